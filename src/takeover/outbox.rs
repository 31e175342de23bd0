//! A queue of messages in front of a connection.

use std::collections::VecDeque;

use crate::{
    Error,
    codec::{Codec, Encoder},
    framed::WriteHalf,
};

/// The sending half of a connection, with a queue of messages that are not encoded yet.
#[derive(Debug)]
pub(super) struct Outbox<C, M> {
    write: WriteHalf<C>,
    queue: VecDeque<M>,
}

/// The reason why sending failed.
pub(super) enum SendFailed {
    /// The codec has refused a message, for example because it is too long. Others can be sent.
    Message(Error),
    /// The socket has failed, and nothing more can be sent.
    Socket(Error),
}

impl<C, M> Outbox<C, M> {
    pub(super) fn new(write: WriteHalf<C>) -> Self {
        Self { write, queue: VecDeque::new() }
    }

    pub(super) fn push(&mut self, message: M) {
        self.queue.push_back(message);
    }

    /// Removes the messages that are not encoded yet.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
    }

    /// Returns true if everything was written.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.write.unsent().bytes == 0
    }
}

impl<C: Codec + Encoder<M, Error = Error>, M> Outbox<C, M> {
    /// Sends the whole queue, and waits until the socket has taken it.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped: a message leaves the queue only when there is room for it.
    pub(super) async fn flush(&mut self) -> Result<(), SendFailed> {
        while !self.queue.is_empty() {
            let permit = self.write.reserve().await.map_err(SendFailed::Socket)?;
            if let Some(message) = self.queue.pop_front() {
                permit.send(message).map_err(|refused| SendFailed::Message(refused.error))?;
            }
        }
        self.write.flush().await.map_err(SendFailed::Socket)
    }
}
