//! Messages over a socket, as [`Stream`] and [`Sink`].

mod driver;
mod read;
mod sender;
mod shared;
mod write;

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::BytesMut;
use futures::{Sink, Stream};

pub use driver::Driver;
pub use read::ReadHalf;
pub use sender::{SendPermit, Sender};
pub(crate) use write::Outbound;
pub use write::{Permit, WriteHalf};

use crate::{
    Codec, Credentials, Decoder, Encoder, Error, FdQueue, Grouping, Parts, SendBuf, SendError, Socket,
    transport::{Receiving, Senders, Sending},
};

/// Messages with descriptors over one socket, as [`Stream`] and [`Sink`].
///
/// It is a [`ReadHalf`] and a [`WriteHalf`] over the same socket, which
/// [`into_split`](Self::into_split) gives away. They fail and end separately: what the peer had
/// sent is still yielded after a write has failed.
///
/// `D` decodes and `E` encodes; mostly they are one codec, and the type is `Framed<FrameCodec>`.
///
/// The runtime's I/O driver and its timer have to be enabled.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
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
/// `send_all` of [`SinkExt`](futures::SinkExt) lose the item, and close its descriptors, when they
/// are dropped before they took it. Where that must not happen, `reserve` first.
#[derive(Debug)]
pub struct Framed<D, E = D> {
    read: ReadHalf<D>,
    write: WriteHalf<E>,
}

impl<C: Codec + Clone> Framed<C> {
    /// Messages of this codec's protocol over the socket. Each direction gets its own copy of the
    /// codec.
    pub fn new(socket: Socket, codec: C) -> Self {
        Self::with_codecs(socket, codec.clone(), codec)
    }
}

impl<D, E: Codec> Framed<D, E> {
    /// Messages of one codec's protocol in, of another's out. `()` is the encoder of a direction
    /// that is not used.
    pub fn with_codecs(socket: Socket, decoder: D, encoder: E) -> Self {
        Self::from_parts(Parts::new(socket, decoder, encoder))
    }

    /// Continues where [`into_parts`](Self::into_parts) stopped.
    pub fn from_parts(parts: Parts<D, E>) -> Self {
        let Parts { socket, decoder, encoder, received, received_fds, unsent, receiving, sending, senders } = parts;
        let socket = Arc::new(socket);
        Self {
            read: ReadHalf::new(Arc::clone(&socket), decoder, received, received_fds, receiving, senders),
            write: WriteHalf::new(socket, encoder, unsent, sending),
        }
    }
}

impl<D, E> Framed<D, E> {
    /// Takes everything apart: the socket, the codecs, what was received and not decoded, and what
    /// was accepted and not sent. No message and no descriptor is lost, except that after an error
    /// of the receiving direction nothing of it is left. Of a message that was sent in part,
    /// `unsent` has the rest.
    pub fn into_parts(self) -> Parts<D, E> {
        let (shared, decoder, received, received_fds, receiving, senders) = self.read.into_parts();
        let (socket, encoder, unsent, sending) = self.write.into_parts();
        drop(shared);
        let socket = Arc::into_inner(socket).expect("only the two halves hold the socket");
        Parts { socket, decoder, encoder, received, received_fds, unsent, receiving, sending, senders }
    }

    /// Continues with other codecs: what was received and not decoded is decoded by the new one,
    /// and what was accepted by the old one is sent as it is. For a handshake in another format.
    pub fn map_codecs<D2, E2: Codec>(self, map: impl FnOnce(D, E) -> (D2, E2)) -> Framed<D2, E2> {
        Framed::from_parts(self.into_parts().map_codecs(map))
    }

    /// Splits into halves that can be moved to different tasks.
    pub fn into_split(mut self) -> (ReadHalf<D>, WriteHalf<E>) {
        self.write.shut_down_on_drop(true);
        (self.read, self.write)
    }

    /// Puts halves together again.
    ///
    /// # Errors
    /// Gives them back if they are of different sockets.
    #[expect(clippy::result_large_err, reason = "the halves are as large when they are put together")]
    pub fn reunite(read: ReadHalf<D>, mut write: WriteHalf<E>) -> Result<Self, ReuniteError<D, E>> {
        if !Arc::ptr_eq(read.shared_socket(), write.shared_socket()) {
            return Err(ReuniteError { read, write });
        }
        write.shut_down_on_drop(false);
        Ok(Self { read, write })
    }

    /// The socket, for its options and its peer.
    pub fn socket(&self) -> &Socket {
        self.read.socket()
    }

    /// Returns the process that sent the message that was yielded last: see
    /// [`ReadHalf::credentials`].
    pub fn credentials(&self) -> Option<&Credentials> {
        self.read.credentials()
    }

    /// The decoder.
    pub fn decoder_mut(&mut self) -> &mut D {
        self.read.decoder_mut()
    }

    /// The encoder.
    pub fn encoder_mut(&mut self) -> &mut E {
        self.write.encoder_mut()
    }

    /// Number of bytes and of descriptors that were accepted and are not sent.
    pub fn unsent(&self) -> (usize, usize) {
        self.write.unsent()
    }

    /// See [`WriteHalf::flush`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// As there.
    pub async fn flush(&mut self) -> Result<(), Error> {
        self.write.flush().await
    }

    /// See [`WriteHalf::close`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// As there.
    pub async fn close(&mut self) -> Result<(), Error> {
        self.write.close().await
    }
}

impl<D, E: Codec> Framed<D, E> {
    /// See [`WriteHalf::reserve`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// As there.
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

/// Two directions of a socket, for messages of several encoders out.
pub(crate) fn halves<D>(socket: Socket, decoder: D) -> (ReadHalf<D>, Outbound) {
    let socket = Arc::new(socket);
    let mut outbound = Outbound::new(Arc::clone(&socket), SendBuf::new(), Grouping::default(), Sending::default());
    outbound.side.shut_down_on_drop(true);
    (
        ReadHalf::new(socket, decoder, BytesMut::new(), FdQueue::new(), Receiving::default(), Senders::default()),
        outbound,
    )
}

// Nothing in it is pinned: codecs are only ever used through `&mut`.
impl<D, E> Unpin for Framed<D, E> {}

/// The halves are not of the same socket. Brings them back.
pub struct ReuniteError<D, E = D> {
    /// The receiving half.
    pub read: ReadHalf<D>,
    /// The sending half.
    pub write: WriteHalf<E>,
}

impl<D, E> fmt::Debug for ReuniteError<D, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReuniteError").finish_non_exhaustive()
    }
}

impl<D, E> fmt::Display for ReuniteError<D, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("halves of different sockets cannot be put together")
    }
}

impl<D, E> std::error::Error for ReuniteError<D, E> {}

impl<D, E> From<ReuniteError<D, E>> for io::Error {
    fn from(error: ReuniteError<D, E>) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use futures::{FutureExt, SinkExt, StreamExt};
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    use super::*;
    use crate::{Frame, FrameCodec, SocketKind};

    #[test]
    fn everything_can_move_between_threads() {
        fn check<T: Send + Sync + 'static>() {}
        check::<Framed<FrameCodec>>();
        check::<ReadHalf<FrameCodec>>();
        check::<WriteHalf<FrameCodec>>();
        check::<Sender<FrameCodec>>();
        check::<Driver<FrameCodec>>();
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
        assert_eq!(driver.await.unsent(), (0, 1));
    }

    /// They are one message then. The first frame has told its own length only.
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
            assert!(tx.unsent().0 > 0);
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
        const ROLE: &str = "framed::tests::a_full_quiet_socket_sends_on_without_a_descriptor_to_spare";
        if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == ROLE) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
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
