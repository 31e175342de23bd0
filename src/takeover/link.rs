//! The new process's end of the connection to the server that it replaces.

use std::time::Instant as StdInstant;

use futures::StreamExt;
use tokio::time::{Instant, sleep_until};

use super::{
    outbox::Outbox,
    protocol::{FromTaker, TakerCodec, ToTaker},
    steps::TakerStep,
    taker::{Taker, TakerSettings},
};
use crate::{Error, Framed, Socket, framed::ReadHalf};

/// A [`Taker`] with its connection.
#[derive(Debug)]
pub(super) struct TakerLink {
    pub(super) taker: Taker,
    read: ReadHalf<TakerCodec>,
    out: Outbox<TakerCodec, FromTaker>,
    /// True while READY is queued and not written in full.
    is_ready_unwritten: bool,
    /// False once the end of the data was read.
    can_read: bool,
    /// False once the socket has refused to send.
    can_write: bool,
}

/// An event of the connection that the owner of the link has to handle.
pub(super) enum Event {
    /// A message. It was applied to the taker already.
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
            can_read: true,
            can_write: true,
        }
    }

    /// Returns the taker's next step. Steps that send a message are taken here.
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

    /// Returns true if everything was written, or nothing more can be written.
    pub(super) fn is_flushed(&self) -> bool {
        !self.can_write || self.out.is_empty()
    }

    /// Waits until something happens, and applies it to the taker.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub(super) async fn next_event(&mut self) -> Option<Event> {
        let deadline = self.taker.next_timeout().map(Instant::from_std);
        let is_unsent = !self.is_flushed();
        let Self { taker, read, out, is_ready_unwritten, can_read, can_write } = self;
        tokio::select! {
            biased;
            // Writing comes before reading: what the giver's end means depends on whether READY was
            // written.
            sent = out.flush(), if is_unsent => match sent {
                Ok(()) if std::mem::take(is_ready_unwritten) => taker.on_ready_written(),
                Ok(()) => {}
                Err(_) => {
                    *can_write = false;
                    taker.on_send_failed(now());
                }
            },
            message = read.next(), if *can_read => match message {
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
                    *can_read = false;
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

/// Returns the time of tokio's clock, which tests can pause.
pub(super) fn now() -> StdInstant {
    Instant::now().into_std()
}
