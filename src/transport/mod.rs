//! Messages over one socket, **without waiting**: each call makes one attempt, and its result says
//! what to wait for.
//!
//! [`framed`](crate::Framed) waits with tokio and [`blocking`](crate::blocking) with `poll(2)`. The
//! rules of sending and receiving are here, once for both.

mod parts;
mod receive;
mod send;
mod senders;
mod spare;

pub use parts::Parts;
pub(crate) use receive::{ReceiveSide, Receiving, Rest};
pub(crate) use send::{SendSide, Sending, encode};
pub(crate) use senders::Senders;
