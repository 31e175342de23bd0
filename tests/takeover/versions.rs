//! Processes that support different versions of the protocol.

use std::{net::SocketAddr, path::Path, process::Command};

use crate::{
    control_path,
    process::{Process, free_address, keep_open, who_serves},
};

/// Starts a process of a release that supports these versions.
fn release(path: &Path, address: SocketAddr, versions: (u8, u8)) -> Process {
    let mut command = Command::new("/proc/self/exe");
    command.env("FDWIRE_VERSIONS", format!("{} {}", versions.0, versions.1));
    Process::start_by(command, path, address)
}

fn serving_release(path: &Path, address: SocketAddr, versions: (u8, u8)) -> Process {
    let mut process = release(path, address, versions);
    process.serve();
    process
}

/// The process of the new release may have a higher or a lower version.
///
/// Rules: G-VERSION.
#[test]
fn a_newer_release_is_replaced_by_an_older_one_and_the_reverse() {
    let (_directory, path) = control_path();
    let address = free_address();
    let mut serving = serving_release(&path, address, (1, 1));
    for versions in [(1, 2), (1, 1), (1, 3), (2, 3), (2, 2), (1, 2), (1, 1)] {
        let new = serving_release(&path, address, versions);
        serving.expect("left");
        assert!(serving.child.wait().unwrap().success());
        serving = new;
        assert_eq!(who_serves(address), Some(serving.child.id()), "versions {versions:?}");
    }
    // A takeover between releases is undone like any other.
    let _open = keep_open(address);
    let newer = serving_release(&path, address, (1, 2));
    let _open_too = keep_open(address);
    drop(newer);
    assert_eq!(who_serves(address), Some(serving.child.id()));
}

/// Rules: G-NO-VERSION.
#[test]
fn releases_without_a_common_version_do_not_replace_each_other() {
    for (old, new) in [((1, 1), (2, 3)), ((2, 3), (1, 1))] {
        let (_directory, path) = control_path();
        let address = free_address();
        let old = serving_release(&path, address, old);
        let mut new = release(&path, address, new);
        new.go();
        let report = new.report();
        assert!(report.contains("failed: Refused(Version)"), "{report}");
        assert!(new.child.wait().unwrap().success());
        assert_eq!(who_serves(address), Some(old.child.id()));
        // A release with a common version replaces it.
        let next = serving_release(&path, address, (1, 3));
        while who_serves(address) != Some(next.child.id()) {}
    }
}
