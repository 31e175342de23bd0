//! Runs the example `quic_restart` as its user would.

mod common;

use common::demo;

#[test]
fn a_thousand_connections_of_quic_live_through_twenty_restarts() {
    let seen = demo("quic_restart", &[]);
    assert_eq!((seen["missing"], seen["failed to connect"]), (0.0, 0.0), "{seen:?}");
    assert!(seen["connections"] >= 1000.0 && seen["connected meanwhile"] > 100.0, "{seen:?}");
    assert_eq!(seen["generations"], 21.0, "{seen:?}");
    println!("{seen:?}");
}
