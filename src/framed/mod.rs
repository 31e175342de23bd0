//! A connection of messages over a socket, as [`Stream`] and [`Sink`].

mod driver;
mod outbound;
mod read;
mod reunite;
mod sender;
mod shared;
mod write;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use futures_sink::Sink;

pub use driver::SendDriver;
pub(crate) use outbound::Outbound;
pub use read::ReadHalf;
pub use reunite::ReuniteError;
pub use sender::{SendPermit, Sender, TrySendError};
pub use write::{Permit, WriteHalf};

pub use crate::transport::{FramedParts, Unsent};

use crate::{
    codec::{Codec, Decoder, Encoder, Grouping},
    credentials::Credentials,
    error::{Error, SendError},
    socket::Socket,
    transport::{ReceiveParts, SendParts},
};

/// A connection over one socket: a [`Stream`] and [`Sink`] of messages with descriptors.
///
/// It consists of a [`ReadHalf`] and a [`WriteHalf`] over the same socket, which
/// [`into_split`](Self::into_split) returns. They fail and end separately: after a write has
/// failed, the stream still yields the messages of the peer.
///
/// `D` decodes and `E` encodes. Usually both have the same type, for example `Framed<FrameCodec>`.
///
/// The runtime's I/O driver and its timer have to be enabled.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
/// use futures::{SinkExt, StreamExt};
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// let mut tx = Framed::new(a, FrameCodec::default());
/// let mut rx = Framed::new(b, FrameCodec::default());
///
/// let file = std::fs::File::open("/dev/null")?;
/// tx.send(Frame::new("log file").with_fd(file)).await?;
/// let Frame { payload, fds } = rx.next().await.ok_or("the peer is gone")??;
/// assert_eq!((&payload[..], fds.len()), (&b"log file"[..], 1));
/// # Ok(()) }
/// ```
///
/// # Cancel safety
/// `next()`, [`flush`](Self::flush), [`close`](Self::close) and [`reserve`](Self::reserve) can be
/// dropped at any await and called again: nothing is lost. `send(item)`, `feed(item)` and
/// `send_all` of [`SinkExt`](futures::SinkExt) lose the item and close its descriptors if they are
/// dropped before the item is in the queue. If an item must not be lost, call `reserve` first.
#[derive(Debug)]
#[must_use = "a connection ends when it is dropped"]
pub struct Framed<D, E = D> {
    read: ReadHalf<D>,
    write: WriteHalf<E>,
}

impl<C: Codec + Clone> Framed<C> {
    /// Returns a connection over a socket. Each direction gets its own clone of the codec.
    pub fn new(socket: Socket, codec: C) -> Self {
        Self::with_codecs(socket, codec.clone(), codec)
    }
}

impl<D, E: Codec> Framed<D, E> {
    /// Returns a connection over a socket, with a codec for each direction. Use `()` as the encoder
    /// if nothing is sent.
    pub fn with_codecs(socket: Socket, decoder: D, encoder: E) -> Self {
        Self::from_parts(FramedParts::new(socket, decoder, encoder))
    }

    /// Puts together the parts that [`into_parts`](Self::into_parts) has returned.
    pub fn from_parts(parts: FramedParts<D, E>) -> Self {
        let (socket, receive, send) = parts.split();
        let socket = Arc::new(socket);
        let read = ReadHalf::new(Arc::clone(&socket), receive);
        Self { read, write: WriteHalf::new(socket, send) }
    }
}

impl<D, E> Framed<D, E> {
    /// Takes the connection apart: the socket, the codecs, the bytes and descriptors that were
    /// received and not decoded, and the messages that were accepted and not sent. If a message was
    /// sent in part, `unsent` has the rest of it. No message and no descriptor is lost, unless the
    /// receiving direction has failed: then its bytes and descriptors were dropped.
    pub fn into_parts(self) -> FramedParts<D, E> {
        // When one half has dropped its reference to the socket, the other one is the last.
        let (shared, receive) = self.read.into_parts();
        let (socket, send) = self.write.into_parts();
        drop(shared);
        let socket = Arc::into_inner(socket).expect("only the two halves hold the socket");
        FramedParts::join(socket, receive, send)
    }

