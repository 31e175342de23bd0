//! The receiving direction of a connection, without waiting.

use std::{
    io, mem,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;

use super::{senders::Senders, spare};
use crate::{
    closer::Account,
    codec::{Decoder, FdQueue, Inbound, Step, Unfinished},
    credentials::Credentials,
    error::Error,
    socket::{Endpoint, SocketKind},
    sys::{self, Received},
};

/// The receiving direction of a connection: the bytes and descriptors that have arrived, and the
/// state of the direction.
///
/// It does not contain its socket. The caller passes the same socket in all calls.
#[derive(Debug)]
pub(crate) struct ReceiveSide {
    inbound: Inbound,
    state: Receiving,
    senders: Senders,
    timing: RestTiming,
}

/// The state of a receiving direction.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Receiving {
    /// More may be received.
    #[default]
    Open,
    /// The error or the end was yielded, and nothing follows.
    Over,
}

/// The content of a receiving direction, without its codec.
#[derive(Debug, Default)]
pub(crate) struct ReceiveParts {
    /// The bytes that were received and not decoded.
    pub(super) bytes: BytesMut,
    /// The descriptors that were received and that no message has claimed.
    pub(super) fds: FdQueue<OwnedFd>,
    pub(super) state: Receiving,
    /// The processes that sent the received bytes.
    pub(super) senders: Senders,
}

impl ReceiveSide {
    /// Returns a direction that goes on with `parts`.
    pub(crate) fn new(socket: Endpoint<'_>, parts: ReceiveParts) -> Self {
        let ReceiveParts { bytes, fds, state, senders } = parts;
        let inbound = Inbound::new(socket.kind() == SocketKind::SeqPacket, bytes, fds);
        let mut side = Self { inbound, state, senders, timing: RestTiming::default() };
        side.set_closer(socket);
        if state == Receiving::Over {
            side.inbound.end();
        }
        side
    }

    /// Returns the next message, or what to do to get one. After [`Step::End`], call
    /// [`last_error`](Self::last_error).
    ///
    /// # Errors
    /// The errors of the decoder. The caller has to [fail](Self::fail) the direction then.
    #[inline(always)]
    pub(crate) fn next<D: Decoder>(&mut self, decoder: &mut D) -> Result<Step<D::Item>, D::Error> {
        self.inbound.next(decoder)
    }

    /// Charges the peer's uid for the messages that are not complete. Call it when
    /// [`next`](Self::next) finds no complete message.
    ///
    /// # Errors
    /// [`Error::OverUidLimit`] if the uid holds more than it may hold.
    pub(crate) fn hold(&self, socket: Endpoint<'_>) -> Result<(), Error> {
        socket.hold(self.inbound.bytes.len(), self.inbound.fds.count())
    }

    /// Returns true if part of a message has arrived, or a descriptor that no message has claimed.
    pub(crate) fn has_part(&self) -> bool {
        !self.inbound.bytes.is_empty() || self.inbound.fds.count() > 0
    }

    /// Returns the process that sent the message that was decoded last.
    pub(crate) fn credentials(&self) -> Option<&Credentials> {
        self.senders.of_message(self.inbound.decoded()).map(|credentials| &**credentials)
    }

    /// Makes the queue close its descriptors in the background, unless they are taken out.
    fn set_closer(&mut self, socket: Endpoint<'_>) {
        self.inbound.fds.set_closer(Arc::<Account>::clone(socket.account()));
    }

    /// Makes room in the buffer, and makes one `recvmsg`.
    ///
    /// # Errors
    /// The errors of recvmsg(2).
    pub(crate) fn receive<D: Decoder>(
        &mut self,
        socket: BorrowedFd<'_>,
        decoder: &D,
    ) -> io::Result<Received> {
        let most = self.inbound.make_room(decoder, spare::take).min(decoder.max_receive_bytes());
        // With no room, `recvmsg` returns 0, which looks like the end of the stream.
        sys::recvmsg(socket, &mut self.inbound.bytes, most.max(1), &mut self.inbound.fds)
    }

