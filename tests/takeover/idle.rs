//! Servers that drain do not disturb the one that serves, and are not disturbed by its clients.

use std::{
    net::{SocketAddr, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    control_path,
    process::{Process, free_address, keep_open, who_serves},
};

/// If a duplicate of the listener stays in the event loop of an old process, that process is woken
/// for connections of the new one. HAProxy lost 87 % of its accept rate to that.
#[test]
fn a_server_that_drains_has_taken_its_listeners_out_of_its_event_loop() {
    let (_directory, path) = control_path();
    let address = free_address();
    let old = Process::serving(&path, address);
    let _open = keep_open(address);
    assert!(is_watched(&old, address));
    let new = Process::serving(&path, address);
    assert_eq!(who_serves(address), Some(new.child.id()));
    let begin = Instant::now();
    while is_watched(&old, address) {
        // The old process has received READY by now, and takes the listener out soon.
        assert!(begin.elapsed() < Duration::from_secs(20), "its listener stays in its event loop");
    }
    assert!(is_watched(&new, address));
}

/// Nothing wakes a process whose own connections are silent, whatever other clients do.
#[test]
fn ten_generations_that_drain_are_not_woken_by_clients_of_the_newest() {
    // Ten processes that were replaced have an open connection each.
    let (_directory, path) = control_path();
    let address = free_address();
    let serving_udp = || {
        let mut command = Command::new("/proc/self/exe");
        command.env("FDWIRE_UDP", "1");
        Process::serving_by(command, &path, address)
    };
    let mut newest = serving_udp();
    let (mut draining, mut open) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        open.push(keep_open(address));
        draining.push(std::mem::replace(&mut newest, serving_udp()));
    }
    // Clients of the newest one come. The result is how often each of the others has run meanwhile.
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(address).unwrap();
    let clients_come = || {
        let before: Vec<_> = draining.iter().map(switches).collect();
        for _ in 0..100 {
            assert_eq!(who_serves(address), Some(newest.child.id()));
            client.send(b"who").unwrap();
            let mut answer = [0; 100];
            let length = client.recv(&mut answer).unwrap();
            assert_eq!(answer[..length], *newest.child.id().to_string().as_bytes());
        }
        draining
            .iter()
            .map(switches)
            .zip(before)
            .map(|(after, before)| after - before)
            .collect::<Vec<_>>()
    };
    // In the first rounds, the old processes may still be busy with the last takeover.
    let mut wakes = clients_come();
    for _ in 0..50 {
        if wakes.iter().all(|&wakes| wakes == 0) {
            assert!(draining.iter().all(|process| !is_watched(process, address)));
            return;
        }
        wakes = clients_come();
    }
    panic!("100 connections and datagrams have woken the generations that drain {wakes:?} times");
}

/// Counts how many times the kernel has switched to a thread of a process.
fn switches(process: &Process) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{}/task", process.child.id())).unwrap();
    let status = threads
        .map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap());
    let number = |line: &str| line.rsplit('\t').next().unwrap().parse::<u64>().unwrap();
    status
        .map(|status| {
            status.lines().filter(|line| line.contains("ctxt_switches")).map(number).sum::<u64>()
        })
        .sum()
}

/// Returns true if an event loop of the process watches the listener with this address.
fn is_watched(process: &Process, address: SocketAddr) -> bool {
    let port = format!(":{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let row = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listens = row
        .filter(|row| row[1].ends_with(&port) && row[3] == "0A")
        .map(|row| row[9].to_owned())
        .next();
    let inode: u64 = listens.expect("somebody listens").parse().unwrap();
    let watched = format!("ino:{inode:x} ");
    let files = std::fs::read_dir(format!("/proc/{}/fdinfo", process.child.id())).unwrap();
    let infos = files.filter_map(|file| std::fs::read_to_string(file.unwrap().path()).ok());
    infos
        .into_iter()
        .any(|info| info.lines().any(|line| line.starts_with("tfd:") && line.contains(&watched)))
}
