//! Frames over real sockets of both kinds. Each test checks that it ends with as many open
//! descriptors as it began with, so the tests of this binary run one at a time.

#[path = "../common/mod.rs"]
mod common;

mod blocking;
mod cancellation;
mod delivery;
mod encoders;
mod ends;
mod errors;
mod extremes;
mod faults;
mod limits;
mod model;
mod send_fd;
mod sender;
mod sender_ends;
mod side;

use common::{counted, counted_in, open_fds};
