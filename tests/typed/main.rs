//! Messages whose fields are descriptors, over real sockets and against other implementations of
//! the JSON formats. Descriptors are counted around each test.

#[path = "../common/mod.rs"]
mod common;

mod json_rpc;
mod messages;
mod varlink;
