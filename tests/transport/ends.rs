//! The end of a connection: the peer closes, dies, or shuts one direction down, at any point.

use std::{io, net::Shutdown, os::fd::AsFd};

use fdwire::{Error, Frame, FrameCodec, Framed, Socket, SocketKind};
use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    common::{
        encoded, framed_pair, marked, marks, raw_send, role_socket, run, spawn_role, with_raw_peer,
    },
    counted,
    side::{End, end_with_raw_peer, ends, on_both_sides},
};

/// Returns three frames as they are sent: the bytes, and for each descriptor the byte that it is
/// attached to.
fn three_frames() -> Vec<u8> {
    [encoded(b"one", 1), encoded(b"two", 0), encoded(b"three", 2)].concat()
}

/// Checks what a receiver yields if the peer is gone after the first `cut` bytes of
/// [`three_frames`].
async fn check_cut(mut rx: End<FrameCodec>, cut: usize) {
    let ends = [11, 22, 35];
    for (payload, fds) in [("one", vec![1]), ("two", vec![]), ("three", vec![2, 3])]
        .into_iter()
        .zip(ends)
        .filter_map(|(f, end)| (end <= cut).then_some(f))
    {
        let frame = rx.frame().await;
        assert_eq!((&frame.payload[..], marks(&frame)), (payload.as_bytes(), fds));
    }
    let whole = ends.into_iter().rfind(|end| *end <= cut).unwrap_or(0);
    if cut > whole {
        let error = rx.next().await.unwrap().unwrap_err();
        assert!(matches!(error, Error::UnexpectedEnd { bytes } if bytes == cut - whole), "{error}");
    }
    assert!(rx.next().await.is_none());
}

fn send_cut(peer: &impl AsFd, cut: usize) {
    for (index, byte) in three_frames()[..cut].iter().enumerate() {
        let fds = match index {
            0 => vec![marked(1)],
            22 => vec![marked(2), marked(3)],
            _ => vec![],
        };
        raw_send(peer, &[*byte], &fds);
    }
}

#[test]
fn a_peer_may_close_after_any_byte() {
    on_both_sides(async |kind, side| {
        for cut in 0..=three_frames().len() {
            let (rx, peer) = end_with_raw_peer(kind, side);
            send_cut(&peer, cut);
            drop(peer);
            check_cut(rx, cut).await;
        }
    });
}

#[test]
fn a_peer_may_be_killed_after_any_byte() {
    if let Some(socket) = role_socket("ends::a_peer_may_be_killed_after_any_byte") {
        // The parent chooses the byte to stop at, and kills this process there.
        return run(async {
            let mut control = Framed::new(Socket::try_from(socket).unwrap(), FrameCodec::default());
            let frame = control.try_next().await.unwrap().unwrap();
            let cut = frame.payload[0] as usize;
            let [peer] = frame.fds.into_array().unwrap();
            send_cut(&peer, cut);
            control.send(Frame::new("sent")).await.unwrap();
            std::future::pending().await
        });
    }
    on_both_sides(async |kind, side| {
        for cut in [0, 1, 8, 10, 11, 15, 23, 34, 35] {
            let (rx, peer) = end_with_raw_peer(kind, side);
            let (control, child_end) = Socket::pair(kind).unwrap();
            let mut control = Framed::new(control, FrameCodec::default());
            let mut child =
                spawn_role("ends::a_peer_may_be_killed_after_any_byte", None, child_end.into());
            control.send(Frame::new(vec![cut as u8]).with_fd(peer)).await.unwrap();
            assert_eq!(control.try_next().await.unwrap().unwrap().payload, "sent");
            kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL).unwrap();
            child.wait().unwrap();
            check_cut(rx, cut).await;
        }
    });
}

fn nothing_to_read(socket: &impl AsFd) -> bool {
    poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(0)
}

