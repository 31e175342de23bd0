//! The two directions of a connection, **without waiting**. Each call makes one attempt, and its
//! result contains the event for which the caller has to wait.
//!
//! [`framed`](crate::Framed) waits with tokio, and [`blocking`](crate::blocking) with `poll(2)`.
//! Both use the rules of sending and receiving in this module.

mod parts;
mod receive;
mod send;
mod senders;
mod spare;
mod unsent;

pub use parts::FramedParts;
pub(crate) use receive::{ReceiveParts, ReceiveSide, Rest};
pub(crate) use send::{SendParts, SendSide, Sending, encode};
pub use unsent::Unsent;
