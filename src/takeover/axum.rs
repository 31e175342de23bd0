//! axum serves from a gated listener.

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
    /// When this process is replaced, answers by HTTP/1.1 say `Connection: close` from that moment
    /// on, so clients that ask anyway move to the new process by themselves. The others are told to
    /// end at moments that are [spread](super::Options::drain) over some time: a silent connection
    /// of HTTP/1.1 is closed, one of HTTP/2 gets GOAWAY and finishes its requests. A client that
    /// sends a request at the very moment at which its connection is closed has to repeat it, which
    /// clients of HTTP/1.1 have to expect of every server (RFC 9112, section 9.5).
    ///
    /// Unlike `axum::serve` with a graceful shutdown, this does not tell all clients at once, has a
    /// deadline, and serves on if the takeover is undone. Handlers find the client's address in
    /// `ConnectInfo<SocketAddr>`.
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
    /// println!("{} connections are cut", finished.unfinished);
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    /// Outside of a tokio runtime, or if its I/O driver or its timer is not enabled.
    ///
    /// # Cancel safety
    /// When dropped, no further connection is accepted. Those that are open go on until their end.
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
            () = accept => unreachable!("it accepts until it is dropped"),
        }
    }
}

async fn serve_connection(
    connection: OpenConnection,
    stream: TcpStream,
    client: SocketAddr,
    router: Router,
) {
    // Each answer of HTTP/1.1 is the last one once this process is replaced.
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
    // Serve until the client is done, the connection's moment has come, or the deadline is over.
    let builder = Builder::new(TokioExecutor::new());
    let mut serving = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let served = tokio::select! {
        served = &mut serving => served,
        () = connection.ending() => {
            serving.as_mut().graceful_shutdown();
            tokio::select! {
                served = serving => served,
                () = connection.deadline() => {
                    return debug!(%client, "cut at the deadline of the drain");
                }
            }
        }
    };
    if let Err(error) = served {
        debug!(%client, %error, "a connection has failed");
    }
}

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
