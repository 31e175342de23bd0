//! Checking received descriptors.

mod info;

use std::{
    fmt,
    os::fd::{AsFd, OwnedFd},
};

pub use info::{FdAccess, FdInfo, FdType, SocketDomain, SocketType};

use crate::closer::close_in_background;

/// A condition for received descriptors, for example "a read-only regular file".
///
/// A peer decides what it sends. If a program expects a file and gets a FIFO, its `read` may block.
/// If it expects a read-only file and gets a writable one, it may share more than it should. So
/// check a descriptor before you use it. The check reads the properties of the open file itself
/// (statx(2), `F_GETFL`, `SO_DOMAIN`, `SO_TYPE`). It uses no path, and does not wait for the daemon
/// of a FUSE file system. These properties never change for an open file. The only exception are
/// sockets: any holder can connect one, or make it listen, later.
///
/// A descriptor that was opened with `O_PATH` satisfies no policy except [`any`](Self::any).
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
    required: Required,
    /// `None` if any access will do.
    access: Option<FdAccess>,
}

/// The kind of descriptor that a policy requires, apart from its access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Required {
    Any,
    /// Anything except a socket.
    File,
    SealedMemfd,
    Type(FdType),
}

/// The error for a descriptor that does not satisfy a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, got {found}")]
#[non_exhaustive]
pub struct FdMismatch {
    /// The policy that was checked.
    pub expected: FdPolicy,
    /// The properties of the descriptor.
    pub found: FdInfo,
}

impl FdPolicy {
    /// Accepts any descriptor.
    pub const fn any() -> Self {
        Self::requiring(Required::Any)
    }

    /// Accepts anything that can be used as a file, which means everything except sockets.
    pub const fn file() -> Self {
        Self::requiring(Required::File)
    }

    /// Accepts a regular file. Reading it never waits for a peer, unless it is on a network or FUSE
    /// file system.
    pub const fn regular_file() -> Self {
        Self::requiring(Required::Type(FdType::RegularFile))
    }

    /// Accepts a memfd that nobody can write to or shorten. After one check of its content, it can
    /// be mapped and trusted. See [`FdInfo::is_sealed`].
    pub const fn sealed_memfd() -> Self {
        Self::requiring(Required::SealedMemfd)
    }

    /// Accepts a directory.
    pub const fn directory() -> Self {
        Self::requiring(Required::Type(FdType::Directory))
    }

    /// Accepts an end of a pipe. With [`read_only`](Self::read_only), only the end to read from.
    pub const fn pipe() -> Self {
        Self::requiring(Required::Type(FdType::Pipe))
    }

    /// Accepts a socket that does not listen, connected or not. `SOCK_STREAM` of IP is TCP, or a
    /// protocol such as MPTCP that programs use in the same way.
    pub const fn socket(domain: SocketDomain, socket_type: SocketType) -> Self {
        Self::requiring(Required::Type(FdType::Socket(domain, socket_type)))
    }

    /// Accepts a socket that listens.
    pub const fn listener(domain: SocketDomain, socket_type: SocketType) -> Self {
        Self::requiring(Required::Type(FdType::Listener(domain, socket_type)))
    }

    const fn requiring(required: Required) -> Self {
        Self { required, access: None }
    }

    /// Returns the policy with a further condition: the descriptor permits only reading.
    #[must_use]
    pub const fn read_only(self) -> Self {
        Self { access: Some(FdAccess::ReadOnly), ..self }
    }

    /// Returns the policy with a further condition: the descriptor permits only writing.
    #[must_use]
    pub const fn write_only(self) -> Self {
        Self { access: Some(FdAccess::WriteOnly), ..self }
    }

    /// Returns the policy with a further condition: the descriptor permits reading and writing.
    #[must_use]
    pub const fn read_write(self) -> Self {
        Self { access: Some(FdAccess::ReadWrite), ..self }
    }

    /// Checks a descriptor without taking it.
    ///
    /// # Errors
    /// [`FdMismatch`] if the descriptor does not satisfy the policy.
    pub fn check(&self, fd: impl AsFd) -> Result<(), FdMismatch> {
        if *self == Self::any() {
            return Ok(());
        }
        let found = FdInfo::of(fd);
        let fits = self.required.is_met_by(found)
            && self.access.is_none_or(|access| access == found.access);
        if fits { Ok(()) } else { Err(FdMismatch { expected: *self, found }) }
    }

    /// Takes a descriptor, and returns it if it satisfies the policy.
    ///
    /// # Errors
    /// [`FdMismatch`] if it does not. Then it is closed [in the background](close_in_background).
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

impl Required {
    /// Returns true if a descriptor with these properties satisfies the requirement.
    fn is_met_by(self, found: FdInfo) -> bool {
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
        match self.required {
            Required::Any => write!(f, "a {access}descriptor"),
            Required::File => write!(f, "a {access}file that is not a socket"),
            Required::SealedMemfd => write!(f, "a {access}memfd sealed against changes"),
            Required::Type(fd_type) => write!(f, "a {access}{fd_type}"),
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

    /// Checks each kind of descriptor that a peer may send against each policy.
    #[test]
    fn a_policy_takes_what_it_names_and_nothing_else() {
        // Descriptors of each kind.
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

        // Each policy, with the descriptors that it takes.
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

        // Policies that take nearly everything.
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
    fn a_refusal_names_the_expected_and_the_received_kind() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let refused =
            FdPolicy::socket(SocketDomain::Ip, SocketType::Stream).accept(listener).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "expected a stream socket of IP, got a listening stream socket of IP"
        );
    }
}
