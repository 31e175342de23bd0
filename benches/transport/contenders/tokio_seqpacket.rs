use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::OwnedFd,
};

use bytes::Bytes;
use tokio_seqpacket::{
    UnixSeqpacket,
    ancillary::{AncillaryMessageWriter, OwnedAncillaryMessage},
};

use super::{
    Link, Received, Setup,
    batch::{Batch, Room, largest_packet},
};

/// tokio-seqpacket. It sends packets of one message each. By hand, many messages go in one packet
/// and the receiver takes them apart. A message longer than a packet is cut by hand, too.
pub(crate) struct TokioSeqpacket {
    socket: UnixSeqpacket,
    max_packet: usize,
    waiting: Batch,
    room: Room,
    with_fds: bool,
    control: Box<Control>,
}

/// Room for 253 descriptors, aligned for the control message's header.
#[repr(align(8))]
struct Control([u8; CONTROL_BYTES]);

const CONTROL_BYTES: usize = 1032;

impl Link for TokioSeqpacket {
    fn new(socket: OwnedFd, setup: Setup) -> Self {
        Self {
            max_packet: largest_packet(&socket),
            socket: socket.try_into().expect("a SEQPACKET socket"),
            waiting: Batch::default(),
            room: Room::new(setup.load),
            with_fds: setup.load.fd,
            control: Box::new(Control([0; CONTROL_BYTES])),
        }
    }

    async fn send(&mut self, payload: &Bytes, fd: Option<OwnedFd>) {
        self.waiting.push(payload, fd);
    }

    async fn flush(&mut self) {
        let Self { socket, max_packet, waiting, control, .. } = self;
        let call = async |pieces: &[IoSlice<'_>], fds: &mut Vec<OwnedFd>| match (pieces, &fds[..]) {
            ([piece], []) => socket.send(piece).await,
            (pieces, []) => socket.send_vectored(pieces).await,
            (pieces, fds) => {
                let mut control = AncillaryMessageWriter::new(&mut control.0);
                control.add_fds(fds).expect("room for 253");
                socket.send_vectored_with_ancillary(pieces, &mut control).await
            }
        };
        waiting.send_all(max_packet, call).await;
    }

    async fn recv(&mut self, received: &mut Received) {
        let Self { socket, room, control, .. } = self;
        let info = if self.with_fds {
            let place = &mut [IoSliceMut::new(room.spare())];
            let result = socket.recv_vectored_with_ancillary(place, &mut control.0).await;
            let (info, control) = result.expect("receiving");
            for message in control.into_messages() {
                if let OwnedAncillaryMessage::FileDescriptors(fds) = message {
                    received.fds.extend(fds);
                }
            }
            info
        } else {
            socket.recv(room.spare()).await.expect("receiving")
        };
        room.received(info.bytes_read());
        received.bytes += info.bytes_read();
    }
}
