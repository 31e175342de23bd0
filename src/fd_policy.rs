//! The check of received descriptors.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    sys::socket::{SockType, getsockopt, sockopt},
};

use crate::{
    closer::close_in_background,
    sys::{self, FileType},
};

/// A condition for received descriptors: "a read-only regular file, or nothing".
///
/// A peer decides what it sends. A program that expects a file and gets a FIFO blocks in `open` or
/// `read`; one that gets its file writable shares more than it meant to. So look before use. The
/// kernel is asked about the open file itself (statx(2), `F_GETFL`, `SO_DOMAIN`, `SO_TYPE`), no
/// path and no daemon of a FUSE file system. All of that is fixed for an open file; only a socket
/// that is connected or begins to listen changes, which any holder can do later.
///
/// A descriptor opened with `O_PATH` satisfies nothing but [`any`](Self::any).
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::fs::File;
///
/// use fdwire::fd_policy::FdPolicy;
///
/// const LOG: FdPolicy = FdPolicy::regular_file().read_only();
///
/// let file = File::from(LOG.accept(File::open("/proc/self/exe")?)?);
/// let refused = LOG.accept(File::open("/dev/null")?).unwrap_err();
/// assert_eq!(
///     refused.to_string(),
///     "expected a read-only regular file, got a read-only character device"
/// );
/// # drop(file); Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdPolicy {
    wanted: Wanted,
    access: Option<FdAccess>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Any,
    File,
    SealedMemfd,
    Type(FdType),
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
    /// An eventfd, a pidfd, an epoll instance and their kin, or something that the kernel does not
    /// tell (for example, because a sandbox forbids asking).
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
    /// Another one, by the number that `SO_DOMAIN` has for it.
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
    /// Another one.
    Other,
}

/// The access that a descriptor permits (`O_ACCMODE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FdAccess {
    /// `O_RDONLY`. It says nothing of the file: who may open the file anew may get more.
    ReadOnly,
    /// `O_WRONLY`.
    WriteOnly,
    /// `O_RDWR`.
    ReadWrite,
    /// `O_PATH`, or nothing that the kernel tells.
    Neither,
}

/// The facts about a descriptor that a policy can ask for.
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

/// A descriptor is not what it has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, got {found}")]
#[non_exhaustive]
pub struct FdMismatch {
    /// The policy.
    pub expected: FdPolicy,
    /// The descriptor.
    pub found: FdInfo,
}

impl FdPolicy {
    /// Any descriptor.
    pub const fn any() -> Self {
        Self::wanting(Wanted::Any)
    }

    /// Anything that is used as a file: no socket.
    pub const fn file() -> Self {
        Self::wanting(Wanted::File)
    }

    /// A regular file. Reading it never waits for a peer, unless it is on a network or FUSE file
    /// system.
    pub const fn regular_file() -> Self {
        Self::wanting(Wanted::Type(FdType::RegularFile))
    }

    /// A memfd that nobody can write to or shorten, so that it can be mapped and trusted after one
    /// check. See [`FdInfo::is_sealed`].
    pub const fn sealed_memfd() -> Self {
        Self::wanting(Wanted::SealedMemfd)
    }

    /// A directory.
    pub const fn directory() -> Self {
        Self::wanting(Wanted::Type(FdType::Directory))
    }

    /// An end of a pipe. [`read_only`](Self::read_only) is the end to read from.
    pub const fn pipe() -> Self {
        Self::wanting(Wanted::Type(FdType::Pipe))
    }

    /// A socket that does not listen, connected or not. `SOCK_STREAM` of IP is TCP, but for
    /// protocols such as MPTCP that programs use in the same way.
    pub const fn socket(domain: SocketDomain, socket_type: SocketType) -> Self {
        Self::wanting(Wanted::Type(FdType::Socket(domain, socket_type)))
    }

    /// A socket that listens.
    pub const fn listener(domain: SocketDomain, socket_type: SocketType) -> Self {
        Self::wanting(Wanted::Type(FdType::Listener(domain, socket_type)))
    }

