//! Code that users of bare sockets write by hand: it puts messages together, and it provides the
//! memory to receive into.

use std::{
    io::{IoSlice, Result},
    os::fd::OwnedFd,
};

use ::fdwire::SocketKind;
use bytes::{Buf, Bytes, BytesMut};
use nix::{
    libc,
    sys::socket::{getsockopt, sockopt},
};
use smallvec::SmallVec;

use super::{LONG_MESSAGE, Load, Setup};

const PAGE: usize = 4096;

/// Messages that wait to be sent together. Short ones are copied one behind the other, which is
/// cheaper than a piece in the call for each.
#[derive(Debug, Default)]
pub(super) struct Batch {
    copied: Vec<u8>,
    shared: Vec<Bytes>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Batch {
    const COPY_UP_TO: usize = 1024;

    pub(super) fn push(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        match payload.len() <= Self::COPY_UP_TO {
            true => self.copied.extend_from_slice(payload),
            false => self.shared.push(payload.clone()),
        }
        self.fds.extend(fd);
    }

    /// Returns all messages in one piece, for crates that take nothing else.
    pub(super) fn in_one_piece(&mut self) -> &[u8] {
        if self.shared.len() > 1 {
            for message in self.shared.drain(..) {
                self.copied.extend_from_slice(&message);
            }
        }
        self.shared.first().map_or(&self.copied, |message| &message[..])
    }

    pub(super) fn clear(&mut self) {
        self.copied.clear();
        self.shared.clear();
        self.fds.clear();
    }

    /// Sends everything. The first call has all descriptors, and all messages as far as the socket
    /// takes them. A message longer than a packet is cut.
    pub(super) async fn send_all(
        &mut self,
        max_packet: &mut usize,
        mut call: impl AsyncFnMut(&[IoSlice<'_>], &mut Vec<OwnedFd>) -> Result<usize>,
    ) {
        // The copied messages are one piece, and each long message is another.
        let Self { copied, shared, fds } = self;
        let first = (!copied.is_empty()).then_some(&copied[..]);
        let pieces = first.into_iter().chain(shared.iter().map(|message| &message[..]));
        let mut all = pieces.map(IoSlice::new).collect::<SmallVec<[_; 16]>>();
        let mut pieces = &mut all[..];
        while let [first, ..] = pieces {
            // A call has all pieces, or the beginning of one that is longer than a packet.
            let cut = [IoSlice::new(&first[..first.len().min(*max_packet)])];
            match call(if first.len() > *max_packet { &cut } else { pieces }, fds).await {
                Ok(sent) => {
                    fds.clear();
                    IoSlice::advance_slices(&mut pieces, sent);
                }
                // The kernel has no memory in one piece for a packet of that size.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) && *max_packet > PAGE => {
                    *max_packet /= 2
                }
                Err(error) => panic!("sending: {error}"),
            }
        }
        drop(all);
        copied.clear();
        shared.clear();
    }
}

/// Returns the most bytes of a packet that the socket takes, in whole pages.
pub(super) fn largest_packet(socket: &OwnedFd) -> usize {
    let bytes = getsockopt(socket, sockopt::SndBuf).expect("SO_SNDBUF can be read") - 32;
    bytes.min(4_263_616) / PAGE * PAGE
}

/// Returns the most bytes of a packet when fdwire cuts a long message, so that bare calls cut it in
/// the same way.
pub(super) fn same_packet(socket: &OwnedFd, setup: Setup) -> usize {
    match setup.kind {
        SocketKind::SeqPacket => {
            let quarter = getsockopt(socket, sockopt::SndBuf).expect("SO_SNDBUF can be read") / 4;
            quarter.max(64 << 10) / PAGE * PAGE
        }
        _ => usize::MAX,
    }
}

/// Memory to receive into. A long message is received whole, into the memory of the message before
/// it, which is no longer needed. So contenders that need initialised memory pay for that only
/// once, as with a pool of buffers.
#[derive(Debug)]
pub(super) struct Room {
    memory: BytesMut,
    filled: usize,
    of_one_message: bool,
}

impl Room {
    pub(super) fn new(load: Load) -> Self {
        let bytes = load.bytes.max(LONG_MESSAGE);
        // It does not begin at the start of a page, as a plain large `Vec` does: some processors
        // are ten times slower there, and the comparison would be between allocators.
        let mut memory = BytesMut::zeroed(bytes + 2 * PAGE);
        memory.advance(memory.as_ptr().align_offset(PAGE) + 64);
        memory.truncate(bytes);
        Self { memory, filled: 0, of_one_message: load.bytes >= LONG_MESSAGE }
    }

    /// Returns the memory to receive into next.
    pub(super) fn spare(&mut self) -> &mut [u8] {
        &mut self.memory[self.filled..]
    }

    /// Marks the first `bytes` bytes of [`spare`](Self::spare) as received.
    pub(super) fn received(&mut self, bytes: usize) {
        assert!(bytes > 0, "the peer is gone");
        if self.of_one_message {
            self.filled = (self.filled + bytes) % self.memory.len();
        }
    }
}
