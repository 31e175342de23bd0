//! The one send loop and the one receive loop.

use std::{
    future::Future,
    io::{IoSlice, Result},
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll, ready},
};

use nix::libc;
use tokio::{
    io::{
        Interest,
        unix::{AsyncFd, AsyncFdReadyGuard},
    },
    task::coop,
    time::{Instant, Sleep},
};

use super::{Backoff, Socket, SocketKind};
use crate::{
    closer::BackgroundFd,
    sys::{self, Received},
};

impl Socket {
    /// Waits until something is there, and calls `receive`, which makes one
    /// [`recvmsg`](sys::recvmsg). `ECONNRESET` is no error but something to
    /// [ask for](Self::was_reset) at the end.
    ///
    /// Readiness is kept until nothing is left for sure, since no new event comes for data that is left behind. Usually only
    /// `EAGAIN` proves that. A read of a stream that ends early proves it too, unless [something splits](Self::is_drained)
    /// reads.
    pub(crate) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        mut receive: impl FnMut(BorrowedFd<'_>) -> Result<Received>,
    ) -> Poll<Result<Received>> {
        loop {
            let mut ready = ready!(self.io.poll_read_ready(cx))?; // takes part in the cooperative budget
            match receive(self.as_fd()) {
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => ready.clear_ready(),
                    Some(libc::ECONNRESET) => self.reset.store(true, Ordering::Relaxed),
                    Some(libc::EINTR) => {}
                    _ => return Poll::Ready(Err(error)),
                },
                Ok(received) => {
                    if self.is_drained(&received) {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(received));
                }
            }
        }
    }

    /// Returns true if a receive has taken everything that was there when it began.
    ///
    /// The kernel ends the read of a stream early at three places: behind bytes that came with descriptors, between data of
    /// different processes if credentials are on, and before the out-of-band mark. The first two bring control data. The third
    /// is announced as priority readiness, which stays set from then on.
    fn is_drained(&self, received: &Received) -> bool {
        let stream = self.kind == SocketKind::Stream;
        let split = received.with_control || received.bytes == 0;
        stream && received.short && !split && self.io.try_io(Interest::PRIORITY, |_| Ok(())).is_err()
    }

    /// A timer of the runtime that the socket is registered with.
    pub(crate) fn sleep_until(&self, deadline: Instant) -> Sleep {
        let _context = self.runtime.enter();
        tokio::time::sleep_until(deadline)
    }

    /// Whether the peer has closed with unread data. The kernel says so once, to a receive or to a send: on STREAM after the
    /// data that is left to read, on SEQPACKET before it.
    pub(crate) fn was_reset(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }

    /// Sends bytes, and with their first byte descriptors. Returns the number of bytes sent; all descriptors are sent
    /// then. Tries first and waits only when the socket takes nothing.
    pub(crate) fn poll_send<'fd>(
        &self,
        cx: &mut Context<'_>,
        wait: &mut SendWait,
        bytes: &[IoSlice<'_>],
        fds: impl ExactSizeIterator<Item = BorrowedFd<'fd>> + Clone,
    ) -> Poll<Result<usize>> {
        loop {
            let mut ready = ready!(wait.poll(cx, self))?;
            let coop = ready!(coop::poll_proceed(cx));
            match sys::sendmsg(self.as_fd(), bytes, fds.clone()) {
                Err(error) => match error.raw_os_error() {
                    // Readiness from before the send may be stale. Ask for it, and only if it is stale then, wait.
                    Some(libc::EAGAIN) => match &mut ready {
                        _ if self.quiet => wait.for_duplicate(self)?,
                        Some(ready) => ready.clear_ready(),
                        None => wait.full = true,
                    },
                    // Too many descriptors of this uid are in flight, or there is no memory for more. They get fewer when
                    // receivers receive, which no event announces: the socket reports writable all along.
                    Some(libc::ETOOMANYREFS | libc::ENOMEM) => wait.a_while(self),
                    Some(libc::EINTR) => {}
                    Some(libc::ECONNRESET) => {
                        self.reset.store(true, Ordering::Relaxed);
                        return Poll::Ready(Err(error));
                    }
                    _ => return Poll::Ready(Err(error)),
                },
                Ok(sent) => {
                    coop.made_progress();
                    *wait = SendWait::default();
                    return Poll::Ready(Ok(sent));
                }
            }
        }
    }
}

