//! How a connection ends, at every point.

use std::{io, net::Shutdown};

use fdwire::{Error, Frame, FrameCodec, Framed, Socket, SocketKind};
use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    common::{
        encoded, framed_pair, marked, marks, raw_send, role_socket, run, spawn_role, wait_for_close_of_peer,
        with_raw_peer,
    },
    counted,
};

/// Three frames as they are sent: bytes, and at which byte which descriptors are attached.
fn three_frames() -> Vec<u8> {
    [encoded(b"one", 1), encoded(b"two", 0), encoded(b"three", 2)].concat()
}

/// Checks what a receiver yields of the first `cut` bytes of [`three_frames`], after which the peer is gone.
async fn check_cut(mut rx: Framed<FrameCodec>, cut: usize) {
    let ends = [11, 22, 35];
    for (payload, fds) in [("one", vec![1]), ("two", vec![]), ("three", vec![2, 3])]
        .into_iter()
        .zip(ends)
        .filter_map(|(f, end)| (end <= cut).then_some(f))
    {
        let frame = rx.try_next().await.unwrap().unwrap();
        assert_eq!((&frame.payload[..], marks(&frame)), (payload.as_bytes(), fds));
    }
    let whole = ends.into_iter().rfind(|end| *end <= cut).unwrap_or(0);
    if cut > whole {
        let error = rx.next().await.unwrap().unwrap_err();
        assert!(matches!(error, Error::UnexpectedEnd { bytes } if bytes == cut - whole), "{error}");
    }
    assert!(rx.next().await.is_none());
}

fn send_cut(peer: &impl std::os::fd::AsFd, cut: usize) {
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
    counted(async |kind| {
        for cut in 0..=three_frames().len() {
            let (rx, peer) = with_raw_peer(kind);
            send_cut(&peer, cut);
            drop(peer);
            check_cut(rx, cut).await;
        }
    });
}

#[test]
fn a_peer_may_be_killed_after_any_byte() {
    if let Some(socket) = role_socket("ends::a_peer_may_be_killed_after_any_byte") {
        // The parent says where to stop, and kills.
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
    counted(async |kind| {
        for cut in [0, 1, 8, 10, 11, 15, 23, 34, 35] {
            let (rx, peer) = with_raw_peer(kind);
            let (control, child_end) = Socket::pair(kind).unwrap();
            let mut control = Framed::new(control, FrameCodec::default());
            let mut child = spawn_role("ends::a_peer_may_be_killed_after_any_byte", None, child_end.into());
            control.send(Frame::new(vec![cut as u8]).with_fd(peer)).await.unwrap();
            assert_eq!(control.try_next().await.unwrap().unwrap().payload, "sent");
            kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL).unwrap();
            child.wait().unwrap();
            check_cut(rx, cut).await;
        }
    });
}

#[test]
fn a_peer_that_closes_is_noticed_by_the_sender_and_nothing_unsent_is_lost() {
    counted(async |kind| {
        let (mut tx, rx) = framed_pair(kind);
        drop(rx);
        wait_for_close_of_peer(tx.socket());
        tx.feed(Frame::new("unsent").with_fd(marked(1))).await.unwrap();
        let error = io::Error::from(tx.flush().await.unwrap_err());
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);

        // From now on items come back at once, with the same error.
        let refused = tx.send(Frame::new("refused").with_fd(marked(2))).await.unwrap_err();
        assert!(matches!(&refused.error, Error::Io(error) if error.kind() == io::ErrorKind::BrokenPipe));
        assert_eq!(marks(&refused.item.unwrap()), [2]);
        assert!(tx.reserve().await.is_err() && tx.flush().await.is_err());

        let parts = tx.into_parts();
        let (bytes, fds) = parts.unsent.into_parts();
        assert_eq!((&bytes[8..], fds.len()), (&b"unsent"[..], 1));
    });
}

#[test]
fn a_peer_that_closes_in_the_middle_of_a_large_frame() {
    counted(async |kind| {
        let (mut tx, peer) = with_raw_peer(kind);
        let send = tx.send(Frame::new(vec![0; 8 << 20]).with_fd(marked(1)));
        let (sent, ()) = tokio::join!(send, async {
            tokio::task::yield_now().await;
            drop(peer);
        });
        let error = sent.unwrap_err();
        assert!(matches!(error.error, Error::Io(_)) && error.item.is_none());
        assert!(matches!(tx.next().await, Some(Err(Error::Reset))));
        assert!(tx.next().await.is_none());
    });
}

