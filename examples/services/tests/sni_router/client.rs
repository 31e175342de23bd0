//! A real TLS client, made of rustls and hyper.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http_body_util::{BodyExt, Empty};
use hyper::{
    Request,
    body::Bytes,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::router::{NAMES, Router};

pub(crate) fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs")
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Http {
    One,
    Two,
}

pub(crate) const VERSIONS: [Http; 2] = [Http::One, Http::Two];

impl Http {
    fn alpn(self) -> &'static [u8] {
        if self == Self::One { b"http/1.1" } else { b"h2" }
    }

    /// Returns the name as the worker writes it.
    pub(crate) fn name(self) -> &'static str {
        if self == Self::One { "HTTP/1.1" } else { "HTTP/2.0" }
    }
}

/// Returns the settings of a client that trusts the workers of a router.
pub(crate) fn config(router: &Router, version: Http) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    for name in NAMES {
        let certificate = CertificateDer::from_pem_file(router.certificate(name)).unwrap();
        roots.add(certificate).unwrap();
    }
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![version.alpn().to_vec()];
    config
}

/// Returns the ClientHello for a name, or for an IP address. An IP address is not part of the
/// hello.
pub(crate) fn hello(router: &Router, name: &'static str) -> Vec<u8> {
    let (config, name) = (config(router, Http::One), ServerName::try_from(name).unwrap());
    let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes).unwrap();
    }
    bytes
}

/// A client that has a connection to a worker.
pub(crate) enum Client {
    One(http1::SendRequest<Empty<Bytes>>),
    Two(http2::SendRequest<Empty<Bytes>>),
}

impl Client {
    /// Connects, sends a ClientHello for a name in records of this length and in pieces of one
    /// byte, and completes the handshake.
    ///
    /// # Errors
    /// Returns the error of the connection or of the handshake.
    pub(crate) async fn connect(
        router: &Router,
        name: &'static str,
        version: Http,
        record_bytes: Option<usize>,
    ) -> io::Result<Self> {
        let mut config = config(router, version);
        config.max_fragment_size = record_bytes.map(|bytes| bytes + 5);
        let tcp = TcpStream::connect(router.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(name).unwrap();
        let tls = TlsConnector::from(Arc::new(config)).connect(name, ByteByByte(tcp)).await?;
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(version.alpn()));
        Ok(Self::start_http(tls, version).await.unwrap())
    }

    async fn start_http(tls: TlsStream<ByteByByte>, version: Http) -> hyper::Result<Self> {
        let io = TokioIo::new(tls);
        match version {
            Http::One => {
                let (sender, connection) = http1::handshake(io).await?;
                tokio::spawn(connection);
                Ok(Self::One(sender))
            }
            Http::Two => {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
                tokio::spawn(connection);
                Ok(Self::Two(sender))
            }
        }
    }

    /// Sends a request, and returns the answer.
    pub(crate) async fn get(&mut self) -> hyper::Result<String> {
        let request = Request::get("https://one.test/").header("host", "one.test");
        let request = request.body(Empty::new()).unwrap();
        let response = match self {
            Self::One(sender) => sender.send_request(request).await?,
            Self::Two(sender) => sender.send_request(request).await?,
        };
        let body = response.into_body().collect().await?.to_bytes();
        Ok(String::from_utf8(body.to_vec()).unwrap())
    }
}

/// Writes one byte at a time.
pub(crate) struct ByteByByte(TcpStream);

impl AsyncRead for ByteByByte {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for ByteByByte {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let one = bytes.len().min(1);
        Pin::new(&mut self.0).poll_write(cx, &bytes[..one])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
