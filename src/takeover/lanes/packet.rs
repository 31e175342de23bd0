//! The bytes of a datagram on a lane: one packet is a header and the payload.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use crate::fields::Fields;

/// Length of the header in bytes.
pub(super) const HEADER_BYTES: usize = 48;

const VERSION: u8 = 1;

/// Everything about a datagram except its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::takeover) struct Header {
    pub(in crate::takeover) source: SocketAddr,
    pub(in crate::takeover) destination: Option<IpAddr>,
    pub(in crate::takeover) ecn: u8,
}

impl Header {
    /// Returns the bytes that [the protocol](crate::takeover::protocol#lanes) defines.
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = VERSION;
        bytes[1] = family(self.source.ip());
        bytes[2] = self.destination.map_or(0, family);
        bytes[3] = self.ecn;
        bytes[4..6].copy_from_slice(&self.source.port().to_be_bytes());
        if let SocketAddr::V6(source) = self.source {
            bytes[8..12].copy_from_slice(&source.flowinfo().to_be_bytes());
            bytes[12..16].copy_from_slice(&source.scope_id().to_be_bytes());
        }
        put_ip(&mut bytes[16..32], self.source.ip());
        if let Some(destination) = self.destination {
            put_ip(&mut bytes[32..], destination);
        }
        bytes
    }

    /// Reads a header. Returns `None` if the version, a family or the reserved field is wrong.
    pub(super) fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let [version, source_family, destination_family, ecn] = fields.array()?;
        let (port, reserved) = (fields.u16()?, fields.u16()?);
        let (flowinfo, scope_id) = (fields.u32()?, fields.u32()?);
        let source = match ip(source_family, fields.array()?)? {
            IpAddr::V4(ip) => SocketAddrV4::new(ip, port).into(),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, port, flowinfo, scope_id).into(),
        };
        let destination = match destination_family {
            0 => None,
            family => Some(ip(family, fields.array()?)?),
        };
        (version == VERSION && reserved == 0).then_some(Self { source, destination, ecn })
    }
}

fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 4 } else { 6 }
}

fn put_ip(dst: &mut [u8], ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => dst[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => dst.copy_from_slice(&ip.octets()),
    }
}

fn ip(family: u8, bytes: [u8; 16]) -> Option<IpAddr> {
    match family {
        4 => Some(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
        6 => Some(Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_header_arrives_as_it_was(
            source: SocketAddr,
            destination: Option<IpAddr>,
            ecn: u8,
        ) {
            let header = Header { source, destination, ecn };
            prop_assert_eq!(Header::from_bytes(&header.to_bytes()), Some(header));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes: [u8; 32], rest: [u8; 16]) {
            let mut whole = [0; HEADER_BYTES];
            whole[..32].copy_from_slice(&bytes);
            whole[32..].copy_from_slice(&rest);
            let _ = Header::from_bytes(&whole);
        }
    }

    /// Rules: B-PACKET.
    #[test]
    fn an_unknown_version_or_family_is_refused() {
        let header =
            Header { source: ([127, 0, 0, 1], 80).into(), destination: None, ecn: 0 }.to_bytes();
        for (place, value) in [(0, 2), (1, 5), (2, 1), (6, 1)] {
            let mut bytes = header;
            bytes[place] = value;
            assert_eq!(Header::from_bytes(&bytes), None);
        }
    }
}
