//! Many tasks that send into one socket, one message at a time.

use std::{io::IoSlice, os::fd::OwnedFd, sync::Arc};

use bytes::Bytes;
use fdwire::{Frame, FrameCodec, Framed};
use futures::{
    SinkExt,
    future::{FutureExt, LocalBoxFuture},
};
use rustix::net::SendAncillaryBuffer;
use tokio::{
    io::unix::AsyncFd,
    sync::{Mutex, mpsc},
    task::{JoinSet, yield_now},
};
use tokio_seqpacket::UnixSeqpacket;

use crate::{
    contenders::{Fdwire, Setup, bare},
    ends::End,
};

/// A sender that tasks share. A new way to share one implements this and gets a line in `rows`.
pub(crate) trait Shared: Clone + Send + 'static {
    /// Takes over a non-blocking socket. Called inside a runtime, so it may spawn tasks.
    fn new(socket: OwnedFd) -> Self;

    /// Sends a message. When this returns, the message is sent, or will be without a further call.
    fn send(&self, payload: Bytes) -> impl Future<Output = ()> + Send;
}

/// Sends from many tasks.
struct Tasks<S> {
    shared: S,
    payload: Bytes,
    tasks: usize,
}

/// Makes an end that sends from `TASKS` tasks.
pub(crate) fn senders<S: Shared, const TASKS: usize>(
    socket: OwnedFd,
    setup: Setup,
) -> Box<dyn End> {
    Box::new(Tasks {
        shared: S::new(socket),
        payload: vec![7; setup.load.bytes].into(),
        tasks: TASKS,
    })
}

impl<S: Shared> End for Tasks<S> {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { shared, payload, tasks } = self;
        let run = async move {
            let mut all = JoinSet::new();
            for task in 0..*tasks {
                let (shared, payload) = (shared.clone(), payload.clone());
                let share = count / *tasks + usize::from(task < count % *tasks);
                all.spawn(async move {
                    for _ in 0..share {
                        shared.send(payload.clone()).await;
                        yield_now().await; // the other tasks have messages too
                    }
                });
            }
            all.join_all().await;
        };
        run.boxed_local()
    }
}

/// fdwire behind a mutex: each task locks it, sends its message and flushes.
#[derive(Clone)]
pub(crate) struct FdwireMutex(Arc<Mutex<Framed<FrameCodec>>>);

impl Shared for FdwireMutex {
    fn new(socket: OwnedFd) -> Self {
        Self(Arc::new(Mutex::new(Fdwire::framed(socket))))
    }

    async fn send(&self, payload: Bytes) {
        self.0.lock().await.send(Frame::new(payload)).await.expect("sending");
    }
}

/// fdwire behind a channel: one task feeds the messages that wait there, and flushes.
#[derive(Clone)]
pub(crate) struct FdwireChannel(mpsc::Sender<Frame>);

impl Shared for FdwireChannel {
    fn new(socket: OwnedFd) -> Self {
        const ROOM: usize = 64;

        let (sender, mut receiver) = mpsc::channel(ROOM);
        let mut framed = Fdwire::framed(socket);
        tokio::spawn(async move {
            let mut frames = Vec::with_capacity(ROOM);
            while receiver.recv_many(&mut frames, ROOM).await > 0 {
                for frame in frames.drain(..) {
                    framed.feed(frame).await.expect("sending");
                }
                framed.flush().await.expect("sending");
            }
        });
        Self(sender)
    }

    async fn send(&self, payload: Bytes) {
        self.0.send(Frame::new(payload)).await.expect("the task is there");
    }
}

/// fdwire's own sender for many tasks.
#[derive(Clone)]
pub(crate) struct FdwireSender(fdwire::Sender<FrameCodec>);

impl Shared for FdwireSender {
    fn new(socket: OwnedFd) -> Self {
        let (_, write) = Fdwire::framed(socket).into_split();
        let (sender, driver) = write.into_sender();
        tokio::spawn(driver);
        Self(sender)
    }

    async fn send(&self, payload: Bytes) {
        self.0.send(Frame::new(payload)).await.expect("sending");
    }
}

/// tokio-seqpacket, which all tasks may use at the same time.
#[derive(Clone)]
pub(crate) struct SeqpacketShared(Arc<UnixSeqpacket>);

impl Shared for SeqpacketShared {
    fn new(socket: OwnedFd) -> Self {
        Self(Arc::new(socket.try_into().expect("a SEQPACKET socket")))
    }

    async fn send(&self, payload: Bytes) {
        assert_eq!(self.0.send(&payload).await.expect("sending"), payload.len());
    }
}

/// `sendmsg` on a SEQPACKET socket, which all tasks may use at the same time.
#[derive(Clone)]
pub(crate) struct BareShared(Arc<AsyncFd<OwnedFd>>);

impl Shared for BareShared {
    fn new(socket: OwnedFd) -> Self {
        Self(Arc::new(bare::register(socket)))
    }

    async fn send(&self, payload: Bytes) {
        let mut control = SendAncillaryBuffer::default();
        let sent = bare::send(&self.0, &[IoSlice::new(&payload)], &mut control).await;
        assert_eq!(sent.expect("sending"), payload.len());
    }
}
