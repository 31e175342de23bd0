//! The processes of the bench: servers, and watchers, which leave a copy of a listener in their
//! event loops.

use std::{
    env,
    error::Error,
    fs,
    io::{self, BufRead, BufReader, Read, Write, pipe},
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use fdwire::takeover::{self, Listeners, Options, Server};
use tokio::{io::AsyncWriteExt, net, runtime::Builder};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Names the role of a process.
pub(crate) const ROLE: &str = "FDWIRE_TAKEOVER_BENCH";

/// A process that writes its reports to its standard output.
pub(crate) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    reports: BufReader<io::PipeReader>,
}

impl Process {
    /// Starts a server that reports that it has started and then waits for [`go`](Self::go). If it
    /// is the first one at its path, it binds `listeners` sockets, and the first of them is at
    /// `address`.
    pub(crate) fn server(path: &Path, address: SocketAddr, listeners: usize) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command
            .env(ROLE, "server")
            .env("BENCH_PATH", path)
            .env("BENCH_ADDRESS", address.to_string());
        command.env("BENCH_LISTENERS", listeners.to_string()).stdin(Stdio::piped());
        let mut process = Self::start(command)?;
        process.stdin = process.child.stdin.take();
        Ok(process)
    }

    /// Starts a server and waits until it serves. Returns the CPU time and the elapsed time from
    /// its request for the listeners until it was ready.
    pub(crate) fn serving(
        path: &Path,
        address: SocketAddr,
        listeners: usize,
    ) -> Result<(Self, Duration, Duration)> {
        let mut process = Self::server(path, address, listeners)?;
        process.report()?;
        process.go()?;
        let [cpu, elapsed] = process.numbers()?;
        Ok((process, Duration::from_nanos(cpu), Duration::from_nanos(elapsed)))
    }

    /// Starts the first server at a path, with a listener that other processes have too.
    pub(crate) fn first(path: &Path, listener: &TcpListener) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.env(ROLE, "server").env("BENCH_PATH", path).env("BENCH_LISTENERS", "1");
        command.stdin(Stdio::from(listener.as_fd().try_clone_to_owned()?));
        let mut process = Self::start(command)?;
        process.report()?;
        Ok(process)
    }

    /// Starts a process that leaves a listener in its event loop and never accepts.
    pub(crate) fn watcher(listener: &TcpListener) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.env(ROLE, "watcher").stdin(Stdio::from(listener.as_fd().try_clone_to_owned()?));
        let mut process = Self::start(command)?;
        process.report()?;
        Ok(process)
    }

    fn start(mut command: Command) -> Result<Self> {
        let (reports, stdout) = pipe()?;
        let child = command.stdout(stdout).spawn()?;
        Ok(Self { child, stdin: None, reports: BufReader::new(reports) })
    }

    /// Lets a [`server`](Self::server) take the listeners.
    pub(crate) fn go(&mut self) -> Result<()> {
        Ok(self.stdin.as_mut().ok_or("the process has no input")?.write_all(b"\n")?)
    }

    /// Waits for the next report.
    pub(crate) fn report(&mut self) -> Result<String> {
        let mut report = String::new();
        match self.reports.read_line(&mut report)? {
            0 => Err("a process of the bench has ended".into()),
            _ => Ok(report.trim().to_owned()),
        }
    }

    fn numbers(&mut self) -> Result<[u64; 2]> {
        let report = self.report()?;
        let (first, second) = report.split_once(' ').ok_or("a report has two numbers")?;
        Ok([first.parse()?, second.parse()?])
    }

    /// Returns the CPU time so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        cpu(&self.child.id().to_string())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the CPU time of all threads of a process, as the kernel's scheduler counts it.
fn cpu(process: &str) -> Result<Duration> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        let figures = fs::read_to_string(thread?.path().join("schedstat"))?;
        nanoseconds += figures.split(' ').next().ok_or("no figure")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Runs a process of the bench.
pub(crate) fn run(role: &str) -> Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    match role {
        "server" => runtime.block_on(serve()),
        _ => runtime.block_on(watch()),
    }
}

async fn serve() -> Result<()> {
    // Read the arguments, and allow as many descriptors as possible.
    let variable = |name: &str| env::var(name).map_err(|_| format!("no {name}"));
    let path = variable("BENCH_PATH")?;
    let address = env::var("BENCH_ADDRESS").ok();
    let listeners: usize = variable("BENCH_LISTENERS")?.parse()?;
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)?;
    }

    // Only the first process at a path calls this. Without an address, its listener is at standard
    // input.
    let bind = || {
        let mut bound = Listeners::new();
        match &address {
            Some(address) => bound.add("http", TcpListener::bind(address)?)?,
            None => bound.add("http", TcpListener::from(stdin()?))?,
        }
        for number in 1..listeners {
            bound.add(format!("listener {number}"), TcpListener::bind("127.0.0.1:0")?)?;
        }
        Ok(bound)
    };

    // Wait until the bench lets it go on.
    if address.is_some() {
        println!("started");
        io::stdin().read_exact(&mut [0])?;
    }

    // Measure from the request until it is ready.
    let (begin, cpu_begin) = (Instant::now(), cpu("self")?);
    let server = takeover::bind_or_take(&path, Options::default(), bind).await?.ready().await?;
    let (elapsed, used) = (begin.elapsed(), cpu("self")? - cpu_begin);
    println!("{} {}", used.as_nanos(), elapsed.as_nanos());
    answer(&server).await
}

/// Answers until the listener is given away, and then stays until it is killed, as a server does
/// whose clients keep their connections.
async fn answer(server: &Server) -> Result<()> {
    let http = server.gated::<net::TcpListener>("http", 0)?;
    while let Ok((mut connection, _)) = http.accept().await {
        tokio::spawn(async move { connection.write_all(b"hello").await });
    }
    std::future::pending().await
}

/// Keeps the listener at standard input in the event loop, and does not accept from it.
async fn watch() -> Result<()> {
    let listener = TcpListener::from(stdin()?);
    listener.set_nonblocking(true)?;
    let _listener = net::TcpListener::from_std(listener)?;
    println!("started");
    std::future::pending().await
}

fn stdin() -> io::Result<OwnedFd> {
    io::stdin().as_fd().try_clone_to_owned()
}