    /// Changes the codecs, for a handshake in another format. The new decoder decodes everything
    /// that was received and not decoded. Messages that the old encoder has accepted are sent as
    /// they are.
    pub fn map_codecs<D2, E2: Codec>(self, map: impl FnOnce(D, E) -> (D2, E2)) -> Framed<D2, E2> {
        Framed::from_parts(self.into_parts().map_codecs(map))
    }

    /// Splits into halves that can be moved to different tasks.
    pub fn into_split(mut self) -> (ReadHalf<D>, WriteHalf<E>) {
        self.write.shut_down_on_drop(true);
        (self.read, self.write)
    }

    /// Returns the socket, for its options and its peer.
    pub fn socket(&self) -> &Socket {
        self.read.socket()
    }

    /// Returns the process that sent the last message that was yielded. See
    /// [`ReadHalf::credentials`].
    pub fn credentials(&self) -> Option<&Credentials> {
        self.read.credentials()
    }

    /// Returns the decoder.
    pub fn decoder_mut(&mut self) -> &mut D {
        self.read.decoder_mut()
    }

    /// Returns the encoder.
    pub fn encoder_mut(&mut self) -> &mut E {
        self.write.encoder_mut()
    }

    /// Returns the amount that was accepted and not sent.
    pub fn unsent(&self) -> Unsent {
        self.write.unsent()
    }

    /// Sends everything that was accepted. See [`WriteHalf::flush`].
    ///
    /// # Errors
    /// The errors of [`WriteHalf::flush`].
    ///
    /// # Cancel safety
    /// The same as for [`WriteHalf::flush`].
    pub async fn flush(&mut self) -> Result<(), Error> {
        self.write.flush().await
    }

    /// Flushes, then shuts down the sending direction. See [`WriteHalf::close`].
    ///
    /// # Errors
    /// The errors of [`WriteHalf::close`].
    ///
    /// # Cancel safety
    /// The same as for [`WriteHalf::close`].
    pub async fn close(&mut self) -> Result<(), Error> {
        self.write.close().await
    }
}

impl<D, E: Codec> Framed<D, E> {
    /// Waits for room for one message. See [`WriteHalf::reserve`].
    ///
    /// # Errors
    /// The errors of [`WriteHalf::reserve`].
    ///
    /// # Cancel safety
    /// The same as for [`WriteHalf::reserve`].
    pub async fn reserve(&mut self) -> Result<Permit<'_, E>, Error> {
        self.write.reserve().await
    }
}

impl<D: Decoder, E> Stream for Framed<D, E> {
    type Item = Result<D::Item, D::Error>;

    #[inline]
    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.get_mut().read).poll_next(cx)
    }
}

impl<D, E: Encoder<I>, I> Sink<I> for Framed<D, E> {
    type Error = SendError<I, E::Error>;

    #[inline]
    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Sink::<I>::poll_ready(Pin::new(&mut self.get_mut().write), cx)
    }

    #[inline]
    fn start_send(self: Pin<&mut Self>, item: I) -> Result<(), Self::Error> {
        Pin::new(&mut self.get_mut().write).start_send(item)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Sink::<I>::poll_flush(Pin::new(&mut self.get_mut().write), cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Sink::<I>::poll_close(Pin::new(&mut self.get_mut().write), cx)
    }
}

// No field is pinned: codecs are only used through `&mut`.
impl<D, E> Unpin for Framed<D, E> {}

