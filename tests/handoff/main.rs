//! The hand-off of accepted connections. Tests that count descriptors run one at a time.

#[path = "../common/mod.rs"]
mod common;

mod http;
mod polling;
mod raw_dispatcher;
mod rules;
mod shortage;
mod worker;
