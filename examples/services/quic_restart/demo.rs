//! Restarts a server that has many connections, and prints what its clients see.

use std::{
    env, fs,
    net::{SocketAddr, UdpSocket},
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use quinn::{
    ClientConfig, Connection, Endpoint, TransportConfig,
    rustls::{RootCertStore, pki_types::CertificateDer},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::{sleep, timeout},
};

use crate::{Result, other};

const RESTARTS: usize = 20;

/// Sockets of clients, each with many connections.
const SOCKETS: usize = 8;

/// Requests at a time.
const AT_ONCE: usize = 32;

/// New connections that are kept after each restart.
const NEW: usize = 10;

/// Between two new connections of the load.
const PAUSE: Duration = Duration::from_millis(5);

/// For anything that should happen soon, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server process.
struct Process {
    _child: Child,
    reports: Lines<BufReader<ChildStdout>>,
}

impl Process {
    async fn start(address: SocketAddr, directory: &Path) -> Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .args(["--listen", &address.to_string()])
            .arg("--path")
            .arg(directory.join("takeover"))
            .arg("--certificate")
            .arg(directory.join("certificate"))
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().ok_or_else(|| other("no standard output"))?;
        let mut process = Self { _child: child, reports: BufReader::new(stdout).lines() };
        process.wait_for("ready").await?;
        Ok(process)
    }

    async fn wait_for(&mut self, report: &str) -> Result<()> {
        match timeout(PATIENCE, self.reports.next_line()).await?? {
            Some(line) if line == report => Ok(()),
            other_report => {
                Err(other(format!("a server reported {other_report:?} and not {report:?}")).into())
            }
        }
    }
}

/// A connection, and the process that has answered its first request.
struct Client {
    connection: Connection,
    generation: u32,
}

/// Connects from several sockets in turn.
struct Clients {
    endpoints: Vec<Endpoint>,
    server: SocketAddr,
    turn: AtomicUsize,
}

impl Clients {
    fn new(server: SocketAddr, certificate: Vec<u8>) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(certificate))?;
        let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
        let mut transport = TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_secs(5)));
        transport.max_idle_timeout(Some(PATIENCE.try_into()?));
        config.transport_config(Arc::new(transport));
        let endpoint = |_| {
            let mut endpoint = Endpoint::client(([127, 0, 0, 1], 0).into())?;
            endpoint.set_default_client_config(config.clone());
            Ok(endpoint)
        };
        let endpoints = (0..SOCKETS).map(endpoint).collect::<Result<_>>()?;
        Ok(Self { endpoints, server, turn: AtomicUsize::new(0) })
    }

    async fn connect(&self) -> Result<Client> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let connecting = self.endpoints[turn % SOCKETS].connect(self.server, "localhost")?;
        let connection = timeout(PATIENCE, connecting).await??;
        let generation = ask(&connection).await?;
        Ok(Client { connection, generation })
    }
}

/// Asks which generation serves a connection.
async fn ask(connection: &Connection) -> Result<u32> {
    let asking = async {
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(b"who").await?;
        send.finish()?;
        Ok(String::from_utf8(receive.read_to_end(100).await?)?.parse()?)
    };
    timeout(PATIENCE, asking).await?
}

/// Asks over all connections, and returns the number of those that have failed.
async fn ask_all(clients: &[Client]) -> usize {
    let failed = stream::iter(clients).map(async |client| match ask(&client.connection).await {
        Ok(generation) if generation == client.generation => 0,
        Ok(generation) => {
            eprintln!("generation {generation} answers for {}", client.generation);
            1
        }
        Err(error) => {
            eprintln!("a connection to generation {} is lost: {error}", client.generation);
            1
        }
    });
    failed.buffer_unordered(AT_ONCE).fold(0, async |sum, failed| sum + failed).await
}

pub(crate) async fn run(connections: usize) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
    let mut processes = vec![Process::start(address, directory.path()).await?];
    let clients = Arc::new(Clients::new(address, fs::read(directory.path().join("certificate"))?)?);

    let connecting =
        stream::iter(0..connections).map(|_| clients.connect()).buffer_unordered(AT_ONCE);
    let mut open: Vec<Client> =
        connecting.collect::<Vec<_>>().await.into_iter().collect::<Result<_>>()?;
    println!("{} connections are open", open.len());

    // New clients connect all the time, during every restart.
    let (connected, refused) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let load = tokio::spawn({
        let (clients, connected, refused) =
            (Arc::clone(&clients), Arc::clone(&connected), Arc::clone(&refused));
        async move {
            loop {
                match clients.connect().await {
                    Ok(client) => {
                        connected.fetch_add(1, Ordering::SeqCst);
                        client.connection.close(0u32.into(), b"");
                    }
                    Err(error) => {
                        eprintln!("a new connection failed: {error}");
                        refused.fetch_add(1, Ordering::SeqCst);
                    }
                }
                sleep(PAUSE).await;
            }
        }
    });

    let mut lost = 0;
    for number in 1..=RESTARTS {
        // Requests are on their way while the processes change places.
        let (process, lost_meanwhile) =
            tokio::join!(Process::start(address, directory.path()), ask_all(&open));
        processes.push(process?);
        lost += lost_meanwhile + ask_all(&open).await;
        for _ in 0..NEW {
            open.push(clients.connect().await?);
        }
        println!(
            "restart {number} of {RESTARTS}: {} connections are open, {lost} answers are missing",
            open.len()
        );
    }
    load.abort();
    let mut generations: Vec<_> = open.iter().map(|client| client.generation).collect();
    generations.dedup();

    // Without connections, all processes but the last one end. A close is one datagram, and if it
    // is lost, the server keeps the connection for a long time. So the closes are not sent all at
    // once.
    for some in open.chunks(AT_ONCE) {
        some.iter().for_each(|client| client.connection.close(0u32.into(), b""));
        sleep(PAUSE).await;
    }
    for endpoint in &clients.endpoints {
        endpoint.wait_idle().await;
    }
    processes.pop();
    for mut process in processes {
        process.wait_for("left").await?;
    }

    let (connected, refused) = (connected.load(Ordering::SeqCst), refused.load(Ordering::SeqCst));
    println!("connections {}", open.len());
    println!("generations {}", generations.len());
    println!("missing {lost}");
    println!("connected meanwhile {connected}");
    println!("failed to connect {refused}");
    if lost + refused > 0 {
        return Err(other("a client has noticed a restart").into());
    }
    Ok(())
}
