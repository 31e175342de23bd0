//! A socket for quinn that moves between processes.

use std::{
    fmt,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use fdwire::takeover::{Datagrams, protocol::Address};
use futures::future::BoxFuture;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState},
};

/// Receives through [`Datagrams`], and sends as quinn does.
#[derive(Debug)]
pub(crate) struct MovingSocket {
    datagrams: Datagrams,
    state: UdpSocketState,
}

impl MovingSocket {
    pub(crate) fn new(datagrams: Datagrams) -> io::Result<Self> {
        // Switches on the control messages that quinn needs with each datagram, and UDP_GRO.
        let state = UdpSocketState::new((&datagrams).into())?;
        Ok(Self { datagrams, state })
    }
}

impl AsyncUdpSocket for MovingSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller { socket: self, waiting: Mutex::new(None) })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.state.send((&self.datagrams).into(), transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let (Some(buffer), Some(meta)) = (buffers.first_mut(), meta.first_mut()) else {
            return Poll::Ready(Ok(0));
        };
        let received = ready!(self.datagrams.poll_recv(cx, buffer))?;
        *meta = RecvMeta {
            addr: received.source,
            len: received.len,
            stride: received.stride,
            ecn: EcnCodepoint::from_bits(received.ecn),
            dst_ip: received.destination,
        };
        Poll::Ready(Ok(1))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        match self.datagrams.identity().address {
            Address::Ip(address) => Ok(address),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Waits for room to send.
struct Poller {
    socket: Arc<MovingSocket>,
    waiting: Mutex<Option<BoxFuture<'static, io::Result<()>>>>,
}

impl UdpPoller for Poller {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waiting = self.waiting.lock().unwrap();
        let writable = waiting.get_or_insert_with(|| {
            let socket = Arc::clone(&self.socket);
            Box::pin(async move { socket.datagrams.writable().await })
        });
        let result = ready!(writable.as_mut().poll(cx));
        *waiting = None;
        Poll::Ready(result)
    }
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poller").finish_non_exhaustive()
    }
}
