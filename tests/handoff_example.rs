//! Runs the example `handoff`, which README shows, as a reader would.

mod common;

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::Stdio,
};

use common::example;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Sends a request as `curl` does, and returns the whole answer.
fn get(address: &str) -> String {
    let mut client = TcpStream::connect(address).unwrap();
    write!(client, "GET / HTTP/1.1\r\nhost: {address}\r\naccept: */*\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn workers_answer_whole_responses_until_a_signal_ends_all_processes() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        serve_until(signal);
    }
}

fn serve_until(signal: Signal) {
    // The front prints its address.
    let mut command = example("handoff");
    let mut front = command.arg("127.0.0.1:0").stdout(Stdio::piped()).spawn().unwrap();
    let (mut output, mut line) = (BufReader::new(front.stdout.take().unwrap()), String::new());
    output.read_line(&mut line).unwrap();
    let address = line.trim_end().rsplit_once("http://").unwrap().1.trim_end_matches('/');

    // Workers answer requests, and the front does not.
    let mut workers = BTreeSet::new();
    for _ in 0..20 {
        let answer = get(address);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{answer}");
        let pid = body.strip_prefix("worker ").and_then(|rest| rest.split(' ').next()).unwrap();
        workers.insert(pid.parse::<i32>().unwrap());
    }
    assert!(!workers.contains(&front.id().cast_signed()), "the front answers itself");

    // After a worker is killed, all requests are answered.
    kill(Pid::from_raw(*workers.first().unwrap()), Signal::SIGKILL).unwrap();
    for _ in 0..20 {
        assert!(get(address).starts_with("HTTP/1.1 200 OK\r\n"));
    }

    // A service manager may signal all processes, and Ctrl-C does. The workers have the pipe open
    // too, so its end shows that they ended.
    for worker in workers.iter().skip(1) {
        kill(Pid::from_raw(*worker), signal).unwrap();
    }
    kill(Pid::from_raw(front.id().cast_signed()), signal).unwrap();
    assert!(front.wait().unwrap().success());
    assert_eq!(output.read_line(&mut line).unwrap(), 0);
}

#[test]
fn the_example_explains_its_use_and_names_an_address_that_is_taken() {
    let help = example("handoff").arg("--help").output().unwrap();
    assert_eq!(
        String::from_utf8(help.stdout).unwrap(),
        "usage: handoff [ADDRESS]  (default: 127.0.0.1:8080)\n"
    );

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = example("handoff").arg(&address).output().unwrap();
    let expected =
        format!("handoff: cannot listen on {address}: Address already in use (os error 98)\n");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), expected);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn readme_shows_the_example() {
    let read = |path: &str| {
        std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    };
    let (readme, example) = (read("README.md"), read("examples/handoff.rs"));
    let program = &example[example.find("use std").unwrap()..];
    assert!(readme.contains(program), "README.md and examples/handoff.rs differ");
}
