//! The end of sending from many tasks, and messages that are refused and leave nothing behind.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

use fdwire::{
    Error, Frame, FrameCodec, Framed, Limits, SendError, Sender, Socket,
    codec::{Codec, Encoder, SendBuf},
};
use futures::{SinkExt, StreamExt, TryStreamExt};
use nix::{errno::Errno, libc};
use tokio::task::JoinHandle;

use crate::{
    common::{encoded, framed_pair, large, mark_of, marked, marks, settle},
    counted,
    sender::{check_marks, fill, narrow, shared},
};

fn is_closed<I>(result: Result<(), SendError<I>>) -> I {
    let SendError { error, item } = result.unwrap_err();
    assert!(matches!(error, Error::Closed), "{error}");
    item.unwrap()
}

#[test]
fn when_the_peer_is_gone_every_item_comes_back_or_is_in_the_half() {
    counted(async |kind| {
        let ((read, sender, driver), rx) = narrow(kind, Limits::default().max_queued_bytes(20_000));
        let driver = tokio::spawn(driver);

        // Some messages are in the socket, some with the driver, and some in the queue. Five more
        // and a flush wait.
        let accepted = fill(&sender).await;
        let waiting: Vec<JoinHandle<_>> = (0..5)
            .map(|n| {
                let sender = sender.clone();
                tokio::spawn(async move { sender.send(Frame::new("").with_fd(marked(n))).await })
            })
            .collect();
        let flush = tokio::spawn({
            let sender = sender.clone();
            async move { sender.flush().await }
        });
        settle().await;
        let permit = sender.clone();
        drop(rx);

        // Each item that waits comes back with the error, and so do all later ones.
        let write = driver.await.unwrap();
        for (n, task) in waiting.into_iter().enumerate() {
            let SendError { error, item } = task.await.unwrap().unwrap_err();
            assert!(error.is_peer_gone(), "{error}");
            assert_eq!(marks(&item.unwrap()), [n as u32]);
        }
        assert!(flush.await.unwrap().unwrap_err().is_peer_gone());
        let refused = sender.send(Frame::new("").with_fd(marked(7))).await.unwrap_err();
        assert_eq!((refused.error.is_peer_gone(), marks(&refused.item.unwrap())), (true, vec![7]));
        assert!(permit.reserve().await.unwrap_err().is_peer_gone());
        assert!(sender.flush().await.unwrap_err().is_peer_gone());

        // The items that were accepted and not sent are in the half.
        let mut half = Framed::reunite(read, write).unwrap();
        assert!(half.flush().await.unwrap_err().is_peer_gone());
        let (bytes, fds) = half.into_parts().unsent.into_parts();
        assert!((20_000..22_000).contains(&bytes.len()), "{} bytes are unsent", bytes.len());
        assert!(fds.iter().map(mark_of).eq(accepted - fds.len() as u32..accepted));
    });
}

/// Sends `refused`, which the kernel does not pass to the peer, between messages of other senders.
async fn a_descriptor_that_is_not_passed_ends_sending(
    (a, mut b): (Framed<FrameCodec>, Framed<FrameCodec>),
    refused: OwnedFd,
    errno: Errno,
) {
    let expected = Some(errno as i32);
    let is_expected =
        |error: &Error| matches!(error, Error::Io(error) if error.raw_os_error() == expected);
    let (read, sender, driver) = shared(a);
    let driver = tokio::spawn(driver);
    let others: [Sender<FrameCodec>; 2] = [sender.clone(), sender.clone()];
    others[0].send(Frame::new("before")).await.unwrap();
    others[0].flush().await.unwrap();

    // All are accepted before the driver sends them.
    others[0].send(Frame::new("one").with_fd(marked(1))).await.unwrap();
    sender.send(Frame::new("two").with_fd(refused)).await.unwrap();
    others[1].send(Frame::new("three").with_fd(marked(3))).await.unwrap();
    for sender in &others {
        assert!(is_expected(&sender.flush().await.unwrap_err()));
        assert!(is_expected(&sender.reserve().await.unwrap_err()));
        let SendError { error, item } =
            sender.send(Frame::new("late").with_fd(marked(4))).await.unwrap_err();
        assert!(is_expected(&error) && marks(&item.unwrap()) == [4], "{error}");
    }

    // The other direction goes on.
    let mut a = Framed::reunite(read, driver.await.unwrap()).unwrap();
    assert_eq!(b.try_next().await.unwrap().unwrap().payload, "before");
    b.send(Frame::new("answer")).await.unwrap();
    assert_eq!(a.try_next().await.unwrap().unwrap().payload, "answer");

    // The unsent messages are in the half, with all descriptors.
    assert!(is_expected(&a.flush().await.unwrap_err()));
    let (bytes, fds) = a.into_parts().unsent.into_parts();
    assert_eq!(bytes, [encoded(b"one", 1), encoded(b"two", 1), encoded(b"three", 1)].concat());
    assert_eq!((fds.len(), mark_of(&fds[0]), mark_of(&fds[2])), (3, 1, 3));
    assert!(b.next().await.is_none());
}

