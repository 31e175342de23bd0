//! The process that serves after a takeover succeeds, is called off, or is undone.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use bytes::Bytes;
use fdwire::{
    Frame,
    takeover::{
        self, Error, Options, Phase,
        protocol::{AbortReason, Refusal},
    },
};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, Shutdown, send, shutdown},
};
use tokio::net::TcpStream;

use crate::{
    check_does_not_serve, check_serves, common::*, control_path, first, first_with, http,
    offered_to_raw_taker, request, request_until_not_busy,
};

#[test]
fn a_new_server_serves_and_the_old_one_drains_and_leaves() {
    run(async {
        let (_directory, path) = control_path();
        let old = first(&path);
        let address = crate::address(&old);
        let pending = request(&path).await;
        assert_eq!(pending.identities().count(), 1);
        check_serves(&old, address).await; // until the new server is ready

        let new = pending.ready().await.unwrap();
        old.replaced().await;
        assert_eq!((old.phase(), new.phase()), (Phase::Draining, Phase::Serving));
        let waiting = check_does_not_serve(&old, address).await;
        let (_, peer) = http(&new).accept().await.unwrap();
        assert_eq!(peer, waiting.local_addr().unwrap());
        assert!(old.drained().await);
        assert!(http_error(&old).await.is_none(), "its listeners are closed");
        check_serves(&new, address).await;
    });
}

async fn http_error(server: &takeover::Server) -> Option<()> {
    server.gated::<tokio::net::TcpListener>("http", 0).ok().map(drop)
}

#[test]
fn connections_that_wait_in_the_queue_are_accepted_by_the_new_server() {
    run(async {
        let (_directory, path) = control_path();
        let old = first(&path);
        let address = crate::address(&old);
        let mut clients = Vec::new();
        for _ in 0..50 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        let new = request(&path).await.ready().await.unwrap();
        old.replaced().await;
        assert!(old.drained().await);
        drop(old);
        let http = http(&new);
        for client in clients {
            let (_, peer) = http.accept().await.unwrap();
            assert_eq!(peer, client.local_addr().unwrap());
        }
    });
}

#[test]
fn a_new_server_that_ends_before_it_is_ready_changes_nothing() {
    run(async {
        let (_directory, path) = control_path();
        let old = first(&path);
        let address = crate::address(&old);
        for _ in 0..3 {
            drop(request(&path).await);
            check_serves(&old, address).await;
        }
        assert_eq!(old.phase(), Phase::Serving);
        request_until_not_busy(&path).await.ready().await.unwrap();
    });
}

/// Rules: G-UNDO.
#[test]
fn a_new_server_that_ends_while_the_old_one_drains_is_undone() {
    run(async {
        let (_directory, path) = control_path();
        let old = first(&path);
        let address = crate::address(&old);
        for _ in 0..3 {
            let new = request_until_not_busy(&path).await.ready().await.unwrap();
            old.replaced().await;
            new.confirmed().await;
            drop(new);
            assert!(old.undone().await);
            check_serves(&old, address).await;
            assert!(!old.drained().await, "it serves");
        }
    });
}

/// Rules: G-RESUMED, G-BATON.
#[test]
fn a_new_server_hands_everything_back_with_the_baton() {
    run(async {
        let (_directory, path) = control_path();
        let old = first_with(&path, Options::default().with_baton());
        let address = crate::address(&old);
        let new = takeover::request(&path, Options::default().with_baton())
            .await
            .unwrap()
            .ready()
            .await
            .unwrap();
        old.replaced().await;
        old.put_down_baton(Bytes::from_static(b"leader"));
        assert_eq!(new.confirmed().await.unwrap(), "leader");
        new.hand_back(Bytes::from_static(b"leader of term 2")).await.unwrap();
        assert_eq!((old.phase(), new.phase()), (Phase::Serving, Phase::Replaced));
        check_serves(&old, address).await;
        assert!(path.exists() && path.with_extension("lock").exists());

        // After the old server has left, nothing can be handed back.
        drop(new);
        let new = request_until_not_busy(&path).await.ready().await.unwrap();
        old.replaced().await;
        assert!(old.drained().await);
        let refused = new.hand_back(Bytes::from_static(b"x")).await.unwrap_err();
        assert_eq!(refused, "x");
        check_serves(&new, address).await;
    });
}

