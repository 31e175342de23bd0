//! Connections for a program **without a runtime**, for example a command-line tool that passes a
//! descriptor to a service, or a small helper in a sandbox.
//!
//! The frames, the codecs, the limits and the rules are those of the asynchronous side. The peer
//! cannot detect which side is used. Each call waits in the calling thread, without a limit or for
//! the [time that you set](Framed::set_read_timeout). Signals do not end a wait.
//!
//! ```
//! use std::{thread, time::Duration};
//!
//! use fdwire::{Frame, FrameCodec, SocketKind, blocking::{Framed, Socket}};
//!
//! let (here, there) = Socket::pair(SocketKind::SeqPacket)?;
//! let service = thread::spawn(move || {
//!     let mut client = Framed::new(there, FrameCodec::default());
//!     while let Some(request) = client.next().transpose()? {
//!         client.send(Frame::new(format!("{} descriptors", request.fds.len())))?;
//!     }
//!     Ok::<(), fdwire::Error>(())
//! });
//!
//! let mut service_end = Framed::new(here, FrameCodec::default());
//! service_end.set_read_timeout(Some(Duration::from_secs(10)));
//! service_end.send(Frame::new("log file").with_fd(std::fs::File::open("/dev/null")?))?;
//! let answer = service_end.next().ok_or("the service is gone")??;
//! assert_eq!(answer.payload, "1 descriptors");
//! # drop(service_end);
//! # service.join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A peer can make the `close` of a descriptor or a connection slow. So they are closed [in the
//! background](crate::close_in_background), by threads that start with the first socket. Some
//! system calls need a process with only one thread, for example to enter a user namespace. Make
//! them before the first socket.
//!
//! `RLIMIT_NOFILE` has to be at least 1, because of poll(2). A program in a sandbox can set it to
//! 1. It can then still send the descriptors that it has, but can't receive any.
//!
//! [`fdwire::Sender`](crate::Sender), for sending from many tasks, needs a runtime. Here,
//! [`Framed::into_split`] returns halves for two threads.

mod listener;
mod read;
mod socket;
mod wait;
mod write;

use std::{sync::Arc, time::Duration};

pub use listener::Listener;
pub use read::ReadHalf;
pub use socket::Socket;
pub use write::WriteHalf;

use crate::{
    codec::{Codec, Decoder, Encoder},
    credentials::Credentials,
    error::{Error, SendError},
    transport::{FramedParts, Unsent},
};

/// A connection over one socket. It is an [`Iterator`] of the messages that arrive, which waits for
/// the next one, and it [sends](Self::send) messages.
///
/// It consists of a [`ReadHalf`] and a [`WriteHalf`] over the same socket, which
/// [`into_split`](Self::into_split) returns. They fail and end separately: after a write has
/// failed, the iterator still yields the messages of the peer.
///
/// `D` decodes and `E` encodes. Usually both have the same type, for example `Framed<FrameCodec>`.
///
/// If two peers both send more than the socket holds before they read, they wait for each other
/// without end. To avoid that, read in another thread or set a [time
/// limit](Self::set_write_timeout).
///
/// ```
/// use fdwire::{Frame, FrameCodec, SocketKind, blocking::{Framed, Socket}};
///
/// let (a, b) = Socket::pair(SocketKind::Stream)?;
/// let mut tx = Framed::new(a, FrameCodec::default());
/// for name in ["one", "two"] {
///     tx.feed(Frame::new(name))?;
/// }
/// tx.close()?; // sends both messages together, and then the end of the stream
///
/// let rx = Framed::new(b, FrameCodec::default());
/// let frames = rx.collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(frames.len(), 2);
/// # Ok::<(), fdwire::Error>(())
/// ```
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

    /// Puts together the parts that [`into_parts`](Self::into_parts) has returned. The connection
    /// has no timeouts.
    pub fn from_parts(parts: FramedParts<D, E, Socket>) -> Self {
        let (socket, receive, send) = parts.split();
        let socket = Arc::new(socket);
        let read = ReadHalf::new(Arc::clone(&socket), receive);
        Self { read, write: WriteHalf::new(socket, send) }
    }

    /// Takes the connection apart, as [`fdwire::Framed::into_parts`](crate::Framed::into_parts)
    /// does.
    pub fn into_parts(self) -> FramedParts<D, E, Socket> {
        let (shared, receive) = self.read.into_parts();
        let (socket, send) = self.write.into_parts();
        // Without this reference, `socket` is the last one.
        drop(shared);
        let socket = Arc::into_inner(socket).expect("only the two halves hold the socket");
        FramedParts::join(socket, receive, send)
    }

    /// Changes the codecs, as [`fdwire::Framed::map_codecs`](crate::Framed::map_codecs) does. The
    /// new connection has no timeouts.
    pub fn map_codecs<D2, E2: Codec>(self, map: impl FnOnce(D, E) -> (D2, E2)) -> Framed<D2, E2> {
        Framed::from_parts(self.into_parts().map_codecs(map))
    }

    /// Splits into halves that can be moved to different threads.
    pub fn into_split(mut self) -> (ReadHalf<D>, WriteHalf<E>) {
        self.write.shut_down_on_drop();
        (self.read, self.write)
    }

    /// Sets the time for which one call waits for a message. See [`ReadHalf::set_read_timeout`].
    pub fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.read.set_read_timeout(timeout);
    }

    /// Sets the time for which one call waits until the socket accepts data. See
    /// [`WriteHalf::set_write_timeout`].
    pub fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.write.set_write_timeout(timeout);
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

    /// Sends an item, and everything that was fed before. See [`WriteHalf::send`].
    ///
    /// # Errors
    /// The errors of [`WriteHalf::send`].
    pub fn send<I>(&mut self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        self.write.send(item)
    }

    /// Accepts an item for sending. See [`WriteHalf::feed`].
    ///
    /// # Errors
    /// The errors of [`WriteHalf::feed`].
    pub fn feed<I>(&mut self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        self.write.feed(item)
    }

    /// Sends everything that was accepted. See [`WriteHalf::flush`].
    ///
    /// # Errors
    /// The errors of [`WriteHalf::flush`].
    pub fn flush(&mut self) -> Result<(), Error> {
        self.write.flush()
    }

    /// Flushes, then shuts down the sending direction. See [`WriteHalf::close`].
    ///
    /// # Errors
    /// The errors of [`WriteHalf::close`].
    pub fn close(&mut self) -> Result<(), Error> {
        self.write.close()
    }
}

impl<D: Decoder, E> Iterator for Framed<D, E> {
    type Item = Result<D::Item, D::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read.next()
    }
}
