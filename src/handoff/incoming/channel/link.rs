//! One link to a dispatcher: its book, and the socket's sending direction.

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

pub(super) struct Link {
    /// Tells it from the other links of this worker.
    pub(super) number: u64,
    pub(super) book: Book<Prepared>,
    /// `None` after the end.
    pub(super) write: Option<WriteHalf<WorkerCodec>>,
    /// Bytes given to `write` in all.
    fed: u64,
    /// Where each message ends among them that was not sent as a whole.
    ends: VecDeque<u64>,
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
            ends: VecDeque::new(),
            task: Waker::noop().clone(),
        };
        (link, read)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.write.is_none()
    }

    /// Ends the conversation. Returns false if it has ended before.
    pub(super) fn shut_down(&mut self) -> bool {
        let Some(write) = self.write.take() else { return false };
        // Standard input stays open beside the socket that was made of it.
        let _ = write.socket().shutdown(Shutdown::Both);
        true
    }

    /// Gives the book's messages to the socket's queue.
    pub(super) fn feed(&mut self) {
        let Some(write) = &mut self.write else { return };
        while let Some(message) = self.book.next_message() {
            let before = write.unsent().bytes;
            // One that is refused is never sent, and nothing after it: the socket has failed.
            match Pin::new(&mut *write).start_send(message) {
                Ok(()) => {
                    self.fed = self.fed.saturating_add((write.unsent().bytes - before) as u64)
                }
                Err(_) => self.fed = u64::MAX,
            }
            self.ends.push_back(self.fed);
        }
    }

    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(write) = &mut self.write else { return Poll::Ready(Ok(())) };
        let flushed = Sink::<FromWorker>::poll_flush(Pin::new(&mut *write), cx);
        if self.fed != u64::MAX {
            let sent = self.fed - write.unsent().bytes as u64;
            let messages = self.ends.partition_point(|end| *end <= sent);
            self.ends.drain(..messages);
            self.book.on_sent(messages as u64);
        }
        flushed.map_err(|error| error.error)
    }

    pub(super) fn unsent_bytes(&self) -> usize {
        self.write.as_ref().map_or(0, |write| write.unsent().bytes)
    }

    /// Returns true if the dispatcher takes no more answers though it is there: asked after a send
    /// has failed. If it has gone instead, the end of the stream, or what it sent before, is there
    /// to be read already.
    pub(super) fn is_cut_off(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let socket = self.write.as_ref().map(WriteHalf::socket);
        socket.is_some_and(|socket| {
            recv(socket.as_fd().as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
        })
    }
}
