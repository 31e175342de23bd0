//! The dispatcher of the hand-off layer, with workers built from the codec and with those of this
//! crate.

#[path = "../common/mod.rs"]
mod common;

mod descriptors;
mod drain;
mod end_to_end;
mod faults;
mod fenced;
mod hand_over;
mod helper;
mod injected;
mod last_words;
mod orphans;
mod processes;
mod raw_worker;
mod succession;
mod succession_processes;
mod retire;
mod rules;
mod serve_ends;
mod serve_with;
mod shortage;
mod startup;
mod stubborn;
mod willing;
mod workers;

use fdwire::SocketKind;

/// Runs a test on both kinds of socket.
fn both(test: impl AsyncFn(SocketKind)) {
    for kind in common::KINDS {
        common::run(test(kind));
    }
}
