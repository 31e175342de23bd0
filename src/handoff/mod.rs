//! Accepted connections over frames: a dispatcher that has them, and workers that serve them.

mod address;
mod connection;
mod dispatcher;
mod incoming;
pub mod protocol;

pub use address::{Address, Transport};
pub use connection::{Connection, ConnectionParts, ConnectionStream, Serving};
pub use dispatcher::{
    Accepted, Cause, DispatchError, Dispatcher, DispatcherBuilder, Dispatching, IntoListener, NotDispatched, Permit,
    Retired, Stats, Strategy, Unadopted, WorkerCommand, WorkerId, WorkerState, WorkerStats,
};
pub use incoming::{End, Incoming, IncomingBuilder, IncomingHandle};
