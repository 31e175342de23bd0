//! Shortages of the system: descriptors, and descriptors in flight.

use std::{process::ExitStatus, time::Duration};

use fdwire::{Error, Frame, FrameCodec, Framed, Socket};
use futures::{SinkExt, StreamExt, TryStreamExt};
use nix::sys::resource::{Resource, setrlimit};
use tokio::time::timeout;

use crate::{
    common::{framed_pair, marked, marks, other_uid, role_socket, run, spawn_role},
    counted, open_fds,
};

async fn ended(mut child: std::process::Child) -> ExitStatus {
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap()
}

#[test]
fn a_receiver_at_its_descriptor_limit_returns_an_error_and_leaks_nothing() {
    const ROLE: &str =
        "limits::a_receiver_at_its_descriptor_limit_returns_an_error_and_leaks_nothing";
    if let Some(socket) = role_socket(ROLE) {
        return run(async {
            let mut rx = Framed::new(Socket::try_from(socket).unwrap(), FrameCodec::default());
            rx.send(Frame::new("ready")).await.unwrap();
            let limit = open_fds() as u64 + 10;
            setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap();
            let before = open_fds();
            // Frames that were complete before the loss are received.
            assert_eq!(rx.try_next().await.unwrap().unwrap().fds.len(), 2);
            assert_eq!(rx.try_next().await.unwrap().unwrap().payload, "none");
            assert!(matches!(rx.next().await, Some(Err(Error::TruncatedControl))));
            assert!(rx.next().await.is_none());
            // The descriptors are closed on another thread.
            while std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) != before {
                tokio::task::yield_now().await;
            }
        });
    }
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut tx = Framed::new(a, FrameCodec::default());
        let child = spawn_role(ROLE, None, b.into());
        assert_eq!(tx.try_next().await.unwrap().unwrap().payload, "ready");
        tx.feed(Frame::new("few").with_fds((0..2).map(marked))).await.unwrap();
        tx.feed(Frame::new("none")).await.unwrap();
        tx.feed(Frame::new("many").with_fds((0..50).map(marked))).await.unwrap();
        tx.send(Frame::new("none, and too late")).await.unwrap();
        assert!(ended(child).await.success());
    });
}

#[test]
fn too_many_descriptors_in_flight_are_waited_for() {
    const ROLE: &str = "limits::too_many_descriptors_in_flight_are_waited_for";
    if let Some(socket) = role_socket(ROLE) {
        return run(async {
            // The limit of descriptors in flight counts all processes of the uid. The kernel checks
            // it before it adds more.
            setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
            let mut tx = Framed::new(Socket::try_from(socket).unwrap(), FrameCodec::default());
            let null = std::fs::File::open("/dev/null").unwrap();
            let frame = |n: u8| {
                Frame::new(vec![n]).with_fds((0..40).map(|_| null.try_clone().unwrap().into()))
            };

            // The third frame has to wait.
            tx.send(frame(0)).await.unwrap();
            tx.send(frame(1)).await.unwrap();
            let stuck = timeout(Duration::from_millis(100), tx.send(frame(2))).await;
            assert!(
                stuck.is_err(),
                "80 descriptors of this uid are in flight, the limit of 64 is not there"
            );
            assert_eq!((tx.unsent().bytes, tx.unsent().fds), (9, 40));

            // The parent reads this name, and receives only then.
            std::fs::write("/proc/self/comm", "stuck").unwrap();
            tx.close().await.unwrap();
            assert!(tx.next().await.is_none());
        });
    }
    let Some(uid) = other_uid() else { return };
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut rx = Framed::new(a, FrameCodec::default());
        let child = spawn_role(ROLE, Some(uid), b.into());
        while std::fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap().trim()
            != "stuck"
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for n in 0..3 {
            let frame = rx.try_next().await.unwrap().unwrap();
            assert_eq!((frame.payload[0], frame.fds.len()), (n, 40));
        }
        assert!(rx.next().await.is_none());
        drop(rx);
        assert!(ended(child).await.success());
    });
}

#[test]
fn a_sender_without_a_descriptor_to_spare_still_gets_on() {
    const ROLE: &str = "limits::a_sender_without_a_descriptor_to_spare_still_gets_on";
    if let Some(socket) = role_socket(ROLE) {
        return run(async {
            let mut tx = Framed::new(Socket::try_from(socket).unwrap(), FrameCodec::default());
            let limit = open_fds() as u64; // one is open for reading the directory
            setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap();
            while std::fs::File::open("/dev/null").map(std::mem::forget).is_ok() {}
            tx.send(Frame::new(vec![0; 4 << 20])).await.unwrap();
        });
    }
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut rx = Framed::new(a, FrameCodec::default());
        let child = spawn_role(ROLE, None, b.into());
        assert_eq!(rx.try_next().await.unwrap().unwrap().payload.len(), 4 << 20);
        assert!(ended(child).await.success());
    });
}

#[test]
fn a_sink_waits_when_its_limits_are_reached() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        let mut sent = 0;
        while timeout(Duration::ZERO, tx.feed(Frame::new(vec![0; 50_000]).with_fd(marked(sent))))
            .await
            .is_ok()
        {
            sent += 1;
            let fdwire::framed::Unsent { bytes, fds, .. } = tx.unsent();
            assert!(bytes < (256 << 10) + 50_008 && fds <= 6);
        }
        let receive = async {
            for n in 0..sent {
                assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [n]);
            }
        };
        let ((), flushed) = tokio::join!(receive, tx.flush());
        flushed.unwrap();
    });
}
