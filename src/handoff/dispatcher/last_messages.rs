//! The last messages of a worker that was fenced.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

use bytes::BytesMut;

use super::{WorkerId, handover::Handover, pool::Pool, protocol::FromWorker};
use crate::{
    Socket,
    codec::{Decoder, FdQueue},
    handoff::protocol::TolerantCodec,
    sys,
};

/// The number of errors of `recvmsg` in a row after which reading is given up.
const MOST_FAILURES: usize = 100;

/// The messages that a worker had sent before it was fenced, and that the pool has not got.
pub(super) struct LastMessages {
    messages: Vec<FromWorker>,
    /// False if there are further messages, which cannot be read.
    is_all: bool,
    /// The number of offers that were not sent to the worker.
    unsent: usize,
}

impl LastMessages {
    /// Reads the messages that are left in a socket after its stream has failed or ended, and adds
    /// them to those that were received before. An empty packet looks like the end, and messages
    /// may follow an error of `recvmsg`. In both cases a worker may have sent a whole ADOPTED after
    /// it.
    pub(super) fn read_rest(received: Vec<FromWorker>, unsent: usize, socket: &Socket) -> Self {
        let mut last = Self { messages: received, is_all: true, unsent };
        let (mut bytes, mut fds) = (BytesMut::new(), FdQueue::<OwnedFd>::new());
        let (mut codec, mut failures) = (TolerantCodec::default(), 0);
        while sys::unread(socket.as_fd()).is_ok_and(|bytes| bytes > 0) {
            if failures == MOST_FAILURES {
                last.is_all = false;
                break;
            }
            bytes.reserve(64 << 10);
            match sys::recvmsg(socket.as_fd(), &mut bytes, usize::MAX, &mut fds) {
                Ok(_) => failures = 0, // no bytes are an empty packet: more is unread
                Err(_) => failures += 1,
            }
            while let Ok(Some(message)) = codec.decode(&mut bytes, &mut fds) {
                last.messages.extend(message.ok());
            }
        }
        last
    }

    /// Lets the pool process the messages. Returns the number of offers that were not sent.
    pub(super) fn apply_to(
        self,
        pool: &mut Pool<Box<Handover>>,
        id: WorkerId,
        now: Instant,
    ) -> usize {
        for message in self.messages {
            pool.on_last_message(id, message, self.unsent, now);
        }
        if !self.is_all {
            pool.on_unreadable(id, self.unsent, now);
        }
        self.unsent
    }
}
