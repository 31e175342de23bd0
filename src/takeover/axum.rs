//! HTTP from a gated listener, with axum.

use std::{
    convert::Infallible, future::pending, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration,
};

use axum::{
    Router,
    extract::ConnectInfo,
    http::{HeaderValue, Version, header::CONNECTION},
    response::Response,
    serve::Listener,
};
use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tracing::{debug, warn};

use super::{Finished, Gated, OpenConnection, Server, protocol::Address};

/// The time to wait after an error, which usually means that no descriptor is left.
const BACK_OFF: Duration = Duration::from_millis(20);

impl Server {
    /// Serves a router by HTTP/1.1 and HTTP/2 until another process has taken over for good and
    /// this one may leave, as described for [`finish`](Self::finish).
    ///
    /// From the moment at which this process is replaced, its answers in HTTP/1.1 have `Connection:
    /// close`. So active clients move to the new process by themselves. The other connections end
    /// at moments that are [spread](super::Options::drain) over some time: a silent connection of
    /// HTTP/1.1 is closed, and one of HTTP/2 gets GOAWAY and finishes its requests. If a client
    /// sends a request at the very moment at which its connection is closed, it has to repeat the
    /// request. Clients of HTTP/1.1 have to expect that of every server (RFC 9112, section 9.5).
    ///
    /// `axum::serve` with a graceful shutdown ends all connections at once, and has no deadline.
    /// This method spreads them, has a deadline, and goes on serving if the takeover is undone.
    /// Handlers find the client's address in `ConnectInfo<SocketAddr>`.
    ///
    /// ```no_run
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use axum::{Router, routing::get};
    /// use fdwire::takeover::{self, Listeners, Options};
    ///
    /// let bind = || {
    ///     let mut listeners = Listeners::new();
    ///     listeners.bind_tcp("http", "127.0.0.1:0".parse().expect("an address"))?;
    ///     Ok(listeners)
    /// };
    /// let options = Options::default();
    /// let pending = takeover::bind_or_take("/run/app/takeover", options, bind).await?;
    /// let server = pending.ready().await?;
    /// let router = Router::new().route("/", get(|| async { "hello\n" }));
    /// let finished = server.serve_axum(server.gated("http", 0)?, router).await;
    /// println!("{finished}");
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    /// Outside of a tokio runtime, or if its I/O driver or its timer is not enabled.
    ///
    /// # Cancel safety
    /// If this is dropped, no further connection is accepted. Open connections go on until they
    /// end.
    pub async fn serve_axum(&self, mut listener: Gated<TcpListener>, router: Router) -> Finished {
        let accept = async {
            loop {
                let (stream, client) = Listener::accept(&mut listener).await;
                let connection = self.open_connection();
                tokio::spawn(serve_connection(connection, stream, client, router.clone()));
            }
        };
        tokio::select! {
            finished = self.finish() => finished,
            () = accept => unreachable!("this loop has no end"),
        }
    }
}

/// Serves one connection until it ends or is cut.
async fn serve_connection(
    connection: OpenConnection,
    stream: TcpStream,
    client: SocketAddr,
    router: Router,
) {
    // Once this process is replaced, each answer of HTTP/1.1 is the last one of its connection.
    let connection = Arc::new(connection);
    let router = TowerToHyperService::new(router);
    let service = service_fn(|mut request: Request<Incoming>| {
        let (router, connection) = (router.clone(), Arc::clone(&connection));
        async move {
            request.extensions_mut().insert(ConnectInfo(client));
            let is_http1 = request.version() < Version::HTTP_2;
            let mut response: Response = hyper::service::Service::call(&router, request).await?;
            if is_http1 && connection.is_replaced() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    // Serve until the client has ended, or until this connection has to end. Then wait for requests
    // that are being answered, up to the deadline.
    let builder = Builder::new(TokioExecutor::new());
    let mut serving = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let served = tokio::select! {
        served = &mut serving => served,
        () = connection.ending() => {
            serving.as_mut().graceful_shutdown();
            tokio::select! {
                served = serving => served,
                () = connection.deadline() => {
                    return debug!(%client, "connection cut at the deadline of the drain");
                }
            }
        }
    };
    if let Err(error) = served {
        debug!(%client, %error, "connection failed");
    }
}

/// Lets `axum::serve` accept from this listener. While another process serves, `accept` waits.
impl Listener for Gated<TcpListener> {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match Self::accept(self).await {
                Ok(accepted) => return accepted,
                Err(error) if error.kind() == io::ErrorKind::NotConnected => pending().await,
                Err(error) => {
                    warn!(%error, "can't accept a connection; trying again");
                    sleep(BACK_OFF).await;
                }
            }
        }
    }

    /// Returns the address of the listener.
    ///
    /// # Errors
    /// It does not fail, because a TCP listener has an address.
    fn local_addr(&self) -> io::Result<SocketAddr> {
        match self.identity().address {
            Address::Ip(address) => Ok(address),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
