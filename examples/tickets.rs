//! Tickets: a way to give a descriptor to a call of an RPC system, because RPC systems can't carry
//! descriptors. The client deposits a file over a Unix socket beside the RPC and gets a ticket for
//! it: a random text that is good for one call and for a short time. It quotes the ticket in the
//! call, and the service takes the file. A ticket that has been used is worthless to anybody who
//! sees it.
//!
//! The RPC here is HTTP, served by axum: `POST /count/TICKET` counts the lines of a file that the
//! service itself need not be able to open. Deposits are typed messages, with a policy for the
//! descriptors: a read-only regular file, or nothing.
//!
//! ```sh
//! cargo build --features axum,serde --example tickets
//! target/debug/examples/tickets serve --path /tmp/tickets.sock --http 127.0.0.1:8080
//! target/debug/examples/tickets count --path /tmp/tickets.sock --http 127.0.0.1:8080 Cargo.toml
//! ```

use std::{
    collections::HashMap,
    error::Error as StdError,
    fmt,
    fs::File,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{Router, extract, http::StatusCode, routing::post};
use clap::Parser;
use fdwire::{
    Framed, Listener, Socket, SocketKind, blocking, close_in_background,
    fd_policy::{FdMismatch, FdPolicy},
    typed::{Passable, Passed, Typed, TypedError},
};
use futures::{SinkExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, time::sleep};

/// Counts the lines of files that an HTTP service gets by tickets.
#[derive(Parser)]
enum Args {
    /// Serves HTTP, and takes deposits.
    Serve {
        /// The path of the socket that takes deposits.
        #[arg(long)]
        path: PathBuf,
        /// The address to serve HTTP on.
        #[arg(long)]
        http: SocketAddr,
        /// How long a ticket is good.
        #[arg(long, value_name = "MILLISECONDS", default_value_t = 10_000)]
        lifetime: u64,
    },
    /// Prints a ticket for a file.
    Deposit {
        /// The path of the socket that takes deposits.
        #[arg(long)]
        path: PathBuf,
        /// The file to deposit.
        file: PathBuf,
    },
    /// Deposits a file, and has its lines counted.
    Count {
        /// The path of the socket that takes deposits.
        #[arg(long)]
        path: PathBuf,
        /// The address of the service.
        #[arg(long)]
        http: SocketAddr,
        /// The file to deposit.
        file: PathBuf,
    },
}

/// A file that may be deposited.
struct Input(File);

impl Passable for Input {
    type Fd = OwnedFd;

    fn check(fd: &OwnedFd) -> Result<(), FdMismatch> {
        FdPolicy::regular_file().read_only().check(fd)
    }

    fn from_fd(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    fn into_fd(self) -> OwnedFd {
        self.0.into()
    }
}

/// A message of a client.
#[derive(Serialize, Deserialize)]
struct Deposit(Passed<Input>);

/// The answer: a ticket, or the reason why there is none.
type Answer = Result<String, String>;

/// The files that wait for their call.
struct Tickets {
    waiting: Mutex<HashMap<String, Waiting>>,
    lifetime: Duration,
}

struct Waiting {
    file: File,
    /// The uid of the client that has deposited the file.
    uid: u32,
    until: Instant,
}

impl Tickets {
    /// The number of files of one uid that may wait at a time. Each takes a descriptor here.
    const MAX_FILES: usize = 64;

    fn issue(&self, file: File, uid: u32) -> Answer {
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| format!("cannot get random bytes: {error}"))?;
        let ticket: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.values().filter(|other| other.uid == uid).count() >= Self::MAX_FILES {
            drop(waiting);
            close_in_background([file]);
            return Err(format!("{} files of uid {uid} wait already", Self::MAX_FILES));
        }
        waiting
            .insert(ticket.clone(), Waiting { file, uid, until: Instant::now() + self.lifetime });
        Ok(ticket)
    }

    /// Takes the file of a ticket, which is used up then.
    fn redeem(&self, ticket: &str) -> Option<File> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(ticket)?;
        if waiting.until < Instant::now() {
            close_in_background([waiting.file]);
            return None;
        }
        Some(waiting.file)
    }

    /// Closes the files whose tickets have expired.
    fn expire(&self) {
        let now = Instant::now();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let over: Vec<_> = waiting.extract_if(|_, waiting| waiting.until < now).collect();
        drop(waiting);
        close_in_background(over.into_iter().map(|(_, waiting)| waiting.file));
    }
}

