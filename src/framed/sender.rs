use std::sync::Arc;

use super::shared::Shared;
use crate::{Codec, Encoder, Error, SendError};

/// Sends messages over one socket from many tasks. From
/// [`WriteHalf::into_sender`](crate::WriteHalf::into_sender); clone it for each task.
///
/// A message is encoded into a common queue at once. The [`Driver`](crate::Driver), which has to be
/// spawned, sends all that wait together, so many tasks with a message each cost a system call or
/// two, not one each. Messages of one task arrive in their order.
///
/// While as much waits as the [limits](Codec::limits) allow, senders wait in line for room, first
/// come first served.
///
/// When sending has failed, or the driver is gone ([`Error::Closed`]), each item comes back in the
/// [`SendError`]. What was accepted before and not sent is in what the driver resolves to.
///
/// If the kernel refuses a descriptor, sending fails for **all** senders of the connection. It
/// refuses io_uring descriptors (`EINVAL`), and every descriptor if the peer
/// [takes none](crate::Socket::set_pass_fds) (`EPERM`). Messages that were accepted just before may
/// then be unsent too, because all that wait go out together. So check the type of a descriptor
/// before you send it if somebody else has chosen it.
///
/// When all senders are dropped, the driver sends what waits and resolves.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
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
/// # let received = Framed::new(b, FrameCodec::default()).filter(|frame| std::future::ready(frame.is_ok()));
/// # assert_eq!(received.count().await, 64);
/// # Ok(()) }
/// ```
///
/// # Cancel safety
/// Each method can be dropped at any await. Then [`send`](Self::send) loses its item, and closes
/// its descriptors, if it had not taken it yet; where that must not happen,
/// [`reserve`](Self::reserve) first. A place in line is lost too.
#[derive(Debug)]
pub struct Sender<E> {
    shared: Arc<Shared<E>>,
}

impl<E> Sender<E> {
    /// The first one, which `shared` counts already.
    pub(super) fn new(shared: Arc<Shared<E>>) -> Self {
        Self { shared }
    }

    /// Waits until everything that was accepted before this call has been sent, by any sender.
    /// Messages are sent without it too.
    ///
    /// # Errors
    /// If sending has failed, as for [`WriteHalf::flush`](crate::WriteHalf::flush).
    /// [`Error::Closed`] if the driver is gone.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn flush(&self) -> Result<(), Error> {
        self.shared.flush().await
    }
}

impl<E: Codec> Sender<E> {
    /// Waits for room and accepts the item for sending.
    ///
    /// # Errors
    /// What the encoder refuses, what sending has failed with, and [`Error::Closed`] if the driver
    /// is gone. The item comes back with it.
    ///
    /// # Cancel safety
    /// The item is lost, and its descriptors are closed, if this is dropped before it is ready.
    pub async fn send<I>(&self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        self.shared.room().await.accept(item)
    }

    /// Waits for room for one message. [`SendPermit::send`] then takes it at once, so a cancelled
    /// task still has its item.
    ///
    /// Other senders go on meanwhile: an unused permit takes room for one byte and one descriptor
    /// from them.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
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
    /// As for [`send`](Self::send).
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn reserve(&self) -> Result<SendPermit<'_, E>, Error> {
        self.shared.room().await.keep()?;
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

/// Room for one message, from [`Sender::reserve`].
#[derive(Debug)]
#[must_use = "nothing is sent with a permit that is dropped"]
pub struct SendPermit<'a, E> {
    shared: &'a Shared<E>,
}

impl<E> SendPermit<'_, E> {
    /// Accepts the item for sending.
    ///
    /// # Errors
    /// As for [`Sender::send`].
    pub fn send<I>(self, item: I) -> Result<(), SendError<I, E::Error>>
    where
        E: Encoder<I>,
    {
        self.shared.room_with_permit().accept(item)
    }
}

impl<E> Drop for SendPermit<'_, E> {
    fn drop(&mut self) {
        self.shared.remove_permit();
    }
}
