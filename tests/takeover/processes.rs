//! Servers that are processes of their own, under load, killed and stopped.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use nix::sys::signal::Signal;

use crate::{
    common::*,
    control_path,
    process::{Process, ROLE, free_address, keep_open, serve, who_serves},
};

/// Sends requests until `stop` is set, and returns the failures. A one-shot client connects for
/// each request, and others only after an answer has ended their connection.
fn send_requests(
    address: SocketAddr,
    one_shot: bool,
    stop: &AtomicBool,
    answers: &AtomicUsize,
) -> Vec<String> {
    let mut failures = Vec::new();
    let mut connection = None;
    while !stop.load(Ordering::SeqCst) {
        // A request connects if no connection is open. It returns true if the answer is the last.
        let mut request = || -> std::io::Result<bool> {
            let open = match connection.take() {
                Some(open) => open,
                None => BufReader::new(TcpStream::connect(address)?),
            };
            let open: &mut BufReader<TcpStream> = connection.insert(open);
            open.get_mut().write_all(b"who\n")?;
            let mut answer = String::new();
            if open.read_line(&mut answer)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            Ok(answer.ends_with("close\n"))
        };
        // The outcome is counted, and decides whether the connection is kept.
        match request() {
            Ok(closes) => {
                answers.fetch_add(1, Ordering::SeqCst);
                if closes || one_shot {
                    connection = None;
                }
            }
            Err(error) => {
                failures.push(error.to_string());
                connection = None;
            }
        }
    }
    failures
}

#[test]
fn a_restart_under_load_fails_no_request() {
    if let Some(socket) = role_socket(ROLE) {
        return one_thread().block_on(serve(socket));
    }
    // Six clients send requests.
    let (_directory, path) = control_path();
    let address = free_address();
    let mut process = Process::serving(&path, address);
    let stop = Arc::new(AtomicBool::new(false));
    let answers = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..6)
        .map(|number| {
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            thread::spawn(move || send_requests(address, number % 2 == 0, &stop, &answers))
        })
        .collect();
    // The server is replaced ten times, and each process answers requests.
    for _ in 0..10 {
        let before = answers.load(Ordering::SeqCst);
        let next = Process::serving(&path, address);
        process.expect("left");
        assert!(process.child.wait().unwrap().success());
        process = next;
        while answers.load(Ordering::SeqCst) < before + 100 {
            thread::yield_now(); // the new one answers
        }
    }
    // No request has failed.
    stop.store(true, Ordering::SeqCst);
    let failures: Vec<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
    println!(
        "10 restarts, {} answers, {} failures",
        answers.load(Ordering::SeqCst),
        failures.len()
    );
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn a_process_that_dies_before_it_is_ready_changes_nothing_and_one_that_dies_later_is_undone() {
    let (_directory, path) = control_path();
    let address = free_address();
    let old = Process::serving(&path, address);

    let mut new = Process::start(&path, address);
    new.go();
    new.expect("requested");
    drop(new);
    assert_eq!(who_serves(address), Some(old.child.id()));

    // A client keeps the old process from leaving.
    let _idle = keep_open(address);
    let new = Process::serving(&path, address);
    while who_serves(address) != Some(new.child.id()) {}
    drop(new);
    assert_eq!(who_serves(address), Some(old.child.id()));
}

#[test]
fn a_new_process_serves_if_the_old_one_dies_before_it_is_ready() {
    let (_directory, path) = control_path();
    let address = free_address();
    let old = Process::serving(&path, address);
    let mut new = Process::start(&path, address);
    new.go();
    new.expect("requested");
    drop(old);
    new.go();
    new.expect("ready");
    new.expect("confirmed");
    assert_eq!(who_serves(address), Some(new.child.id()));
    // The new process can be replaced like any other.
    let third = Process::serving(&path, address);
    new.expect("left");
    assert_eq!(who_serves(address), Some(third.child.id()));
}

#[test]
fn a_process_that_hangs_before_ready_does_not_serve_when_it_wakes_up() {
    let (_directory, path) = control_path();
    let address = free_address();
    let mut command = Command::new("/proc/self/exe");
    command.env("FDWIRE_READY", "300");
    let old = Process::serving_by(command, &path, address);
    let mut hung = Process::start(&path, address);
    hung.go();
    hung.expect("requested");
    hung.signal(Signal::SIGSTOP);
    // The old process calls the takeover off by itself, and the next process can ask for another.
    let next = loop {
        let mut next = Process::start(&path, address);
        next.go();
        match next.report().as_str() {
            "requested" => break next,
            busy => assert!(busy.contains("another process is taking over"), "{busy}"),
        }
    };
    assert_eq!(who_serves(address), Some(old.child.id()));
    // When the hung process goes on, it learns that it is too late.
    hung.go();
    hung.signal(Signal::SIGCONT);
    let report = hung.report();
    assert!(report.contains("not ready in time"), "{report}");
    assert!(hung.child.wait().unwrap().success());
    drop(next);
}
