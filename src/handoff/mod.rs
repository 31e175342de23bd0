//! Accepted connections over frames: a dispatcher that has them, and workers that serve them.

mod address;
pub mod protocol;

pub use address::{Address, Transport};