/// Returns the two directions of a socket. The sending direction accepts messages of several
/// encoders.
pub(crate) fn halves<D>(socket: Socket, decoder: D) -> (ReadHalf<D>, Outbound) {
    let socket = Arc::new(socket);
    let mut outbound =
        Outbound::new(Arc::clone(&socket), SendParts::default(), Grouping::default());
    outbound.side.shut_down_on_drop(true);
    (ReadHalf::new(socket, (decoder, ReceiveParts::default())), outbound)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use futures::{FutureExt, SinkExt, StreamExt};
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    use super::*;
    use crate::{codec::FrameCodec, frame::Frame, socket::SocketKind};

    #[test]
    fn everything_can_move_between_threads() {
        fn check<T: Send + Sync + 'static>() {}
        check::<Framed<FrameCodec>>();
        check::<ReadHalf<FrameCodec>>();
        check::<WriteHalf<FrameCodec>>();
        check::<Sender<FrameCodec>>();
        check::<SendDriver<FrameCodec>>();
        check::<Error>();
        check::<SendError<Frame>>();
    }

    /// A descriptor without a byte cannot be sent, so sending has failed from the start.
    #[tokio::test]
    async fn a_driver_gives_back_what_could_not_be_put_together_again() {
        let (a, _b) = Socket::pair(SocketKind::Stream).unwrap();
        let mut parts = Framed::new(a, FrameCodec::default()).into_parts();
        parts.unsent.put_fd(std::fs::File::open("/dev/null").unwrap());
        let (sender, driver) = Framed::from_parts(parts).into_split().1.into_sender();
        assert!(sender.send(Frame::new("refused")).await.unwrap_err().item.is_some());
        assert_eq!(driver.await.unsent().fds, 1);
    }

    /// The appended frames are one message then, and the first one announces only its own length.
    #[tokio::test]
    async fn frames_that_were_appended_to_what_is_unsent_fit_their_packets() {
        let (a, b) = Socket::pair(SocketKind::SeqPacket).unwrap();
        a.set_send_buffer_size(1 << 20).unwrap();
        let mut parts = Framed::new(a, FrameCodec::default()).into_parts();
        let lengths = || [70_000].into_iter().chain([2000; 300]);
        for length in lengths() {
            parts.encoder.encode(Frame::new(vec![7; length]), &mut parts.unsent).unwrap();
        }
        let (mut tx, mut rx) = (Framed::from_parts(parts), Framed::new(b, FrameCodec::default()));
        let receive = async {
            for length in lengths() {
                assert_eq!(rx.next().await.unwrap().unwrap().payload.len(), length);
            }
        };
        tokio::join!(receive, async { tx.flush().await.unwrap() });
    }

    #[tokio::test]
    async fn a_full_quiet_socket_sends_on_when_there_is_room() {
        for kind in [SocketKind::SeqPacket, SocketKind::Stream] {
            let (a, b) = Socket::pair(kind).unwrap();
            let mut tx = Framed::new(a.quiet(), FrameCodec::default());
            let mut rx = Framed::new(b, FrameCodec::default());
            let mut frames = 1; // the one that does not fit is in the queue
            while tx.send(Frame::new(vec![7; 60_000])).now_or_never().is_some() {
                frames += 1;
            }
            assert!(!tx.unsent().is_empty());
            let receive = async {
                for _ in 0..frames {
                    rx.next().await.unwrap().unwrap();
                }
            };
            tokio::join!(receive, async { tx.flush().await.unwrap() });
        }
    }

    /// Runs in a process of its own, because it uses up the descriptors.
    #[test]
    fn a_full_quiet_socket_sends_on_without_a_descriptor_to_spare() {
        const ROLE: &str =
            "framed::tests::a_full_quiet_socket_sends_on_without_a_descriptor_to_spare";
        if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == ROLE) {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            return runtime.block_on(send_without_a_descriptor_to_spare());
        }
        let mut command = std::process::Command::new("/proc/self/exe");
        let output = command.args([ROLE, "--exact"]).env("FDWIRE_ROLE", ROLE).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && stdout.contains("1 passed"), "{output:?}");
    }

    async fn send_without_a_descriptor_to_spare() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        for kind in [SocketKind::SeqPacket, SocketKind::Stream] {
            let (a, b) = Socket::pair(kind).unwrap();
            let mut tx = Framed::new(a.quiet(), FrameCodec::default());
            let mut rx = Framed::new(b, FrameCodec::default());
            // New descriptors get the lowest free number, so all below this one are in use.
            let last = std::fs::File::open("/dev/null").unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, last.as_raw_fd() as u64 + 1, hard).unwrap();
            assert!(last.try_clone().is_err());

            let mut frames = 1; // the one that does not fit is in the queue
            while let Some(sent) = tx.send(Frame::new(vec![7; 60_000])).now_or_never() {
                sent.unwrap();
                frames += 1;
            }
            let receive = async {
                for _ in 0..frames {
                    rx.next().await.unwrap().unwrap();
                }
            };
            tokio::join!(receive, async { tx.flush().await.unwrap() });
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        }
    }
}
