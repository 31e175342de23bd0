//! The task that serves a channel.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use futures::StreamExt;
use tokio::time::{Sleep, sleep_until};

use super::{Channel, now};
use crate::{
    Error,
    framed::ReadHalf,
    handoff::{incoming::IncomingEnd, protocol::SalvagingCodec},
};

/// More bytes of answers than this wait for a dispatcher only if it asks and asks and does not
/// read.
const MAX_UNSENT_BYTES: usize = 256 << 10;

/// Serves one link of the channel until it ends, whether or not the application asks for anything.
pub(super) struct Task {
    pub(super) channel: Arc<Channel>,
    /// The number of the link.
    pub(super) link: u64,
    pub(super) read: ReadHalf<SalvagingCodec>,
    pub(super) timer: Option<Pin<Box<Sleep>>>,
}

impl Future for Task {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let end = match self.poll_read(cx) {
            Poll::Ready(end) => end,
            Poll::Pending => {
                let answered = self.poll_answer(cx);
                self.channel.end_abandoned();
                ready!(answered)
            }
        };
        self.channel.end(self.link, end);
        Poll::Ready(())
    }
}

impl Task {
    /// Reads all there is. Ready at the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<IncomingEnd> {
        while let Some(message) = ready!(self.read.poll_next_unpin(cx)) {
            let end = match message {
                Ok(message) => self.channel.received(self.link, message),
                Err(error) if error.is_peer_gone() => break,
                Err(error) => Some(IncomingEnd::Failed(Arc::new(error))),
            };
            if let Some(end) = end {
                return Poll::Ready(end);
            }
        }
        Poll::Ready(IncomingEnd::DispatcherGone)
    }

    /// Says what there is to say. Ready at the end.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<IncomingEnd> {
        let Self { channel, link: number, timer, .. } = self;
        let mut state = channel.lock();
        let Some((link, headroom)) = state.link_and_headroom(*number) else {
            return Poll::Ready(IncomingEnd::DispatcherGone); // it was ended elsewhere
        };
        link.task.clone_from(cx.waker());
        link.book.ask(now(), || headroom.count());
        while let Some(due) = link.book.next_timeout() {
            let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(due.into())));
            // Usually there is more time than before. Then it goes off too early, which costs less
            // than setting it each time.
            if due < timer.deadline().into_std() || timer.is_elapsed() {
                timer.as_mut().reset(due.into());
            }
            if timer.as_mut().poll(cx).is_pending() {
                break;
            }
            link.book.on_timeout(now());
            link.book.ask(now(), || headroom.count());
        }
        let left = link.book.leave();
        link.feed();
        match link.poll_flush(cx) {
            Poll::Ready(Ok(())) if left => return Poll::Ready(IncomingEnd::Drained),
            Poll::Ready(Err(error)) if !error.is_peer_gone() => {
                return Poll::Ready(IncomingEnd::Failed(Arc::new(error)));
            }
            Poll::Ready(Err(_)) if link.is_cut_off() => return Poll::Ready(IncomingEnd::Fenced),
            _ => {}
        }
        if link.unsent_bytes() > MAX_UNSENT_BYTES {
            let error = Error::invalid("a dispatcher that asks without reading the answers");
            return Poll::Ready(IncomingEnd::Failed(Arc::new(error)));
        }
        let is_worth_asking = link.book.is_worth_asking();
        let application = if is_worth_asking { state.application.take() } else { None };
        drop(state);
        application.into_iter().for_each(Waker::wake);
        Poll::Pending
    }
}

/// The runtime may drop it in the middle.
impl Drop for Task {
    fn drop(&mut self) {
        self.channel.end(self.link, IncomingEnd::Failed(Arc::new(Error::Closed)));
    }
}
