//! Receiving from a UDP socket, with the addresses and the ECN bits of each datagram.

use std::{
    io::{IoSliceMut, Result},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg},
};

use super::{super::inspect::socket_addr, Received};

/// The size of the buffer for control data, in bytes. It is enough for all options that the
/// application may have switched on, timestamps included.
const CONTROL_BYTES: usize = 512;

/// Receives without waiting. Several datagrams come at once if `UDP_GRO` is switched on.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Received> {
    let mut control = [0; CONTROL_BYTES];
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let source = message.address.as_ref().and_then(socket_addr).ok_or(Errno::EAFNOSUPPORT)?;
    let mut received =
        Received { len: message.bytes, stride: message.bytes, source, destination: None, ecn: 0 };
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::UdpGroSegments(bytes) if bytes > 0 => {
                received.stride = bytes as usize
            }
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                received.destination =
                    Some(IpAddr::V4(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes())));
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                received.destination = Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)));
            }
            ControlMessageOwned::Ipv4Tos(tos) => received.ecn = tos & 3,
            ControlMessageOwned::Ipv6TClass(class) => received.ecn = (class & 3) as u8,
            _ => {}
        }
    }
    received.stride = received.stride.min(received.len);
    Ok(received)
}
