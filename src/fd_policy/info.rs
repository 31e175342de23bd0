//! The properties of a descriptor that a policy can check.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    sys::socket::{SockType, getsockopt, sockopt},
};

use crate::sys::{self, FileType};

/// The properties of a descriptor that a [policy](super::FdPolicy) can check.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// use fdwire::fd_policy::{FdInfo, FdType, SocketDomain, SocketType};
///
/// let (socket, _) = std::os::unix::net::UnixStream::pair()?;
/// let info = FdInfo::of(&socket);
/// assert_eq!(info.fd_type, FdType::Socket(SocketDomain::Unix, SocketType::Stream));
/// assert_eq!(info.to_string(), "a stream socket of AF_UNIX");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FdInfo {
    /// The type of the open file.
    pub fd_type: FdType,
    /// The access that it permits.
    pub access: FdAccess,
    /// True for a memfd that nobody can write to or shorten: it is sealed with `F_SEAL_WRITE` and
    /// `F_SEAL_SHRINK`, see memfd_create(2).
    pub is_sealed: bool,
}

/// The type of the open file behind a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FdType {
    /// A regular file. A memfd is one, too.
    RegularFile,
    /// A directory.
    Directory,
    /// A character device: a terminal, `/dev/null`.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// An end of a pipe, or a FIFO.
    Pipe,
    /// A socket that does not listen.
    Socket(SocketDomain, SocketType),
    /// A socket that listens.
    Listener(SocketDomain, SocketType),
    /// An eventfd, a pidfd, an epoll instance or a similar file. Also any file whose type can't be
    /// determined, for example because a sandbox forbids the system call.
    Other,
}

/// The address family of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SocketDomain {
    /// IPv4 or IPv6.
    Ip,
    /// `AF_UNIX`.
    Unix,
    /// Another family, with its number in `SO_DOMAIN`.
    Other(i32),
}

/// The type of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SocketType {
    /// `SOCK_STREAM`.
    Stream,
    /// `SOCK_DGRAM`.
    Datagram,
    /// `SOCK_SEQPACKET`.
    SeqPacket,
    /// Another type.
    Other,
}

/// The access that a descriptor permits (`O_ACCMODE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FdAccess {
    /// `O_RDONLY`. A process with permission to open the file anew may still get more access.
    ReadOnly,
    /// `O_WRONLY`.
    WriteOnly,
    /// `O_RDWR`.
    ReadWrite,
    /// `O_PATH`, or an access that can't be determined.
    Neither,
}

impl FdInfo {
    /// Returns the properties of a descriptor. This takes a few system calls, none of which waits.
    pub fn of(fd: impl AsFd) -> Self {
        let fd = fd.as_fd();
        let access = access(fd);
        let fd_type = fd_type(fd);
        let is_sealed =
            fd_type == FdType::RegularFile && access != FdAccess::Neither && sys::is_sealed(fd);
        Self { fd_type, access, is_sealed }
    }
}

/// Returns the access that a descriptor permits.
fn access(fd: BorrowedFd<'_>) -> FdAccess {
    let Ok(flags) = fcntl(fd, FcntlArg::F_GETFL).map(OFlag::from_bits_retain) else {
        return FdAccess::Neither;
    };
    match flags & OFlag::O_ACCMODE {
        _ if flags.contains(OFlag::O_PATH) => FdAccess::Neither,
        OFlag::O_RDONLY => FdAccess::ReadOnly,
        OFlag::O_WRONLY => FdAccess::WriteOnly,
        OFlag::O_RDWR => FdAccess::ReadWrite,
        // Linux has a fourth mode, 3, which permits ioctl only: see open(2).
        _ => FdAccess::Neither,
    }
}

/// Returns the type of the open file.
fn fd_type(fd: BorrowedFd<'_>) -> FdType {
    match sys::file_kind(fd).map_or(FileType::Other, |kind| kind.file_type) {
        FileType::Regular => FdType::RegularFile,
        FileType::Directory => FdType::Directory,
        FileType::CharacterDevice => FdType::CharDevice,
        FileType::BlockDevice => FdType::BlockDevice,
        FileType::Pipe => FdType::Pipe,
        FileType::Socket => socket_type(fd),
        FileType::Other => FdType::Other,
    }
}

/// Returns the type of a socket.
fn socket_type(fd: BorrowedFd<'_>) -> FdType {
    let domain = match getsockopt(&fd, sys::Domain) {
        Ok(libc::AF_INET | libc::AF_INET6) => SocketDomain::Ip,
        Ok(libc::AF_UNIX) => SocketDomain::Unix,
        Ok(other) => SocketDomain::Other(other),
        // An `O_PATH` descriptor of a socket file is not a socket.
        Err(_) => return FdType::Other,
    };
    let socket_type = match getsockopt(&fd, sockopt::SockType) {
        Ok(SockType::Stream) => SocketType::Stream,
        Ok(SockType::Datagram) => SocketType::Datagram,
        Ok(SockType::SeqPacket) => SocketType::SeqPacket,
        _ => SocketType::Other,
    };
    match getsockopt(&fd, sockopt::AcceptConn) {
        Ok(true) => FdType::Listener(domain, socket_type),
        _ => FdType::Socket(domain, socket_type),
    }
}

impl fmt::Display for FdInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_socket = matches!(self.fd_type, FdType::Socket(..) | FdType::Listener(..));
        let access = if is_socket { "" } else { self.access.adjective() };
        let sealed = if self.is_sealed { "sealed " } else { "" };
        write!(f, "a {access}{sealed}{}", self.fd_type)
    }
}

impl FdAccess {
    pub(super) fn adjective(self) -> &'static str {
        match self {
            Self::ReadOnly => "read-only ",
            Self::WriteOnly => "write-only ",
            Self::ReadWrite => "read-write ",
            Self::Neither => "path-only ",
        }
    }
}

impl fmt::Display for FdType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RegularFile => f.write_str("regular file"),
            Self::Directory => f.write_str("directory"),
            Self::CharDevice => f.write_str("character device"),
            Self::BlockDevice => f.write_str("block device"),
            Self::Pipe => f.write_str("pipe"),
            Self::Socket(domain, kind) => write!(f, "{kind} socket of {domain}"),
            Self::Listener(domain, kind) => write!(f, "listening {kind} socket of {domain}"),
            Self::Other => f.write_str("descriptor of another type"),
        }
    }
}

impl fmt::Display for SocketDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip => f.write_str("IP"),
            Self::Unix => f.write_str("AF_UNIX"),
            Self::Other(number) => write!(f, "address family {number}"),
        }
    }
}

impl fmt::Display for SocketType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stream => "stream",
            Self::Datagram => "datagram",
            Self::SeqPacket => "seqpacket",
            Self::Other => "raw",
        })
    }
}
