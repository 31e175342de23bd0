use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use super::{
    shared::{Next, Shared},
    write::Outbound,
};
use crate::{Codec, WriteHalf};

/// Sends what [`Sender`](crate::Sender)s accept: a future to be spawned. From
/// [`WriteHalf::into_sender`](crate::WriteHalf::into_sender).
///
/// It resolves when all senders are dropped and everything is sent, or when sending has failed,
/// which the next [`flush`](WriteHalf::flush) of the half says again. In the [`WriteHalf`] that it
/// gives back is everything that was accepted and not sent. Drop that to end the direction, or
/// reunite it with its other half.
///
/// A single descriptor that the kernel refuses makes sending fail for all senders: see
/// [`Sender`](crate::Sender).
///
/// Dropping the driver before shuts down the sending direction, and closes what was accepted and
/// not sent. Senders get their items back from then on, with
/// [`Error::Closed`](crate::Error::Closed).
///
/// # Panics
/// If it is polled after it has resolved.
#[derive(Debug)]
#[must_use = "nothing is sent unless it is spawned or awaited"]
pub struct Driver<E> {
    shared: Arc<Shared<E>>,
    /// `None` once it has resolved.
    outbound: Option<Outbound>,
}

impl<E> Driver<E> {
    pub(super) fn new(shared: Arc<Shared<E>>, outbound: Outbound) -> Self {
        Self { shared, outbound: Some(outbound) }
    }
}

impl<E: Codec> Future for Driver<E> {
    type Output = WriteHalf<E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<WriteHalf<E>> {
        let this = self.get_mut();
        let outbound = this.outbound.as_mut().expect("polled after it has resolved");
        loop {
            match this.shared.next(cx, outbound) {
                Next::Send => {
                    let before = outbound.side.buf.len();
                    // Its error stays in the half.
                    let _ = ready!(outbound.poll_send_until(cx, |buf| buf.len() < before));
                }
                Next::Yield => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Next::Wait => return Poll::Pending,
                Next::Finish => break,
            }
        }
        let outbound = this.outbound.take().expect("used just now");
        Poll::Ready(this.shared.finish(outbound))
    }
}

impl<E> Drop for Driver<E> {
    fn drop(&mut self) {
        if self.outbound.is_some() {
            self.shared.abandon();
        }
    }
}
