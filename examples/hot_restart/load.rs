//! Clients that send requests all the time.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};

/// The pause between two requests of a client.
const PAUSE: Duration = Duration::from_millis(1);

/// The longest time for an answer. A later one counts as a failure of the server.
const PATIENCE: Duration = Duration::from_secs(10);

/// The outcomes of the requests of all clients.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) answered: u64,
    /// The number of requests whose connection was cut, and that were answered on another one.
    pub(crate) repeated: u64,
    pub(crate) failed: Vec<String>,
    /// The process ids in the answers.
    pub(crate) processes: BTreeSet<String>,
    last: Option<Instant>,
    pub(crate) longest_gap: Duration,
}

/// The clients. Half of them connect for each request, and the others keep their connections.
pub(crate) struct Load {
    pub(crate) seen: Arc<Mutex<Seen>>,
    clients: JoinSet<()>,
}

impl Load {
    /// Starts clients. If `repeats` is true, they send a request once more if its connection is
    /// cut, as browsers and proxies do.
    pub(crate) fn start(address: SocketAddr, clients: usize, repeats: bool) -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        let mut load = Self { seen, clients: JoinSet::new() };
        for number in 0..clients {
            load.clients.spawn(client(address, number % 2 == 0, repeats, Arc::clone(&load.seen)));
        }
        load
    }

    /// Returns the number of requests that were answered, and of those that failed.
    pub(crate) fn counts(&self) -> (u64, usize) {
        let seen = self.seen.lock().unwrap();
        (seen.answered, seen.failed.len())
    }

    /// Begins to measure the longest gap anew, and returns the one so far.
    pub(crate) fn take_longest_gap(&self) -> Duration {
        std::mem::take(&mut self.seen.lock().unwrap().longest_gap)
    }
}

async fn client(address: SocketAddr, one_shot: bool, repeats: bool, seen: Arc<Mutex<Seen>>) {
    let mut connection = None;
    loop {
        let mut outcome = request(address, &mut connection, one_shot, &seen).await;
        if outcome.is_err() && repeats {
            outcome = request(address, &mut connection, one_shot, &seen).await;
            seen.lock().unwrap().repeated += u64::from(outcome.is_ok());
        }
        {
            let mut seen = seen.lock().unwrap();
            match outcome {
                Ok(()) => seen.answered += 1,
                Err(error) => seen.failed.push(error.to_string()),
            }
        }
        sleep(PAUSE).await;
    }
}

async fn request(
    address: SocketAddr,
    connection: &mut Option<BufReader<TcpStream>>,
    one_shot: bool,
    seen: &Mutex<Seen>,
) -> io::Result<()> {
    let is_new = connection.is_none();
    let mut open = match connection.take() {
        Some(open) => open,
        None => BufReader::new(TcpStream::connect(address).await?),
    };
    let end = if one_shot { "connection: close\r\n" } else { "" };
    open.write_all(format!("GET / HTTP/1.1\r\nhost: localhost\r\n{end}\r\n").as_bytes()).await?;
    let (closes, process) = timeout(PATIENCE, answer(&mut open)).await??;
    let mut seen = seen.lock().unwrap();
    if is_new {
        seen.accepted();
    }
    seen.processes.insert(process);
    *connection = Some(open).filter(|_| !closes);
    Ok(())
}

/// Reads an answer. Returns true if the server closes the connection after it, and its body.
async fn answer(connection: &mut BufReader<TcpStream>) -> io::Result<(bool, String)> {
    let (mut closes, mut length) = (false, 0);
    loop {
        let mut line = String::new();
        if connection.read_line(&mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        closes |= line == "connection: close";
        if let Some(bytes) = line.strip_prefix("content-length: ") {
            length = bytes.parse().map_err(io::Error::other)?;
        }
    }
    let mut body = vec![0; length];
    connection.read_exact(&mut body).await?;
    Ok((closes, String::from_utf8_lossy(&body).trim().to_owned()))
}

impl Seen {
    /// Counts a new connection whose first request was answered.
    fn accepted(&mut self) {
        let now = Instant::now();
        if let Some(last) = self.last.replace(now) {
            self.longest_gap = self.longest_gap.max(now - last);
        }
    }
}
