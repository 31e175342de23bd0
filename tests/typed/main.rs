//! Messages whose fields are descriptors, over real sockets and against other implementations of
//! the JSON formats. Each test checks that it ends with as many open descriptors as it began with.

#[path = "../common/mod.rs"]
mod common;

mod json_rpc;
mod messages;
mod varlink;
