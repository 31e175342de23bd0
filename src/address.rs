//! The address of a socket, as a value and as bytes of a message.

use std::{
    ffi::OsString,
    fmt,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            self,
            ffi::{OsStrExt, OsStringExt},
        },
    },
    path::PathBuf,
};

use crate::{
    error::Error,
    fields::{Fields, put_short},
};

/// The address of a listener, or of one end of a connection at the time when it was accepted.
///
/// ```
/// use fdwire::handoff::Address;
///
/// let address = Address::from("127.0.0.1:80".parse::<std::net::SocketAddr>()?);
/// assert_eq!(address.to_string(), "127.0.0.1:80");
/// assert!(address.socket_addr().is_some_and(|address| address.port() == 80));
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// No address, as for a Unix socket that was never bound. Most clients do not bind theirs.
    #[default]
    Unnamed,
    /// An address of the internet protocol, with a port.
    Ip(SocketAddr),
    /// The path of a Unix socket.
    Path(PathBuf),
    /// The abstract name of a Unix socket, without the zero byte in front that the kernel uses.
    Abstract(Vec<u8>),
}

impl Address {
    /// Returns the address and port if this is an address of the internet protocol.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Ip(address) => Some(*address),
            _ => None,
        }
    }

    /// Appends the address as a field of a message.
    pub(crate) fn put(&self, dst: &mut Vec<u8>) -> Result<(), Error> {
        match self {
            Self::Unnamed => dst.push(0),
            Self::Ip(SocketAddr::V4(address)) => {
                dst.push(4);
                dst.extend(address.ip().octets());
                dst.extend(address.port().to_be_bytes());
            }
            Self::Ip(SocketAddr::V6(address)) => {
                dst.push(6);
                dst.extend(address.ip().octets());
                dst.extend(address.port().to_be_bytes());
                dst.extend(address.flowinfo().to_be_bytes());
                dst.extend(address.scope_id().to_be_bytes());
            }
            Self::Path(path) => {
                dst.push(1);
                put_short(dst, path.as_os_str().as_bytes())?;
            }
            Self::Abstract(name) => {
                dst.push(2);
                put_short(dst, name)?;
            }
        }
        Ok(())
    }

    /// Reads the address from the fields of a message.
    pub(crate) fn read(fields: &mut Fields<'_>) -> Option<Self> {
        Some(match fields.u8()? {
            0 => Self::Unnamed,
            4 => Self::Ip(SocketAddrV4::new(Ipv4Addr::from(fields.array()?), fields.u16()?).into()),
            6 => {
                let (ip, port) = (Ipv6Addr::from(fields.array()?), fields.u16()?);
                Self::Ip(SocketAddrV6::new(ip, port, fields.u32()?, fields.u32()?).into())
            }
            1 => Self::Path(OsString::from_vec(fields.short()?.to_vec()).into()),
            2 => Self::Abstract(fields.short()?.to_vec()),
            _ => return None,
        })
    }
}

impl fmt::Display for Address {
    /// Writes an internet address such as `127.0.0.1:80`, a path, or an abstract name with `@` in
    /// front.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unnamed => f.write_str("unnamed"),
            Self::Ip(address) => address.fmt(f),
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{}", name.escape_ascii()),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

impl From<unix::net::SocketAddr> for Address {
    fn from(address: unix::net::SocketAddr) -> Self {
        match (address.as_pathname(), address.as_abstract_name()) {
            (Some(path), _) => Self::Path(path.to_owned()),
            (_, Some(name)) => Self::Abstract(name.to_owned()),
            _ => Self::Unnamed,
        }
    }
}

impl From<tokio::net::unix::SocketAddr> for Address {
    fn from(address: tokio::net::unix::SocketAddr) -> Self {
        unix::net::SocketAddr::from(address).into()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{SocketAddrV4, SocketAddrV6};

    use proptest::{collection::vec, prelude::*};

    use super::Address;

    /// Generates addresses of every kind.
    pub(crate) fn any_address() -> impl Strategy<Value = Address> {
        prop_oneof![
            Just(Address::Unnamed),
            any::<SocketAddrV4>().prop_map(|address| Address::Ip(address.into())),
            any::<SocketAddrV6>().prop_map(|address| Address::Ip(address.into())),
            "/[a-z/]{0,100}".prop_map(|path| Address::Path(path.into())),
            vec(any::<u8>(), 0..108).prop_map(Address::Abstract),
        ]
    }
}
