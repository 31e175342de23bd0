//! The work of the two processes of a contender: one way, and there and back.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use bytes::Bytes;
use futures::future::{FutureExt, LocalBoxFuture};

use crate::contenders::{Link, Load, Received, Setup};

/// One end of a contender's connection, in either process.
pub(crate) trait End {
    /// Does this end's part of `count` messages, and checks what arrives.
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()>;

    /// Returns the CPU time of the processes that it has started and that take part in the work.
    fn cpu_time_of_others(&self) -> Duration {
        Duration::ZERO
    }
}

/// Makes an end inside of a runtime.
pub(crate) type MakeEnd = fn(OwnedFd, Setup) -> Box<dyn End>;

/// Makes the messages of a [`Load`].
struct Messages {
    payload: Bytes,
    fd: Option<OwnedFd>,
}

impl Messages {
    fn new<L: Link>(load: Load) -> Self {
        let fd = (load.fd && L::PASSES_FDS)
            .then(|| File::open("/dev/null").expect("/dev/null is there").into());
        Self { payload: vec![7; load.bytes].into(), fd }
    }

    /// Makes a descriptor for one message by `dup`, if the messages carry any.
    fn fd(&self) -> Option<OwnedFd> {
        self.fd.as_ref().map(|fd| fd.as_fd().try_clone_to_owned().expect("a descriptor is free"))
    }
}

/// Sends batches.
struct Sender<L> {
    link: L,
    load: Load,
    messages: Messages,
}

pub(crate) fn sender<L: Link>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    let load = setup.load;
    Box::new(Sender { link: L::new(socket, setup), load, messages: Messages::new::<L>(load) })
}

impl<L: Link> End for Sender<L> {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { link, load, messages } = self;
        let run = async move {
            for _ in 0..count / load.batch {
                for _ in 0..load.batch {
                    link.send(&messages.payload, messages.fd()).await;
                }
                link.flush().await;
            }
        };
        run.boxed_local()
    }
}

/// Receives messages and counts their bytes and descriptors.
struct Receiver<L> {
    link: L,
    load: Load,
}

pub(crate) fn receiver<L: Link>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    Box::new(Receiver { link: L::new(socket, setup), load: setup.load })
}

impl<L: Link> End for Receiver<L> {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self { link, load } = self;
        let run = async move {
            let (mut received, mut fds) = (Received::default(), 0);
            while received.bytes < count * load.bytes {
                link.recv(&mut received).await;
                fds += received.fds.len();
                received.fds.clear();
            }
            assert_eq!(received.bytes, count * load.bytes);
            assert_eq!(fds + received.handles, if load.fd { count } else { 0 });
        };
        run.boxed_local()
    }
}

/// Receives one message.
async fn recv_one<L: Link>(link: &mut L, load: Load) -> Option<OwnedFd> {
    let mut received = Received::default();
    while received.bytes < load.bytes {
        link.recv(&mut received).await;
    }
    assert_eq!(received.bytes, load.bytes);
    assert_eq!(received.fds.len() + received.handles, usize::from(load.fd));
    received.fds.pop()
}

/// Sends a message and waits for the answer, one at a time.
struct Client<L>(Sender<L>);

pub(crate) fn client<L: Link>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    let load = setup.load;
    Box::new(Client(Sender {
        link: L::new(socket, setup),
        load,
        messages: Messages::new::<L>(load),
    }))
}

impl<L: Link> End for Client<L> {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self(Sender { link, load, messages }) = self;
        let run = async move {
            for _ in 0..count {
                link.send(&messages.payload, messages.fd()).await;
                link.flush().await;
                drop(recv_one(link, *load).await);
            }
        };
        run.boxed_local()
    }
}

/// Answers each message with one of the same size, and sends its descriptor back.
struct Echo<L>(Sender<L>);

pub(crate) fn echo<L: Link>(socket: OwnedFd, setup: Setup) -> Box<dyn End> {
    let (load, payload) = (setup.load, vec![7; setup.load.bytes].into());
    let messages = Messages { payload, fd: None };
    Box::new(Echo(Sender { link: L::new(socket, setup), load, messages }))
}

impl<L: Link> End for Echo<L> {
    fn run(&mut self, count: usize) -> LocalBoxFuture<'_, ()> {
        let Self(Sender { link, load, messages }) = self;
        let run = async move {
            for _ in 0..count {
                let fd = recv_one(link, *load).await;
                link.send_back(&messages.payload, fd).await;
                link.flush().await;
            }
        };
        run.boxed_local()
    }
}

/// An end that has nothing to do.
struct Idle;

pub(crate) fn idle(_: OwnedFd, _: Setup) -> Box<dyn End> {
    Box::new(Idle)
}

impl End for Idle {
    fn run(&mut self, _: usize) -> LocalBoxFuture<'_, ()> {
        std::future::ready(()).boxed_local()
    }
}
