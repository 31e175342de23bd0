//! The processes of each contender: routers and workers.

use std::{
    env,
    error::Error,
    fs, io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use fdwire::handoff::Incoming;
use hyper::{Request, body, body::Bytes};
use hyper_util::server::graceful::GracefulShutdown;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net,
    runtime::Builder,
};

use crate::{
    hello::read_hello,
    router::Router,
    worker::{serve, tls_acceptor},
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Names the role of a process.
pub(crate) const ROLE: &str = "FDWIRE_SNI_BENCH";

/// Names the directory with the certificate, its key, and the worker's socket.
const DIRECTORY: &str = "FDWIRE_SNI_BENCH_DIRECTORY";

/// The server name in the clients' TLS handshake.
pub(crate) const NAME: &str = "one.test";

/// A way to bring connections to the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    /// The worker accepts by itself.
    NoRouter,
    /// The router of the example `sni_router` hands the connection over.
    Fdwire,
    /// A router that reads the same name in the same way, and passes all bytes on.
    CopyBidirectional,
    /// haproxy in TCP mode passes all bytes on.
    Haproxy { splices: bool },
}

pub(crate) const CONTENDERS: [Contender; 5] = [
    Contender::NoRouter,
    Contender::Fdwire,
    Contender::CopyBidirectional,
    Contender::Haproxy { splices: false },
    Contender::Haproxy { splices: true },
];

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::NoRouter => "no router",
            Self::Fdwire => "fdwire",
            Self::CopyBidirectional => "copy_bidirectional",
            Self::Haproxy { splices: false } => "haproxy",
            Self::Haproxy { splices: true } => "haproxy, splice-auto",
        }
    }
}

/// Writes the certificate that all workers have, and its key.
pub(crate) fn write_certificate(directory: &Path) -> Result<()> {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed([NAME.to_owned()])?;
    fs::write(directory.join("certificate"), cert.pem())?;
    fs::write(directory.join("key"), signing_key.serialize_pem())?;
    Ok(())
}

/// The processes of a contender. They are killed when it is dropped.
pub(crate) struct Servers {
    pub(crate) contender: Contender,
    pub(crate) address: SocketAddr,
    pub(crate) certificate: PathBuf,
    children: Vec<Child>,
}

impl Servers {
    /// Starts router and worker. Returns `None` if the router is not installed.
    pub(crate) fn start(contender: Contender, directory: &Path) -> Result<Option<Self>> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut servers = Self {
            contender,
            address: listener.local_addr()?,
            certificate: directory.join("certificate"),
            children: Vec::new(),
        };
        let socket = directory.join(contender.name());
        match contender {
            Contender::NoRouter => servers.spawn("worker at TCP", directory, listener)?,
            // The router starts its worker.
            Contender::Fdwire => servers.spawn("router", directory, listener)?,
            // The worker listens at a path, and the router connects to it.
            Contender::CopyBidirectional => {
                servers.spawn("worker at a path", directory, UnixListener::bind(&socket)?)?;
                servers.spawn("proxy", directory, listener)?;
            }
            Contender::Haproxy { splices } => {
                let config = directory.join(format!("{}.cfg", contender.name()));
                fs::write(&config, haproxy_config(&socket, splices))?;
                let mut haproxy = Command::new("haproxy");
                haproxy
                    .arg("-db")
                    .arg("-f")
                    .arg(config)
                    .stdin(Stdio::from(OwnedFd::from(listener)));
                match haproxy.spawn() {
                    Ok(child) => servers.children.push(child),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
                servers.spawn("worker at a path", directory, UnixListener::bind(&socket)?)?;
            }
        }
        Ok(Some(servers))
    }

    /// Starts a process of this executable, with a listener as its standard input.
    fn spawn(&mut self, role: &str, directory: &Path, listener: impl Into<OwnedFd>) -> Result<()> {
        let mut command = Command::new(env::current_exe()?);
        command.env(ROLE, role).env(DIRECTORY, directory).stdin(Stdio::from(listener.into()));
        self.children.push(command.spawn()?);
        Ok(())
    }

