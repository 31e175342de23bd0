//! The task that sends what the [`Sender`](super::Sender)s of a connection accept.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use super::{
    WriteHalf,
    outbound::Outbound,
    shared::{Next, Shared},
};
use crate::{codec::Codec, transport::Sending};

/// Sends the messages that [`Sender`](crate::Sender)s accept. This is a future that you spawn.
/// [`WriteHalf::into_sender`](crate::framed::WriteHalf::into_sender) makes it.
///
/// It resolves when all senders are dropped and everything is sent, or when sending has failed. The
/// result is the [`WriteHalf`], with everything that was accepted and not sent. After a failure,
/// the next [`flush`](WriteHalf::flush) of the half returns the error. Drop the half to end the
/// direction, or reunite it with its other half.
///
/// One descriptor that the kernel refuses makes sending fail for all senders: see
/// [`Sender`](crate::Sender).
///
/// If you drop the driver before it resolves, the sending direction is shut down, and the
/// descriptors of messages that were not sent are closed. From then on, senders get their items
/// back with [`Error::Closed`](crate::Error::Closed).
///
/// # Panics
/// If it is polled after it has resolved.
#[derive(Debug)]
#[must_use = "nothing is sent unless the driver is spawned or awaited"]
pub struct SendDriver<E> {
    shared: Arc<Shared<E>>,
    /// `None` once the driver has resolved.
    outbound: Option<Outbound>,
}

impl<E> SendDriver<E> {
    pub(super) fn new(shared: Arc<Shared<E>>, outbound: Outbound) -> Self {
        Self { shared, outbound: Some(outbound) }
    }

    /// Puts the half together again, with everything that is not sent.
    fn finish(&mut self) -> WriteHalf<E> {
        let mut outbound = self.outbound.take().expect("it is there until the driver resolves");
        let sending = match outbound.side.state().clone() {
            Sending::Open => Sending::Closed, // no sender is left that could get this error
            ended => ended,
        };
        let (encoder, mut pending) = self.shared.end(sending);
        // Messages that no call has sent yet follow those that the driver had begun to send.
        outbound.side.buf.append(&mut pending);
        WriteHalf {
            encoder: encoder.expect("only the driver takes it, when it resolves"),
            outbound,
        }
    }
}

impl<E: Codec> Future for SendDriver<E> {
    type Output = WriteHalf<E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<WriteHalf<E>> {
        let this = self.get_mut();
        let outbound = this.outbound.as_mut().expect("polled after it has resolved");
        loop {
            match this.shared.next(cx, outbound) {
                Next::Send => {
                    let before = outbound.side.buf.len();
                    // An error stays in the half. The next call of `next` returns `Finish` then.
                    let _ = ready!(outbound.poll_send_until(cx, |buf| buf.len() < before));
                }
                // Other tasks run now, and append their messages.
                Next::Yield => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Next::Wait => return Poll::Pending,
                Next::Finish => return Poll::Ready(this.finish()),
            }
        }
    }
}

impl<E> Drop for SendDriver<E> {
    fn drop(&mut self) {
        if self.outbound.is_some() {
            self.shared.abandon();
        }
    }
}