    const fn wanting(wanted: Wanted) -> Self {
        Self { wanted, access: None }
    }

    /// The same with reading permitted and writing not.
    #[must_use]
    pub const fn read_only(self) -> Self {
        Self { access: Some(FdAccess::ReadOnly), ..self }
    }

    /// The same with writing permitted and reading not.
    #[must_use]
    pub const fn write_only(self) -> Self {
        Self { access: Some(FdAccess::WriteOnly), ..self }
    }

    /// The same with both permitted.
    #[must_use]
    pub const fn read_write(self) -> Self {
        Self { access: Some(FdAccess::ReadWrite), ..self }
    }

    /// Checks a descriptor without taking it.
    ///
    /// # Errors
    /// [`FdMismatch`] if it is something else.
    pub fn check(&self, fd: impl AsFd) -> Result<(), FdMismatch> {
        if *self == Self::any() {
            return Ok(());
        }
        let found = FdInfo::of(fd);
        let fits = self.wanted.is(found) && self.access.is_none_or(|access| access == found.access);
        if fits { Ok(()) } else { Err(FdMismatch { expected: *self, found }) }
    }

    /// Takes a descriptor if it is what it has to be.
    ///
    /// # Errors
    /// [`FdMismatch`] if it is something else. It is closed
    /// [in the background](close_in_background) then.
    pub fn accept(&self, fd: impl Into<OwnedFd>) -> Result<OwnedFd, FdMismatch> {
        let fd = fd.into();
        match self.check(&fd) {
            Ok(()) => Ok(fd),
            Err(mismatch) => {
                close_in_background([fd]);
                Err(mismatch)
            }
        }
    }
}

impl Wanted {
    fn is(self, found: FdInfo) -> bool {
        let is_socket = matches!(found.fd_type, FdType::Socket(..) | FdType::Listener(..));
        match self {
            Self::Any => true,
            Self::File => !is_socket && found.access != FdAccess::Neither,
            Self::SealedMemfd => found.is_sealed,
            Self::Type(fd_type) => fd_type == found.fd_type && found.access != FdAccess::Neither,
        }
    }
}

impl FdInfo {
    /// Asks the kernel. Takes a few system calls, none of which waits.
    pub fn of(fd: impl AsFd) -> Self {
        let fd = fd.as_fd();
        let access = access(fd);
        let fd_type = fd_type(fd);
        let is_sealed =
            fd_type == FdType::RegularFile && access != FdAccess::Neither && sys::is_sealed(fd);
        Self { fd_type, access, is_sealed }
    }
}

fn access(fd: BorrowedFd<'_>) -> FdAccess {
    let Ok(flags) = fcntl(fd, FcntlArg::F_GETFL).map(OFlag::from_bits_retain) else {
        return FdAccess::Neither;
    };
    match flags & OFlag::O_ACCMODE {
        _ if flags.contains(OFlag::O_PATH) => FdAccess::Neither,
        OFlag::O_RDONLY => FdAccess::ReadOnly,
        OFlag::O_WRONLY => FdAccess::WriteOnly,
        OFlag::O_RDWR => FdAccess::ReadWrite,
        _ => FdAccess::Neither, // 3 permits ioctl only, see open(2)
    }
}

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

