use std::{
    io::{IoSlice, IoSliceMut, Result},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use bytes::Bytes;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use smallvec::SmallVec;
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    Link, Received, Setup,
    batch::{Batch, Room, same_packet},
};

/// `sendmsg` and `recvmsg`, as one would write it by hand for tokio. All messages between two
/// flushes go in one call with all their descriptors, and the receiver does not take messages
/// apart. It is the floor for a crate that sends messages together.
pub(crate) struct Bare {
    io: AsyncFd<OwnedFd>,
    max_packet: usize,
    waiting: Batch,
    room: Room,
    control: Box<[MaybeUninit<u8>; CONTROL_BYTES]>,
}

/// Room for the most descriptors that a call takes.
const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(253));

#[allow(unsafe_code, reason = "tokio has no safe registration")]
pub(crate) fn register(socket: OwnedFd) -> AsyncFd<OwnedFd> {
    // SAFETY: an `OwnedFd` is open and keeps its number for as long as it lives, and it lives in
    // the `AsyncFd`.
    let io =
        unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE | Interest::WRITABLE) };
    io.expect("the socket can be registered")
}

pub(crate) async fn send(
    io: &AsyncFd<OwnedFd>,
    pieces: &[IoSlice<'_>],
    control: &mut SendAncillaryBuffer<'_, '_, '_>,
) -> Result<usize> {
    loop {
        let mut ready = io.writable().await?;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        if let Ok(sent) = ready.try_io(|io| Ok(sendmsg(io, pieces, control, flags)?)) {
            return sent;
        }
    }
}

impl Bare {
    /// Sends a message with a descriptor at once. The caller keeps its descriptor.
    pub(crate) async fn send_copy(&self, payload: &Bytes, fd: BorrowedFd<'_>) {
        let mut control = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let (mut control, fds) = (SendAncillaryBuffer::new(&mut control), [fd]);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        send(&self.io, &[IoSlice::new(payload)], &mut control).await.expect("sending");
    }
}

impl Link for Bare {
    fn new(socket: OwnedFd, setup: Setup) -> Self {
        Self {
            max_packet: same_packet(&socket, setup),
            io: register(socket),
            waiting: Batch::default(),
            room: Room::new(setup.load),
            control: Box::new([MaybeUninit::uninit(); CONTROL_BYTES]),
        }
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        self.waiting.push(payload, fd);
    }

    async fn flush(&mut self) {
        let Self { io, max_packet, waiting, control, .. } = self;
        let call = async |pieces: &[IoSlice<'_>], fds: &mut Vec<OwnedFd>| {
            let fds = fds.iter().map(AsFd::as_fd).collect::<SmallVec<[_; 1]>>();
            let mut control = SendAncillaryBuffer::new(&mut control[..]);
            if !fds.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            }
            send(io, pieces, &mut control).await
        };
        waiting.send_all(max_packet, call).await;
    }

    async fn recv(&mut self, received: &mut Received) {
        let Self { io, room, control, .. } = self;
        loop {
            let mut ready = io.readable().await.expect("the runtime is there");
            let mut control = RecvAncillaryBuffer::new(&mut control[..]);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let place = &mut [IoSliceMut::new(room.spare())];
            let Ok(result) = ready.try_io(|io| Ok(recvmsg(io, place, &mut control, flags)?)) else {
                continue;
            };
            let bytes = result.expect("receiving").bytes;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    received.fds.extend(fds);
                }
            }
            room.received(bytes);
            received.bytes += bytes;
            return;
        }
    }
}
