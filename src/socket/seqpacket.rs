//! Conversions from and into the sockets of tokio-seqpacket.

use std::{
    io::{Error, Result},
    os::fd::OwnedFd,
};

use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

use super::{Listener, Socket, SocketKind, check::invalid_descriptor, open::set_nonblocking};

impl TryFrom<UnixSeqpacket> for Socket {
    type Error = Error;

    fn try_from(seqpacket: UnixSeqpacket) -> Result<Self> {
        OwnedFd::from(seqpacket).try_into()
    }
}

/// Makes the socket non-blocking, for every holder.
///
/// # Errors
/// `InvalidInput` if the socket is not of kind [`SocketKind::SeqPacket`]. It is closed then.
impl TryFrom<Socket> for UnixSeqpacket {
    type Error = Error;

    fn try_from(socket: Socket) -> Result<Self> {
        match socket.kind() {
            SocketKind::SeqPacket => {
                set_nonblocking(&socket, true)?;
                OwnedFd::from(socket).try_into()
            }
            SocketKind::Stream => {
                Err(invalid_descriptor("it is SOCK_STREAM, SOCK_SEQPACKET is expected"))
            }
        }
    }
}

impl TryFrom<UnixSeqpacketListener> for Listener {
    type Error = Error;

    fn try_from(listener: UnixSeqpacketListener) -> Result<Self> {
        OwnedFd::from(listener).try_into()
    }
}
