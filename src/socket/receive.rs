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
    /// Readiness is kept until the socket is certainly empty, because no new event comes for data
    /// that is left. Usually only `EAGAIN` proves that. A short read of a stream proves it too,
    /// unless [something splits](Self::is_drained) reads.
    pub(crate) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        mut receive: impl FnMut(BorrowedFd<'_>) -> Result<Received>,
    ) -> Poll<Result<Received>> {
        loop {
            // Takes part in the cooperative budget.
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
    /// out-of-band mark. The first two bring control data. The third is announced as priority
    /// readiness, which stays set from then on.
    fn is_drained(&self, received: &Received) -> bool {
        let stream = self.kind() == SocketKind::Stream;
        let split = received.with_control || received.bytes == 0;
        stream
            && received.short
            && !split
            && self.io.try_io(Interest::PRIORITY, |_| Ok(())).is_err()
    }

    /// Returns a timer of the runtime that the socket is registered with.
    pub(crate) fn sleep_until(&self, deadline: Instant) -> Sleep {
        let _context = self.runtime.enter();
        tokio::time::sleep_until(deadline)
    }
}
