//! The one send loop.

use std::{
    future::Future,
    io::Result,
    os::fd::AsFd,
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
    time::Sleep,
};

use super::{Attempt, Endpoint, Socket};
use crate::{backoff::Backoff, closer::BackgroundFd, sys};

impl Socket {
    /// Makes attempts until one of them has sent something. The first attempt is made without
    /// waiting.
    pub(crate) fn poll_send(
        &self,
        cx: &mut Context<'_>,
        wait: &mut SendWait,
        mut attempt: impl FnMut(Endpoint<'_>) -> Result<Attempt>,
    ) -> Poll<Result<()>> {
        loop {
            // If the last attempt has failed, wait for the event that it needs.
            let mut ready = ready!(wait.poll(cx, self))?;
            let coop = ready!(coop::poll_proceed(cx));
            match attempt(self.endpoint())? {
                Attempt::Sent => {
                    coop.made_progress();
                    *wait = SendWait::default();
                    return Poll::Ready(Ok(()));
                }
                Attempt::Again => {}
                // tokio may still have readiness from before this attempt. So try once more with
                // the readiness that it has. If that attempt fails too, the readiness was stale:
                // clear it and wait for an event.
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

/// The events for which a sender waits before the next attempt.
#[derive(Debug, Default)]
pub(crate) struct SendWait {
    /// True if the socket was full at the last attempt. Then the next one needs readiness.
    full: bool,
    /// A copy of a [quiet](Socket::quiet) socket that was full, registered for writing.
    duplicate: Option<AsyncFd<BackgroundFd>>,
    /// Set while sending waits for a resource of the kernel.
    timer: Option<Pin<Box<Sleep>>>,
    /// The growing times of `timer`.
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
        if self.full { socket.io.poll_write_ready(cx).map_ok(Some) } else { Poll::Ready(Ok(None)) }
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
                // There is no descriptor left for the duplicate, or no room in the event loop.
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC) => {
                    self.a_while(socket)
                }
                _ => return Err(error),
            },
        }
        Ok(())
    }

    /// Returns true if it waits for a resource of the kernel, which reports no event for that.
    pub(crate) fn is_for_a_while(&self) -> bool {
        self.timer.is_some()
    }

    /// Sets the timer. Its time grows until a send succeeds.
    pub(crate) fn a_while(&mut self, socket: &Socket) {
        let _context = socket.runtime.enter();
        self.timer = Some(Box::pin(tokio::time::sleep(self.backoff.next())));
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, io::IoSlice, time::Duration};

    use super::*;
    use crate::socket::SocketKind;

    #[tokio::test]
    async fn a_send_that_succeeds_resets_the_wait() {
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

            assert!(!wait.full, "the next send waits for readiness first");
            assert_eq!(
                wait.backoff.next(),
                Duration::from_millis(1),
                "the next shortage begins with a longer wait"
            );
        }
    }
}