    /// Returns the CPU time of all processes so far.
    pub(crate) fn cpu(&self) -> io::Result<Duration> {
        let mut cpu = Duration::ZERO;
        for child in &self.children {
            let pid = child.id();
            // The workers of the dispatcher are children of the router.
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            for pid in [&*pid.to_string()].into_iter().chain(children.split_whitespace()) {
                cpu += cpu_of(pid)?;
            }
        }
        Ok(cpu)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Returns the CPU time of all threads of a process, as the kernel's scheduler counts it.
fn cpu_of(pid: &str) -> io::Result<Duration> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let figures = fs::read_to_string(thread?.path().join("schedstat"))?;
        let first = figures.split(' ').next().and_then(|figure| figure.parse::<u64>().ok());
        nanoseconds += first.ok_or(io::ErrorKind::InvalidData)?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

fn haproxy_config(socket: &Path, splices: bool) -> String {
    let splice = if splices { "option splice-auto" } else { "" };
    format!(
        "global\n    nbthread 1\n\
         defaults\n    mode tcp\n    maxconn 1000\n    {splice}\n    timeout connect 10s\n    \
         timeout client 60s\n    timeout server 60s\n\
         frontend front\n    bind fd@0\n    tcp-request inspect-delay 5s\n    \
         tcp-request content accept if {{ req.ssl_hello_type 1 }}\n    \
         use_backend one if {{ req.ssl_sni -i {NAME} }}\n\
         backend one\n    server one \"unix@{}\"\n",
        socket.display()
    )
}

/// Runs a process of a contender.
pub(crate) fn run(role: &str) -> Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let directory = PathBuf::from(env::var(DIRECTORY)?);
    runtime.block_on(async {
        match role {
            "worker" => work(&directory).await,
            "worker at TCP" => {
                let listener = net::TcpListener::from_std(tcp_listener()?)?;
                accept(&directory, async || Ok(listener.accept().await?.0)).await
            }
            "worker at a path" => {
                let listener = UnixListener::from(stdin()?);
                listener.set_nonblocking(true)?;
                let listener = net::UnixListener::from_std(listener)?;
                accept(&directory, async || Ok(listener.accept().await?.0)).await
            }
            "router" => route(&directory).await,
            "proxy" => proxy(&directory.join(Contender::CopyBidirectional.name())).await,
            _ => Err(format!("no such role: {role}").into()),
        }
    })
}

fn stdin() -> io::Result<OwnedFd> {
    io::stdin().as_fd().try_clone_to_owned()
}

fn tcp_listener() -> io::Result<TcpListener> {
    let listener = TcpListener::from(stdin()?);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Runs the example's router, with one worker.
async fn route(directory: &Path) -> Result<()> {
    let mut router = Router::new(500, Duration::from_secs(5));
    let mut worker = tokio::process::Command::new(env::current_exe()?);
    worker.env(ROLE, "worker").env(DIRECTORY, directory);
    router.add_worker(NAME, worker)?;
    Ok(Arc::new(router).serve(net::TcpListener::from_std(tcp_listener()?)?).await?)
}

/// Reads the name as the example's router does, connects to the worker, and passes all bytes on.
async fn proxy(socket: &Path) -> Result<()> {
    let listener = net::TcpListener::from_std(tcp_listener()?)?;
    loop {
        let (mut client, _) = listener.accept().await?;
        let socket = socket.to_owned();
        tokio::spawn(async move {
            let Ok(hello) = read_hello(&mut client).await else { return };
            if hello.server_name != NAME {
                return;
            }
            let Ok(mut worker) = net::UnixStream::connect(socket).await else { return };
            // The bytes of the hello were read already, so they are sent first.
            if worker.write_all(&hello.bytes).await.is_ok() {
                // It fails if a client leaves.
                let _ = copy_bidirectional(&mut client, &mut worker).await;
            }
        });
    }
}

/// Runs a worker of the example's router.
async fn work(directory: &Path) -> Result<()> {
    let mut incoming = Incoming::from_stdin()?;
    let site = Site::new(directory)?;
    let serving = tokio::spawn(async move {
        while let Some(connection) = incoming.next().await {
            site.serve(connection);
        }
    });
    Ok(serving.await?)
}

/// Runs a worker that accepts its connections.
async fn accept<S>(directory: &Path, accept: impl AsyncFn() -> io::Result<S>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let site = Site::new(directory)?;
    loop {
        site.serve(accept().await?);
    }
}

/// The server of all workers. Its answer has as many bytes as the path of the request names.
struct Site {
    tls: tokio_rustls::TlsAcceptor,
    serving: GracefulShutdown,
    bytes: Bytes,
}

impl Site {
    fn new(directory: &Path) -> Result<Self> {
        let tls = tls_acceptor(&directory.join("certificate"), &directory.join("key"))?;
        Ok(Self { tls, serving: GracefulShutdown::new(), bytes: vec![b'x'; 1 << 20].into() })
    }

    fn serve(&self, connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let bytes = self.bytes.clone();
        let answer = move |request: &Request<body::Incoming>| {
            let count = request.uri().path()[1..].parse().unwrap_or(0);
            bytes.slice(..bytes.len().min(count))
        };
        let serving = serve(self.tls.clone(), connection, self.serving.watcher(), answer);
        tokio::spawn(async move {
            let _ = serving.await; // it fails if a client leaves
        });
    }
}
