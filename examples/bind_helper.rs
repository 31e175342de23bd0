//! A bind helper: a service that is not root asks a small root process for a listener at a port
//! that the service may not bind. The helper looks up the service's uid and the port in an
//! allow-list. It answers with a listener or with the number of an error, as a typed message
//! (feature `serde`). The service needs no capability, is not started as root, and can ask again at
//! any time.
//!
//! ```sh
//! cargo build --features serde --example bind_helper
//! sudo target/debug/examples/bind_helper serve --path /run/bind.sock --allow 1000:80
//! target/debug/examples/bind_helper run --path /run/bind.sock 127.0.0.1:80       # as uid 1000
//! ```

use std::{
    error::Error as StdError,
    fmt,
    io::{self, Write},
    net::{SocketAddr, TcpListener},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use clap::Parser;
use fdwire::{
    Framed, Limits, Listener, Socket, SocketKind, blocking,
    typed::{Passed, Typed, TypedError},
};
use futures::{SinkExt, TryStreamExt};
use nix::libc;
use serde::{Deserialize, Serialize};

/// Gives listeners at privileged ports to services that are not root.
#[derive(Parser)]
enum Args {
    /// Serves requests, as root.
    Serve {
        /// The path where the helper listens for requests.
        #[arg(long)]
        path: PathBuf,
        /// A uid and the TCP ports that it may have. May be given again.
        #[arg(long, value_name = "UID:PORT[-PORT]", required = true)]
        allow: Vec<Rule>,
    },
    /// Runs a service that says hello to its clients.
    Run {
        /// The path where the helper listens.
        #[arg(long)]
        path: PathBuf,
        /// The address that the service wants to listen on.
        address: SocketAddr,
        /// The number of clients after which the service ends.
        #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
        clients: usize,
    },
}

/// Ports that a uid may have.
#[derive(Debug, Clone)]
struct Rule {
    uid: u32,
    ports: RangeInclusive<u16>,
}

impl FromStr for Rule {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (uid, ports) = text.split_once(':').ok_or("no colon between uid and port")?;
        let (from, to) = ports.split_once('-').unwrap_or((ports, ports));
        let port = |text: &str| text.parse().map_err(|_| "the port is not a number up to 65535");
        let uid = uid.parse().map_err(|_| "the uid is not a number")?;
        Ok(Self { uid, ports: port(from)?..=port(to)? })
    }
}

/// A request: to listen at this address, over TCP.
#[derive(Debug, Serialize, Deserialize)]
struct Listen(SocketAddr);

/// The answer: a listener, or an errno.
type Answer = Result<Passed<TcpListener>, i32>;

/// The time that the service waits for an answer. A helper that has hung must not hang it.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let done = match Args::parse() {
        Args::Serve { path, allow } => serve(&path, allow),
        Args::Run { path, address, clients } => run(&path, address, clients),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn serve(path: &Path, rules: Vec<Rule>) -> Result<(), Box<dyn StdError>> {
    // The mode lets everybody connect to the path. The listener admits only uids that have a rule.
    let listener = Listener::bind_with_mode(path, SocketKind::SeqPacket, 0o666)
        .map_err(|error| format!("cannot listen on {}: {error}", path.display()))?
        .allow_uids(rules.iter().map(|rule| rule.uid));
    print_line(format_args!("helper: listening on {}", path.display()))?;
    let rules: Arc<[Rule]> = rules.into();
    loop {
        let (socket, rules) = (listener.accept().await?, Arc::clone(&rules));
        tokio::spawn(async move {
            if let Err(error) = answer(socket, &rules).await {
                eprintln!("helper: a service is disconnected: {error}");
            }
        });
    }
}

async fn answer(socket: Socket, rules: &[Rule]) -> Result<(), TypedError> {
    let uid = socket.peer_cred().map_err(fdwire::Error::from)?.uid;
    let requests =
        Typed::<Listen>::new(Limits::default().max_payload_bytes(100).max_fds_per_frame(0));
    let mut client = Framed::with_codecs(socket, requests, Typed::<Answer>::default());
    while let Some(Listen(address)) = client.try_next().await? {
        let listener = listen(address, uid, rules);
        let outcome = listener.as_ref().err().map_or("granted".to_owned(), ToString::to_string);
        print_line(format_args!("helper: uid {uid} asks for {address}: {outcome}"))
            .map_err(fdwire::Error::from)?;
        let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        client.send(listener.map(Passed::from).map_err(errno)).await?;
    }
    Ok(())
}

fn listen(address: SocketAddr, uid: u32, rules: &[Rule]) -> io::Result<TcpListener> {
    let is_allowed = |rule: &Rule| rule.uid == uid && rule.ports.contains(&address.port());
    if !rules.iter().any(is_allowed) {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    TcpListener::bind(address)
}

fn run(path: &Path, address: SocketAddr, clients: usize) -> Result<(), Box<dyn StdError>> {
    let listener = request(path, address)?;
    let uid = nix::unistd::geteuid();
    print_line(format_args!("service: uid {uid} listens on {}", listener.local_addr()?))?;
    for client in listener.incoming().take(clients) {
        let hello = client.and_then(|mut client| writeln!(client, "hello from uid {uid}"));
        if let Err(error) = hello {
            eprintln!("service: a client is disconnected: {error}");
        }
    }
    Ok(())
}

/// Asks the helper for a listener. The type of the answer checks that its descriptor is one.
fn request(path: &Path, address: SocketAddr) -> Result<TcpListener, Box<dyn StdError>> {
    let socket = blocking::Socket::connect(path, SocketKind::SeqPacket)
        .map_err(|error| format!("cannot connect to {}: {error}", path.display()))?;
    let mut helper = blocking::Framed::with_codecs(
        socket,
        Typed::<Answer>::default(),
        Typed::<Listen>::default(),
    );
    helper.set_read_timeout(Some(PATIENCE));
    let gone = || format!("the helper at {} serves no request of this uid", path.display());
    helper.send(Listen(address)).map_err(|refused| match refused.error {
        TypedError::Connection(error) if error.is_peer_gone() => gone(),
        error => format!("cannot ask the helper at {}: {error}", path.display()),
    })?;
    let answer = match helper.next() {
        Some(Err(TypedError::Connection(error))) if error.is_peer_gone() => Err(gone())?,
        None => Err(gone())?,
        Some(answer) => {
            answer.map_err(|error| format!("the helper at {}: {error}", path.display()))?
        }
    };
    let listener = answer.map_err(io::Error::from_raw_os_error);
    Ok(listener.map_err(|error| format!("cannot listen on {address}: {error}"))?.into_inner())
}

/// Prints a line at once, because another process may wait for it.
fn print_line(line: fmt::Arguments<'_>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
