//! A server that runs out of descriptors in the middle of a takeover.

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::{
    place,
    processes::{Process, free_address, who_serves},
};

/// Limits the numbers that a process may open. The limit can be raised again.
fn limit_descriptors(process: &Process, below: u64) {
    let pid = Pid::from_raw(process.child.id() as i32);
    let maximum = getrlimit(Resource::Nofile).maximum;
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(below), maximum }).unwrap();
}

fn highest_descriptor(process: &Process) -> u64 {
    let files = std::fs::read_dir(format!("/proc/{}/fd", process.child.id())).unwrap();
    files.map(|file| file.unwrap().file_name().to_str().unwrap().parse().unwrap()).max().unwrap()
}

/// Whatever it can't make any more, the takeover is called off, and it serves on.
#[test]
fn a_server_at_its_descriptor_limit_calls_a_takeover_off_and_serves_on() {
    let (_directory, path) = place();
    let address = free_address();
    let mut old = Process::serving(&path, address);
    let highest = highest_descriptor(&old);
    let mut failures = 0;
    // One is for the connection of the new process, so it is accepted.
    for room in 1.. {
        limit_descriptors(&old, highest + 1 + room);
        let mut new = Process::start(&path, address);
        new.go();
        let report = new.report();
        if report == "requested" {
            new.go();
            new.expect("ready");
            old.expect("left");
            assert_eq!(who_serves(address), Some(new.child.id()));
            break;
        }
        assert!(report.contains("the running server failed to send its listeners"), "{report}");
        failures += 1;
        limit_descriptors(&old, 1000);
        assert_eq!(who_serves(address), Some(old.child.id()));
    }
    println!("called off {failures} times");
    assert!(failures > 0);
}
