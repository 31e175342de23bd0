//! The task that serves a channel.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use futures::StreamExt;
use tokio::time::{Instant, Sleep, sleep};

use super::Channel;
use crate::{
    Error,
    framed::ReadHalf,
    handoff::{incoming::End, protocol::WorkerCodec},
};

/// How long a finished connection may go unreported when there is nothing else to say. Answers bring the report along, so as long as
/// connections come this timer does nothing, but a near one would be set in hardware each time the process sleeps.
const REPORT_AFTER: Duration = Duration::from_millis(100);

/// How long to wait for descriptors to come free.
const OUT_OF_FDS: Duration = Duration::from_millis(10);

/// More bytes of answers than this wait for a dispatcher only if it asks and asks and does not read.
const MAX_UNSENT_BYTES: usize = 256 << 10;

/// Serves the channel until it ends, whether or not the application asks for anything.
pub(super) struct Task {
    pub(super) channel: Arc<Channel>,
    pub(super) read: ReadHalf<WorkerCodec>,
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
        self.channel.end(end);
        Poll::Ready(())
    }
}

impl Task {
    /// Reads all there is. Ready at the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        while let Some(message) = ready!(self.read.poll_next_unpin(cx)) {
            match message.and_then(|message| self.channel.received(message)) {
                Ok(()) => {}
                Err(error) if error.is_peer_gone() => break,
                Err(error) => return Poll::Ready(End::Failed(Arc::new(error))),
            }
        }
        Poll::Ready(End::DispatcherGone)
    }

    /// Says what there is to say. Ready at the end.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let Self { channel, timer, .. } = self;
        let mut state = channel.lock();
        state.task.clone_from(cx.waker());
        state.ask();
        while state.report_due || state.short {
            let waiting = timer.get_or_insert_with(|| Box::pin(sleep(REPORT_AFTER)));
            if state.short {
                let soon = waiting.deadline().min(Instant::now() + OUT_OF_FDS);
                waiting.as_mut().reset(soon);
            }
            if waiting.as_mut().poll(cx).is_pending() {
                break;
            }
            *timer = None;
            state.report_due = false;
            state.book.report();
            state.ask();
        }
        let left = state.book.leave();
        state.feed();
        match state.poll_flush(cx) {
            Poll::Ready(Ok(())) if left => return Poll::Ready(End::Drained),
            Poll::Ready(Err(error)) if !error.is_peer_gone() => return Poll::Ready(End::Failed(Arc::new(error))),
            Poll::Ready(Err(_)) if state.is_cut_off() => return Poll::Ready(End::Fenced),
            _ => {}
        }
        if state.unsent_bytes() > MAX_UNSENT_BYTES {
            let error = Error::invalid("a dispatcher that asks without reading the answers");
            return Poll::Ready(End::Failed(Arc::new(error)));
        }
        let application = if state.book.is_worth_asking() { state.application.take() } else { None };
        drop(state);
        application.into_iter().for_each(Waker::wake);
        Poll::Pending
    }
}

/// The runtime may drop it in the middle.
impl Drop for Task {
    fn drop(&mut self) {
        self.channel.end(End::Failed(Arc::new(Error::Closed)));
    }
}
