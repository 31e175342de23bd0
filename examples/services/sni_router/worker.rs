//! A worker: terminates TLS, and serves HTTP/1.1 and HTTP/2.

use std::{convert::Infallible, error::Error, fmt, path::Path, process, sync::Arc, time::Duration};

use fdwire::handoff::Incoming;
use http_body_util::Full;
use hyper::{
    Request, Response,
    body::{self, Bytes},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{
        conn::auto,
        graceful::{GracefulShutdown, Watcher},
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How long the TLS handshake may take, and after it the head of the first request.
const TIME_TO_BEGIN: Duration = Duration::from_secs(10);

/// At the end, the time for requests that are on their way.
const GRACE: Duration = Duration::from_millis(100);

/// At the end, the time for requests that are being answered.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

/// Serves the connections that come over the standard input.
pub(crate) async fn run(certificate: &Path, key: &Path) -> Result<()> {
    // Ctrl-C goes to all processes of the terminal, and a service manager may signal all processes
    // of a service. The router acts on it.
    let _ignored = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let tls = tls_acceptor(certificate, key)?;

    let mut incoming = Incoming::from_stdin()?;
    let (handle, serving) = (incoming.handle(), GracefulShutdown::new());
    while let Some(connection) = incoming.next().await {
        let (peer, name) = (connection.peer_addr().clone(), connection.metadata().clone());
        let answer = move |request: &Request<body::Incoming>| {
            let (name, pid) = (String::from_utf8_lossy(&name), process::id());
            Bytes::from(format!("{name}: worker {pid}, {peer}, {:?}\n", request.version()))
        };
        let (tls, watcher) = (tls.clone(), serving.watcher());
        tokio::spawn(async move {
            if let Err(error) = serve(tls, connection, watcher, answer).await {
                tracing::debug!("a connection has ended: {error}");
            }
        });
    }

    // The router wants this worker to end, or is gone.
    sleep(GRACE).await;
    let _ = timeout(FINISH_LIMIT, serving.shutdown()).await;
    handle.ended().await;
    Ok(())
}

/// Serves one client: the handshake, and then the HTTP version that it has led to.
pub(crate) async fn serve(
    tls: TlsAcceptor,
    connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    watcher: Watcher,
    answer: impl Fn(&Request<body::Incoming>) -> Bytes,
) -> Result<()> {
    let stream = timeout(TIME_TO_BEGIN, tls.accept(connection)).await??;
    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(HTTP_2);
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(TIME_TO_BEGIN);
    http.http2().timer(TokioTimer::new()).keep_alive_interval(TIME_TO_BEGIN);
    let http = if is_http2 { http.http2_only() } else { http.http1_only() };
    let service = service_fn(|request| {
        let response = Response::new(Full::new(answer(&request)));
        async { Ok::<_, Infallible>(response) }
    });
    let serving = http.serve_connection(TokioIo::new(stream), service);
    watcher.watch(serving).await
}

const HTTP_2: &[u8] = b"h2";

/// Makes an acceptor of a certificate chain and its key, both in PEM files.
///
/// # Errors
/// They name the file.
pub(crate) fn tls_acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor> {
    let in_file = |path: &Path, error: &dyn fmt::Display| format!("{}: {error}", path.display());
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|error| in_file(certificate, &error))?;
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| in_file(key, &error))?;
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(|error| in_file(certificate, &error))?;
    config.alpn_protocols = vec![HTTP_2.to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
