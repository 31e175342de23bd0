//! The dispatcher of the hand-off layer, with workers built from the codec and with those of this
//! crate.

#[path = "../common/mod.rs"]
mod common;

mod descriptors;
mod drain;
mod end_to_end;
mod exhaustion;
mod faults;
mod fencing;
mod groups;
mod hand_over;
mod helper;
mod in_flight;
mod injected;
mod last_words;
mod log;
mod orphans;
mod processes;
mod raw_worker;
mod recall;
mod refusal;
mod replace;
mod retire;
mod rolling;
mod rules;
mod serve_ends;
mod serve_with;
mod shortage;
mod spans;
mod startup;
mod succession;
mod succession_processes;
mod willing;

use fdwire::SocketKind;

/// Runs a test on both kinds of socket.
fn both(test: impl AsyncFn(SocketKind)) {
    for kind in common::KINDS {
        common::run(test(kind));
    }
}
