//! The contenders: different ways to send and receive messages over one connected socket.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use bytes::{Buf, Bytes, BytesMut};
use fdwire::{Frame, FrameCodec, Framed, Socket};
use futures::{SinkExt, StreamExt};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tokio::io::{Interest, unix::AsyncFd};
use tokio_seqpacket::{
    UnixSeqpacket,
    ancillary::{AncillaryMessageWriter, OwnedAncillaryMessage},
};

/// One end of a connection.
pub(crate) trait Link: Sized {
    /// Takes over a non-blocking socket. `room` is the length of the longest message or packet.
    fn new(socket: OwnedFd, room: usize) -> Self;

    /// Sends a message, or keeps it for [`flush`](Self::flush). Closes the descriptor once it is sent.
    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>);

    async fn flush(&mut self);

    /// Receives a message or more, and returns the length of their payload.
    async fn recv(&mut self, fds: &mut Vec<OwnedFd>) -> usize;
}

/// This crate, over either kind of socket.
pub(crate) struct Fdwire(Framed<FrameCodec>);

impl Link for Fdwire {
    fn new(socket: OwnedFd, _: usize) -> Self {
        Self(Framed::new(Socket::try_from(socket).unwrap(), FrameCodec::default()))
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        let frame = Frame::new(payload.clone());
        self.0.feed(if let Some(fd) = fd { frame.with_fd(fd) } else { frame }).await.unwrap();
    }

    async fn flush(&mut self) {
        self.0.flush().await.unwrap();
    }

    async fn recv(&mut self, fds: &mut Vec<OwnedFd>) -> usize {
        let frame = self.0.next().await.unwrap().unwrap();
        fds.extend(frame.fds);
        frame.payload.len()
    }
}

/// tokio-seqpacket, message by message. Reads every message into the same buffer: what an application that keeps
/// messages does next, copy them out of it, is not counted.
pub(crate) struct TokioSeqpacket {
    socket: UnixSeqpacket,
    buffer: BytesMut,
}

/// A buffer to receive into. It does not begin at the start of a page, as a plain large `Vec` does: some processors are
/// ten times slower there, and the comparison would be between allocators.
fn receive_buffer(bytes: usize) -> BytesMut {
    const PAGE: usize = 4096;
    let mut buffer = BytesMut::zeroed(bytes + 2 * PAGE);
    buffer.advance(buffer.as_ptr().align_offset(PAGE) + 64);
    buffer.truncate(bytes);
    buffer
}

/// Room for a descriptor, aligned for the control message's header.
#[repr(align(8))]
struct Control([u8; 24]);

impl Link for TokioSeqpacket {
    fn new(socket: OwnedFd, room: usize) -> Self {
        Self { socket: socket.try_into().unwrap(), buffer: receive_buffer(room) }
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        let mut control = Control([0; 24]);
        let mut control = AncillaryMessageWriter::new(&mut control.0);
        if let Some(fd) = &fd {
            control.add_fds([fd]).unwrap();
        }
        let sent = self.socket.send_vectored_with_ancillary(&[IoSlice::new(payload)], &mut control).await.unwrap();
        assert_eq!(sent, payload.len());
    }

    async fn flush(&mut self) {}

    async fn recv(&mut self, fds: &mut Vec<OwnedFd>) -> usize {
        let mut control = Control([0; 24]);
        let buffer = &mut [IoSliceMut::new(&mut self.buffer)];
        let (info, control) = self.socket.recv_vectored_with_ancillary(buffer, &mut control.0).await.unwrap();
        for message in control.into_messages() {
            if let OwnedAncillaryMessage::FileDescriptors(arrived) = message {
                fds.extend(arrived);
            }
        }
        info.bytes_read()
    }
}

/// `sendmsg` and `recvmsg` on a SEQPACKET socket, as one would write it by hand for tokio. All messages between two
/// flushes go in one packet, which the receiver takes as it is: the floor for any coalescing.
pub(crate) struct Bare {
    io: AsyncFd<OwnedFd>,
    payloads: Vec<Bytes>,
    fds: Vec<OwnedFd>,
    buffer: BytesMut,
    control: Vec<u8>,
}

const FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL).union(MsgFlags::MSG_CMSG_CLOEXEC);

impl Link for Bare {
    #[allow(unsafe_code, reason = "tokio has no safe registration")]
    fn new(socket: OwnedFd, room: usize) -> Self {
        // SAFETY: an `OwnedFd` is open and keeps its number for as long as it lives, and it lives in the `AsyncFd`.
        let io = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE | Interest::WRITABLE) };
        Self {
            io: io.unwrap(),
            payloads: Vec::new(),
            fds: Vec::new(),
            buffer: receive_buffer(room),
            control: nix::cmsg_space!([RawFd; 253]),
        }
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        self.payloads.push(payload.clone());
        self.fds.extend(fd);
    }

    async fn flush(&mut self) {
        let pieces = self.payloads.iter().map(|payload| IoSlice::new(payload)).collect::<Vec<_>>();
        let fds = self.fds.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[] } else { &rights[..] };
        loop {
            let mut ready = self.io.writable().await.unwrap();
            let send = |io: &AsyncFd<OwnedFd>| Ok(sendmsg::<()>(io.as_raw_fd(), &pieces, control, FLAGS, None)?);
            if let Ok(sent) = ready.try_io(send) {
                assert_eq!(sent.unwrap(), self.payloads.iter().map(Bytes::len).sum::<usize>());
                break;
            }
        }
        self.payloads.clear();
        self.fds.clear();
    }

    #[allow(unsafe_code, reason = "nix gives received descriptors as numbers")]
    async fn recv(&mut self, fds: &mut Vec<OwnedFd>) -> usize {
        let Self { io, buffer, control, .. } = self;
        loop {
            let mut ready = io.readable().await.unwrap();
            let buffer = &mut [IoSliceMut::new(buffer)];
            let received = ready.try_io(|io| Ok(recvmsg::<()>(io.as_raw_fd(), buffer, Some(control), FLAGS)?));
            let Ok(received) = received else { continue };
            let received = received.unwrap();
            for message in received.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(arrived) = message {
                    // SAFETY: the kernel has just installed it in this process, for this message.
                    fds.extend(arrived.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            return received.bytes;
        }
    }
}
