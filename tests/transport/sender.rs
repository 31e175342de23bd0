//! Many tasks send over one socket.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use bytes::{Buf, Bytes};
use fdwire::{
    Error, Frame, FrameCodec, Framed, Limits, SendError, Sender, Socket, SocketKind,
    framed::{ReadHalf, SendDriver, TrySendError},
};
use futures::{StreamExt, TryStreamExt, future::join_all};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use tokio::task::{JoinHandle, yield_now};

use crate::{
    cancellation::once,
    common::{
        framed_pair, large, marked, marks, one_thread, one_worker, settle, some_threads,
        with_raw_peer,
    },
    counted, counted_in,
};

pub(crate) type Parts = (ReadHalf<FrameCodec>, Sender<FrameCodec>, SendDriver<FrameCodec>);

pub(crate) fn shared(framed: Framed<FrameCodec>) -> Parts {
    let (read, write) = framed.into_split();
    let (sender, driver) = write.into_sender();
    (read, sender, driver)
}

/// A sender with these limits on a socket that takes little, and its peer.
pub(crate) fn narrow(kind: SocketKind, limits: Limits) -> (Parts, Framed<FrameCodec>) {
    let (a, b) = Socket::pair(kind).unwrap();
    a.set_send_buffer_size(1).unwrap();
    (shared(Framed::new(a, FrameCodec::new(limits))), Framed::new(b, large()))
}

/// Sends marked frames, one by one, until there is no room for more, and returns their number.
pub(crate) async fn fill(sender: &Sender<FrameCodec>) -> u32 {
    let mut accepted = 0;
    loop {
        settle().await;
        let Some(permit) = once(sender.reserve()).await else { return accepted };
        permit.unwrap().send(Frame::new(vec![0; 1000]).with_fd(marked(accepted))).unwrap();
        accepted += 1;
    }
}

pub(crate) async fn check_marks(
    rx: &mut Framed<FrameCodec>,
    expected: impl IntoIterator<Item = u32>,
) {
    for mark in expected {
        assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [mark]);
    }
}

/// A payload with the number of its sender and the number of the message.
fn numbered(task: u32, n: u32) -> Bytes {
    [task.to_be_bytes(), n.to_be_bytes()].concat().into()
}

#[test]
fn messages_of_many_tasks_arrive_once_each_in_the_order_of_their_task() {
    const TASKS: u32 = 64;
    const EACH: u32 = 60;
    for runtime in [one_thread, some_threads] {
        counted_in(runtime, async |kind| {
            let (tx, mut rx) = framed_pair(kind);
            let (_read, sender, driver) = shared(tx);
            let driver = tokio::spawn(driver);

            // Each task numbers its messages.
            for task in 0..TASKS {
                let sender = sender.clone();
                tokio::spawn(async move {
                    for n in 0..EACH {
                        let frame = Frame::new(numbered(task, n));
                        let fds = (0..n % 3).map(|_| marked(task * EACH + n));
                        sender.send(frame.with_fds(fds)).await.unwrap();
                    }
                    sender.flush().await.unwrap();
                });
            }
            drop(sender);

            // The numbers of each task arrive in order, each with its own descriptors.
            let mut next = [0; TASKS as usize];
            for _ in 0..TASKS * EACH {
                let mut frame = rx.try_next().await.unwrap().unwrap();
                let (task, n) = (frame.payload.get_u32(), frame.payload.get_u32());
                assert_eq!(n, next[task as usize], "task {task}");
                assert_eq!(marks(&frame), vec![task * EACH + n; n as usize % 3]);
                next[task as usize] += 1;
            }
            drop(driver.await.unwrap());
            assert!(rx.next().await.is_none());
        });
    }
}

