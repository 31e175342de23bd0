//! The service `quic_restart`, run as a user would run it.

#[path = "../../../tests/common/programs.rs"]
#[allow(dead_code, reason = "each test binary uses a part")]
mod programs;

use std::process::Command;

use programs::demo_of;

#[test]
fn a_thousand_connections_of_quic_live_through_twenty_restarts() {
    let seen = demo_of(Command::new(env!("CARGO_BIN_EXE_quic_restart")), &[]);
    assert_eq!((seen["missing"], seen["failed to connect"]), (0.0, 0.0), "{seen:?}");
    assert!(seen["connections"] >= 1000.0 && seen["connected meanwhile"] > 100.0, "{seen:?}");
    assert_eq!(seen["generations"], 21.0, "{seen:?}");
    println!("{seen:?}");
}
