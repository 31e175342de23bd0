//! Sending and receiving datagrams.

use std::{
    future::poll_fn,
    io::{Error as IoError, ErrorKind, Result},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::SocketAddr,
    },
    sync::{Arc, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use nix::{libc, sys::socket::UnixAddr};
use smallvec::SmallVec;
use tokio::{
    io::{Interest, unix::AsyncFdReadyGuard},
    task::coop,
};

use super::{Datagram, DatagramSocket, MAX_PAYLOAD_BYTES};
use crate::{
    backoff::Backoff,
    closer::{Account, BackgroundFd},
    error::Error,
    frame::Fds,
    limits::SCM_MAX_FD,
    socket::{SendFailure, open::unix_addr},
    sys,
};

/// The number of descriptors that may wait to be closed. While more wait, nothing is received.
const MAX_CLOSING: usize = 2 * SCM_MAX_FD;

impl DatagramSocket {
    /// Sends a datagram to the connected peer, with copies of at most 253 descriptors. Waits while
    /// the receiver's queue is full.
    ///
    /// # Errors
    /// After an error nothing was sent, and the next send may succeed. `ConnectionRefused` (the
    /// peer has closed its socket, which ends the [connection](Self::connect)), `NotConnected`,
    /// `EMSGSIZE` (larger than the send buffer), `InvalidInput` (more than 253 descriptors),
    /// `PermissionDenied` (the peer refuses descriptors, or is connected to another socket), and
    /// other errors of sendmsg(2).
    ///
    /// # Cancel safety
    /// If this is dropped before it returns, the datagram was not sent.
    ///
    /// # Panics
    /// If the kernel lacks memory or too many descriptors are in flight, and the runtime's timer is
    /// not enabled.
    pub async fn send(&self, payload: impl AsRef<[u8]>, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_with(payload.as_ref(), fds, None).await
    }

    /// Sends a datagram to an address. While the receiver's queue is full, this tries again after
    /// growing pauses, because the kernel does not report when there is room.
    ///
    /// # Errors
    /// The errors of [`send`](Self::send). `NotFound` and `ConnectionRefused` if nobody has a
    /// socket at the address.
    ///
    /// # Cancel safety
    /// If this is dropped before it returns, the datagram was not sent.
    ///
    /// # Panics
    /// If it has to wait and the runtime's timer is not enabled.
    pub async fn send_to(
        &self,
        payload: impl AsRef<[u8]>,
        fds: &[BorrowedFd<'_>],
        receiver: &SocketAddr,
    ) -> Result<()> {
        self.send_with(payload.as_ref(), fds, Some(&unix_addr(receiver)?)).await
    }

    async fn send_with(
        &self,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        receiver: Option<&UnixAddr>,
    ) -> Result<()> {
        if fds.len() > SCM_MAX_FD {
            let reason =
                format!("a datagram takes at most {SCM_MAX_FD} descriptors, not {}", fds.len());
            return Err(IoError::new(ErrorKind::InvalidInput, reason));
        }
        let mut backoff = Backoff::default();
        let mut writable: Option<AsyncFdReadyGuard<'_, BackgroundFd>> = None;
        loop {
            let coop = poll_fn(coop::poll_proceed).await;
            match sys::send_datagram(self.as_fd(), payload, fds.iter().copied(), receiver) {
                Ok(()) => {
                    coop.made_progress();
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => match SendFailure::of(&error) {
                    SendFailure::Full if receiver.is_none() => {
                        drop(coop);
                        // tokio may still have readiness from before this attempt. So try once
                        // more with the readiness that it has. If that attempt fails too, the
                        // readiness was stale: clear it and wait for an event.
                        match writable.take() {
                            None => writable = Some(self.io.writable().await?),
                            Some(mut stale) => stale.clear_ready(),
                        }
                    }
                    // The kernel does not report when the queue of another socket has room, when
                    // fewer descriptors are in flight, or when there is memory.
                    SendFailure::Full | SendFailure::Scarce | SendFailure::NoMemoryForPacket => {
                        drop(coop);
                        tokio::time::sleep(backoff.next()).await;
                    }
                    SendFailure::PacketTooLarge | SendFailure::Final => return Err(error),
                },
            }
        }
    }

    /// Waits for the next datagram.
    ///
    /// # Errors
    /// No error is final: the next call returns the next datagram.
    ///
    /// - [`TruncatedPacket`](Error::TruncatedPacket) if a datagram is longer than 256 KiB.
    /// - [`TruncatedControl`](Error::TruncatedControl) if some of its descriptors were lost because
    ///   this process has reached its limit. The other descriptors of that datagram are closed.
    /// - [`Io`](Error::Io) with `ConnectionReset` if the peer has connected to another socket, and
    ///   so has discarded its queue.
    /// - [`Io`](Error::Io) with other errors of recvmsg(2).
    ///
    /// # Cancel safety
    /// No datagram is lost when dropped.
    pub async fn recv(&self) -> std::result::Result<Datagram, Error> {
        poll_fn(|cx| self.account.poll_at_most(cx, MAX_CLOSING)).await;
        self.io.async_io(Interest::READABLE, |_| self.try_recv()).await?
    }

    /// Polls for the next datagram. Only the task that polled last is woken.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fdwire::socket::DatagramSocket;
    /// use futures::{StreamExt, stream};
    ///
    /// let (a, b) = DatagramSocket::pair()?;
    /// a.send("one", &[]).await?;
    /// let mut datagrams = stream::poll_fn(|cx| b.poll_recv(cx).map(Some));
    /// assert_eq!(datagrams.next().await.ok_or("it never ends")??.payload, "one");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// The errors of [`recv`](Self::recv).
    pub fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<std::result::Result<Datagram, Error>> {
        loop {
            ready!(self.account.poll_at_most(cx, MAX_CLOSING));
            let mut ready = ready!(self.io.poll_read_ready(cx))?;
            if let Ok(received) = ready.try_io(|_| self.try_recv()) {
                return Poll::Ready(received?);
            }
        }
    }

    /// Receives the next datagram.
    ///
    /// # Errors
    /// `WouldBlock` if there is no datagram. The inner error concerns one datagram.
    fn try_recv(&self) -> Result<std::result::Result<Datagram, Error>> {
        let mut fds = SmallVec::new();
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        // Receive into the common buffer, and then copy the datagram, whose size is known then.
        buffer.reserve(MAX_PAYLOAD_BYTES);
        let (received, sender) = loop {
            match sys::recv_datagram(self.as_fd(), &mut buffer, &mut fds) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                received => break received?,
            }
        };
        let payload = Bytes::copy_from_slice(&buffer);
        buffer.clear();
        drop(buffer);
        // From here on, descriptors that are not taken out are closed in the background.
        let fds = Fds::from_peer(fds, Some(Arc::<Account>::clone(&self.account)));
        Ok(match received {
            sys::Received { packet_truncated: true, .. } => Err(Error::TruncatedPacket),
            sys::Received { control_truncated: true, .. } => Err(Error::TruncatedControl),
            sys::Received { credentials, .. } => Ok(Datagram { payload, fds, sender, credentials }),
        })
    }
}
