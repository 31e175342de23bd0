//! The one receive loop.

use std::{
    io::Result,
    os::fd::BorrowedFd,
    task::{Context, Poll, ready},
};

use tokio::{
    io::Interest,
    time::{Instant, Sleep},
};

use super::{Socket, SocketKind};
use crate::sys::Received;

impl Socket {
    /// Waits until there is something to receive, and calls `receive`, which makes one
    /// [`recvmsg`](crate::sys::recvmsg).
    ///
    /// Readiness is kept until the socket is certainly empty, because tokio gets no new event for
    /// data that is left (edge-triggered epoll). `EAGAIN` proves that the socket is empty. A read
    /// of a stream that returns less than there was room for also proves it, with
    /// [exceptions](Self::is_drained).
    pub(crate) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        mut receive: impl FnMut(BorrowedFd<'_>) -> Result<Received>,
    ) -> Poll<Result<Received>> {
        loop {
            // This also takes a unit of tokio's cooperative budget.
            let mut ready = ready!(self.io.poll_read_ready(cx))?;
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
    /// out-of-band mark. In the first two cases the read returns control data. In the third, epoll
    /// reports priority readiness, which stays set from then on.
    fn is_drained(&self, received: &Received) -> bool {
        let stream = self.kind() == SocketKind::Stream;
        let split = received.with_control || received.bytes == 0;
        stream
            && received.short
            && !split
            && self.io.try_io(Interest::PRIORITY, |_| Ok(())).is_err()
    }

    /// Returns a timer of the runtime with which the socket is registered.
    pub(crate) fn sleep_until(&self, deadline: Instant) -> Sleep {
        let _context = self.runtime.enter();
        tokio::time::sleep_until(deadline)
    }
}
