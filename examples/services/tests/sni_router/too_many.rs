//! Clients that use up the places of the router: others are served all the same.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
};

use rustls::AlertDescription;

use crate::{
    client::{Client, Http, block_on, hello},
    foreign::alert,
    router::{DEAD, LONG, Router},
};

const CLIENTS: usize = 20;

/// Returns a router that holds [`CLIENTS`] clients, and the number of its own sockets.
fn small_router() -> (Router, usize) {
    let router = Router::start_with(["--clients", &CLIENTS.to_string(), "--patience", LONG]);
    // The workers have started when they have served a client.
    for name in ["one.test", "two.test"] {
        serve_one(&router, name);
    }
    let sockets = router.sockets();
    (router, sockets)
}

fn serve_one(router: &Router, name: &'static str) {
    let answer = block_on(async {
        Client::connect(router, name, Http::Two, None).await.unwrap().get().await.unwrap()
    });
    assert!(answer.starts_with(name), "{answer}");
}

/// A client that takes a place from others, and the answer to it so far.
struct Flooder {
    client: TcpStream,
    answer: Vec<u8>,
}

/// Connects 10 times as many clients as the router holds. Each sends these bytes and then nothing.
fn flood(router: &Router, bytes: &[u8]) -> Vec<Flooder> {
    let connect = |_| {
        let mut client = router.connect();
        let _ = client.write_all(bytes); // fails if the router has ended the connection already
        client.set_nonblocking(true).unwrap();
        Flooder { client, answer: Vec::new() }
    };
    (0..10 * CLIENTS).map(connect).collect()
}

/// Waits until the router has ended all clients but this number.
fn wait_until_held(clients: &mut Vec<Flooder>, held: usize) {
    while clients.len() > held {
        clients.retain_mut(|Flooder { client, answer }| {
            match client.read_to_end(answer) {
                Ok(_) => assert_eq!(*answer, alert(AlertDescription::UserCanceled)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(_) => {} // a reset, because it was still writing; the answer may be lost
            }
            false
        });
    }
    assert_eq!(clients.len(), held);
}

/// Checks that the router holds as many clients as it may, and serves others meanwhile.
fn check(router: &Router, sockets: usize, clients: &mut Vec<Flooder>) {
    wait_until_held(clients, CLIENTS);
    for _ in 0..3 {
        serve_one(router, "one.test");
    }
    wait_until_held(clients, CLIENTS - 1); // the served clients needed one place at a time
    router.wait_for_sockets(sockets + clients.len());
}

#[test]
fn silent_clients_do_not_keep_others_out() {
    let (router, sockets) = small_router();
    let mut silent = flood(&router, &[]);
    check(&router, sockets, &mut silent);
    drop(silent);
    router.wait_for_sockets(sockets);
}

#[test]
fn clients_with_half_a_hello_do_not_keep_others_out() {
    let (router, sockets) = small_router();
    let hello = hello(&router, "one.test");
    let mut half = flood(&router, &hello[..hello.len() / 2]);
    check(&router, sockets, &mut half);
    drop(half);
    router.wait_for_sockets(sockets);
}

#[test]
fn clients_of_a_name_whose_workers_are_dead_do_not_keep_others_out() {
    let (router, sockets) = small_router();
    let mut waiting = flood(&router, &hello(&router, DEAD));
    check(&router, sockets, &mut waiting);
}

#[test]
fn clients_that_do_not_leave_after_they_were_refused_do_not_keep_others_out() {
    let (router, sockets) = small_router();
    let refused = flood(&router, b"SSH-2.0-OpenSSH_9.2\r\n");
    serve_one(&router, "two.test");
    router.wait_for_sockets(sockets + CLIENTS);
    drop(refused);
    router.wait_for_sockets(sockets);
}
