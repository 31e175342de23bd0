//! axum serves what is handed over.

use std::{future::pending, io};

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use futures::StreamExt;

use super::Incoming;
use crate::handoff::{Address, Connection};

/// For `axum::serve`. After the end of the stream it accepts nothing more and does not return: see
/// [`IncomingHandle::drain_requested`](crate::handoff::IncomingHandle::drain_requested).
impl Listener for Incoming {
    type Io = Connection;
    type Addr = Address;

    async fn accept(&mut self) -> (Connection, Address) {
        match self.next().await {
            Some(connection) => {
                let peer = connection.peer_addr().clone();
                (connection, peer)
            }
            None => pending().await,
        }
    }

    /// # Errors
    /// Always: each connection has a [local address](Connection::local_addr) of its own.
    fn local_addr(&self) -> io::Result<Address> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "each connection has a local address of its own"))
    }
}

/// The client's address, for `into_make_service_with_connect_info::<Address>()`.
impl Connected<IncomingStream<'_, Incoming>> for Address {
    fn connect_info(connection: IncomingStream<'_, Incoming>) -> Self {
        connection.remote_addr().clone()
    }
}
