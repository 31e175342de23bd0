//! The clients: HTTP/1.1 over TLS, 16 connections at a time.

use std::{
    error::Error,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    Load,
    servers::{NAME, Servers},
};

/// Connections that are open at the same time.
const CONNECTIONS: usize = 16;

/// The figures of one contender in one round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    requests: usize,
    elapsed: Duration,
    cpu: Duration,
}

impl Sample {
    /// Returns the requests a second.
    pub(crate) fn rate(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// Returns the CPU time of router and worker for a request, in microseconds.
    pub(crate) fn cpu(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.requests as f64
    }
}

/// The clients of a contender.
pub(crate) struct Client<'a> {
    servers: &'a Servers,
    connection: Connection,
    keep_alive: bool,
}

impl<'a> Client<'a> {
    pub(crate) fn new(servers: &'a Servers, load: Load) -> Self {
        let mut roots = RootCertStore::empty();
        let certificate = CertificateDer::from_pem_file(&servers.certificate);
        roots.add(certificate.expect("it was written")).expect("it is a certificate");
        let mut config =
            ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let connection = Connection {
            tls: TlsConnector::from(Arc::new(config)),
            address: servers.address,
            answer_bytes: load.answer_bytes,
        };
        Self { servers, connection, keep_alive: load.keep_alive }
    }

    /// Sends requests for the time `window`.
    ///
    /// # Errors
    /// Returns the error of a connection or a request that failed.
    pub(crate) async fn run(
        &self,
        window: Duration,
    ) -> Result<Sample, Box<dyn Error + Send + Sync>> {
        // Connections that are kept are opened before the time begins.
        let mut open = Vec::new();
        if self.keep_alive {
            for _ in 0..CONNECTIONS {
                open.push(self.connection.open().await?);
            }
        }
        // Each client sends one request after the other until the time is over.
        let (begin, before) = (Instant::now(), self.servers.cpu()?);
        let mut clients = JoinSet::new();
        for number in 0..CONNECTIONS {
            let (connection, kept) = (self.connection.clone(), open.pop());
            clients.spawn(async move {
                let outcome = match kept {
                    Some(stream) => connection.repeat(stream, begin + window).await,
                    None => connection.reopen(begin + window).await,
                };
                outcome.map_err(|error| io::Error::other(format!("client {number}: {error}")))
            });
        }
        let mut requests = 0;
        while let Some(client) = clients.join_next().await {
            requests += client??;
        }
        Ok(Sample { requests, elapsed: begin.elapsed(), cpu: self.servers.cpu()? - before })
    }
}

/// The address and TLS settings of a connection, and the size of the answers to request.
#[derive(Clone)]
struct Connection {
    tls: TlsConnector,
    address: SocketAddr,
    answer_bytes: usize,
}

impl Connection {
    async fn open(&self) -> io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(self.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(NAME).expect("a valid name");
        self.tls.connect(name, tcp).await
    }

    /// Sends requests on one connection. Returns their number.
    async fn repeat(&self, mut stream: TlsStream<TcpStream>, until: Instant) -> io::Result<usize> {
        let (mut requests, mut answer) = (0, Vec::new());
        while Instant::now() < until {
            self.request(&mut stream, "keep-alive", &mut answer).await?;
            requests += 1;
        }
        Ok(requests)
    }

    /// Sends each request on a connection of its own. Returns their number.
    async fn reopen(&self, until: Instant) -> io::Result<usize> {
        let (mut requests, mut answer) = (0, Vec::new());
        while Instant::now() < until {
            let mut stream = self.open().await?;
            self.request(&mut stream, "close", &mut answer).await?;
            stream.read_to_end(&mut answer).await?;
            requests += 1;
        }
        Ok(requests)
    }

    /// Sends a request and reads the whole answer.
    async fn request(
        &self,
        stream: &mut TlsStream<TcpStream>,
        connection: &str,
        answer: &mut Vec<u8>,
    ) -> io::Result<()> {
        let bytes = self.answer_bytes;
        let request =
            format!("GET /{bytes} HTTP/1.1\r\nhost: {NAME}\r\nconnection: {connection}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        stream.flush().await?;
        // The answer has a head, an empty line, and the body.
        answer.clear();
        loop {
            if stream.read_buf(answer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let head = answer.windows(4).take(1000).position(|end| end == b"\r\n\r\n");
            if head.is_some_and(|head| answer.len() == head + 4 + bytes) {
                return Ok(());
            }
        }
    }
}
