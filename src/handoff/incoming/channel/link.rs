//! One link to a dispatcher: its [`Book`], and the sending half of its socket.

use std::{
    collections::VecDeque,
    net::Shutdown,
    os::fd::{AsFd, AsRawFd},
    pin::Pin,
    task::{Context, Poll, Waker},
};

use futures_sink::Sink;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};

use crate::{
    Error, Framed, Socket,
    framed::{ReadHalf, WriteHalf},
    handoff::{
        incoming::{book::Book, prepared::Prepared},
        protocol::{FromWorker, SalvagingCodec, WorkerCodec},
    },
};

/// A worker's end of one link. Its receiving half belongs to the [`Task`](super::Task).
pub(super) struct Link {
    /// Distinguishes this link from the other links of this worker.
    pub(super) number: u64,
    pub(super) book: Book<Prepared>,
    /// `None` after this link has ended.
    pub(super) write: Option<WriteHalf<WorkerCodec>>,
    /// The total number of bytes given to `write`, or `u64::MAX` after `write` has refused a
    /// message.
    fed: u64,
    /// For each message that is not completely sent, the value of `fed` at its end. The oldest
    /// message is first, so the values only grow.
    message_ends: VecDeque<u64>,
    /// Wakes the task that serves this link.
    pub(super) task: Waker,
}

impl Link {
    pub(super) fn new(
        number: u64,
        book: Book<Prepared>,
        socket: Socket,
    ) -> (Self, ReadHalf<SalvagingCodec>) {
        let (read, write) =
            Framed::with_codecs(socket.quiet(), SalvagingCodec::default(), WorkerCodec::default())
                .into_split();
        let link = Self {
            number,
            book,
            write: Some(write),
            fed: 0,
            message_ends: VecDeque::new(),
            task: Waker::noop().clone(),
        };
        (link, read)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.write.is_none()
    }

    /// Ends this link in both directions. Returns false if it has ended before.
    pub(super) fn shut_down(&mut self) -> bool {
        let Some(write) = self.write.take() else { return false };
        // Dropping this half does not end the link: the task has the other half of the socket, and
        // another process may have a copy.
        let _ = write.socket().shutdown(Shutdown::Both);
        true
    }

    /// Moves the messages of the book into the send buffer of the socket.
    pub(super) fn feed(&mut self) {
        let Some(write) = &mut self.write else { return };
        while let Some(message) = self.book.next_message() {
            let before = write.unsent().bytes;
            // The sink refuses a message only if the socket has failed. Neither this message nor
            // any after it is ever sent, and no number of sent bytes reaches `u64::MAX`.
            match Pin::new(&mut *write).start_send(message) {
                Ok(()) => {
                    self.fed = self.fed.saturating_add((write.unsent().bytes - before) as u64)
                }
                Err(_) => self.fed = u64::MAX,
            }
            self.message_ends.push_back(self.fed);
        }
    }

    /// Sends what the socket takes, and reports to the book how many messages were completely sent.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(write) = &mut self.write else { return Poll::Ready(Ok(())) };
        let flushed = Sink::<FromWorker>::poll_flush(Pin::new(&mut *write), cx);
        if self.fed != u64::MAX {
            let sent = self.fed - write.unsent().bytes as u64;
            let messages = self.message_ends.partition_point(|end| *end <= sent);
            self.message_ends.drain(..messages);
            self.book.on_sent(messages as u64);
        }
        flushed.map_err(|error| error.error)
    }

    pub(super) fn unsent_bytes(&self) -> usize {
        self.write.as_ref().map_or(0, |write| write.unsent().bytes)
    }

    /// Returns true if the dispatcher has stopped reading from this link but still exists. Called
    /// after a send has failed. If the dispatcher is gone instead, its last messages or the end of
    /// the stream can already be read.
    pub(super) fn is_cut_off(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let socket = self.write.as_ref().map(WriteHalf::socket);
        socket.is_some_and(|socket| {
            recv(socket.as_fd().as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
        })
    }
}