/// Rules: T-READY-TIME.
#[test]
fn a_new_server_that_is_too_late_does_not_serve() {
    run(async {
        let (_directory, path) = control_path();
        let old = first_with(&path, Options::default().ready_timeout(Duration::from_millis(20)));
        let address = crate::address(&old);
        let pending = request(&path).await;
        // The new server hangs. The takeover has been called off when another one is accepted.
        let second = request_until_not_busy(&path).await;
        drop(second);
        let late = pending.ready().await.unwrap_err();
        assert!(matches!(late, Error::Aborted(AbortReason::TimedOut)), "{late}");
        check_serves(&old, address).await;
    });
}

/// Rules: G-BUSY, G-STATUS.
#[test]
fn a_second_takeover_is_refused_while_one_is_under_way() {
    run(async {
        let (_directory, path) = control_path();
        let old = first(&path);
        let pending = request(&path).await;
        let second = takeover::request(&path, Options::default()).await.unwrap_err();
        assert!(matches!(second, Error::Refused(Refusal::Busy)), "{second}");
        assert!(second.to_string().contains("another process is taking over"), "{second}");
        let status = takeover::status(&path, &Options::default()).await.unwrap();
        assert_eq!((status.pid, status.takeover_in_progress), (std::process::id(), true));
        let new = pending.ready().await.unwrap();
        old.replaced().await;
        // The control socket has moved too, so the next process asks the new server.
        let third = request(&path).await.ready().await.unwrap();
        new.replaced().await;
        assert_eq!((old.phase(), third.phase()), (Phase::Replaced, Phase::Serving));
    });
}

#[test]
fn the_application_calls_a_takeover_off() {
    run(async {
        let (_directory, path) = control_path();
        let old = first(&path);
        let pending = request(&path).await;
        old.withdraw();
        let late = loop {
            // The server's task may not have called it off yet.
            match takeover::request(&path, Options::default()).await {
                Err(Error::Refused(Refusal::Busy)) => tokio::task::yield_now().await,
                _ => break pending.ready().await.unwrap_err(),
            }
        };
        assert!(matches!(late, Error::Aborted(AbortReason::Withdrawn)), "{late}");
    });
}

#[test]
fn state_arrives_with_its_descriptors() {
    run(async {
        let (_directory, path) = control_path();
        let old = first(&path);
        old.send_state(|| {
            vec![Frame::new("counters").with_fd(marked(7)), Frame::new("cache").with_fds([])]
        });
        let mut pending = request(&path).await;
        let state = pending.take_state();
        assert_eq!(state[0].payload, "counters");
        assert_eq!(marks(&state[0]), [7]);
        assert_eq!((&state[1].payload[..], state[1].fds.len()), (&b"cache"[..], 0));
    });
}

/// Rules: T-RELEASE.
#[test]
fn generations_replace_each_other_and_only_the_last_two_hold_the_listeners() {
    run(async {
        let (_directory, path) = control_path();
        let mut generations = vec![first(&path)];
        let address = crate::address(&generations[0]);
        for _ in 0..10 {
            let new = request_until_not_busy(&path).await.ready().await.unwrap();
            generations.last().unwrap().replaced().await;
            new.confirmed().await;
            check_serves(&new, address).await;
            generations.push(new);
        }
        let phases: Vec<_> = generations.iter().map(takeover::Server::phase).collect();
        assert_eq!(phases[..9], [Phase::Replaced; 9]);
        assert_eq!(phases[9..], [Phase::Draining, Phase::Serving]);
        // When the last server ends, the one before it accepts again.
        generations.pop();
        assert!(generations[9].undone().await);
        check_serves(&generations[9], address).await;
        generations.clear();
        assert!(!path.exists(), "the last owner removes the path");
    });
}