fn socket_type(fd: BorrowedFd<'_>) -> FdType {
    let domain = match getsockopt(&fd, sys::Domain) {
        Ok(libc::AF_INET | libc::AF_INET6) => SocketDomain::Ip,
        Ok(libc::AF_UNIX) => SocketDomain::Unix,
        Ok(other) => SocketDomain::Other(other),
        Err(_) => return FdType::Other, // a socket's path, opened with O_PATH
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

impl fmt::Display for FdPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = self.access.map_or("", FdAccess::adjective);
        match self.wanted {
            Wanted::Any => write!(f, "a {access}descriptor"),
            Wanted::File => write!(f, "a {access}file that is no socket"),
            Wanted::SealedMemfd => write!(f, "a {access}memfd sealed against changes"),
            Wanted::Type(fd_type) => write!(f, "a {access}{fd_type}"),
        }
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
    fn adjective(self) -> &'static str {
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

#[cfg(test)]
mod tests {
    use std::{
        fs::{File, OpenOptions},
        io::Read,
        net::{TcpListener, TcpStream, UdpSocket},
        os::unix::{fs::OpenOptionsExt, net::UnixListener, net::UnixStream},
    };

    use nix::{
        fcntl::SealFlag,
        sys::memfd::{MFdFlags, memfd_create},
    };

    use super::*;

    /// Everything that a peer may send, and which policies take it.
    #[test]
    fn a_policy_takes_what_it_names_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let writable = File::create(&path).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let (unix, _peer) = UnixStream::pair().unwrap();
        let tcp_listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(tcp_listener.local_addr().unwrap()).unwrap();
        let sealed = File::from(memfd_create("sealed", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK))
            .unwrap();
        let o_path =
            |path| OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).unwrap();
        let offers: [(&str, OwnedFd); 14] = [
            ("read-only file", File::open(&path).unwrap().into()),
            ("write-only file", writable.into()),
            (
                "read-write file",
                OpenOptions::new().read(true).write(true).open(&path).unwrap().into(),
            ),
            ("path of a file", o_path(path.as_path()).into()),
            ("unsealed memfd", memfd_create("unsealed", MFdFlags::MFD_ALLOW_SEALING).unwrap()),
            ("sealed memfd", sealed.into()),
            ("directory", File::open(directory.path()).unwrap().into()),
            ("read end", reader.into()),
            ("write end", writer.into()),
            ("unix", unix.into()),
            ("tcp", tcp.into()),
            ("tcp listener", tcp_listener.into()),
            ("udp", UdpSocket::bind("127.0.0.1:0").unwrap().into()),
            ("unix listener", UnixListener::bind(directory.path().join("socket")).unwrap().into()),
        ];
        use SocketDomain::{Ip, Unix};
        use SocketType::{Datagram, Stream};
        let policies: [(FdPolicy, &[&str]); 12] = [
            (FdPolicy::regular_file().read_only(), &["read-only file"]),
            (FdPolicy::regular_file().write_only(), &["write-only file"]),
            (
                FdPolicy::regular_file().read_write(),
                &["read-write file", "unsealed memfd", "sealed memfd"],
            ),
            (FdPolicy::sealed_memfd(), &["sealed memfd"]),
            (FdPolicy::directory(), &["directory"]),
            (FdPolicy::pipe().read_only(), &["read end"]),
            (FdPolicy::pipe(), &["read end", "write end"]),
            (FdPolicy::socket(Unix, Stream), &["unix"]),
            (FdPolicy::socket(Ip, Stream), &["tcp"]),
            (FdPolicy::listener(Ip, Stream), &["tcp listener"]),
            (FdPolicy::listener(Unix, Stream), &["unix listener"]),
            (FdPolicy::socket(Ip, Datagram), &["udp"]),
        ];
        for (policy, takes) in policies {
            for (name, fd) in &offers {
                let outcome = policy.check(fd);
                assert_eq!(outcome.is_ok(), takes.contains(name), "{name}: {outcome:?}");
            }
        }
        for (name, fd) in &offers {
            assert!(FdPolicy::any().check(fd).is_ok());
            let is_file =
                !["path of a file", "unix", "tcp", "tcp listener", "udp", "unix listener"]
                    .contains(name);
            assert_eq!(FdPolicy::file().check(fd).is_ok(), is_file, "{name}");
        }
    }

    #[test]
    fn what_is_refused_is_closed() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        assert!(FdPolicy::directory().accept(writer).is_err());
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "the end of the pipe");
    }

    #[test]
    fn a_refusal_says_what_was_expected_and_what_came() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let refused =
            FdPolicy::socket(SocketDomain::Ip, SocketType::Stream).accept(listener).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "expected a stream socket of IP, got a listening stream socket of IP"
        );
    }
}
