//! Runs the example `hot_restart` as its user would.
#![cfg(feature = "axum")]

mod common;

use std::collections::BTreeMap;

use common::example;

/// The last lines of a demo: numbers with their names.
fn demo(arguments: &[&str]) -> BTreeMap<String, f64> {
    let output = example("hot_restart").arg("--demo").args(arguments).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    let number = |line: &str| {
        let (name, number) = line.trim_end_matches(" ms").rsplit_once(' ')?;
        Some((name.to_owned(), number.parse().ok()?))
    };
    stdout.lines().filter(|line| !line.starts_with("restart ")).filter_map(number).collect()
}

#[test]
fn twenty_restarts_under_load_fail_no_request() {
    let seen = demo(&[]);
    assert_eq!(seen["failed"], 0.0, "{seen:?}");
    assert!(seen["answered"] > 1000.0, "{seen:?}");
    println!("{seen:?}");
}

#[test]
fn twenty_restarts_in_which_processes_are_killed_fail_no_request_that_is_repeated() {
    let seen = demo(&["--kill"]);
    assert_eq!(seen["failed"], 0.0, "{seen:?}");
    assert!(seen["answered"] > 1000.0 && seen["kills"] > 0.0, "{seen:?}");
    println!("{seen:?}");
}
