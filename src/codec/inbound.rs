//! The receiving direction of a connection, without I/O.

use std::os::fd::OwnedFd;

use bytes::BytesMut;

use super::{Decoder, FdQueue, buffers::Buffers};
use crate::error::Error;

/// The bytes and descriptors that have arrived and are not decoded yet, with the phase of the
/// receiving direction.
///
/// ```text
///                 decode: message          decode_eof: message
///                   ┌────┐                      ┌────┐
///                   │    ▼                      │    ▼
///            ┌────► Decoding              ┌───► Draining ────► Ended ◄──── any error
///   received │         │ decode: none     │        decode_eof: none
///            │         ▼                  │
///            └────  Receiving ────────────┘
///                                end of stream
/// ```
#[derive(Debug)]
pub(crate) struct Inbound<F = OwnedFd> {
    pub(crate) bytes: BytesMut,
    pub(crate) fds: FdQueue<F>,
    /// True if descriptors were lost. The queue records that too, but a decoder may replace the
    /// queue.
    truncated: bool,
    buffers: Buffers,
    phase: Phase,
    /// The number of messages decoded.
    decoded: u64,
}

/// The message of which only part has arrived, and the oldest descriptor that waits for its
/// message. Each has a number, which stays the same until the message is complete.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Unfinished {
    /// The number of the message of which some bytes have arrived.
    message: Option<u64>,
    /// The number of the descriptor that has waited longest for its message.
    fd: Option<u64>,
}

impl Unfinished {
    /// Returns the part of this that is the same in `now`.
    fn still_in(self, now: Self) -> Self {
        Self {
            message: self.message.filter(|_| self.message == now.message),
            fd: self.fd.filter(|_| self.fd == now.fd),
        }
    }

    /// Returns the message and the descriptor for which the time runs from now on. The second value
    /// is true if it begins now. `self` is the value before, and `now` the present state.
    pub(crate) fn update(self, now: Self) -> (Self, bool) {
        match self.still_in(now) {
            Self { message: None, fd: None } => (now, true),
            rest => (rest, false),
        }
    }

    /// Returns true if nothing is unfinished.
    pub(crate) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// The phase of a receiving direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A complete message may have arrived.
    Decoding,
    /// No complete message has arrived.
    Receiving,
    /// The stream has ended, and what has arrived is decoded.
    Draining,
    /// Nothing follows.
    Ended,
}

/// The next step of the receiving direction.
#[derive(Debug)]
pub(crate) enum Step<T> {
    /// A message.
    Item(T),
    /// No message is complete. Call `make_room`, receive into the spare room of `bytes` and into
    /// `fds`, and then call `received` or `end_of_stream`.
    Receive,
    /// The direction has ended.
    End,
}

impl<F> Inbound<F> {
    pub(crate) fn new(packets: bool, bytes: BytesMut, fds: FdQueue<F>) -> Self {
        let buffers = Buffers::new(packets, &bytes);
        let truncated = fds.is_truncated();
        Self { bytes, fds, truncated, buffers, phase: Phase::Decoding, decoded: 0 }
    }

    /// Returns the next message, or what to do to get one. After an error it returns the end.
    #[inline(always)]
    pub(crate) fn next<D: Decoder<F>>(
        &mut self,
        decoder: &mut D,
    ) -> Result<Step<D::Item>, D::Error> {
        loop {
            match self.phase {
                // After a loss, only a message that needs none of the lost descriptors is good.
                Phase::Decoding => match decoder.decode(&mut self.bytes, &mut self.fds) {
                    Ok(Some(item)) if !self.truncated || self.is_untouched_by_the_loss() => {
                        self.decoded += 1;
                        return Ok(Step::Item(item));
                    }
                    // No complete message is left, so more has to be received.
                    Ok(None) if !self.truncated || self.is_made_good() => {
                        let fds = self.fds.count();
                        if fds > decoder.limits().max_queued_fds {
                            return Err(self.fail(Error::UnclaimedFds { fds }.into()));
                        }
                        self.phase = Phase::Receiving;
                    }
                    Ok(_) => return Err(self.fail(Error::TruncatedControl.into())),
                    Err(error) => return Err(self.fail(error)),
                },
                Phase::Receiving => return Ok(Step::Receive),
                // The stream has ended. The decoder gets the rest.
                Phase::Draining => match decoder.decode_eof(&mut self.bytes, &mut self.fds) {
                    Ok(Some(item)) => {
                        self.decoded += 1;
                        return Ok(Step::Item(item));
                    }
                    Ok(None) => self.phase = Phase::Ended,
                    Err(error) => return Err(self.fail(error)),
                },
                Phase::Ended => return Ok(Step::End),
            }
        }
    }

    /// Returns true if the message that was decoded needs none of the descriptors that were lost.
    fn is_untouched_by_the_loss(&self) -> bool {
        self.fds.is_truncated() && !self.fds.is_spoiled()
    }

    /// Returns true if the decoder has given up the messages that have lost descriptors.
    fn is_made_good(&mut self) -> bool {
        self.truncated = !self.fds.take_made_good();
        !self.truncated
    }

    /// Makes room in `bytes`, possibly in a new buffer. Returns the greatest number of bytes to
    /// receive. `spare` returns a buffer that [was released](Self::release), or an empty one.
    pub(crate) fn make_room<D: Decoder<F>>(
        &mut self,
        decoder: &D,
        spare: impl FnOnce() -> BytesMut,
    ) -> usize {
        let limit = decoder.limits().max_payload_bytes;
        match decoder.missing_bytes(&self.bytes) {
            Some(missing) => self.buffers.make_room_for(&mut self.bytes, missing.min(limit), spare),
            None => self.buffers.make_room(&mut self.bytes, spare),
        }
    }

    /// Gives up the empty buffers. Returns a buffer that other connections can use. It may be
    /// without memory. Call this when there is nothing to receive.
    pub(crate) fn release(&mut self) -> BytesMut {
        self.buffers.release(&mut self.bytes)
    }

    /// Handles that bytes or descriptors were added.
    pub(crate) fn received(&mut self) {
        self.buffers.received();
        self.phase = Phase::Decoding;
    }

    /// Handles that bytes and descriptors were added, and that further descriptors were lost. The
    /// kernel loses the last ones, so messages that need none of them are not affected.
    pub(crate) fn received_truncated(&mut self) {
        self.fds.set_truncated();
        self.truncated = true;
        self.received();
    }

    /// Handles the end of the stream.
    pub(crate) fn end_of_stream(&mut self) {
        self.phase = Phase::Draining;
    }

    /// Returns the number of messages decoded.
    pub(crate) fn decoded(&self) -> u64 {
        self.decoded
    }

    /// Returns the message and descriptor that are not complete.
    pub(crate) fn unfinished(&self) -> Unfinished {
        Unfinished {
            message: (!self.bytes.is_empty()).then_some(self.decoded),
            fd: self.fds.first(),
        }
    }

    /// Closes the descriptors that no message has claimed.
    pub(crate) fn close_fds(&mut self) {
        self.fds.clear();
    }

    /// Ends the direction: nothing more is received or decoded.
    pub(crate) fn end(&mut self) {
        self.phase = Phase::Ended;
    }

    /// Ends the direction with an error. After a loss of descriptors, the error is always that of
    /// the loss, because it may have caused any other error.
    fn fail<E: From<Error>>(&mut self, error: E) -> E {
        self.phase = Phase::Ended;
        if self.truncated { Error::TruncatedControl.into() } else { error }
    }
}
