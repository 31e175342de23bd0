//! The task that serves one link of a channel.

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

/// The most bytes of answers that may wait to be sent. More can only wait if the dispatcher keeps
/// sending requests and does not read the answers.
const MAX_UNSENT_BYTES: usize = 256 << 10;

/// Serves one link of the channel until the link ends, even if the application never asks for a
/// connection.
pub(super) struct Task {
    pub(super) channel: Arc<Channel>,
    /// The number of the link.
    pub(super) link: u64,
    pub(super) read: ReadHalf<SalvagingCodec>,
    /// Goes off at the next timeout of the book, or earlier.
    pub(super) timer: Option<Pin<Box<Sleep>>>,
}

impl Future for Task {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let end = match self.poll_read(cx) {
            Poll::Ready(end) => end,
            // Everything that has arrived is read, so the answers cover all of it.
            Poll::Pending => {
                let answered = self.poll_answer(cx);
                self.channel.end_abandoned();
                ready!(answered)
            }
        };
        self.channel.end_link(self.link, end);
        Poll::Ready(())
    }
}

impl Task {
    /// Reads all messages that have arrived. Ready when the link has ended.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<IncomingEnd> {
        while let Some(message) = ready!(self.read.poll_next_unpin(cx)) {
            let end = match message {
                Ok(message) => self.channel.on_message(self.link, message),
                Err(error) if error.is_peer_gone() => break,
                Err(error) => Some(IncomingEnd::Failed(Arc::new(error))),
            };
            if let Some(end) = end {
                return Poll::Ready(end);
            }
        }
        Poll::Ready(IncomingEnd::DispatcherGone)
    }

    /// Sends the answers, reports, and demand that are due. Ready when the link has ended.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<IncomingEnd> {
        let Self { channel, link: number, timer, .. } = self;
        let mut state = channel.lock();
        let Some((link, headroom)) = state.link_and_headroom(*number) else {
            return Poll::Ready(IncomingEnd::DispatcherGone); // `Channel` has ended this link
        };
        link.task.clone_from(cx.waker());
        link.book.ask(now(), || headroom.count());
        // Do what is due, and set the timer to the next timeout.
        while let Some(due) = link.book.next_timeout() {
            let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(due.into())));
            // A timer that is set too early stays: it usually has to move to a later time, and one
            // useless wakeup costs less than setting the timer on each poll.
            if due < timer.deadline().into_std() || timer.is_elapsed() {
                timer.as_mut().reset(due.into());
            }
            if timer.as_mut().poll(cx).is_pending() {
                break;
            }
            link.book.on_timeout(now());
            link.book.ask(now(), || headroom.count());
        }
        // Send, and find out whether the link has ended.
        let has_left = link.book.leave();
        link.feed();
        match link.poll_flush(cx) {
            Poll::Ready(Ok(())) if has_left => return Poll::Ready(IncomingEnd::Drained),
            Poll::Ready(Err(error)) if !error.is_peer_gone() => {
                return Poll::Ready(IncomingEnd::Failed(Arc::new(error)));
            }
            Poll::Ready(Err(_)) if link.is_cut_off() => return Poll::Ready(IncomingEnd::Fenced),
            _ => {}
        }
        if link.unsent_bytes() > MAX_UNSENT_BYTES {
            let error = Error::invalid("a dispatcher sends requests without reading the answers");
            return Poll::Ready(IncomingEnd::Failed(Arc::new(error)));
        }
        let is_worth_asking = link.book.is_worth_asking();
        // Wake the application after the lock is released, because a waker runs foreign code.
        let application = if is_worth_asking { state.application.take() } else { None };
        drop(state);
        application.into_iter().for_each(Waker::wake);
        Poll::Pending
    }
}

/// Ends the link if the runtime drops the task before that.
impl Drop for Task {
    fn drop(&mut self) {
        self.channel.end_link(self.link, IncomingEnd::Failed(Arc::new(Error::Closed)));
    }
}
