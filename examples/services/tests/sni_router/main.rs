//! The router for TLS connections as its users run it: a process of its own, with workers, real TLS
//! clients, and clients that are none.

#[path = "../../../../tests/common/programs.rs"]
#[allow(dead_code, reason = "each test binary uses a part")]
mod programs;

mod client;
mod foreign;
mod router;
mod served;
mod too_many;
