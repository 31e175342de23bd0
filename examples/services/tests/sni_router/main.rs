//! The service `sni_router` as its users run it: a process of its own, with workers. Its clients
//! are real TLS clients, and others that do not use TLS.

#[path = "../../../../tests/common/programs.rs"]
#[allow(dead_code, reason = "each test binary uses a part")]
mod programs;

mod client;
mod foreign;
mod router;
mod served;
mod too_many;
