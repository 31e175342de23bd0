//! A descriptor to be sent.

use std::{
    fs::File,
    io::{PipeReader, PipeWriter},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    process::{ChildStderr, ChildStdin, ChildStdout},
    sync::Arc,
};

/// A descriptor to be sent, with the way in which this process closes its own copy afterwards.
///
/// `sendmsg` puts a copy into the message, and the copy in this process is closed right after it.
/// The receiver may have closed its copy by then, so this `close` can be the last one. The last
/// `close` of a socket can block for as long as a peer likes, so sockets are closed [in the
/// background](crate::close_in_background).
///
/// | made from | after it was sent |
/// |---|---|
/// | a descriptor (`File`, [`OwnedFd`]) | a system call finds out its kind, then it is closed |
/// | `Arc<OwnedFd>` | other references keep it open; the last one closes it as above |
/// | [`SendFd::assume_socket`] | it is closed in the background, without this system call |
/// | [`SendFd::assume_file`] | it is closed at once, without this system call |
///
/// The system call takes about 0.2 µs for each descriptor.
///
/// If you share a socket by `Arc`, its receiver may set `SO_LINGER`, which makes your own `close`
/// slow too. So do not drop the last reference. Take the descriptor out with `Arc::into_inner`, and
/// pass it to [`close_in_background`](crate::close_in_background).
///
/// If a `SendFd` is dropped before a connection has accepted it, it is closed in the calling
/// thread, like an [`OwnedFd`]. That is also true of the descriptors in
/// [`FramedParts::unsent`](crate::framed::FramedParts#structfield.unsent). If a connection has
/// accepted a descriptor and does not send it, the descriptor is closed in the background, unless
/// it was made by [`SendFd::assume_file`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::{fs::File, os::fd::OwnedFd, sync::Arc};
///
/// use fdwire::{Frame, FrameCodec, Framed, SendFd, Socket, SocketKind};
/// use futures::SinkExt;
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// let mut tx = Framed::new(a, FrameCodec::default());
///
/// let shared: Arc<OwnedFd> = Arc::new(File::open("/dev/null")?.into());
/// for _ in 0..3 {
///     tx.send(Frame::from_parts("the same file", [Arc::clone(&shared)])).await?; // no `dup`
/// }
/// let file = SendFd::assume_file(File::open("/dev/null")?);
/// tx.send(Frame::from_parts("a file of ours", [file])).await?;
/// tx.send(Frame::new("anything").with_fd(File::open("/dev/null")?)).await?;
/// # drop(b); Ok(()) }
/// ```
#[derive(Debug)]
pub struct SendFd(Handle);

/// The two ways to hold a descriptor. Both take 16 bytes.
#[derive(Debug)]
enum Handle {
    Owned(OwnedFd, FdKind),
    Shared(Arc<OwnedFd>, FdKind),
}

/// The kind of open file that the caller has declared for a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FdKind {
    /// Nothing was declared.
    Unknown,
    Socket,
    /// A file whose `close` is quick.
    File,
}

impl SendFd {
    /// Declares that a descriptor is a socket, which saves a system call. If it is not a socket, it
    /// is still closed in the background, but may delay the closing of sockets.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # let (connection, _) = std::os::unix::net::UnixStream::pair()?;
    /// let fd = fdwire::SendFd::assume_socket(connection);
    /// # Ok(()) }
    /// ```
    pub fn assume_socket(fd: impl Into<Self>) -> Self {
        fd.into().of_kind(FdKind::Socket)
    }

    /// Declares that the `close` of a descriptor is quick: it is a regular file of a local file
    /// system, a pipe, a memfd or `/dev/null`. Never use this for a socket, a file of a network or
    /// FUSE file system, a terminal, or a descriptor that a peer has sent. Closing such a
    /// descriptor may block the thread that sends.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// let fd = fdwire::SendFd::assume_file(std::fs::File::open("/dev/null")?);
    /// # Ok(()) }
    /// ```
    pub fn assume_file(fd: impl Into<Self>) -> Self {
        fd.into().of_kind(FdKind::File)
    }

    fn of_kind(self, kind: FdKind) -> Self {
        Self(match self.0 {
            Handle::Owned(fd, _) => Handle::Owned(fd, kind),
            Handle::Shared(fd, _) => Handle::Shared(fd, kind),
        })
    }

    /// Takes the descriptor out. Returns `None` if it is shared and others still hold it.
    pub fn into_inner(self) -> Option<OwnedFd> {
        self.into_last().map(|(fd, _)| fd)
    }

    /// Takes the descriptor out, with its kind.
    #[inline]
    pub(crate) fn into_last(self) -> Option<(OwnedFd, FdKind)> {
        match self.0 {
            Handle::Owned(fd, kind) => Some((fd, kind)),
            Handle::Shared(fd, kind) => Some((Arc::into_inner(fd)?, kind)),
        }
    }
}

impl AsFd for SendFd {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Handle::Owned(fd, _) => fd.as_fd(),
            Handle::Shared(fd, _) => fd.as_fd(),
        }
    }
}

impl From<OwnedFd> for SendFd {
    #[inline]
    fn from(fd: OwnedFd) -> Self {
        Self(Handle::Owned(fd, FdKind::Unknown))
    }
}

/// Shares the descriptor: only the last reference closes it.
impl From<Arc<OwnedFd>> for SendFd {
    fn from(fd: Arc<OwnedFd>) -> Self {
        Self(Handle::Shared(fd, FdKind::Unknown))
    }
}

/// Implements the conversion for a type that owns a descriptor and gives it away.
macro_rules! from_owner {
    ($($owner:ty),* $(,)?) => {
        $(impl From<$owner> for SendFd {
            fn from(owner: $owner) -> Self {
                OwnedFd::from(owner).into()
            }
        })*
    };
}

from_owner!(File, PipeReader, PipeWriter, ChildStdin, ChildStdout, ChildStderr);
from_owner!(TcpListener, TcpStream, UdpSocket, UnixDatagram, UnixListener, UnixStream);

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn it_is_small() {
        assert_eq!(size_of::<SendFd>(), 16);
        assert_eq!(size_of::<Option<SendFd>>(), 16);
    }

    #[test]
    fn the_kind_is_the_one_that_was_declared_last() {
        let kind = |fd: SendFd| fd.into_last().map(|(_, kind)| kind);
        assert_eq!(kind(null().into()), Some(FdKind::Unknown));
        assert_eq!(kind(SendFd::assume_file(null())), Some(FdKind::File));
        assert_eq!(kind(SendFd::assume_socket(Arc::new(null()))), Some(FdKind::Socket));
        assert_eq!(kind(SendFd::assume_file(SendFd::assume_socket(null()))), Some(FdKind::File));
    }

    #[test]
    fn only_the_last_reference_takes_the_descriptor_out() {
        let shared = Arc::new(null());
        let number = shared.as_raw_fd();
        let (first, second) =
            (SendFd::from(Arc::clone(&shared)), SendFd::assume_file(Arc::clone(&shared)));
        assert_eq!(first.as_fd().as_raw_fd(), number);
        assert!(first.into_inner().is_none());
        drop(shared);
        assert_eq!(second.into_inner().map(|fd| fd.as_raw_fd()), Some(number));
    }
}