    /// Handles the result of a [`receive`](Self::receive). `is_rest` is true if
    /// [part](Self::has_part) of a message had arrived before.
    ///
    /// # Errors
    /// [`Error::TruncatedPacket`] and [`Error::MixedSenders`].
    pub(crate) fn received(
        &mut self,
        socket: Endpoint<'_>,
        mut received: Received,
        is_rest: bool,
    ) -> Result<(), Error> {
        if !self.inbound.fds.has_closer() {
            self.set_closer(socket); // a decoder has replaced the whole queue
        }
        // Credentials count only if this process has switched them on. Another holder of the socket
        // may have done so too.
        let credentials = received.credentials.take().filter(|_| socket.wants_credentials());
        if received.bytes > 0 && (credentials.is_some() || self.senders.know_any()) {
            self.senders.received(credentials, self.inbound.decoded(), is_rest)?;
        }
        match received {
            Received { packet_truncated: true, .. } => return Err(Error::TruncatedPacket),
            Received { control_truncated: true, .. } => self.inbound.received_truncated(),
            Received { bytes: 0, .. } => self.inbound.end_of_stream(),
            _ => self.inbound.received(),
        }
        Ok(())
    }

    /// Returns the time limit for the rest of a message. Call it when there is nothing to receive.
    pub(crate) fn rest(&mut self, limit: Duration, now: impl FnOnce() -> Instant) -> Rest {
        self.timing.rest(self.inbound.unfinished(), limit, now)
    }

    /// Returns the error for a message that did not come in time.
    pub(crate) fn unfinished(&self) -> Error {
        Error::Unfinished { bytes: self.inbound.bytes.len(), fds: self.inbound.fds.count() }
    }

    /// Gives up unused buffers. Call it when there is nothing to receive.
    pub(crate) fn release(&mut self) {
        spare::keep(self.inbound.release());
    }

    /// Returns the error to report at the end of the stream, once.
    pub(crate) fn last_error(&mut self, socket: Endpoint<'_>) -> Option<Error> {
        self.release();
        let before = mem::replace(&mut self.state, Receiving::Over);
        (before == Receiving::Open && socket.was_reset()).then_some(Error::Reset)
    }

    /// Ends the direction after an error: closes everything that has arrived.
    pub(crate) fn fail(&mut self, socket: Endpoint<'_>) {
        // Drop everything that the direction holds: bytes, descriptors, and the charge for them.
        self.state = Receiving::Over;
        self.inbound.end();
        self.inbound.bytes.clear();
        self.release();
        self.inbound.close_fds();
        self.end(socket);
    }

    /// Takes back the charge of the peer's uid. Call it when the half with this direction is
    /// dropped.
    pub(crate) fn end(&self, socket: Endpoint<'_>) {
        let _ = socket.hold(0, 0); // to hold nothing is never over a limit
    }

    /// Takes out everything that has arrived, for a direction that goes on elsewhere.
    pub(crate) fn take(&mut self) -> ReceiveParts {
        self.release();
        ReceiveParts {
            bytes: mem::take(&mut self.inbound.bytes),
            fds: mem::take(&mut self.inbound.fds),
            state: self.state,
            senders: mem::take(&mut self.senders).carried_over(self.inbound.decoded()),
        }
    }
}

/// The time limit for the rest of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rest {
    /// There is no limit, because nothing is unfinished or no limit is set.
    Unlimited,
    /// The rest has to come before this time.
    Until(Instant),
    /// The time limit has been reached.
    Over,
}

/// The measurement of the time for the rest of a message.
#[derive(Debug, Default)]
struct RestTiming {
    /// The message and the descriptor for which the time runs.
    unfinished: Unfinished,
    /// `None` if nothing is unfinished, or the limit is longer than the clock reaches.
    deadline: Option<Instant>,
}

impl RestTiming {
    /// Returns the limit, if this is unfinished now. The time begins when it is unfinished for the
    /// first time.
    fn rest(
        &mut self,
        unfinished: Unfinished,
        limit: Duration,
        now: impl FnOnce() -> Instant,
    ) -> Rest {
        let (unfinished, begins) = self.unfinished.update(unfinished);
        self.unfinished = unfinished;
        if unfinished.is_nothing() {
            self.deadline = None;
            return Rest::Unlimited;
        }
        let now = now();
        // If this is called long after the deadline, the receiver was not polled, and the peer may
        // have waited for this process. So such a deadline does not count.
        if begins
            || self.deadline.is_some_and(|deadline| now.saturating_duration_since(deadline) > LATE)
        {
            self.deadline = now.checked_add(limit);
        }
        match self.deadline {
            Some(deadline) if now < deadline => Rest::Until(deadline),
            Some(_) => Rest::Over,
            // The limit is longer than the clock reaches.
            None => Rest::Unlimited,
        }
    }
}