#[test]
fn reading_goes_on_after_a_write_error() {
    counted(async |kind| {
        let (mut a, mut b) = framed_pair(kind);
        for n in 0..3 {
            b.send(Frame::new("last words").with_fd(marked(n))).await.unwrap();
        }
        drop(b);
        wait_for_close_of_peer(a.socket());
        assert!(a.send(Frame::new("too late")).await.is_err());
        for n in 0..3 {
            assert_eq!(marks(&a.try_next().await.unwrap().unwrap()), [n]);
        }
        assert!(a.next().await.is_none());
    });
}

#[test]
fn a_reset_is_reported_after_the_data() {
    counted(async |kind| {
        let (mut a, mut b) = framed_pair(kind);
        a.send(Frame::new("never read")).await.unwrap();
        for n in 0..3 {
            b.send(Frame::new("last words").with_fd(marked(n))).await.unwrap();
        }
        drop(b); // with unread data: ECONNRESET, on SEQPACKET before the data
        for n in 0..3 {
            assert_eq!(marks(&a.try_next().await.unwrap().unwrap()), [n]);
        }
        assert!(matches!(a.next().await, Some(Err(Error::Reset))));
        assert!(a.next().await.is_none());
    });
}

#[test]
fn a_frame_cut_by_a_reset_is_an_unexpected_end() {
    counted(async |kind| {
        let (mut a, peer) = with_raw_peer(kind);
        a.send(Frame::new("never read")).await.unwrap();
        raw_send(&peer, &encoded(b"cut", 1)[..9], &[marked(1)]);
        drop(peer);
        assert!(matches!(a.next().await, Some(Err(Error::UnexpectedEnd { bytes: 9 }))));
        assert!(a.next().await.is_none());
    });
}

#[test]
fn each_direction_closes_for_itself() {
    counted(async |kind| {
        let (mut a, mut b) = framed_pair(kind);
        a.send(Frame::new("question")).await.unwrap();
        a.close().await.unwrap();
        assert_eq!(b.try_next().await.unwrap().unwrap().payload, "question");
        assert!(b.next().await.is_none());
        b.send(Frame::new("answer").with_fd(marked(1))).await.unwrap();
        assert_eq!(marks(&a.try_next().await.unwrap().unwrap()), [1]);
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
fn dropping_the_whole_leaves_other_holders_of_the_socket_alone() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let copy = std::os::fd::AsFd::as_fd(&a).try_clone_to_owned().unwrap();
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
            return eprintln!("skipped: SO_PASSRIGHTS is not to be had: {error}");
        }
        a.feed(Frame::new("with").with_fd(marked(1))).await.unwrap();
        let error = io::Error::from(a.flush().await.unwrap_err());
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(a.into_parts().unsent.fd_count(), 1);
        assert!(b.next().await.is_none());
    });
}

#[test]
fn nothing_follows_the_end() {
    counted(async |kind| {
        let (mut a, peer) = with_raw_peer(kind);
        a.send(Frame::new("never read")).await.unwrap();
        raw_send(&peer, b"?", &[]);
        assert!(matches!(a.next().await, Some(Err(Error::BadMagic { .. }))));
        assert!(a.next().await.is_none());
        drop(peer);
        assert!(a.send(Frame::new("learns of the reset")).await.is_err());
        assert!(a.next().await.is_none());
    });
}

#[test]
fn closing_after_a_failure_still_ends_the_direction() {
    counted(async |kind| {
        let (mut a, mut b) = framed_pair(kind);
        if b.socket().set_pass_fds(false).is_err() {
            return eprintln!("skipped: SO_PASSRIGHTS is not to be had");
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
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let mut tx = Framed::new(a, FrameCodec::default());
        let mut child = spawn_role(ROLE, None, b.into());
        assert_eq!(tx.try_next().await.unwrap().unwrap().payload, "ready");
        let mut accepted = 0;
        let refused = loop {
            let frame = Frame::new(vec![0; 100_000]).with_fd(marked(accepted));
            match tx.feed(frame).await {
                Ok(()) => accepted += 1,
                Err(refused) => break refused.item.unwrap(),
            }
        };
        assert_eq!(marks(&refused), [accepted]);
        let unsent = tx.into_parts().unsent.into_parts().1;
        assert!(unsent.iter().map(crate::common::mark_of).eq(accepted - unsent.len() as u32..accepted));
        child.wait().unwrap();
    });
}

#[test]
fn what_has_ended_stays_so_with_another_codec() {
    counted(async |kind| {
        let (mut a, peer) = with_raw_peer(kind);
        raw_send(&peer, b"?", &[marked(1)]);
        assert!(matches!(a.next().await, Some(Err(Error::BadMagic { .. }))));
        // The descriptor of the first is gone; the second must not get the third's.
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
fn after_shutting_down_the_reading_side_what_was_sent_comes_and_then_the_end() {
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