#[test]
fn sending_fails_if_the_peer_closes_in_the_middle_of_a_large_frame() {
    on_both_sides(async |kind, side| {
        let (mut tx, peer) = end_with_raw_peer(kind, side);
        let send = tx.send(Frame::new(vec![0; 8 << 20]).with_fd(marked(1)));
        let (sent, ()) = tokio::join!(send, async {
            while nothing_to_read(&peer) {
                tokio::task::yield_now().await;
            }
            drop(peer);
        });
        let error = sent.unwrap_err();
        assert!(matches!(error.error, Error::Io(_)) && error.item.is_none());
        assert!(matches!(tx.error().await, Error::Reset));
    });
}

#[test]
fn reading_goes_on_after_a_write_error() {
    on_both_sides(async |kind, side| {
        let (mut a, mut b) = ends(kind, side);
        for n in 0..3 {
            b.send(Frame::new("last words").with_fd(marked(n))).await.unwrap();
        }
        drop(b);
        a.wait_for_close_of_peer().await;
        assert!(a.send(Frame::new("too late")).await.is_err());
        for n in 0..3 {
            assert_eq!(marks(&a.frame().await), [n]);
        }
        assert!(a.next().await.is_none());
    });
}

#[test]
fn a_frame_cut_by_a_reset_is_an_unexpected_end() {
    on_both_sides(async |kind, side| {
        let (mut a, peer) = end_with_raw_peer(kind, side);
        a.send(Frame::new("never read")).await.unwrap();
        raw_send(&peer, &encoded(b"cut", 1)[..9], &[marked(1)]);
        drop(peer);
        assert!(matches!(a.error().await, Error::UnexpectedEnd { bytes: 9 }));
    });
}

#[test]
fn each_direction_closes_for_itself() {
    on_both_sides(async |kind, side| {
        let (mut a, mut b) = ends(kind, side);
        a.send(Frame::new("question")).await.unwrap();
        a.close().await.unwrap();
        assert_eq!(b.try_next().await.unwrap().unwrap().payload, "question");
        assert!(b.next().await.is_none());
        b.send(Frame::new("answer").with_fd(marked(1))).await.unwrap();
        assert_eq!(marks(&a.frame().await), [1]);
    });
}

#[test]
fn dropping_the_write_half_ends_the_direction() {
    counted(async |kind| {
        let (a, mut b) = framed_pair(kind);
        let (mut rx, tx) = a.into_split();
        drop(tx);
        assert!(b.next().await.is_none());
        b.send(Frame::new("still read")).await.unwrap();
        assert_eq!(rx.try_next().await.unwrap().unwrap().payload, "still read");
    });
}

#[test]
fn dropping_a_framed_leaves_other_holders_of_the_socket_alone() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let copy = a.as_fd().try_clone_to_owned().unwrap();
        drop(Framed::new(a, FrameCodec::default()));
        let (mut a, mut b) = (
            Framed::new(Socket::try_from(copy).unwrap(), FrameCodec::default()),
            Framed::new(b, FrameCodec::default()),
        );
        a.send(Frame::new("still open")).await.unwrap();
        assert_eq!(b.try_next().await.unwrap().unwrap().payload, "still open");
    });
}

#[test]
fn shutdown_of_reading_fails_the_peers_send_and_keeps_what_it_sent() {
    counted(async |kind| {
        let (mut a, mut b) = framed_pair(kind);
        b.send(Frame::new("before").with_fd(marked(1))).await.unwrap();
        a.socket().shutdown(Shutdown::Read).unwrap();
        let error = b.send(Frame::new("after")).await.unwrap_err();
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(marks(&a.try_next().await.unwrap().unwrap()), [1]);
        assert!(a.next().await.is_none());
    });
}

#[test]
fn a_peer_that_takes_no_descriptors_is_an_error_that_sends_nothing() {
    counted(async |kind: SocketKind| {
        let (mut a, mut b) = framed_pair(kind);
        if let Err(error) = b.socket().set_pass_fds(false) {
            return eprintln!("skipped: this kernel has no SO_PASSRIGHTS: {error}");
        }
        a.feed(Frame::new("with").with_fd(marked(1))).await.unwrap();
        let error = io::Error::from(a.flush().await.unwrap_err());
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(a.into_parts().unsent.fd_count(), 1);
        assert!(b.next().await.is_none());
    });
}

