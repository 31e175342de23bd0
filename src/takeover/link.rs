//! The new process's end of the connection to the server that it replaces.

use std::time::Instant as StdInstant;

use futures::StreamExt;
use tokio::time::{Instant, sleep_until};

use super::{
    outbox::Outbox,
    protocol::{FromTaker, TakerCodec, ToTaker},
    taker::{Taker, TakerSettings, TakerStep},
};
use crate::{Error, Framed, Socket, framed::ReadHalf};

/// A [`Taker`] with its connection.
#[derive(Debug)]
pub(super) struct TakerLink {
    pub(super) taker: Taker,
    read: ReadHalf<TakerCodec>,
    out: Outbox<TakerCodec, FromTaker>,
    /// READY was queued, and is not written in full.
    is_ready_unwritten: bool,
    /// Something may still come.
    reads: bool,
    /// Something may still be written.
    writes: bool,
}

/// An event of the connection that its owner has to know.
pub(super) enum Event {
    /// A message, which was applied to the taker already.
    Message(ToTaker),
    /// A breach of the protocol.
    Error(Error),
}

impl TakerLink {
    pub(super) fn new(socket: Socket, settings: TakerSettings) -> Self {
        let (read, write) = Framed::new(socket, TakerCodec::default()).into_split();
        let taker = Taker::new(now(), settings);
        Self {
            taker,
            read,
            out: Outbox::new(write),
            is_ready_unwritten: false,
            reads: true,
            writes: true,
        }
    }

    /// Returns what is to be done next, except for sending.
    pub(super) fn next_step(&mut self) -> Option<TakerStep> {
        loop {
            match self.taker.next_step()? {
                TakerStep::Send(message) => {
                    self.is_ready_unwritten |= message == FromTaker::Ready;
                    self.out.push(message);
                }
                step => return Some(step),
            }
        }
    }

    /// Returns true if nothing waits to be written, or nothing more can be.
    pub(super) fn is_flushed(&self) -> bool {
        !self.writes || self.out.is_empty()
    }

    /// Waits until something happens, and applies it to the taker.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub(super) async fn next_event(&mut self) -> Option<Event> {
        let deadline = self.taker.next_timeout().map(Instant::from_std);
        let is_unsent = !self.is_flushed();
        let Self { taker, read, out, is_ready_unwritten, reads, writes } = self;
        tokio::select! {
            biased;
            // Before reading: whether READY was written decides what an end means.
            sent = out.flush(), if is_unsent => match sent {
                Ok(()) if std::mem::take(is_ready_unwritten) => taker.on_ready_written(),
                Ok(()) => {}
                Err(_) => {
                    *writes = false;
                    taker.on_send_failed(now());
                }
            },
            message = read.next(), if *reads => match message {
                Some(Ok(message)) => {
                    taker.on_message(now(), &message);
                    return Some(Event::Message(message));
                }
                Some(Err(error)) if error.is_peer_gone() => {} // the end follows
                Some(Err(error)) => {
                    taker.on_violation(now());
                    return Some(Event::Error(error));
                }
                None => {
                    *reads = false;
                    taker.on_end(now());
                }
            },
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                taker.on_timeout(now());
            }
            else => std::future::pending().await,
        }
        None
    }
}

pub(super) fn now() -> StdInstant {
    Instant::now().into_std()
}
