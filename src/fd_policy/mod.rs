//! The check of received descriptors.

mod info;

use std::{
    fmt,
    os::fd::{AsFd, OwnedFd},
};

pub use info::{FdAccess, FdInfo, FdType, SocketDomain, SocketType};

use crate::closer::close_in_background;

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

#[cfg(test)]
mod tests {
    use std::{
        fs::{File, OpenOptions},
        io::Read,
        net::{TcpListener, TcpStream, UdpSocket},
        os::unix::{fs::OpenOptionsExt, net::UnixListener, net::UnixStream},
    };

    use nix::{
        fcntl::{FcntlArg, SealFlag, fcntl},
        libc,
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
