//! Reads the identity of a listener from its descriptor.

use std::{
    io::{Error, ErrorKind, Result},
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
};

use nix::{
    libc,
    sys::socket::{SockType, SockaddrStorage, UnixAddr, getsockname, getsockopt, sockopt},
};

use super::{
    error::Mismatch,
    protocol::{Address, Family, Identity, Kind, Offered},
};
use crate::sys;

/// Returns the identity of a socket. The name and the index are the application's.
///
/// # Errors
/// `InvalidInput` if the descriptor is not a socket of IP or Unix, or a stream that does not
/// listen.
pub(super) fn identity_of(name: String, index: u32, fd: BorrowedFd<'_>) -> Result<Identity> {
    // Refuse everything that can't be offered.
    let family = match getsockopt(&fd, sys::Domain)? {
        libc::AF_UNIX => Family::Unix,
        libc::AF_INET => Family::Ipv4,
        libc::AF_INET6 => Family::Ipv6,
        other => {
            return Err(unusable(&name, format!("its address family {other} is not supported")));
        }
    };
    let kind = match getsockopt(&fd, sockopt::SockType)? {
        SockType::Stream => Kind::Stream,
        SockType::Datagram => Kind::Datagram,
        SockType::SeqPacket => Kind::SeqPacket,
        other => return Err(unusable(&name, format!("its type {other:?} is not supported"))),
    };
    if kind != Kind::Datagram && !getsockopt(&fd, sockopt::AcceptConn)? {
        return Err(unusable(&name, "it does not listen".to_owned()));
    }
    // Read the remaining fields.
    let protocol = getsockopt(&fd, sys::Protocol)?;
    let v6_only = match family {
        Family::Ipv6 => Some(getsockopt(&fd, sockopt::Ipv6V6Only)?),
        _ => None,
    };
    // For a Unix socket, the kernel accepts this option too, and returns an empty name.
    let device = getsockopt(&fd, sockopt::BindToDevice)?.to_string_lossy().into_owned();
    Ok(Identity {
        address: address_of(fd, family)?,
        device: Some(device).filter(|device| !device.is_empty()),
        protocol: u16::try_from(protocol).unwrap_or_default(),
        name,
        index,
        family,
        kind,
        v6_only,
    })
}

/// Returns the number that is the same for all copies of a socket (`SO_COOKIE`).
pub(super) fn cookie_of(fd: BorrowedFd<'_>) -> Result<u64> {
    Ok(getsockopt(&fd, sys::Cookie)?)
}

/// Returns the device and the inode of a path.
pub(super) fn path_id_of(path: &Path) -> Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// Compares a received descriptor with its announcement, field by field.
///
/// # Errors
/// The inner result has the first difference. The outer one has the errors of [`identity_of`].
pub(super) fn compare(offered: &Offered<OwnedFd>) -> Result<std::result::Result<(), Mismatch>> {
    let expected = offered.identity.clone();
    let found = identity_of(expected.name.clone(), expected.index, offered.fd.as_fd())?;
    let cookie = cookie_of(offered.fd.as_fd())?;
    Ok(difference(expected, found, (offered.cookie, cookie)))
}

/// Compares the expected identity of a socket with the identity that was found, and then the two
/// cookies.
///
/// # Errors
/// The first difference.
pub(super) fn difference(
    expected: Identity,
    found: Identity,
    cookies: (u64, u64),
) -> std::result::Result<(), Mismatch> {
    if expected.family != found.family {
        return Err(Mismatch::Family { expected: expected.family, found: found.family });
    }
    if expected.kind != found.kind {
        return Err(Mismatch::Kind { expected: expected.kind, found: found.kind });
    }
    if expected.protocol != found.protocol {
        return Err(Mismatch::Protocol { expected: expected.protocol, found: found.protocol });
    }
    if expected.address != found.address {
        return Err(Mismatch::Address { expected: expected.address, found: found.address });
    }
    if expected.device != found.device {
        return Err(Mismatch::Device { expected: expected.device, found: found.device });
    }
    if expected.v6_only != found.v6_only {
        return Err(Mismatch::V6Only { expected: expected.v6_only, found: found.v6_only });
    }
    match cookies {
        (expected, found) if expected != found => Err(Mismatch::Socket { expected, found }),
        _ => Ok(()),
    }
}

/// Returns the address that a socket is bound to.
fn address_of(fd: BorrowedFd<'_>, family: Family) -> Result<Address> {
    if family == Family::Unix {
        let address = getsockname::<UnixAddr>(fd.as_raw_fd())?;
        return Ok(match (address.path(), address.as_abstract()) {
            (Some(path), _) => Address::Path(path.to_owned()),
            (_, Some(name)) => Address::Abstract(name.to_owned()),
            _ => Address::Unnamed,
        });
    }
    let address = getsockname::<SockaddrStorage>(fd.as_raw_fd())?;
    Ok(socket_addr(&address).map_or(Address::Unnamed, Address::Ip))
}

