//! The wake-ups of a receiver: it is woken for messages that are left after a read that ended
//! early, and for nothing else.

use std::{
    future::poll_fn,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
    },
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use fdwire::{FrameCodec, Framed, Listener, SocketKind};
use futures::{FutureExt, StreamExt, TryStreamExt};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, UnixAddr, bind, getsockopt, listen, send,
    setsockopt, socket, sockopt,
};

use crate::{
    common::{
        abstract_name, encoded, marked, raw_send, role_socket, settle, sock_type, spawn_role,
        with_raw_peer,
    },
    counted, raw, soon,
};

/// Checks that these payloads come next.
async fn check_payloads(rx: &mut Framed<FrameCodec>, payloads: &[&'static str]) {
    for payload in payloads {
        let frame = soon(payload, rx.try_next()).await.unwrap().unwrap();
        assert_eq!(frame.payload, payload.as_bytes());
    }
}

/// Polls once, finds nothing, and so registers for the next event.
async fn wait_once(rx: &mut Framed<FrameCodec>) {
    tokio::task::yield_now().await;
    assert!(rx.next().now_or_never().is_none());
}

#[test]
fn out_of_band_data_does_not_hide_the_messages_behind_it() {
    counted(async |kind| {
        if kind == SocketKind::SeqPacket {
            return; // there is no out-of-band data on this kind
        }
        let (mut rx, peer) = with_raw_peer(kind);
        wait_once(&mut rx).await;
        raw_send(&peer, &encoded(b"one", 0), &[]);
        send(peer.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
        raw_send(&peer, &encoded(b"two", 0), &[]);
        check_payloads(&mut rx, &["one", "two"]).await;
    });
}

/// Sends a message over this socket from another process, and waits until it is sent.
fn send_from_another_process(role: &str, socket: &impl AsFd) {
    let socket = socket.as_fd().try_clone_to_owned().unwrap();
    assert!(spawn_role(role, None, socket).wait().unwrap().success());
}

/// Returns true in the other process, which has sent its message then.
fn is_other_process(role: &str) -> bool {
    let socket = role_socket(role);
    if let Some(socket) = &socket {
        raw_send(socket, &encoded(b"two", 0), &[]);
    }
    socket.is_some()
}

fn listener(name: &std::os::unix::net::SocketAddr, kind: SocketKind) -> OwnedFd {
    let listener =
        socket(AddressFamily::Unix, sock_type(kind), SockFlag::SOCK_CLOEXEC, None).unwrap();
    let addr = UnixAddr::new_abstract(name.as_abstract_name().unwrap()).unwrap();
    bind(listener.as_raw_fd(), &addr).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    listener
}

#[test]
fn a_connection_that_was_made_with_credentials_on_hides_no_message_of_a_second_writer() {
    const ROLE: &str = concat!(
        "wakeups::a_connection_that_was_made_with_credentials_on_",
        "hides_no_message_of_a_second_writer"
    );
    if is_other_process(ROLE) {
        return;
    }
    counted(async |kind| {
        // The option is on when the client connects, before this process has the listener: a
        // service manager does it in this way.
        let addr = abstract_name("credentials");
        let listener = listener(&addr, kind);
        setsockopt(&listener, sockopt::PassCred, &true).unwrap();
        let client = raw::connected_to(&addr, kind);
        raw_send(&client, &encoded(b"one", 0), &[]);
        send_from_another_process(ROLE, &client);

        let accepted = Listener::try_from(listener).unwrap().accept().await.unwrap();
        let mut rx = Framed::new(accepted, FrameCodec::default());
        check_payloads(&mut rx, &["one", "two"]).await;
    });
}

#[test]
fn a_connection_that_is_accepted_has_no_credentials_on() {
    counted(async |kind| {
        let addr = abstract_name("no-credentials");
        let listener = listener(&addr, kind);
        setsockopt(&listener, sockopt::PassCred, &true).unwrap();
        let _client = raw::connected_to(&addr, kind);
        let accepted = Listener::try_from(listener).unwrap().accept().await.unwrap();
        assert!(!getsockopt(&accepted, sockopt::PassCred).unwrap());
    });
}

#[test]
fn credentials_that_another_holder_switches_on_hide_no_message_of_a_second_writer() {
    const ROLE: &str =
        "wakeups::credentials_that_another_holder_switches_on_hide_no_message_of_a_second_writer";
    if is_other_process(ROLE) {
        return;
    }
    counted(async |kind| {
        let (mut rx, peer) = with_raw_peer(kind);
        let other_holder = rx.socket().as_fd().try_clone_to_owned().unwrap();
        wait_once(&mut rx).await;
        setsockopt(&other_holder, sockopt::PassCred, &true).unwrap();
        raw_send(&peer, &encoded(b"one", 0), &[]);
        send_from_another_process(ROLE, &peer);
        check_payloads(&mut rx, &["one", "two"]).await;
    });
}

#[test]
fn a_task_that_has_received_everything_sleeps_until_more_comes() {
    counted(async |kind| {
        let (mut rx, peer) = with_raw_peer(kind);

        // A task receives, and its polls are counted.
        let polls = Arc::new(AtomicUsize::new(0));
        let receiver = tokio::spawn({
            let polls = Arc::clone(&polls);
            async move {
                let mut receive = async || {
                    poll_fn(|cx| {
                        polls.fetch_add(1, Ordering::Relaxed);
                        rx.try_poll_next_unpin(cx)
                    })
                    .await
                };
                while receive().await.transpose().unwrap().is_some() {}
            }
        });

        for _ in 0..3 {
            // A read that brings descriptors may have ended early, so only EAGAIN shows that
            // nothing is left.
            raw_send(&peer, &encoded(b"", 1), &[marked(1)]);
            settle().await;
            let before = polls.load(Ordering::Relaxed);
            settle().await;
            assert_eq!(
                polls.load(Ordering::Relaxed),
                before,
                "the task was polled although nothing came"
            );
        }
        drop(peer);
        receiver.await.unwrap();
    });
}