fn main() -> ExitCode {
    let done = match Args::parse() {
        Args::Serve { path, http, lifetime } => serve(&path, http, Duration::from_millis(lifetime)),
        Args::Deposit { path, file } => deposit(&path, &file).and_then(|ticket| Ok(say(ticket)?)),
        Args::Count { path, http, file } => count(&path, http, &file),
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
async fn serve(path: &Path, http: SocketAddr, lifetime: Duration) -> Result<(), Box<dyn StdError>> {
    let side = Listener::bind(path, SocketKind::SeqPacket)
        .map_err(|error| format!("cannot listen on {}: {error}", path.display()))?;
    let http = TcpListener::bind(http)
        .await
        .map_err(|error| format!("cannot listen on {http}: {error}"))?;
    say(format_args!("serving at http://{}", http.local_addr()?))?;
    let tickets = Arc::new(Tickets { waiting: Mutex::default(), lifetime });

    let app =
        Router::new().route("/count/{ticket}", post(answer_call)).with_state(Arc::clone(&tickets));
    let expiring = async {
        loop {
            sleep(lifetime).await;
            tickets.expire();
        }
    };
    tokio::select! {
        served = axum::serve(http, app) => Ok(served?),
        accepted = take_deposits(side, &tickets) => accepted,
        () = expiring => Ok(()),
    }
}

/// Answers a call of the RPC, which names a ticket.
async fn answer_call(
    extract::State(tickets): extract::State<Arc<Tickets>>,
    extract::Path(ticket): extract::Path<String>,
) -> (StatusCode, String) {
    let Some(file) = tickets.redeem(&ticket) else {
        return (StatusCode::GONE, "no file waits for this ticket\n".to_owned());
    };
    let counted = tokio::task::spawn_blocking(move || lines(&file)).await;
    match counted.unwrap_or_else(|error| Err(io::Error::other(error))) {
        Ok(lines) => (StatusCode::OK, format!("{lines} lines\n")),
        Err(error) => (StatusCode::UNPROCESSABLE_ENTITY, format!("{error}\n")),
    }
}

/// Counts from the beginning. Does not move the offset, because it is the client's too.
fn lines(file: &File) -> io::Result<usize> {
    let (mut buffer, mut offset, mut lines) = ([0; 8192], 0, 0);
    loop {
        match file.read_at(&mut buffer, offset)? {
            0 => return Ok(lines),
            count => {
                offset += count as u64;
                lines += buffer[..count].iter().filter(|byte| **byte == b'\n').count();
            }
        }
    }
}

async fn take_deposits(side: Listener, tickets: &Arc<Tickets>) -> Result<(), Box<dyn StdError>> {
    loop {
        let (socket, tickets) = (side.accept().await?, Arc::clone(tickets));
        tokio::spawn(async move {
            if let Err(error) = take_deposits_of(socket, &tickets).await {
                eprintln!("deposit refused: {error}");
            }
        });
    }
}

async fn take_deposits_of(socket: Socket, tickets: &Tickets) -> Result<(), TypedError> {
    let uid = socket.peer_cred().map_err(fdwire::Error::from)?.uid;
    let mut client =
        Framed::with_codecs(socket, Typed::<Deposit>::default(), Typed::<Answer>::default());
    while let Some(Deposit(file)) = client.try_next().await? {
        client.send(tickets.issue(file.into_inner().0, uid)).await?;
    }
    Ok(())
}

/// Deposits a file and returns the ticket.
fn deposit(path: &Path, file: &Path) -> Result<String, Box<dyn StdError>> {
    let input = File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let socket = blocking::Socket::connect(path, SocketKind::SeqPacket)
        .map_err(|error| format!("cannot connect to {}: {error}", path.display()))?;
    let mut service = blocking::Framed::with_codecs(
        socket,
        Typed::<Answer>::default(),
        Typed::<Deposit>::default(),
    );
    service.set_read_timeout(Some(Duration::from_secs(10)));
    let failed = |error: TypedError| format!("the service at {}: {error}", path.display());
    service.send(Deposit(Input(input).into())).map_err(|refused| failed(refused.error))?;
    let refused = || format!("the service at {} has refused {}", path.display(), file.display());
    Ok(service.next().ok_or_else(refused)?.map_err(failed)??)
}

fn count(path: &Path, http: SocketAddr, file: &Path) -> Result<(), Box<dyn StdError>> {
    let ticket = deposit(path, file)?;
    let mut service =
        TcpStream::connect(http).map_err(|error| format!("cannot connect to {http}: {error}"))?;
    write!(service, "POST /count/{ticket} HTTP/1.0\r\nhost: {http}\r\n\r\n")?;
    let mut response = String::new();
    service.read_to_string(&mut response)?;
    let (head, body) =
        response.split_once("\r\n\r\n").ok_or("the service has not answered in HTTP")?;
    if !head.contains(" 200 ") {
        return Err(format!("the service at {http}: {}", body.trim_end()).into());
    }
    Ok(say(format_args!("{}: {}", file.display(), body.trim_end()))?)
}

/// Prints a line at once, because another process may wait for it.
fn say(line: impl fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
