//! One end of a connection, asynchronous or blocking, for tests that drive both in the same way.

use std::{sync::mpsc, time::Duration};

use fdwire::{
    Error, Frame, FrameCodec, Framed, SendError, Socket, SocketKind, blocking,
    codec::{Codec, Decoder, Encoder},
};
use futures::{SinkExt, StreamExt};
use tokio::sync::oneshot;

use crate::{common::large, counted};

/// The way in which an end waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Async,
    Blocking,
}

pub(crate) const SIDES: [Side; 2] = [Side::Async, Side::Blocking];

/// Runs a test on both kinds of socket, for an end of each sort, and counts the process's
/// descriptors around it.
pub(crate) fn on_both_sides(test: impl AsyncFn(SocketKind, Side)) {
    counted(async |kind| {
        for side in SIDES {
            test(kind, side).await;
        }
    });
}

/// The codec of an end.
pub(crate) trait FrameLike:
    Codec
    + Decoder<Item = Frame, Error = Error>
    + Encoder<Frame, Error = Error>
    + Clone
    + Send
    + 'static
{
}

impl<C> FrameLike for C where
    C: Codec
        + Decoder<Item = Frame, Error = Error>
        + Encoder<Frame, Error = Error>
        + Clone
        + Send
        + 'static
{
}

/// A `Framed` of one of the two sorts.
pub(crate) enum End<C> {
    Async(Box<Framed<C>>),
    Blocking(OnThread<blocking::Framed<C>>),
}

impl<C: FrameLike> End<C> {
    pub(crate) fn new(side: Side, socket: Socket, codec: C) -> Self {
        match side {
            Side::Async => Self::Async(Box::new(Framed::new(socket, codec))),
            Side::Blocking => Self::Blocking(OnThread::new(move || {
                blocking::Framed::new(blocking::Socket::from(socket), codec)
            })),
        }
    }

    pub(crate) async fn send(&mut self, frame: Frame) -> Result<(), SendError<Frame>> {
        match self {
            Self::Async(framed) => framed.send(frame).await,
            Self::Blocking(framed) => framed.call(|framed| framed.send(frame)).await,
        }
    }

    pub(crate) async fn feed(&mut self, frame: Frame) -> Result<(), SendError<Frame>> {
        match self {
            Self::Async(framed) => framed.feed(frame).await,
            Self::Blocking(framed) => framed.call(|framed| framed.feed(frame)).await,
        }
    }

    pub(crate) async fn flush(&mut self) -> Result<(), Error> {
        match self {
            Self::Async(framed) => Framed::flush(framed).await,
            Self::Blocking(framed) => framed.call(|framed| framed.flush()).await,
        }
    }

    pub(crate) async fn close(&mut self) -> Result<(), Error> {
        match self {
            Self::Async(framed) => Framed::close(framed).await,
            Self::Blocking(framed) => framed.call(|framed| framed.close()).await,
        }
    }

    pub(crate) async fn next(&mut self) -> Option<Result<Frame, Error>> {
        match self {
            Self::Async(framed) => framed.next().await,
            Self::Blocking(framed) => framed.call(|framed| framed.next()).await,
        }
    }

    /// Returns the next frame, which must arrive.
    #[track_caller]
    pub(crate) fn frame(&mut self) -> impl Future<Output = Frame> {
        let caller = std::panic::Location::caller();
        async move {
            match self.next().await {
                Some(Ok(frame)) => frame,
                other => panic!("no frame at {caller}: {other:?}"),
            }
        }
    }

    /// Returns the next error, and checks that the stream ends with it.
    #[track_caller]
    pub(crate) fn error(&mut self) -> impl Future<Output = Error> {
        let caller = std::panic::Location::caller();
        async move {
            let error = match self.next().await {
                Some(Err(error)) => error,
                other => panic!("no error at {caller}: {other:?}"),
            };
            assert!(self.next().await.is_none(), "{error} at {caller} is not followed by the end");
            assert!(self.next().await.is_none(), "the end of {caller} is not the last");
            error
        }
    }

    /// Waits until the kernel has closed the other end.
    pub(crate) async fn wait_for_close_of_peer(&mut self) {
        match self {
            Self::Async(framed) => crate::common::wait_for_close_of_peer(framed.socket()),
            Self::Blocking(framed) => {
                framed.call(|framed| crate::common::wait_for_close_of_peer(framed.socket())).await;
            }
        }
    }

    /// Returns the bytes and descriptors that were accepted and not sent.
    pub(crate) async fn into_unsent(self) -> (bytes::BytesMut, Vec<fdwire::SendFd>) {
        match self {
            Self::Async(framed) => framed.into_parts().unsent.into_parts(),
            Self::Blocking(framed) => {
                framed.end(|framed| framed.into_parts().unsent.into_parts()).await
            }
        }
    }
}

/// Two ends of one connection, the first of this sort.
pub(crate) fn ends(kind: SocketKind, side: Side) -> (End<FrameCodec>, Framed<FrameCodec>) {
    let (a, b) = Socket::pair(kind).unwrap();
    (End::new(side, a, large()), Framed::new(b, large()))
}

/// Returns an end, and the bare descriptor of its peer, for a test whose peer misbehaves.
pub(crate) fn end_with_raw_peer(
    kind: SocketKind,
    side: Side,
) -> (End<FrameCodec>, std::os::fd::OwnedFd) {
    end_of_codec_with_raw_peer(kind, side, large())
}

/// Does the same with another codec.
pub(crate) fn end_of_codec_with_raw_peer<C: FrameLike>(
    kind: SocketKind,
    side: Side,
    codec: C,
) -> (End<C>, std::os::fd::OwnedFd) {
    let (a, b) = Socket::pair(kind).unwrap();
    (End::new(side, a, codec), b.into())
}

/// A value that lives in a thread of its own, without a runtime.
pub(crate) struct OnThread<T> {
    jobs: mpsc::Sender<Job<T>>,
}

enum Job<T> {
    Call(Box<dyn FnOnce(&mut T) + Send>),
    End(Box<dyn FnOnce(T) + Send>),
}

impl<T> OnThread<T> {
    pub(crate) fn new(make: impl FnOnce() -> T + Send + 'static) -> Self
    where
        T: 'static,
    {
        let (jobs, queue) = mpsc::channel();
        std::thread::spawn(move || {
            assert!(tokio::runtime::Handle::try_current().is_err(), "a runtime is here");
            let mut value = make();
            for job in queue {
                match job {
                    Job::Call(call) => call(&mut value),
                    Job::End(end) => return end(value),
                }
            }
        });
        Self { jobs }
    }

    pub(crate) async fn call<R: Send + 'static>(
        &self,
        call: impl FnOnce(&mut T) -> R + Send + 'static,
    ) -> R {
        let (output, returned) = oneshot::channel();
        let call = Job::Call(Box::new(move |value| {
            let _cancelled = output.send(call(value));
        }));
        assert!(self.jobs.send(call).is_ok(), "the thread has panicked");
        returned.await.expect("the call has panicked")
    }

    /// The same for a call that takes the value.
    pub(crate) async fn end<R: Send + 'static>(
        self,
        call: impl FnOnce(T) -> R + Send + 'static,
    ) -> R {
        let (output, returned) = oneshot::channel();
        let call = Job::End(Box::new(move |value| {
            let _cancelled = output.send(call(value));
        }));
        assert!(self.jobs.send(call).is_ok(), "the thread has panicked");
        returned.await.expect("the call has panicked")
    }
}

/// The time that a test waits for something that must not happen.
pub(crate) const SHORT: Duration = Duration::from_millis(50);
