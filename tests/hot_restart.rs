//! Runs the example `hot_restart` as its user would.
#![cfg(feature = "axum")]

mod common;

use common::demo;

#[test]
fn twenty_restarts_under_load_fail_no_request() {
    let seen = demo("hot_restart", &[]);
    assert_eq!(seen["failed"], 0.0, "{seen:?}");
    assert!(seen["answered"] > 1000.0, "{seen:?}");
    println!("{seen:?}");
}

#[test]
fn twenty_restarts_in_which_processes_are_killed_fail_no_request_that_is_repeated() {
    let seen = demo("hot_restart", &["--kill"]);
    assert_eq!(seen["failed"], 0.0, "{seen:?}");
    assert!(seen["answered"] > 1000.0 && seen["kills"] > 0.0, "{seen:?}");
    println!("{seen:?}");
}
