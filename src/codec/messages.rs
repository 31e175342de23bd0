//! The list of messages in a [`SendBuf`]: encoding adds to it, and a send removes from it.

use std::{io::IoSlice, mem};

use smallvec::SmallVec;

use super::{
    Encoder, Grouping, SendBuf,
    carrier::Plan,
    message::{Message, OpenPart, RUN_BELOW},
};
use crate::error::{Error, SendError};

impl<F> SendBuf<F> {
    /// Appends one message. If the encoder fails or panics, nothing of the message is left in the
    /// buffer, and `discard` gets its descriptors.
    #[inline(always)]
    pub(crate) fn encode_with<E: Encoder<I, F>, I>(
        &mut self,
        encoder: &mut E,
        item: I,
        discard: fn(Vec<F>),
    ) -> Result<(), SendError<I, E::Error>> {
        let open = OpenMessage { buf: self, discard };
        encoder.encode(item, open.buf)?;
        open.buf
            .commit(encoder.grouping())
            .map_err(|error| SendError::from(E::Error::from(error)))?;
        mem::forget(open);
        Ok(())
    }

    /// Finishes the open message. A message without bytes and descriptors is ignored.
    ///
    /// # Errors
    /// An error if no call can carry the message. Then it is still open, for
    /// [`roll_back`](Self::roll_back).
    #[inline]
    pub(crate) fn commit(&mut self, grouping: Grouping) -> Result<(), Error> {
        if self.plain_run == Some(grouping) && self.run_takes_message() {
            self.finished_bytes = self.len();
            return Ok(());
        }
        self.commit_any(grouping)
    }

    /// Returns true if the open message may join the run, provided that its grouping is the same.
    #[inline]
    fn run_takes_message(&self) -> bool {
        self.len() - self.message_bytes < RUN_BELOW && self.fds.len() == self.finished_fds
    }

    /// Does the same for any message.
    #[inline(never)] // so that `commit` is short
    fn commit_any(&mut self, grouping: Grouping) -> Result<(), Error> {
        if grouping == self.run_grouping && self.run_takes_message() {
            // Parts without descriptors may share a call, as messages do.
            self.finished_bytes = self.len();
            self.begin_message();
            return Ok(());
        }
        self.end_part();
        // Check all parts before any of them becomes a message, so that a refusal changes nothing.
        for index in 0..self.open_parts.len() {
            self.open_part(index, grouping).check(self.max_packet_bytes)?;
        }
        // The run before comes first. The next run has the grouping of this message.
        self.end_run();
        if grouping != Grouping::Alone {
            self.run_grouping = grouping;
        }
        for index in 0..self.open_parts.len() {
            self.messages.push_back(self.open_part(index, grouping));
        }
        if let Some(last) = self.open_parts.last() {
            self.message_bytes = last.end_bytes;
            (self.finished_bytes, self.finished_fds) = (last.end_bytes, last.end_fds);
        }
        self.begin_message();
        Ok(())
    }

    /// Sets the fields for a new open message.
    fn begin_message(&mut self) {
        self.open_parts.clear();
        (self.open_head, self.open_pieces) = (None, 0);
        self.plain_run = Some(self.run_grouping);
    }

    /// Returns a part of the open message as a separate message.
    fn open_part(&self, index: usize, grouping: Grouping) -> Message {
        let OpenPart { end_bytes, end_fds, head } = self.open_parts[index];
        let (start_bytes, start_fds) = match index.checked_sub(1) {
            Some(before) => (self.open_parts[before].end_bytes, self.open_parts[before].end_fds),
            None => (self.finished_bytes, self.finished_fds),
        };
        let bytes = end_bytes - start_bytes;
        Message {
            unsent_bytes: bytes,
            unsent_fds: end_fds - start_fds,
            unsent_head: head.map_or(bytes, |head| head.get() - 1),
            grouping,
            ..Message::default()
        }
    }

    /// Returns the length of the run if nothing else waits and one call has enough pieces for it.
    #[inline]
    pub(super) fn only_run(&self) -> Option<usize> {
        (self.messages.is_empty() && self.bytes.fit_one_call()).then_some(self.finished_bytes)
    }

    /// Moves the run to `messages`. It becomes part of the last message if that was a run too, is
    /// short and is not begun. Otherwise it becomes a new message.
    pub(super) fn end_run(&mut self) {
        let (bytes, grouping) = (self.finished_bytes - self.message_bytes, self.run_grouping);
        if bytes == 0 {
            return;
        }
        match self.messages.back_mut() {
            Some(last) if last.takes_run(bytes, grouping) => {
                last.unsent_bytes += bytes;
                last.unsent_head = last.unsent_bytes;
            }
            _ => self.messages.push_back(Message {
                unsent_bytes: bytes,
                unsent_head: bytes,
                grouping,
                ..Message::default()
            }),
        }
        self.message_bytes = self.finished_bytes;
    }

