//! The one send loop and the one receive loop.

use std::{
    future::Future,
    io::Result,
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
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

use super::{Attempt, Backoff, Endpoint, Socket, SocketKind};
use crate::{
    closer::BackgroundFd,
    sys::{self, Received},
};

impl Socket {
    /// Waits until there is something to receive, and calls `receive`, which makes one
    /// [`recvmsg`](sys::recvmsg).
    ///
    /// Readiness is kept until the socket is certainly empty, because no new event comes for data
    /// that is left. Usually only `EAGAIN` proves that. A short read of a stream proves it too,
    /// unless [something splits](Self::is_drained) reads.
    pub(crate) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        mut receive: impl FnMut(BorrowedFd<'_>) -> Result<Received>,
    ) -> Poll<Result<Received>> {
        loop {
            let mut ready = ready!(self.io.poll_read_ready(cx))?; // takes part in the cooperative budget
            match self.endpoint().receive(&mut receive)? {
                None => ready.clear_ready(),
                Some(received) => {
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
    /// The kernel ends the read of a stream early at three places: behind bytes that came with
    /// descriptors, between data of different processes if credentials are on, and before the
    /// out-of-band mark. The first two bring control data. The third is announced as priority
    /// readiness, which stays set from then on.
    fn is_drained(&self, received: &Received) -> bool {
        let stream = self.kind() == SocketKind::Stream;
        let split = received.with_control || received.bytes == 0;
        stream && received.short && !split && self.io.try_io(Interest::PRIORITY, |_| Ok(())).is_err()
    }

    /// Returns a timer of the runtime that the socket is registered with.
    pub(crate) fn sleep_until(&self, deadline: Instant) -> Sleep {
        let _context = self.runtime.enter();
        tokio::time::sleep_until(deadline)
    }

    /// Makes attempts until one of them has sent something. It tries first, and waits only if the
    /// socket takes nothing.
    pub(crate) fn poll_send(
        &self,
        cx: &mut Context<'_>,
        wait: &mut SendWait,
        mut attempt: impl FnMut(Endpoint<'_>) -> Result<Attempt>,
    ) -> Poll<Result<()>> {
        loop {
            let mut ready = ready!(wait.poll(cx, self))?;
            let coop = ready!(coop::poll_proceed(cx));
            match attempt(self.endpoint())? {
                Attempt::Sent => {
                    coop.made_progress();
                    *wait = SendWait::default();
                    return Poll::Ready(Ok(()));
                }
                Attempt::Again => {}
                // The readiness from before the send may be stale. So first ask for readiness and
                // try again. If that fails too, it was stale: clear it and wait.
                Attempt::Full => match &mut ready {
                    _ if self.quiet => wait.for_duplicate(self)?,
                    Some(ready) => ready.clear_ready(),
                    None => wait.full = true,
                },
                Attempt::Scarce => wait.a_while(self),
            }
        }
    }
}

/// The events that a sender waits for.
#[derive(Debug, Default)]
pub(crate) struct SendWait {
    /// True if the socket took nothing, so its readiness is asked before the next attempt.
    full: bool,
    /// A copy of a [quiet](Socket::quiet) socket that took nothing, registered for writing.
    duplicate: Option<AsyncFd<BackgroundFd>>,
    timer: Option<Pin<Box<Sleep>>>,
    backoff: Backoff,
}

impl SendWait {
    /// Waits for the timer, and for the socket if it was full.
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
    /// If the socket's runtime has ended.
    fn for_duplicate(&mut self, socket: &Socket) -> Result<()> {
        let _context = socket.runtime.enter();
        let copy = socket.as_fd().try_clone_to_owned();
        match copy.and_then(|copy| sys::register(socket.state.guard(copy), Interest::WRITABLE)) {
            Ok(duplicate) => self.duplicate = Some(duplicate),
            Err(error) => match error.raw_os_error() {
                // There is no descriptor left for the duplicate, or no memory to watch it.
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC) => self.a_while(socket),
                _ => return Err(error),
            },
        }
        Ok(())
    }

    /// Returns true if it waits for a resource of the kernel, which no event announces.
    pub(crate) fn is_for_a_while(&self) -> bool {
        self.timer.is_some()
    }

    /// Waits for a while. The time grows until a send succeeds.
    pub(crate) fn a_while(&mut self, socket: &Socket) {
        let _context = socket.runtime.enter();
        self.timer = Some(Box::pin(tokio::time::sleep(self.backoff.next())));
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, io::IoSlice, time::Duration};

    use super::*;

    #[tokio::test]
    async fn after_a_send_that_succeeds_nothing_is_left_of_what_was_waited_for() {
        for kind in [SocketKind::SeqPacket, SocketKind::Stream] {
            let (socket, _peer) = Socket::pair(kind).unwrap();
            let mut wait = SendWait { full: true, ..SendWait::default() };
            for _ in 0..3 {
                wait.a_while(&socket);
            }
            let attempt = |endpoint: Endpoint<'_>| {
                endpoint.send(&[IoSlice::new(b"x")], std::iter::empty()).map(|_| Attempt::Sent)
            };
            poll_fn(|cx| socket.poll_send(cx, &mut wait, attempt)).await.unwrap();

            assert!(!wait.full, "the next send asks first whether the socket is writable");
            assert_eq!(wait.backoff.next(), Duration::from_millis(1), "the next shortage is waited for longer");
        }
    }
}