/// The lengths of the packets that wait in a socket.
fn packets(socket: &impl AsFd) -> Vec<usize> {
    let mut room = vec![0; 1 << 20];
    let mut lengths = Vec::new();
    loop {
        match recv(socket.as_fd().as_raw_fd(), &mut room, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::EAGAIN) => return lengths,
            Ok(bytes) => lengths.push(bytes),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn messages_that_tasks_send_at_the_same_time_go_in_one_packet() {
    // The first runtime has a queue of tasks. The second one prefers the task that was woken last.
    for runtime in [one_thread, one_worker] {
        counted_in(runtime, async |kind| {
            if kind == SocketKind::Stream {
                return; // this kind has no packets
            }
            let (tx, peer) = with_raw_peer(kind);
            let (_read, sender, driver) = shared(tx);
            let driver = tokio::spawn(driver);
            for count in [64, 64, 1] {
                let sender = sender.clone();
                let sends = tokio::spawn(async move {
                    let senders = (0..count).map(|_| sender.clone());
                    let sends = senders.map(|sender| {
                        tokio::spawn(async move {
                            sender.send(Frame::new(vec![7; 64])).await.unwrap();
                            sender.flush().await.unwrap();
                        })
                    });
                    join_all(sends).await
                });
                sends.await.unwrap().into_iter().for_each(|sent| sent.unwrap());
                assert_eq!(packets(&peer), [count * 72]);
            }
            drop(sender);
            driver.await.unwrap();
        });
    }
}

#[test]
fn packets_stay_full_when_senders_wait_in_line() {
    counted(async |kind| {
        if kind == SocketKind::Stream {
            return; // this kind has no packets
        }
        let (a, peer) = Socket::pair(kind).unwrap();
        let limits = Limits::default().max_queued_bytes(64 * 72);
        let (_read, sender, driver) = shared(Framed::new(a, FrameCodec::new(limits)));
        let driver = tokio::spawn(driver);
        let tasks = (0..640).map(|_| sender.clone());
        let tasks = tasks.map(|sender| {
            tokio::spawn(async move { sender.send(Frame::new(vec![7; 64])).await.unwrap() })
        });
        join_all(tasks).await;
        drop(sender);
        driver.await.unwrap();
        assert_eq!(packets(&peer), [64 * 72; 10]);
    });
}

#[test]
fn the_queue_holds_no_more_than_its_limits_while_the_peer_does_not_read() {
    for limits in [Limits::default().max_queued_bytes(5000), Limits::default().max_queued_fds(5)] {
        counted(async |kind| {
            let (a, b) = Socket::pair(kind).unwrap();
            a.set_send_buffer_size(1).unwrap();
            let (_read, sender, driver) = shared(Framed::new(a, FrameCodec::new(limits)));
            let driver = tokio::spawn(driver);

            // More tasks send than there is room for.
            let sends: Vec<JoinHandle<_>> = (0..200)
                .map(|n| {
                    let sender = sender.clone();
                    tokio::spawn(async move {
                        sender.send(Frame::new(vec![0; 1000]).with_fd(marked(n))).await
                    })
                })
                .collect();

            // The messages that were accepted are in the socket, or in the queue within its limits.
            settle().await;
            let accepted = sends.iter().filter(|task| task.is_finished()).count();
            let in_socket: usize = packets(&b).iter().sum();
            assert!(in_socket > 0 && accepted < 200, "the socket was never full");
            assert!(
                accepted * 1008 - in_socket < 6 * 1008,
                "{accepted} were accepted, {in_socket} bytes of them sent"
            );

            // The others are refused when the peer is gone.
            drop(b);
            driver.await.unwrap();
            let refused =
                join_all(sends).await.into_iter().filter(|sent| matches!(sent, Ok(Err(_)))).count();
            assert!(refused > 0);
        });
    }
}

#[test]
fn the_sender_that_waits_first_is_served_first() {
    counted(async |kind| {
        let ((_read, sender, driver), mut rx) =
            narrow(kind, Limits::default().max_queued_bytes(5000));
        let driver = tokio::spawn(driver);
        let accepted = fill(&sender).await;
        for n in 0..50 {
            let sender = sender.clone();
            tokio::spawn(async move {
                sender.send(Frame::new("").with_fd(marked(n))).await.unwrap();
                // This one queues behind all senders that wait by now.
                sender.send(Frame::new("").with_fd(marked(n + 50))).await.unwrap();
            });
        }
        settle().await;
        drop(sender);
        check_marks(&mut rx, (0..accepted).chain(0..100)).await;
        driver.await.unwrap();
    });
}

#[test]
fn a_flush_waits_for_what_was_accepted_before_and_can_be_cancelled() {
    counted(async |kind| {
        let ((_read, sender, driver), mut rx) = narrow(kind, Limits::default());
        let driver = tokio::spawn(driver);
        sender.flush().await.unwrap();
        let accepted = fill(&sender).await;
        assert!(once(sender.flush()).await.is_none());
        let flush = tokio::spawn({
            let sender = sender.clone();
            async move { sender.flush().await }
        });
        settle().await;
        assert!(!flush.is_finished());
        check_marks(&mut rx, 0..accepted).await;
        flush.await.unwrap().unwrap();
        sender.flush().await.unwrap();
        drop(sender);
        driver.await.unwrap();
    });
}

#[test]
fn senders_that_give_up_waiting_hold_up_nobody() {
    counted(async |kind| {
        let ((_read, sender, driver), mut rx) =
            narrow(kind, Limits::default().max_queued_bytes(5000));
        let driver = tokio::spawn(driver);
        let accepted = fill(&sender).await;

        // One task waits for room, and the others wait for their turn behind it.
        let (reader, writer) = io::pipe().unwrap();
        let mut waiting: Vec<JoinHandle<()>> = Vec::new();
        for n in 0..5 {
            let sender = sender.clone();
            let frame = Frame::new("").with_fd(if n % 2 == 0 {
                writer.try_clone().unwrap().into()
            } else {
                marked(n)
            });
            waiting.push(tokio::spawn(async move { sender.send(frame).await.unwrap() }));
            settle().await;
        }
        drop(writer);

        // The first one and others give up. Their descriptors are closed.
        assert!(once(sender.reserve()).await.is_none());
        for n in [2, 0, 4] {
            waiting[n].abort();
            settle().await;
        }
        assert_eq!(io::read_to_string(reader).unwrap(), "", "a copy of the writer is open");

        // The rest is sent.
        check_marks(&mut rx, (0..accepted).chain([1, 3])).await;
        sender.send(Frame::new("").with_fd(marked(9))).await.unwrap();
        check_marks(&mut rx, [9]).await;
        drop(sender);
        driver.await.unwrap();
    });
}

#[test]
fn an_item_that_finds_no_room_at_once_comes_back() {
    counted(async |kind| {
        let ((_read, sender, driver), mut rx) =
            narrow(kind, Limits::default().max_queued_bytes(5000));
        let driver = tokio::spawn(driver);
        let accepted = fill(&sender).await;
        let Err(TrySendError::Full(item)) = sender.try_send(Frame::new("").with_fd(marked(7)))
        else {
            panic!("there is room");
        };
        assert_eq!(marks(&item), [7]);

        // Room belongs to the task that waits for it.
        let waiting = tokio::spawn({
            let sender = sender.clone();
            async move { sender.send(Frame::new("").with_fd(marked(accepted))).await }
        });
        settle().await;
        check_marks(&mut rx, 0..=accepted).await;
        waiting.await.unwrap().unwrap();
        sender.try_send(item).unwrap();
        check_marks(&mut rx, [7]).await;

        // After the end of sending, the item comes back with the reason.
        assert!(!sender.is_closed());
        driver.abort();
        settle().await;
        assert!(sender.is_closed());
        let refused = sender.try_send(Frame::new("").with_fd(marked(8))).unwrap_err();
        assert!(matches!(
            refused,
            TrySendError::Failed(SendError { item: Some(_), error: Error::Closed })
        ));
    });
}

#[test]
fn a_permit_keeps_room_for_one_message() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let limits = Limits::default().max_queued_fds(2);
        let (_read, sender, driver) = shared(Framed::new(a, FrameCodec::new(limits)));
        let (driver, mut rx) = (tokio::spawn(driver), Framed::new(b, large()));

        // Two permits take all room, until one is dropped.
        let (first, second) = (sender.reserve().await.unwrap(), sender.reserve().await.unwrap());
        let third = tokio::spawn({
            let sender = sender.clone();
            async move { sender.send(Frame::new("").with_fd(marked(3))).await }
        });
        settle().await;
        assert!(!third.is_finished());
        drop(first);
        third.await.unwrap().unwrap();
        check_marks(&mut rx, [3]).await;

        // A message without a descriptor leaves the room for one to the next sender.
        let fourth = sender.reserve().await.unwrap();
        let fifth = tokio::spawn({
            let sender = sender.clone();
            async move { sender.send(Frame::new("").with_fd(marked(5))).await }
        });
        settle().await;
        assert!(!fifth.is_finished());
        second.send(Frame::new("plain")).unwrap();
        fifth.await.unwrap().unwrap();
        fourth.send(Frame::new("").with_fd(marked(4))).unwrap();
        assert_eq!(rx.try_next().await.unwrap().unwrap().payload, "plain");
        check_marks(&mut rx, [5, 4]).await;
        drop(sender);
        driver.await.unwrap();
    });
}

#[test]
fn senders_that_always_find_room_leave_other_tasks_their_turn() {
    counted(async |kind| {
        let (tx, _rx) = framed_pair(kind);
        let (_read, sender, _driver) = shared(tx);
        let endless = tokio::spawn(async move {
            loop {
                sender.send(Frame::new("")).await.unwrap();
            }
        });
        yield_now().await; // comes back before the queue is full
        yield_now().await;
        endless.abort();
        assert!(endless.await.unwrap_err().is_cancelled());
    });
}