#[test]
fn a_descriptor_that_the_peer_does_not_take_ends_sending_for_every_sender() {
    counted(async |kind| {
        let (a, b) = framed_pair(kind);
        if let Err(error) = b.socket().set_pass_fds(false) {
            return eprintln!("skipped: this kernel has no SO_PASSRIGHTS: {error}");
        }
        a_descriptor_that_is_not_passed_ends_sending((a, b), marked(2), Errno::EPERM).await;
    });
}

#[test]
fn a_descriptor_that_cannot_be_passed_ends_sending_for_every_sender() {
    counted(async |kind| match io_uring() {
        Ok(ring) => {
            a_descriptor_that_is_not_passed_ends_sending(framed_pair(kind), ring, Errno::EINVAL)
                .await
        }
        Err(error) => eprintln!("skipped: io_uring is not available: {error}"),
    });
}

/// A descriptor of a type that no Unix socket passes.
#[expect(unsafe_code, reason = "a system call that nix lacks")]
fn io_uring() -> nix::Result<OwnedFd> {
    let mut parameters = [0_u64; 15]; // io_uring_params
    // SAFETY: the kernel writes the parameters to an array of their size.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1_u32, parameters.as_mut_ptr()) };
    let ring = Errno::result(ring)?;
    // SAFETY: the call has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(ring as i32) })
}

#[test]
fn without_a_driver_items_come_back_and_nobody_hangs() {
    counted(async |kind| {
        let ((_read, sender, driver), mut rx) = narrow(kind, Limits::default());
        let driver = tokio::spawn(driver);

        // A message with descriptors and a flush wait while the queue is full.
        let accepted = fill(&sender).await;
        let (reader, writer) = io::pipe().unwrap();
        let full = Frame::new("").with_fds((0..10).map(|_| writer.try_clone().unwrap().into()));
        let permit = sender.clone();
        let waiting = tokio::spawn({
            let sender = sender.clone();
            async move { sender.send(full).await }
        });
        let flush = tokio::spawn({
            let sender = sender.clone();
            async move { sender.flush().await }
        });
        settle().await;

        // Both return when the driver is gone, and later calls fail at once.
        driver.abort();
        assert!(driver.await.unwrap_err().is_cancelled());
        assert_eq!(is_closed(waiting.await.unwrap()).fds.len(), 10);
        assert!(matches!(flush.await.unwrap(), Err(Error::Closed)));
        assert!(matches!(sender.flush().await, Err(Error::Closed)));
        assert!(matches!(permit.reserve().await, Err(Error::Closed)));
        assert_eq!(marks(&is_closed(sender.send(Frame::new("").with_fd(marked(1))).await)), [1]);
        drop(writer);
        assert_eq!(io::read_to_string(reader).unwrap(), "", "a copy of the writer is open");

        // The unsent descriptors are closed, and the peer sees the end.
        let mut received = 0;
        while let Some(Ok(frame)) = rx.next().await {
            assert_eq!(marks(&frame), [received]);
            received += 1;
        }
        assert!(received < accepted);
    });
}

