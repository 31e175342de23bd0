//! Peers whose uid is not admitted.

use std::{
    io::{Read, Write},
    os::{linux::net::SocketAddrExt, unix::net::UnixStream},
};

use fdwire::{Listener, SocketKind};

use crate::{
    common::{abstract_name, check_connected, other_uid, raw_send, role_socket, spawn_role},
    counted, raw,
    slow::{slow_to_close, without_waiting},
    soon,
};

/// Receives the name of a listener and descriptors. Connects to the listener, sends it the
/// descriptors, and stays until the test ends it.
fn send_on(control: impl Into<UnixStream>) {
    let mut control = control.into();
    let (name, fds) = raw::receive(&control, true).unwrap();
    let kind = match name[0] {
        b'p' => SocketKind::SeqPacket,
        _ => SocketKind::Stream,
    };
    let connection = raw::connected_to_name(&name[1..], kind);
    raw_send(&connection, b"?", &fds);
    drop(fds);
    control.write_all(b"sent").unwrap();
    let _ = control.read(&mut [0]);
}

#[test]
fn a_peer_that_is_refused_does_not_block_the_listener_with_its_descriptors() {
    const ROLE: &str =
        "refused::a_peer_that_is_refused_does_not_block_the_listener_with_its_descriptors";
    if let Some(control) = role_socket(ROLE) {
        return send_on(control);
    }
    let Some(uid) = other_uid() else { return };
    counted(async |kind| {
        let addr = abstract_name("refused");
        let listener = Listener::bind_addr(&addr, kind).unwrap();
        let (mut control, theirs) = UnixStream::pair().unwrap();
        let mut child = spawn_role(ROLE, Some(uid), theirs.into());
        let (slow, client) = slow_to_close();
        let first = if kind == SocketKind::SeqPacket { b"p" } else { b"s" };
        raw_send(&control, &[first, addr.as_abstract_name().unwrap()].concat(), &[slow]);
        control.read_exact(&mut [0; 4]).unwrap();

        // The next peer in the backlog is admitted.
        let admitted = fdwire::Socket::try_from(raw::connected_to(&addr, kind)).unwrap();
        let accepted =
            without_waiting([client], soon("the admitted peer", listener.accept())).await.unwrap();
        assert_eq!(listener.refused(), 1);
        check_connected(admitted, accepted).await;
        drop(control);
        child.wait().unwrap();
    });
}