    /// Removes the open message with all its parts. Returns its descriptors.
    pub(crate) fn roll_back(&mut self) -> Vec<F> {
        self.begin_message();
        // No piece of shared bytes belongs to two messages, so only whole ones are removed.
        self.bytes.remove_last(self.len() - self.finished_bytes);
        self.fds.split_off(self.finished_fds).into()
    }

    /// Moves all messages of `later` to the end of this buffer. None of them may have been sent in
    /// part.
    pub(crate) fn append(&mut self, later: &mut Self) {
        debug_assert!(
            later.ahead == 0 && later.messages.front().is_none_or(|message| !message.begun)
        );
        if later.is_empty() {
            return; // do not check this buffer: it may have an open message that can't be sent
        }
        debug_assert!([&*self, &*later].iter().all(|buf| buf.has_no_open_message()));
        self.end_run();
        later.end_run();
        self.bytes.append(&mut later.bytes);
        self.fds.append(&mut later.fds);
        self.messages.append(&mut later.messages);
        self.message_bytes += mem::take(&mut later.message_bytes);
        self.finished_bytes += mem::take(&mut later.finished_bytes);
        self.finished_fds += mem::take(&mut later.finished_fds);
    }

    /// Returns true if no encoder has begun a message.
    fn has_no_open_message(&self) -> bool {
        self.len() == self.finished_bytes
            && self.fds.len() == self.finished_fds
            && self.open_parts.is_empty()
    }

    /// Returns the first `limit` bytes that wait, or fewer if they are more than `IOV_MAX` pieces.
    pub(crate) fn io_slices(&self, limit: usize) -> SmallVec<[IoSlice<'_>; 8]> {
        self.bytes.io_slices(limit)
    }

    /// Returns the number of bytes in the first `IOV_MAX` pieces.
    pub(super) fn reachable_bytes(&self) -> usize {
        self.bytes.reachable_bytes()
    }

    /// Returns the first `count` descriptors that wait.
    pub(crate) fn first_fds(&self, count: usize) -> impl ExactSizeIterator<Item = &F> + Clone {
        self.fds.range(..count)
    }

    /// Removes what a send has taken, and returns its descriptors: `bytes` bytes, which may be
    /// fewer than planned, and all descriptors of the plan, because they went with the first byte.
    pub(crate) fn sent(&mut self, plan: Plan, bytes: usize) -> impl Iterator<Item = F> {
        debug_assert!(0 < bytes && bytes <= plan.bytes);
        // In the usual case, only the run waited, and all of it was sent.
        if self.only_run() == Some(bytes) {
            self.finished_bytes = 0;
            self.bytes.remove_first(bytes);
            return None.into_iter().flatten();
        }
        self.end_run();
        self.attribute_sent_fds(plan.fds);
        // Take the bytes from the messages. Descriptors of a message that begins are no longer
        // ahead.
        let mut remaining = bytes;
        while remaining > 0 {
            let message = self.messages.front_mut().expect("messages hold all bytes");
            if !message.begun {
                message.begun = true;
                self.ahead -= message.sent_fds;
            }
            let of_this = remaining.min(message.unsent_bytes);
            remaining -= of_this;
            message.unsent_bytes -= of_this;
            message.unsent_head = message.unsent_head.saturating_sub(of_this);
            if message.unsent_bytes == 0 {
                self.messages.pop_front();
            }
        }
        // Take bytes and descriptors out of the buffer.
        self.message_bytes -= bytes;
        self.finished_bytes -= bytes;
        self.finished_fds -= plan.fds;
        self.bytes.remove_first(bytes);
        // Without descriptors, an empty `Drain` would take longer than everything else here.
        (plan.fds > 0).then(|| self.fds.drain(..plan.fds)).into_iter().flatten()
    }

    /// Counts sent descriptors for the messages to which they belong.
    fn attribute_sent_fds(&mut self, mut fds: usize) {
        for message in &mut self.messages {
            if fds == 0 {
                break;
            }
            let of_this = fds.min(message.unsent_fds);
            fds -= of_this;
            message.unsent_fds -= of_this;
            message.sent_fds += of_this;
            if !message.begun {
                self.ahead += of_this;
            }
        }
    }
}

/// A guard for the open message. On drop it removes the message from the buffer.
struct OpenMessage<'a, F> {
    buf: &'a mut SendBuf<F>,
    discard: fn(Vec<F>),
}

impl<F> Drop for OpenMessage<'_, F> {
    #[cold]
    fn drop(&mut self) {
        (self.discard)(self.buf.roll_back());
    }
}