/// Returns true if a descriptor can be a lane: a Unix socket that keeps packets apart.
pub(super) fn is_lane(fd: &OwnedFd) -> bool {
    getsockopt(fd, sys::Domain) == Ok(libc::AF_UNIX)
        && getsockopt(fd, sockopt::SockType) == Ok(SockType::SeqPacket)
}

/// Returns an IP address with its port. `None` for another address family.
pub(super) fn socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|address| SocketAddr::V4(SocketAddrV4::from(*address)));
    v4.or_else(|| {
        address.as_sockaddr_in6().map(|address| SocketAddr::V6(SocketAddrV6::from(*address)))
    })
}

/// Returns the error for a descriptor that can't be offered.
fn unusable(name: &str, reason: String) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("listener {name:?} can't be offered: {reason}"))
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream, UdpSocket},
        os::{
            linux::net::SocketAddrExt,
            unix::net::{SocketAddr as UnixName, UnixDatagram, UnixListener, UnixStream},
        },
    };

    use nix::sys::socket::setsockopt;

    use super::*;

    fn identity(fd: &impl AsFd) -> Identity {
        identity_of("x".to_owned(), 0, fd.as_fd()).unwrap()
    }

    #[test]
    fn every_field_is_read_from_the_socket() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = identity(&tcp);
        assert_eq!((found.family, found.kind, found.protocol), (Family::Ipv4, Kind::Stream, 6));
        assert_eq!(found.address, Address::Ip(tcp.local_addr().unwrap()));
        assert_eq!((found.device, found.v6_only), (None, None));

        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!((identity(&udp).kind, identity(&udp).protocol), (Kind::Datagram, 17));

        // Linux sets the option for a socket that is bound to one address (ipv6(7)).
        for (address, v6_only) in [("[::]:0", false), ("[::1]:0", true)] {
            if let Ok(v6) = TcpListener::bind(address) {
                assert_eq!(
                    (identity(&v6).family, identity(&v6).v6_only),
                    (Family::Ipv6, Some(v6_only))
                );
            }
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let unix = UnixListener::bind(&path).unwrap();
        assert_eq!(
            (identity(&unix).family, identity(&unix).address),
            (Family::Unix, Address::Path(path))
        );
        let name = format!("fdwire-inspect-{}", std::process::id());
        let unix = UnixDatagram::bind_addr(&UnixName::from_abstract_name(&name).unwrap()).unwrap();
        assert_eq!(identity(&unix).address, Address::Abstract(name.into()));
        assert_eq!(identity(&unix).kind, Kind::Datagram);
    }

    #[test]
    fn a_descriptor_that_is_no_listener_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(identity_of("x".to_owned(), 0, file.as_fd()).is_err());
        let (stream, _) = UnixStream::pair().unwrap();
        let refused = identity_of("x".to_owned(), 0, stream.as_fd()).unwrap_err();
        assert!(refused.to_string().contains("does not listen"), "{refused}");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(
            identity_of("x".to_owned(), 0, client.as_fd()).unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
    }

    /// Binding to a device needs a privilege before Linux 5.7.
    #[test]
    fn a_device_is_a_part_of_the_identity() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        if let Err(error) = setsockopt(&tcp, sockopt::BindToDevice, &"lo".into()) {
            return eprintln!("skipped: SO_BINDTODEVICE: {error}");
        }
        assert_eq!(identity(&tcp).device.as_deref(), Some("lo"));
    }

    /// Rules: T-COMPARE.
    #[test]
    fn each_difference_has_an_error_of_its_own() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = identity(&tcp);
        let check = |change: &dyn Fn(&mut Identity), cookie| {
            let mut expected = found.clone();
            change(&mut expected);
            difference(expected, found.clone(), (cookie, 7)).unwrap_err()
        };
        use Mismatch::*;
        assert!(matches!(check(&|it| it.family = super::Family::Unix, 7), Family { .. }));
        assert!(matches!(check(&|it| it.kind = super::Kind::SeqPacket, 7), Kind { .. }));
        assert!(matches!(check(&|it| it.protocol = 132, 7), Protocol { expected: 132, found: 6 }));
        let elsewhere = super::Address::Ip("127.0.0.1:1".parse().unwrap());
        assert!(matches!(check(&|it| it.address = elsewhere.clone(), 7), Address { .. }));
        assert!(matches!(check(&|it| it.device = Some("eth0".to_owned()), 7), Device { .. }));
        assert!(matches!(check(&|it| it.v6_only = Some(true), 7), V6Only { .. }));
        // Equal addresses stay apart: another socket of a SO_REUSEPORT group.
        assert!(matches!(check(&|_| {}, 8), Socket { expected: 8, found: 7 }));
        difference(found.clone(), found.clone(), (7, 7)).unwrap();
    }
}