/// The delay after a deadline from which on it counts as missed because the receiver was not
/// polled.
const LATE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::{io::IoSlice, os::fd::AsFd};

    use super::*;
    use crate::{codec::Codec, socket::Socket};

    #[tokio::test]
    async fn a_decoder_that_takes_the_whole_queue_does_not_keep_later_descriptors_from_the_closer()
    {
        struct TakesTheQueue;
        impl Codec for TakesTheQueue {}
        impl Decoder for TakesTheQueue {
            type Item = ();
            type Error = Error;
            fn decode(
                &mut self,
                src: &mut BytesMut,
                fds: &mut FdQueue,
            ) -> Result<Option<()>, Error> {
                *fds = FdQueue::new();
                src.clear();
                Ok(None)
            }
        }
        let (a, b) = Socket::pair(SocketKind::Stream).unwrap();
        let mut side = ReceiveSide::new(b.endpoint(), ReceiveParts::default());
        for _ in 0..2 {
            assert!(matches!(side.next(&mut TakesTheQueue), Ok(Step::Receive)));
            sys::sendmsg(a.as_fd(), &[IoSlice::new(b"x")], [a.as_fd()].into_iter()).unwrap();
            let received = side.receive(b.as_fd(), &TakesTheQueue).unwrap();
            side.received(b.endpoint(), received, false).unwrap();
            assert!(side.inbound.fds.has_closer());
        }
    }

    const LIMIT: Duration = Duration::from_secs(30);

    fn nothing() -> Unfinished {
        Unfinished::default()
    }

    /// Returns the state after part of one message has arrived.
    fn part() -> Unfinished {
        Inbound::<OwnedFd>::new(false, BytesMut::from("part"), FdQueue::new()).unfinished()
    }

    #[test]
    fn the_time_for_the_rest_begins_when_nothing_more_is_there() {
        let start = Instant::now();
        let at = |seconds| move || start + Duration::from_secs(seconds);
        let mut timing = RestTiming::default();
        assert_eq!(timing.rest(nothing(), LIMIT, || unreachable!("nobody waits")), Rest::Unlimited);
        assert_eq!(timing.rest(part(), LIMIT, at(5)), Rest::Until(at(35)()));
        assert_eq!(
            timing.rest(part(), LIMIT, at(34)),
            Rest::Until(at(35)()),
            "more of it gives no more time"
        );
        assert_eq!(timing.rest(part(), LIMIT, at(35)), Rest::Over);

        assert_eq!(timing.rest(nothing(), LIMIT, at(35)), Rest::Unlimited);
        assert_eq!(
            timing.rest(part(), LIMIT, at(36)),
            Rest::Until(at(66)()),
            "the next message has a time of its own"
        );
    }

    #[test]
    fn a_time_that_nobody_has_waited_for_does_not_count() {
        let start = Instant::now();
        let mut timing = RestTiming::default();
        timing.rest(part(), LIMIT, || start);
        let late = start + LIMIT + LATE + Duration::from_millis(1);
        assert_eq!(timing.rest(part(), LIMIT, || late), Rest::Until(late + LIMIT));
        assert_eq!(timing.rest(part(), LIMIT, || late + LIMIT), Rest::Over);
    }

    #[test]
    fn a_limit_longer_than_the_clock_reaches_is_none() {
        let mut timing = RestTiming::default();
        for _ in 0..2 {
            assert_eq!(timing.rest(part(), Duration::MAX, Instant::now), Rest::Unlimited);
        }
    }

    #[test]
    fn no_time_at_all_is_over_at_once() {
        assert_eq!(RestTiming::default().rest(part(), Duration::ZERO, Instant::now), Rest::Over);
    }
}
