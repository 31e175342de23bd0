//! Receives frames with plain `recvmsg`, as a peer in another language does, and checks the rules
//! that every sender has to keep.

use std::{
    collections::VecDeque, io::IoSliceMut, mem::MaybeUninit, os::fd::OwnedFd, time::Duration,
};

use fdwire::SocketKind;
use rustix::{
    cmsg_space,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg},
};

/// The limit of the bytes in a packet that has the beginning of a frame.
pub(crate) const MOST_BYTES: usize = 65_600;
/// The limit of the descriptors in a packet, and of those that come before any byte of their frame.
pub(crate) const MOST_FDS: usize = 253;

pub(crate) struct RawReceiver {
    socket: OwnedFd,
    kind: SocketKind,
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl RawReceiver {
    pub(crate) fn new(socket: OwnedFd, kind: SocketKind) -> Self {
        Self { socket, kind, bytes: Vec::new(), fds: VecDeque::new() }
    }

    /// Returns the payload and the descriptors of the next frame, or `None` at the end of the
    /// stream.
    pub(crate) async fn frame(&mut self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        loop {
            if let Some((fds, frame_bytes)) =
                self.header().filter(|(_, bytes)| *bytes <= self.bytes.len())
            {
                assert!(
                    fds <= self.fds.len(),
                    "a whole frame has come, and {} of {fds} descriptors",
                    self.fds.len()
                );
                let frame = Vec::from_iter(self.bytes.drain(..frame_bytes));
                return Some((frame[8..].to_vec(), self.fds.drain(..fds).collect()));
            }
            if !self.receive().await {
                assert!(self.bytes.is_empty() && self.fds.is_empty());
                return None;
            }
        }
    }

    /// Returns how many descriptors and bytes the frame has that has begun. Returns `None` until
    /// its header is complete.
    fn header(&self) -> Option<(usize, usize)> {
        let (header, _) = self.bytes.split_first_chunk::<8>()?;
        assert_eq!(header[..2], [0xFD, 0x10]);
        let fds = u16::from_be_bytes([header[2], header[3]]);
        let payload = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        Some((fds.into(), 8 + payload as usize))
    }

    /// Receives with one `recvmsg`. Returns false at the end of the stream.
    async fn receive(&mut self) -> bool {
        // One `recvmsg` takes a packet, or the missing bytes of a frame.
        let missing = self.header().map_or(0, |(_, bytes)| bytes - self.bytes.len());
        let mut room = vec![0; MOST_BYTES.max(missing)];
        let mut control = [MaybeUninit::uninit(); cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut control);
        let received = loop {
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut room)], &mut control, flags) {
                // Waits until something arrives. The socket is in no event loop, because only `sys`
                // may register one (that is `unsafe`).
                Err(rustix::io::Errno::AGAIN) => tokio::time::sleep(Duration::from_millis(1)).await,
                received => break received.unwrap(),
            }
        };

        // Nothing of it was cut off, and a packet keeps the limits.
        assert!(
            !received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC),
            "there was too little room"
        );
        let rights = |message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        };
        self.fds.extend(control.drain().filter_map(rights).flatten());
        if self.kind == SocketKind::SeqPacket {
            let (bytes, is_rest) = (received.bytes, received.bytes <= missing);
            assert!(
                bytes <= MOST_BYTES || is_rest,
                "a packet of {bytes} bytes; {missing} are missing of a frame"
            );
        }
        self.bytes.extend_from_slice(&room[..received.bytes]);
        self.check_ahead();
        received.bytes > 0
    }

    /// Checks how many descriptors have come before the bytes of their frames. Only whole frames
    /// are checked: if one has begun, all its descriptors may have come already.
    fn check_ahead(&self) {
        let (mut bytes, mut claimed) = (&self.bytes[..], 0);
        while let Some((header, rest)) = bytes.split_first_chunk::<8>() {
            claimed += usize::from(u16::from_be_bytes([header[2], header[3]]));
            let payload = u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize;
            bytes = rest.get(payload..).unwrap_or_default();
        }
        if bytes.is_empty() {
            let ahead = self.fds.len().saturating_sub(claimed);
            assert!(ahead <= MOST_FDS, "{ahead} descriptors are ahead of their frames");
        }
    }
}
