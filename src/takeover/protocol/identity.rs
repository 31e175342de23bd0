//! The description of a listener, as a value and as bytes.

use std::fmt;

use super::Address;
use crate::{
    Error,
    fields::{Fields, put_short},
};

/// The identity of a listener: its name and index, and the properties of its socket.
///
/// The taker also reads all fields except the name and the index from the descriptor. It refuses a
/// descriptor that differs from its announcement.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Identity {
    /// The name that the application has given to the listener.
    pub name: String,
    /// The number of the socket among those with its name, from 0. The sockets of a `SO_REUSEPORT`
    /// group have one name and equal addresses.
    pub index: u32,
    /// Address family (`SO_DOMAIN`).
    pub family: Family,
    /// Type of the socket (`SO_TYPE`).
    pub kind: Kind,
    /// Protocol number (`SO_PROTOCOL`): 6 for TCP, 17 for UDP, 0 for Unix sockets.
    pub protocol: u16,
    /// The address to which the socket is bound (getsockname(2)).
    pub address: Address,
    /// The network device to which the socket is bound (`SO_BINDTODEVICE`).
    pub device: Option<String>,
    /// `IPV6_V6ONLY`. `None` if the family is not IPv6.
    pub v6_only: Option<bool>,
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// `AF_UNIX`.
    Unix,
    /// `AF_INET`.
    Ipv4,
    /// `AF_INET6`.
    Ipv6,
}

/// The type of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// `SOCK_STREAM`.
    Stream,
    /// `SOCK_DGRAM`.
    Datagram,
    /// `SOCK_SEQPACKET`.
    SeqPacket,
}

impl fmt::Display for Identity {
    /// Writes for example `"http" 0 (TCP 0.0.0.0:80)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} (", self.name, self.index)?;
        match (self.family, self.kind, self.protocol) {
            (Family::Unix, kind, _) => write!(f, "Unix {kind}")?,
            (_, Kind::Stream, 6) => f.write_str("TCP")?,
            (_, Kind::Datagram, 17) => f.write_str("UDP")?,
            (family, kind, protocol) => write!(f, "{family:?} {kind}, protocol {protocol},")?,
        }
        write!(f, " {}", self.address)?;
        if let Some(device) = &self.device {
            write!(f, " on {device}")?;
        }
        f.write_str(")")
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stream => "stream",
            Self::Datagram => "datagram",
            Self::SeqPacket => "seqpacket",
        })
    }
}

impl Identity {
    /// Returns true if the two sockets are of one `SO_REUSEPORT` group: the kernel assigns a client
    /// of their address to either.
    pub(in crate::takeover) fn shares_address_with(&self, other: &Self) -> bool {
        matches!(self.address, Address::Ip(_))
            && self.address == other.address
            && (self.kind, self.protocol, &self.device)
                == (other.kind, other.protocol, &other.device)
    }

    pub(super) fn put(&self, dst: &mut Vec<u8>) -> Result<(), Error> {
        put_short(dst, self.name.as_bytes())?;
        dst.extend(self.index.to_be_bytes());
        dst.push(match self.family {
            Family::Unix => 1,
            Family::Ipv4 => 4,
            Family::Ipv6 => 6,
        });
        dst.push(match self.kind {
            Kind::Stream => 1,
            Kind::Datagram => 2,
            Kind::SeqPacket => 5,
        });
        dst.extend(self.protocol.to_be_bytes());
        self.address.put(dst)?;
        put_short(dst, self.device.as_deref().unwrap_or_default().as_bytes())?;
        dst.push(match self.v6_only {
            None => 0,
            Some(false) => 1,
            Some(true) => 2,
        });
        Ok(())
    }

    pub(super) fn read(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self {
            name: fields.text()?,
            index: fields.u32()?,
            family: match fields.u8()? {
                1 => Family::Unix,
                4 => Family::Ipv4,
                6 => Family::Ipv6,
                _ => return None,
            },
            kind: match fields.u8()? {
                1 => Kind::Stream,
                2 => Kind::Datagram,
                5 => Kind::SeqPacket,
                _ => return None,
            },
            protocol: fields.u16()?,
            address: Address::read(fields)?,
            device: Some(fields.text()?).filter(|device| !device.is_empty()),
            v6_only: match fields.u8()? {
                0 => None,
                1 => Some(false),
                2 => Some(true),
                _ => return None,
            },
        })
    }
}
