//! The connections of an `Incoming` for tonic.

use tonic::transport::server::{Connected, TcpConnectInfo};

use super::Connection;

/// Makes an [`Incoming`](super::Incoming) fit for tonic's `serve_with_incoming_shutdown`, as the
/// stream `incoming.map(Ok::<_, Infallible>)`. A handler finds the client's address as
/// `Request::remote_addr`; there is none for the client of a Unix socket.
///
/// tonic's own settings of TCP do not apply to such a stream: set options such as `TCP_NODELAY` in
/// [`serve_with`](super::Dispatcher::serve_with).
///
/// With [`drain_requested`](super::IncomingHandle::drain_requested) as the signal, clients get a
/// GOAWAY when the worker drains, and their calls go on. The service `grpc` is a whole program.
impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo {
            local_addr: self.local_addr().socket_addr(),
            remote_addr: self.peer_addr().socket_addr(),
        }
    }
}
