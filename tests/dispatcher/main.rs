//! The dispatcher of the hand-off layer, with workers built from the codec and with those of this
//! crate.

#[path = "../common/mod.rs"]
mod common;

mod descriptors;
mod drain;
mod end_to_end;
mod faults;
mod fenced;
mod groups;
mod hand_over;
mod helper;
mod injected;
mod last_words;
mod orphans;
mod processes;
mod raw_worker;
mod replace;
mod retire;
mod rolling;
mod rules;
mod serve_ends;
mod serve_with;
mod shortage;
mod spans;
mod startup;
mod stubborn;
mod succession;
mod succession_processes;
mod willing;
mod workers;

use fdwire::SocketKind;

/// Runs a test on both kinds of socket.
fn both(test: impl AsyncFn(SocketKind)) {
    for kind in common::KINDS {
        common::run(test(kind));
    }
}
