//! The processes of a contender, their control sockets, and the cores that they run on.

use std::{
    env,
    io::{ErrorKind, Read, Write},
    net::SocketAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
    sync::LazyLock,
    time::Duration,
};

use fdwire::SocketKind;
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::{
        resource::{UsageWho, getrusage},
        socket::{AddressFamily, SockFlag, SockType, getsockopt, setsockopt, socketpair, sockopt},
    },
    unistd::Pid,
};
use tokio::runtime::{Builder, Runtime};

use crate::{handoff::ClientLoad, rows::Row};

/// A socket beside the one that is measured. Its messages are numbers.
#[derive(Debug)]
pub(crate) struct Control(UnixStream);

impl Control {
    /// Returns the control that this process has as its standard output.
    pub(crate) fn from_stdout() -> Self {
        Self(UnixStream::from(
            std::io::stdout().as_fd().try_clone_to_owned().expect("a descriptor is free"),
        ))
    }

    pub(crate) fn send(&mut self, number: u64) {
        self.0.write_all(&number.to_ne_bytes()).expect("the other process is there");
    }

    /// Waits for a number. Returns `None` if the other process is gone.
    pub(crate) fn receive(&mut self) -> Option<u64> {
        let mut bytes = [0; 8];
        match self.0.read_exact(&mut bytes) {
            Ok(()) => Some(u64::from_ne_bytes(bytes)),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => None,
            Err(error) => panic!("control: {error}"),
        }
    }

    /// Waits for a number on another thread, so that the runtime runs its tasks meanwhile.
    pub(crate) async fn receive_in_runtime(&self) -> u64 {
        let mut copy = Self(self.0.try_clone().expect("a descriptor is free"));
        let received = tokio::task::spawn_blocking(move || copy.receive()).await;
        received.expect("no panic").expect("the other process is there")
    }
}

/// Another process of this executable. It ends when its control socket is shut down.
#[derive(Debug)]
pub(crate) struct Helper {
    pub(crate) control: Control,
    child: Child,
}

impl Helper {
    fn start(args: &[&str], stdin: Stdio) -> Self {
        // Standard output of the process is its control socket.
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let mut command = Command::new(env::current_exe().expect("this executable is a file"));
        command.args(args).stdin(stdin).stdout(OwnedFd::from(theirs));
        Self { control: Control(ours), child: command.spawn().expect("this executable can be run") }
    }

    /// Starts the other end of a contender, with this socket as its standard input.
    pub(crate) fn far_end(row: &Row, contender: &str, socket: OwnedFd) -> Self {
        let cores = match (row.threads, CORES.two) {
            (Threads::OneBound, Some((_, far))) => far.to_string(),
            (Threads::OneBound, None) => String::new(),
            (Threads::One | Threads::Many, _) => CORES.any(),
        };
        Self::start(
            &["--far-end", row.id, "--contender", contender, "--cores", &cores],
            socket.into(),
        )
    }

    /// Starts the client of a hand-off, on any core.
    pub(crate) fn client(address: SocketAddr, load: ClientLoad) -> Self {
        let (address, window, cores) = (address.to_string(), load.window.to_string(), CORES.any());
        let args = [
            "--client",
            &address,
            "--window",
            &window,
            "--request",
            load.request,
            "--cores",
            &cores,
        ];
        Self::start(&args, Stdio::null())
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.control.0.shutdown(std::net::Shutdown::Both);
        let ended = self.child.wait();
        if !std::thread::panicking() {
            assert!(ended.is_ok_and(|status| status.success()), "the other process failed");
        }
    }
}

/// The runtime of each process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// A current-thread runtime, bound to a core of its own.
    OneBound,
    /// A current-thread runtime, on any core.
    One,
    /// A runtime with a thread for each core.
    Many,
}

/// Makes the runtime of a process.
pub(crate) fn runtime(threads: Threads) -> Runtime {
    let mut builder = match threads {
        Threads::OneBound | Threads::One => Builder::new_current_thread(),
        Threads::Many => Builder::new_multi_thread(),
    };
    builder.enable_all().build().expect("a runtime")
}

/// Binds this process, the near end, to the cores that its row needs.
pub(crate) fn take_place(threads: Threads) {
    match (threads, CORES.two) {
        (Threads::OneBound, Some((near, _))) => bind(&[near]),
        (Threads::OneBound, None) => true,
        (Threads::One | Threads::Many, _) => bind(&CORES.allowed),
    };
}

/// Returns user and system time of all threads of this process.
pub(crate) fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("usage can be read");
    [usage.user_time(), usage.system_time()]
        .map(|time| {
            Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()).unsigned_abs())
        })
        .iter()
        .sum()
}

/// The cores of the process that measures and of the processes that it starts. The first use binds
/// this process to its core.
pub(crate) static CORES: LazyLock<Cores> = LazyLock::new(Cores::choose);

/// The cores of this process, and the two that the ends of a contender are bound to.
#[derive(Debug)]
pub(crate) struct Cores {
    pub(crate) allowed: Vec<usize>,
    /// The core of the near end and that of the far end. `None` if there is only one core, or if
    /// binding is not permitted.
    pub(crate) two: Option<(usize, usize)>,
}

impl Cores {
    fn choose() -> Self {
        let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        let allowed =
            (0..CpuSet::count()).filter(|&core| set.is_set(core) == Ok(true)).collect::<Vec<_>>();
        // Binding this process tests whether binding is permitted at all.
        let two = match allowed[..] {
            [near, far, ..] if bind(&[near]) => Some((near, far)),
            _ => None,
        };
        Self { allowed, two }
    }

    /// Returns all allowed cores, as an argument.
    fn any(&self) -> String {
        self.allowed.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
    }
}

/// Binds this process to cores. Returns false if that is not permitted.
pub(crate) fn bind(cores: &[usize]) -> bool {
    let mut set = CpuSet::new();
    cores.iter().all(|&core| set.set(core).is_ok())
        && sched_setaffinity(Pid::from_raw(0), &set).is_ok()
}

/// Makes two connected sockets, with larger send buffers for bulk. The kernel doubles the size that
/// is set.
pub(crate) fn socket_pair(kind: SocketKind, bulk: bool) -> (OwnedFd, OwnedFd) {
    let ty = if kind == SocketKind::Stream { SockType::Stream } else { SockType::SeqPacket };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (near, far) = socketpair(AddressFamily::Unix, ty, None, flags).expect("a socket pair");
    if bulk {
        for end in [&near, &far] {
            // Root may set more than net.core.wmem_max.
            let bytes = 2 << 20;
            setsockopt(end, sockopt::SndBufForce, &bytes)
                .or_else(|_| setsockopt(end, sockopt::SndBuf, &bytes))
                .expect("SO_SNDBUF can be set");
        }
    }
    (near, far)
}

/// Returns the size of the send buffers that [`socket_pair`] gets.
pub(crate) fn send_buffer(bulk: bool) -> usize {
    getsockopt(&socket_pair(SocketKind::SeqPacket, bulk).0, sockopt::SndBuf)
        .expect("SO_SNDBUF can be read")
}