/// What a sender waits for.
#[derive(Debug, Default)]
pub(crate) struct SendWait {
    /// The socket took nothing: to be asked whether it is writable.
    full: bool,
    /// The same where the socket is [quiet](Socket::quiet).
    duplicate: Option<AsyncFd<BackgroundFd>>,
    timer: Option<Pin<Box<Sleep>>>,
    backoff: Backoff,
}

impl SendWait {
    /// Waits for the timer, and for the socket where it was full.
    fn poll<'a>(
        &mut self,
        cx: &mut Context<'_>,
        socket: &'a Socket,
    ) -> Poll<Result<Option<AsyncFdReadyGuard<'a, BackgroundFd>>>> {
        if let Some(timer) = &mut self.timer {
            ready!(timer.as_mut().poll(cx));
            self.timer = None;
        }
        if let Some(duplicate) = &self.duplicate {
            drop(ready!(duplicate.poll_write_ready(cx))?);
            self.duplicate = None;
        }
        match self.full {
            true => socket.io.poll_write_ready(cx).map_ok(Some),
            false => Poll::Ready(Ok(None)),
        }
    }

    /// Waits until a quiet socket is writable.
    ///
    /// # Errors
    /// When the socket's runtime has ended.
    fn for_duplicate(&mut self, socket: &Socket) -> Result<()> {
        let _context = socket.runtime.enter();
        let copy = socket.as_fd().try_clone_to_owned();
        match copy.and_then(|copy| sys::register(socket.guard(copy), Interest::WRITABLE)) {
            Ok(duplicate) => self.duplicate = Some(duplicate),
            Err(error) => match error.raw_os_error() {
                // No descriptor is left for the duplicate, or no memory for watching it.
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC) => self.a_while(socket),
                _ => return Err(error),
            },
        }
        Ok(())
    }

    /// Whether the kernel has too little of something, which no event will announce.
    pub(crate) fn is_for_a_while(&self) -> bool {
        self.timer.is_some()
    }

    /// Waits for a while, longer each time until a send succeeds.
    pub(crate) fn a_while(&mut self, socket: &Socket) {
        let _context = socket.runtime.enter();
        self.timer = Some(Box::pin(tokio::time::sleep(self.backoff.next())));
    }
}

/// What a send of a packet can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TooLarge {
    /// The send buffer holds no packet of this size.
    ForBuffer,
    /// There is no kernel memory in one piece for it at the moment.
    ForMemory,
}

impl TooLarge {
    pub(crate) fn from_error(error: &std::io::Error) -> Option<Self> {
        match error.raw_os_error()? {
            libc::EMSGSIZE => Some(Self::ForBuffer),
            libc::ENOBUFS => Some(Self::ForMemory),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use super::*;

    #[tokio::test]
    async fn after_a_send_that_succeeds_nothing_is_left_of_what_was_waited_for() {
        for kind in [SocketKind::SeqPacket, SocketKind::Stream] {
            let (socket, _peer) = Socket::pair(kind).unwrap();
            let mut wait = SendWait { full: true, ..SendWait::default() };
            for _ in 0..3 {
                wait.a_while(&socket);
            }
            let bytes = [IoSlice::new(b"x")];
            let sent = poll_fn(|cx| socket.poll_send(cx, &mut wait, &bytes, std::iter::empty())).await;
            assert_eq!(sent.unwrap(), 1);

            assert!(!wait.full, "the next send asks first whether the socket is writable");
            assert_eq!(wait.backoff.next(), Duration::from_millis(1), "the next shortage is waited for longer");
        }
    }
}
