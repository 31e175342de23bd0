//! A new process replaces a running server. So far the [protocol], and both sides of it as values without I/O.
#![expect(dead_code, reason = "the tasks that use it come next")]

mod giver;
#[cfg(test)]
mod model;
pub mod protocol;
#[cfg(test)]
mod random;
mod taker;