#[test]
fn a_driver_that_never_ran_closes_the_descriptors_that_were_accepted() {
    counted(async |kind| {
        let (tx, _rx) = framed_pair(kind);
        let (_read, sender, driver) = shared(tx);
        let (reader, writer) = io::pipe().unwrap();
        sender.send(Frame::new("").with_fd(writer)).await.unwrap();
        let permit = sender.reserve().await.unwrap();
        drop(driver);
        assert_eq!(io::read_to_string(reader).unwrap(), "", "a copy of the writer is open");
        assert_eq!(is_closed(permit.send(Frame::new("late"))).payload, "late");
    });
}

#[test]
fn a_refused_item_comes_back_and_disturbs_nobody() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let codec = FrameCodec::new(Limits::default().max_payload_bytes(100));
        let (_read, sender, driver) = shared(Framed::new(a, codec));
        let (driver, mut rx) = (tokio::spawn(driver), Framed::new(b, codec));
        for n in 0..3 {
            sender.send(Frame::new("").with_fd(marked(n))).await.unwrap();
            let refused =
                sender.send(Frame::new(vec![0; 101]).with_fd(marked(n))).await.unwrap_err();
            assert!(matches!(refused.error, Error::FrameTooLong { bytes: 101, limit: 100 }));
            assert_eq!(marks(&refused.item.unwrap()), [n]);
        }
        drop(sender);
        driver.await.unwrap();
        check_marks(&mut rx, 0..3).await;
    });
}

/// Panics at an empty frame, with half of it written.
struct Panics(FrameCodec);

impl Codec for Panics {}

impl Encoder<Frame> for Panics {
    type Error = Error;

    fn encode(&mut self, mut frame: Frame, dst: &mut SendBuf) -> Result<(), SendError<Frame>> {
        if frame.payload.is_empty() {
            dst.put_slice(b"half");
            dst.put_fds(std::mem::take(&mut frame.fds));
            panic!("on purpose");
        }
        self.0.encode(frame, dst)
    }
}

#[test]
fn an_encoder_that_panics_disturbs_nobody() {
    counted(async |kind| {
        let (a, b) = Socket::pair(kind).unwrap();
        let codecs = (FrameCodec::default(), Panics(FrameCodec::default()));
        let (sender, driver) =
            Framed::with_codecs(a, codecs.0, codecs.1).into_split().1.into_sender();
        let (driver, mut rx) = (tokio::spawn(driver), Framed::new(b, large()));
        for n in 0..3 {
            sender.send(Frame::new("fine").with_fd(marked(n))).await.unwrap();
            let other = sender.clone();
            let panics =
                tokio::spawn(async move { other.send(Frame::new("").with_fd(marked(9))).await });
            assert!(panics.await.unwrap_err().is_panic());
        }
        drop(sender);
        driver.await.unwrap();
        check_marks(&mut rx, 0..3).await;
    });
}

#[test]
fn a_half_becomes_a_sender_and_a_half_again() {
    counted(async |kind| {
        let (mut tx, mut rx) = framed_pair(kind);
        for round in [0, 10, 20] {
            tx.feed(Frame::new("before").with_fd(marked(round))).await.unwrap();
            let (read, sender, driver) = shared(tx);
            let driver = tokio::spawn(driver);
            sender.send(Frame::new("").with_fd(marked(round + 1))).await.unwrap();
            check_marks(&mut rx, [round, round + 1]).await;
            settle().await;
            drop(sender); // wakes the driver, which has nothing to do
            tx = Framed::reunite(read, driver.await.unwrap()).unwrap();
        }
        tx.close().await.unwrap();
        assert!(rx.next().await.is_none());

        // A direction that has ended stays so.
        let (_read, sender, driver) = shared(tx);
        assert_eq!(is_closed(sender.send(Frame::new("late")).await).payload, "late");
        assert!(matches!(driver.await.close().await, Ok(())));
        assert!(matches!(sender.flush().await, Err(Error::Closed)));
    });
}
