//! The cost of a frame in numbers that do not depend on the machine: allocations and system calls.
//! `src/codec/copies.rs` counts the copied bytes.
//!
//! ```text
//! cargo test --test cost -- --nocapture   # prints the numbers
//! ```

#[path = "../common/mod.rs"]
mod common;

mod allocations;
mod syscalls;

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
};

use bytes::Bytes;
use fdwire::{
    Frame, FrameCodec, Framed, SendFd, Sender, Socket, SocketKind,
    framed::{ReadHalf, WriteHalf},
};
use futures::{SinkExt, TryStreamExt};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, yield_now},
};

/// Frames in a batch.
const BATCH: usize = 64;

/// The frames of a measurement, which are all alike. Making one allocates nothing.
struct Load {
    payload: Bytes,
    fd: Option<OwnedFd>,
    /// The kind of descriptor that the sender declares.
    kind: fn(OwnedFd) -> SendFd,
}

impl Load {
    fn plain(bytes: usize) -> Self {
        Self { payload: vec![7; bytes].into(), fd: None, kind: SendFd::from }
    }

    fn with_fd(bytes: usize) -> Self {
        Self { fd: Some(File::open("/dev/null").unwrap().into()), ..Self::plain(bytes) }
    }

    fn with_known_file(bytes: usize) -> Self {
        Self { kind: |fd| SendFd::assume_file(fd), ..Self::with_fd(bytes) }
    }

    fn frame(&self) -> Frame<SendFd> {
        let fd = self.fd.as_ref().map(|fd| fd.as_fd().try_clone_to_owned().unwrap());
        Frame::from_parts(self.payload.clone(), fd.map(self.kind))
    }
}

/// One direction of a connection. Its receiver is a task that takes batches and waits in between.
struct Connection {
    tx: Outgoing,
    received: mpsc::Receiver<()>,
    receiver: JoinHandle<()>,
    _unused: (ReadHalf<FrameCodec>, WriteHalf<FrameCodec>),
}

/// The way in which a half is used.
type Start = fn(WriteHalf<FrameCodec>) -> Outgoing;

enum Outgoing {
    Half(Box<WriteHalf<FrameCodec>>),
    /// A `Sender` in many tasks, each of which sends one frame of a batch.
    Tasks(Vec<mpsc::Sender<Frame<SendFd>>>),
    /// A `Sender` in one task, which sends all frames.
    Sender(Sender<FrameCodec>),
}

impl Connection {
    /// Makes a connection for batches of `frames`. The socket gets a send buffer of this size if
    /// the system allows it.
    fn new(kind: SocketKind, frames: usize, send_buffer: Option<usize>, outgoing: Start) -> Self {
        let (a, b) = Socket::pair(kind).unwrap();
        if let Some(bytes) = send_buffer {
            a.set_send_buffer_size(bytes).unwrap();
        }
        let (unused_read, write) = Framed::new(a, FrameCodec::default()).into_split();
        let (mut rx, unused_write) = Framed::new(b, FrameCodec::default()).into_split();
        let (arrived, received) = mpsc::channel(1);
        let receiver = tokio::spawn(async move {
            // The frames live until the next batch comes, so it cannot use their buffer.
            let mut held = Vec::with_capacity(frames);
            loop {
                for n in 0..frames {
                    let Some(frame) = rx.try_next().await.unwrap() else { return };
                    if n == 0 {
                        held.clear();
                    }
                    held.push(frame);
                }
                if arrived.send(()).await.is_err() {
                    return;
                }
            }
        });
        Self { tx: outgoing(write), received, receiver, _unused: (unused_read, unused_write) }
    }

    /// Sends frames together, and waits until they have arrived and the receiver waits for more.
    async fn batch(&mut self, frames: impl ExactSizeIterator<Item = Frame<SendFd>>) {
        match &mut self.tx {
            Outgoing::Half(half) => {
                for frame in frames {
                    half.feed(frame).await.unwrap();
                }
                half.as_mut().flush().await.unwrap();
            }
            Outgoing::Tasks(tasks) => {
                for (task, frame) in tasks.iter().zip(frames) {
                    task.try_send(frame).unwrap();
                }
            }
            Outgoing::Sender(sender) => {
                for frame in frames {
                    sender.send(frame).await.unwrap();
                }
            }
        }
        self.received.recv().await.unwrap();
        yield_now().await;
    }

    /// Ends the connection, and waits until the receiver has seen the end. That may take a moment,
    /// because it does not receive while many of its descriptors wait to be closed.
    async fn end(self) {
        drop(self.tx);
        self.receiver.await.unwrap();
    }
}

fn half(write: WriteHalf<FrameCodec>) -> Outgoing {
    Outgoing::Half(Box::new(write))
}

fn sender(write: WriteHalf<FrameCodec>) -> Outgoing {
    let (sender, driver) = write.into_sender();
    tokio::spawn(driver);
    Outgoing::Sender(sender)
}

fn tasks(write: WriteHalf<FrameCodec>) -> Outgoing {
    let (sender, driver) = write.into_sender();
    tokio::spawn(driver);
    let task = |sender: Sender<FrameCodec>| {
        let (tx, mut rx) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(frame) = rx.recv().await {
                sender.send(frame).await.unwrap();
            }
        });
        tx
    };
    Outgoing::Tasks((0..BATCH).map(|_| task(sender.clone())).collect())
}