/// The state is too long for a message.
///
/// Rules: B-FRAME.
#[test]
fn state_that_is_too_long_calls_the_takeover_off() {
    run(async {
        let (_directory, path) = control_path();
        let old = first(&path);
        let address = crate::address(&old);
        old.send_state(|| vec![Frame::new(vec![0; takeover::protocol::MAX_MESSAGE_BYTES])]);
        let error = takeover::request(&path, Options::default()).await.unwrap_err();
        assert!(matches!(error, Error::Aborted(AbortReason::Failed)), "{error}");
        check_serves(&old, address).await;
    });
}

/// The state has ten megabytes, so the connection is full most of the time.
#[test]
fn large_state_arrives_in_its_order() {
    run(async {
        let (_directory, path) = control_path();
        let old = first(&path);
        old.send_state(|| (0..20).map(|number| Frame::new(vec![number; 500_000])).collect());
        let mut pending = request(&path).await;
        let state = pending.take_state();
        assert_eq!(state.len(), 20);
        assert!(
            state
                .iter()
                .zip(0..)
                .all(|(frame, number)| frame.payload.iter().all(|&byte| byte == number))
        );
        pending.ready().await.unwrap();
    });
}

/// READY is written at about the same time as the takeover is called off, from another thread.
/// Either READY can be written, and the server stops, or it cannot.
///
/// Rules: G-CUT, G-UNDO.
#[test]
fn calling_a_takeover_off_and_ready_exclude_each_other() {
    run_in(some_threads(), async {
        let (_directory, path) = control_path();
        let server = first(&path);
        let (mut called_off, mut replaced) = (0, 0);
        for round in 0..300 {
            // One thread sends READY, and this one calls the takeover off.
            let taker = OwnedFd::from(offered_to_raw_taker(&path).await.0.into_parts().socket);
            let ready = tokio::task::spawn_blocking(move || {
                std::thread::sleep(Duration::from_micros(round % 40 * 5));
                let sent = send(taker.as_raw_fd(), &encoded(b"\x03", 0), MsgFlags::MSG_NOSIGNAL);
                (taker, sent)
            });
            std::thread::sleep(Duration::from_micros(fastrand::u64(..200)));
            server.withdraw();
            // The server stops if READY was sent. The end of the new process undoes that.
            let (taker, sent) = ready.await.unwrap();
            match sent {
                Ok(_) => {
                    replaced += 1;
                    server.replaced().await;
                    drop(taker);
                    assert!(server.undone().await);
                }
                Err(error) => {
                    called_off += 1;
                    assert_eq!(error, Errno::EPIPE);
                    assert_eq!(server.phase(), Phase::Serving);
                }
            }
        }
        println!("called off {called_off} times, replaced {replaced} times");
    });
}

/// The old server checks whether the new process has ended once more, right before it leaves.
///
/// Rules: G-DRAINED.
#[test]
fn a_new_process_that_ends_just_before_the_old_one_leaves_is_noticed() {
    run(async {
        let (_directory, path) = control_path();
        let server = first(&path);
        let address = crate::address(&server);
        for _ in 0..20 {
            let taker = OwnedFd::from(offered_to_raw_taker(&path).await.0.into_parts().socket);
            raw_send(&taker, &encoded(b"\x03", 0), &[]);
            server.replaced().await;
            settle().await;
            // A child that another test is starting may have a copy of the socket for a moment.
            shutdown(taker.as_raw_fd(), Shutdown::Both).unwrap();
            drop(taker);
            assert!(!server.drained().await, "the server leaves, and no process serves");
            check_serves(&server, address).await;
        }
    });
}
