//! Descriptors that are shared, and descriptors whose kind the sender knows.

use std::{
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use fdwire::{Frame, FrameCodec, Framed, Limits, SendFd, Socket};
use futures::{SinkExt, TryStreamExt};

use crate::{
    common::{framed_pair, mark_of, marked, marks},
    counted,
};

fn is_open(fd: RawFd) -> bool {
    std::fs::exists(format!("/proc/self/fd/{fd}")).unwrap()
}

#[test]
fn a_descriptor_that_is_lent_stays_open_and_arrives_as_often_as_it_is_sent() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        let kept = Arc::new(marked(7));
        for _ in 0..3 {
            tx.feed(Frame::from_parts("lent", [Arc::clone(&kept), Arc::clone(&kept)]))
                .await
                .unwrap();
        }
        tx.flush().await.unwrap();
        assert_eq!((Arc::strong_count(&kept), mark_of(&*kept)), (1, 7));
        for _ in 0..3 {
            assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [7, 7]);
        }
    });
}

#[test]
fn the_last_reference_is_closed_when_it_is_sent() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        let kept = Arc::new(marked(7));
        let number = kept.as_raw_fd();
        tx.feed(Frame::from_parts("lent", [kept])).await.unwrap();
        assert!(is_open(number));
        tx.flush().await.unwrap();
        assert!(!is_open(number));
        assert_eq!(marks(&rx.try_next().await.unwrap().unwrap()), [7]);
    });
}

#[test]
fn frames_of_every_type_of_descriptor_share_a_connection() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        let file = marked(3);
        let number = file.as_raw_fd();
        tx.feed(Frame::new("owned").with_fd(marked(1))).await.unwrap();
        tx.feed(Frame::from_parts("lent", [Arc::new(marked(2))])).await.unwrap();
        tx.feed(Frame::from_parts("ours", [SendFd::assume_file(file), SendFd::from(marked(4))]))
            .await
            .unwrap();
        tx.flush().await.unwrap();
        assert!(!is_open(number), "a file that the sender vouches for is closed at once");
        for expected in [&[1][..], &[2], &[3, 4]] {
            let frame = rx.try_next().await.unwrap().unwrap();
            assert_eq!(marks(&frame), expected);
            rx.send(frame).await.unwrap(); // a received frame can be sent on as it is
            assert_eq!(marks(&tx.try_next().await.unwrap().unwrap()), expected);
        }
    });
}

#[test]
fn a_socket_ends_when_both_sides_have_closed_it() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        let pairs: Vec<(UnixStream, UnixStream)> =
            (0..3).map(|_| UnixStream::pair().unwrap()).collect();
        let (sent, kept): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let [a, b, c] = <[UnixStream; 3]>::try_from(sent).unwrap();
        let fds = [
            SendFd::assume_socket(a),
            SendFd::assume_socket(Arc::new(OwnedFd::from(b))),
            SendFd::from(c),
        ];
        tx.send(Frame::from_parts("sockets", fds)).await.unwrap();
        drop(rx.try_next().await.unwrap().unwrap());
        for mut end in kept {
            let read =
                tokio::task::spawn_blocking(move || std::io::Read::read(&mut end, &mut [0])).await;
            assert_eq!(read.unwrap().unwrap(), 0);
        }
    });
}

/// A descriptor of each kind.
fn one_of_each() -> [SendFd; 5] {
    let socket = || UnixStream::pair().unwrap().0;
    [
        marked(1).into(),
        Arc::new(marked(2)).into(),
        SendFd::assume_file(marked(3)),
        SendFd::assume_socket(socket()),
        SendFd::assume_socket(Arc::new(OwnedFd::from(socket()))),
    ]
}

/// `counted` checks that all of them get closed.
#[test]
fn descriptors_that_are_not_sent_are_closed() {
    counted(async |kind| {
        // A frame that was never accepted.
        drop(Frame::from_parts("", one_of_each()));

        // A frame that was accepted, and its connection is dropped.
        let (mut tx, _rx) = framed_pair(kind);
        tx.feed(Frame::from_parts("", one_of_each())).await.unwrap();
        drop(tx);

        // A frame that was accepted, and its driver is dropped.
        let (tx, _rx) = framed_pair(kind);
        let (sender, driver) = tx.into_split().1.into_sender();
        sender.send(Frame::from_parts("", one_of_each())).await.unwrap();
        drop(driver);
        let refused = sender.send(Frame::from_parts("", one_of_each())).await.unwrap_err();
        assert_eq!(refused.item.unwrap().fds.len(), 5);

        // A frame that the kernel refuses, because the peer is gone.
        let (mut tx, rx) = framed_pair(kind);
        drop(rx);
        while tx.feed(Frame::from_parts("", one_of_each())).await.is_ok()
            && tx.flush().await.is_ok()
        {}
        assert!(tx.unsent().fds > 0);
        let fds = tx.into_parts().unsent.into_fds();
        assert_eq!(mark_of(&fds[0]), 1);
    });
}

#[test]
fn a_refused_frame_brings_back_the_descriptors_that_were_lent() {
    counted(async |kind| {
        let (a, _b) = Socket::pair(kind).unwrap();
        let mut tx = Framed::new(a, FrameCodec::new(Limits::default().max_fds_per_frame(1)));
        let kept = Arc::new(marked(7));
        let lent = || [Arc::clone(&kept), Arc::clone(&kept)];
        let refused = tx.send(Frame::from_parts("two", lent())).await.unwrap_err();
        assert_eq!(Arc::strong_count(&kept), 3);
        assert_eq!(
            refused.item.unwrap().fds.iter().map(|fd| mark_of(&fd.as_fd())).sum::<u32>(),
            14
        );
        assert_eq!(Arc::strong_count(&kept), 1);
    });
}
