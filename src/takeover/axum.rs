//! axum serves from a gated listener.

use std::{future::pending, io, net::SocketAddr, time::Duration};

use axum::serve::Listener;
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tracing::warn;

use super::{Gated, protocol::Address};

/// How long to wait after an error: mostly no descriptor is left.
const BACK_OFF: Duration = Duration::from_millis(20);

/// For `axum::serve`. While another process serves, it accepts nothing and does not return.
impl Listener for Gated<TcpListener> {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match Self::accept(self).await {
                Ok(accepted) => return accepted,
                Err(error) if error.kind() == io::ErrorKind::NotConnected => pending().await,
                Err(error) => {
                    warn!(%error, "a connection can't be accepted for the moment");
                    sleep(BACK_OFF).await;
                }
            }
        }
    }

    /// # Errors
    /// None: a TCP listener has an address.
    fn local_addr(&self) -> io::Result<SocketAddr> {
        match self.identity().address {
            Address::Ip(address) => Ok(address),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
