//! The fields of a message that are descriptors.

use std::{
    fmt,
    fs::File,
    marker::PhantomData,
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    sync::Arc,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

use super::{
    FdError,
    scope::{self, Outgoing},
};
use crate::{
    fd_policy::{FdMismatch, FdPolicy, SocketDomain, SocketType},
    frame::Fds,
};

/// A field of a typed message that is a descriptor: `Passed<File>`, `Passed<TcpStream>`.
///
/// The sender makes it with `into()`, and gives the descriptor away with the message. The receiver
/// takes the descriptor out with [`into_inner`](Self::into_inner). In the bytes of the message, the
/// field is a number: the position of the descriptor among those of the message.
///
/// If a received message is dropped, its descriptors are closed [in the
/// background](crate::close_in_background). A descriptor that was taken out is closed like any
/// other.
///
/// Only a codec of this module can serialize it. Other serializers return an error, for example if
/// you print a message as JSON.
pub struct Passed<T: Passable> {
    /// Exactly one descriptor. There is a second reference to it only while a codec encodes or
    /// decodes the message.
    fd: Arc<Fds<T::Fd>>,
    passed: PhantomData<fn(T) -> T>,
}

/// A type that owns a descriptor and can be in a [`Passed`] field. It checks the descriptors that a
/// peer sends.
///
/// It is implemented for the types of std that own a descriptor, and for
/// [`SealedMemfd`](super::SealedMemfd). Implement it for a type of your own to check more:
///
/// ```
/// use std::{fs::File, os::fd::OwnedFd};
///
/// use fdwire::{fd_policy::{FdMismatch, FdPolicy}, typed::Passable};
///
/// /// A regular file that is open for reading only.
/// struct Input(File);
///
/// impl Passable for Input {
///     type Fd = OwnedFd;
///
///     fn check(fd: &OwnedFd) -> Result<(), FdMismatch> {
///         FdPolicy::regular_file().read_only().check(fd)
///     }
///
///     fn from_fd(fd: OwnedFd) -> Self {
///         Self(fd.into())
///     }
///
///     fn into_fd(self) -> OwnedFd {
///         self.0.into()
///     }
/// }
/// ```
pub trait Passable: Sized {
    /// The descriptor type of the connection: [`OwnedFd`]. Tests may use integers.
    type Fd: 'static;

    /// Checks a descriptor that came from a peer.
    ///
    /// # Errors
    /// The expected and the received kind. The message is refused then.
    fn check(fd: &Self::Fd) -> Result<(), FdMismatch>;

    /// Makes the owner from a descriptor. A descriptor from a peer has passed
    /// [`check`](Self::check).
    fn from_fd(fd: Self::Fd) -> Self;

    /// Takes the descriptor out.
    fn into_fd(self) -> Self::Fd;
}

macro_rules! passable {
    ($($owner:ty => $policy:expr),* $(,)?) => {
        $(impl Passable for $owner {
            type Fd = OwnedFd;

            fn check(fd: &OwnedFd) -> Result<(), FdMismatch> {
                const POLICY: FdPolicy = $policy;
                POLICY.check(fd)
            }

            fn from_fd(fd: OwnedFd) -> Self {
                fd.into()
            }

            fn into_fd(self) -> OwnedFd {
                self.into()
            }
        })*
    };
}

passable! {
    OwnedFd => FdPolicy::any(),
    File => FdPolicy::file(),
    TcpStream => FdPolicy::socket(SocketDomain::Ip, SocketType::Stream),
    TcpListener => FdPolicy::listener(SocketDomain::Ip, SocketType::Stream),
    UdpSocket => FdPolicy::socket(SocketDomain::Ip, SocketType::Datagram),
    UnixStream => FdPolicy::socket(SocketDomain::Unix, SocketType::Stream),
    UnixListener => FdPolicy::listener(SocketDomain::Unix, SocketType::Stream),
    UnixDatagram => FdPolicy::socket(SocketDomain::Unix, SocketType::Datagram),
    super::SealedMemfd => FdPolicy::sealed_memfd(),
}

impl<T: Passable> Passed<T> {
    /// Takes the descriptor out.
    ///
    /// # Panics
    /// If a codec is encoding the message at this moment. That can only happen if another thread
    /// sends the same message by an `Arc`.
    pub fn into_inner(self) -> T {
        let fd = Arc::into_inner(self.fd).and_then(|mut fds| fds.pop());
        T::from_fd(fd.expect("no codec is encoding the message"))
    }
}

impl<T: Passable> From<T> for Passed<T> {
    fn from(owner: T) -> Self {
        Self { fd: Arc::new(Fds::from_iter([owner.into_fd()])), passed: PhantomData }
    }
}

impl<T: Passable<Fd: AsFd>> AsFd for Passed<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd[0].as_fd()
    }
}

impl<T: Passable<Fd: fmt::Debug>> fmt::Debug for Passed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Passed").field(&self.fd[0]).finish()
    }
}

impl<T: Passable> Serialize for Passed<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let number = scope::attach(self, Outgoing::Given(Arc::clone(&self.fd)));
        serializer.serialize_u32(number.map_err(ser::Error::custom)?)
    }
}

impl<'de, T: Passable> Deserialize<'de> for Passed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let index = u32::deserialize(deserializer)?;
        let check =
            |fd: &T::Fd| T::check(fd).map_err(|mismatch| FdError::Mismatch { index, mismatch });
        let fd = scope::claim(index, check).map_err(de::Error::custom)?;
        Ok(Self { fd, passed: PhantomData })
    }
}

/// A field of a message that sends a copy of a descriptor. The sender keeps the descriptor, without
/// a call of `dup`.
///
/// On the wire it is the same as a [`Passed`]. So if a message is generic over the type of a field,
/// the sender may have a `SharedFd` there and the receiver a `Passed<File>`. Each clone in a
/// message is sent as another descriptor.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::fs::File;
///
/// use fdwire::{Framed, Socket, SocketKind, typed::{Passed, SharedFd, Typed}};
/// use futures::{SinkExt, StreamExt};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct Log<F> {
///     name: String,
///     file: F,
/// }
///
/// let (a, b) = Socket::pair(SocketKind::SeqPacket)?;
/// let mut tx = Framed::with_codecs(a, (), Typed::<Log<SharedFd>>::default());
/// let mut rx = Framed::with_codecs(b, Typed::<Log<Passed<File>>>::default(), ());
///
/// let file = SharedFd::new(File::open("/dev/null")?);
/// tx.send(Log { name: "null".into(), file: file.clone() }).await?;
/// tx.send(Log { name: "null again".into(), file }).await?;
/// assert_eq!(rx.next().await.ok_or("gone")??.name, "null");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct SharedFd(Arc<OwnedFd>);

impl SharedFd {
    /// Shares a descriptor.
    pub fn new(fd: impl Into<OwnedFd>) -> Self {
        Self(Arc::new(fd.into()))
    }
}

impl From<Arc<OwnedFd>> for SharedFd {
    fn from(fd: Arc<OwnedFd>) -> Self {
        Self(fd)
    }
}

impl AsFd for SharedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Serialize for SharedFd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let number = scope::attach(self, Outgoing::Lent(Arc::clone(&self.0)));
        serializer.serialize_u32(number.map_err(ser::Error::custom)?)
    }
}
