//! Sending over one connection from many tasks.

use std::{fmt, sync::Arc};

use super::{SendDriver, WriteHalf, shared::Shared};
use crate::{
    codec::{Codec, Encoder},
    error::{Error, SendError},
};

/// Sends messages over one socket from many tasks.
/// [`WriteHalf::into_sender`](crate::framed::WriteHalf::into_sender) makes a sender. Clone it for
/// each task.
///
/// A message is encoded into a common queue at once. The [`SendDriver`], which you have to spawn,
/// sends all waiting messages together. So if many tasks send one message each, that takes one or
/// two system calls in total. The messages of one task arrive in their order.
///
/// While the queue is at its [limits](Codec::limits), senders wait for room, first come, first
/// served.
///
/// After sending has failed, or after the driver was dropped ([`Error::Closed`]), each item comes
/// back in the [`SendError`]. If the driver resolves after a failure, its [`WriteHalf`] has the
/// items that were accepted before and not sent.
///
/// If the kernel refuses a descriptor, sending fails for **all** senders of the connection. It
/// refuses io_uring descriptors (`EINVAL`), and every descriptor if the peer [refuses
/// descriptors](crate::Socket::set_pass_fds) (`EPERM`). Messages that were accepted just before may
/// then be unsent too, because waiting messages are sent together. So if a descriptor comes from
/// somebody else, check its type before you send it.
///
/// When all senders are dropped, the driver sends what waits and resolves.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
/// use futures::StreamExt;
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// let (_, write) = Framed::new(a, FrameCodec::default()).into_split();
/// let (sender, driver) = write.into_sender();
/// let driver = tokio::spawn(driver);
/// for n in 0..64u8 {
///     let sender = sender.clone();
///     tokio::spawn(async move { sender.send(Frame::new(vec![n])).await });
/// }
/// drop(sender);
/// let mut write = driver.await?; // all is sent
/// write.close().await?;
/// # let received = Framed::new(b, FrameCodec::default());
/// # let received = received.filter(|frame| std::future::ready(frame.is_ok()));
/// # assert_eq!(received.count().await, 64);
/// # Ok(()) }
/// ```
///
/// # Cancel safety
/// Each method can be dropped at any await. [`send`](Self::send) then loses its item and closes its
/// descriptors, unless the item is in the queue already. If an item must not be lost, call
/// [`reserve`](Self::reserve) first. A task that is dropped while it waits also loses its turn.
#[derive(Debug)]
pub struct Sender<E> {
    shared: Arc<Shared<E>>,
}

impl<E> WriteHalf<E> {
    /// Turns the half into a [`Sender`], which can be cloned for many tasks, and its
    /// [`SendDriver`]. Spawn the driver: it sends the messages that all senders accept. Messages
    /// that this half has accepted before are sent first.
    pub fn into_sender(self) -> (Sender<E>, SendDriver<E>) {
        let shared = Arc::new(Shared::new(self.encoder, &self.outbound));
        (Sender { shared: Arc::clone(&shared) }, SendDriver::new(shared, self.outbound))
    }
}

impl<E> Sender<E> {
    /// Waits until everything that any sender has accepted before this call is sent. The driver
    /// sends messages without this call too.
    ///
    /// # Errors
    /// The errors of [`WriteHalf::flush`](crate::framed::WriteHalf::flush), and [`Error::Closed`]
    /// if the driver is gone.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn flush(&self) -> Result<(), Error> {
        self.shared.flush().await
    }

    /// Returns true if no further item is accepted, because sending has failed or the driver is
    /// gone.
    pub fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }
}

impl<E: Codec> Sender<E> {
    /// Waits for room and accepts the item for sending.
    ///
    /// # Errors
    /// The errors of the encoder, the error with which sending has failed, and [`Error::Closed`] if
    /// the driver is gone. The item comes back with it.
    ///
    /// # Cancel safety
    /// If this is dropped before it returns, the item is lost and its descriptors are closed.
    pub async fn send<I>(&self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        self.shared.slot().await.accept(item)
    }

    /// Accepts the item for sending if there is room for it at once.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind, framed::TrySendError};
    ///
    /// # let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
    /// # let (sender, driver) = Framed::new(a, FrameCodec::default()).into_split().1.into_sender();
    /// # let driver = tokio::spawn(driver);
    /// match sender.try_send(Frame::new("statistics")) {
    ///     Err(TrySendError::Full(_frame)) => {} // the peer is slow: skip this message
    ///     sent => sent?,
    /// }
    /// # drop(b); Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`TrySendError::Full`] if the queue is at its limits, or if other senders wait for room.
    /// [`TrySendError::Failed`] with the errors of [`send`](Self::send).
    pub fn try_send<I>(&self, item: I) -> Result<(), TrySendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        match self.shared.try_slot() {
            Some(slot) => slot.accept(item).map_err(TrySendError::Failed),
            None => Err(TrySendError::Full(item)),
        }
    }

    /// Waits for room for one message. [`SendPermit::send`] then accepts the message without
    /// waiting. So a task that is cancelled while it waits still has its item.
    ///
    /// A permit does not stop other senders: it takes room for one byte and one descriptor only.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
    /// # let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
    /// # let (sender, driver) = Framed::new(a, FrameCodec::default()).into_split().1.into_sender();
    /// # let driver = tokio::spawn(driver);
    /// # let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    /// # let client = tokio::net::TcpStream::connect(listener.local_addr()?).await?;
    /// let permit = sender.reserve().await?; // no room, no accept: clients wait in the backlog
    /// let (connection, peer) = listener.accept().await?;
    /// permit.send(Frame::new(peer.to_string()).with_fd(connection.into_std()?))?;
    /// # drop(b); Ok(()) }
    /// ```
    ///
    /// # Errors
    /// The errors of [`send`](Self::send).
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn reserve(&self) -> Result<SendPermit<'_, E>, Error> {
        self.shared.slot().await.keep()?;
        Ok(SendPermit { shared: &self.shared })
    }
}

impl<E> Clone for Sender<E> {
    fn clone(&self) -> Self {
        self.shared.add_sender();
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<E> Drop for Sender<E> {
    fn drop(&mut self) {
        self.shared.remove_sender();
    }
}

/// The error of [`Sender::try_send`].
pub enum TrySendError<I, E = Error> {
    /// There is no room for the item at the moment. The item comes back.
    Full(I),
    /// The item was refused, or sending has ended: the error of [`Sender::send`].
    Failed(SendError<I, E>),
}

impl<I, E: fmt::Debug> fmt::Debug for TrySendError<I, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(_) => f.write_str("Full"),
            Self::Failed(error) => f.debug_tuple("Failed").field(error).finish(),
        }
    }
}

impl<I, E: fmt::Display> fmt::Display for TrySendError<I, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(_) => f.write_str("the queue of messages to be sent is full"),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

impl<I, E: std::error::Error> std::error::Error for TrySendError<I, E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Full(_) => None,
            Self::Failed(error) => error.source(),
        }
    }
}

/// A permit to send one message, made by [`Sender::reserve`].
#[derive(Debug)]
#[must_use = "a permit that is dropped sends nothing"]
pub struct SendPermit<'a, E> {
    shared: &'a Shared<E>,
}

impl<E> SendPermit<'_, E> {
    /// Accepts the item for sending.
    ///
    /// # Errors
    /// The errors of [`Sender::send`].
    pub fn send<I>(self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        self.shared.slot_of_permit().accept(item)
    }
}

impl<E> Drop for SendPermit<'_, E> {
    fn drop(&mut self) {
        self.shared.remove_permit();
    }
}