#[test]
fn no_item_follows_the_error_that_ends_a_stream() {
    on_both_sides(async |kind, side| {
        let (mut a, peer) = end_with_raw_peer(kind, side);
        a.send(Frame::new("never read")).await.unwrap();
        raw_send(&peer, b"?", &[]);
        assert!(matches!(a.error().await, Error::BadMagic { .. }));
        drop(peer);
        assert!(a.send(Frame::new("learns of the reset")).await.is_err());
        assert!(a.next().await.is_none());
    });
}

#[test]
fn closing_after_a_failure_still_ends_the_direction() {
    on_both_sides(async |kind, side| {
        let (mut a, mut b) = ends(kind, side);
        if b.socket().set_pass_fds(false).is_err() {
            return eprintln!("skipped: this kernel has no SO_PASSRIGHTS");
        }
        assert!(a.send(Frame::new("").with_fd(marked(1))).await.is_err());
        assert!(a.close().await.is_err());
        assert!(b.next().await.is_none());
    });
}

#[test]
fn a_sender_whose_peer_is_killed_gets_back_what_was_not_sent() {
    const ROLE: &str = "ends::a_sender_whose_peer_is_killed_gets_back_what_was_not_sent";
    if let Some(socket) = role_socket(ROLE) {
        return run(async {
            let mut rx = Framed::new(Socket::try_from(socket).unwrap(), FrameCodec::default());
            rx.send(Frame::new("ready")).await.unwrap();
            rx.try_next().await.unwrap().unwrap();
            kill(Pid::this(), Signal::SIGKILL).unwrap();
        });
    }
    on_both_sides(async |kind, side| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut tx = End::new(side, a, FrameCodec::default());
        let mut child = spawn_role(ROLE, None, b.into());
        assert_eq!(tx.frame().await.payload, "ready");

        // Send until a frame is refused, because the peer has received one and died.
        let mut accepted = 0;
        let refused = loop {
            let frame = Frame::new(vec![0; 100_000]).with_fd(marked(accepted));
            match tx.feed(frame).await {
                Ok(()) => accepted += 1,
                Err(refused) => break refused.item.unwrap(),
            }
        };
        assert_eq!(marks(&refused), [accepted]);

        // The unsent descriptors are the last ones that were accepted.
        let (_, unsent) = tx.into_unsent().await;
        assert!(
            unsent.iter().map(crate::common::mark_of).eq(accepted - unsent.len() as u32..accepted)
        );
        child.wait().unwrap();
    });
}

#[test]
fn a_direction_that_has_ended_stays_ended_with_another_codec() {
    counted(async |kind| {
        let (mut a, peer) = with_raw_peer(kind);
        raw_send(&peer, b"?", &[marked(1)]);
        assert!(matches!(a.next().await, Some(Err(Error::BadMagic { .. }))));
        // The descriptor of the first frame is gone. The second frame must not get that of the
        // third.
        raw_send(&peer, &encoded(b"second", 1), &[]);
        raw_send(&peer, &encoded(b"third", 1), &[marked(3)]);
        a.close().await.unwrap();
        let mut a = a.map_codecs(|decoder, encoder| (decoder, encoder));
        assert!(a.next().await.is_none());
        let refused = a.feed(Frame::new("").with_fd(marked(4))).await.unwrap_err();
        assert!(matches!(refused.error, Error::Closed) && refused.item.is_some());
    });
}

#[test]
fn after_shutting_down_the_reading_side_the_frames_sent_before_arrive_and_then_the_end() {
    counted(async |kind| {
        let (mut a, mut b) = framed_pair(kind);
        assert!(a.next().now_or_never().is_none());
        b.send(Frame::new("before")).await.unwrap();
        a.socket().shutdown(Shutdown::Read).unwrap();
        assert!(b.send(Frame::new("after")).await.is_err());
        assert_eq!(a.try_next().await.unwrap().unwrap().payload, "before");
        assert!(a.next().await.is_none());
    });
}
