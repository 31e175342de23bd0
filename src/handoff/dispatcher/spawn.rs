//! Workers that the dispatcher starts, and starts again.

use std::{io, os::fd::OwnedFd, process::Stdio, sync::Arc, time::Duration};

use tokio::{
    process::{Child, Command},
    time::{Instant, timeout},
};
use tracing::{info, warn};

use super::{Dispatcher, Shared, WorkerEntryGuard, WorkerId, WorkerTask, process::Process};
use crate::{Socket, SocketKind};

/// The first wait before a worker is started again; twice as long each time, up to [`LONGEST_WAIT`], until one has adopted a
/// connection.
const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// How a worker is started: a `Command` of tokio or std, and what to do when it ends.
///
/// The worker gets its end of the socket as standard input, which is where
/// [`Incoming::from_stdin`](crate::handoff::Incoming::from_stdin) takes it from.
///
/// ```no_run
/// # fn example(dispatcher: fdwire::handoff::Dispatcher) -> std::io::Result<()> {
/// use fdwire::handoff::WorkerCommand;
/// use tokio::process::Command;
///
/// dispatcher.spawn_worker(WorkerCommand::from(Command::new("my-worker")).restart(true))?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct WorkerCommand {
    command: Command,
    restart: bool,
    kind: SocketKind,
}

impl From<Command> for WorkerCommand {
    fn from(command: Command) -> Self {
        Self { command, restart: false, kind: SocketKind::SeqPacket }
    }
}

impl From<std::process::Command> for WorkerCommand {
    fn from(command: std::process::Command) -> Self {
        Command::from(command).into()
    }
}

impl WorkerCommand {
    /// Whether the worker is started again when it leaves without having been told to: after 10 ms, and after twice as long each
    /// time, up to 10 s, until one has adopted a connection or has lived for longer than that. Default: no.
    #[must_use]
    pub fn restart(mut self, restart: bool) -> Self {
        self.restart = restart;
        self
    }

    /// The kind of the socket. Default: [`SocketKind::SeqPacket`].
    #[must_use]
    pub fn socket_kind(mut self, kind: SocketKind) -> Self {
        self.kind = kind;
        self
    }

    fn start(&mut self) -> io::Result<(Socket, Child)> {
        let (ours, theirs) = Socket::pair(self.kind)?;
        let child = self.command.stdin(Stdio::from(OwnedFd::from(theirs))).spawn();
        // The command keeps what it was given. As long as the worker's end were open here, its death would not end the socket.
        self.command.stdin(Stdio::null());
        Ok((ours, child?))
    }
}

impl Dispatcher {
    /// Starts a worker: a process with the worker's end of a socket as its standard input. Nothing else is open in it that was not
    /// meant for it, since all descriptors of this crate are close-on-exec.
    ///
    /// When the dispatcher is gone, the worker sees the end of the socket. Whether it is killed then is the command's
    /// [`kill_on_drop`](Command::kill_on_drop).
    ///
    /// # Errors
    /// Those of starting a process, and of making a pair of sockets. Starting it again is tried until it succeeds.
    pub fn spawn_worker(&self, command: impl Into<WorkerCommand>) -> io::Result<WorkerId> {
        let _context = self.shared.runtime.enter();
        let mut command = command.into();
        let (socket, child) = command.start()?;
        let id = self.shared.act(|pool| pool.add_worker());
        let task = WorkerTask::new(Arc::clone(&self.shared), id, socket, Process::child(child));
        self.shared.runtime.spawn(supervise(Arc::clone(&self.shared), id, command, task));
        Ok(id)
    }
}

/// Runs one process of the worker after the other.
async fn supervise(shared: Arc<Shared>, id: WorkerId, mut command: WorkerCommand, mut task: WorkerTask) {
    let _entry = WorkerEntryGuard::new(&shared, id);
    let mut wait = FIRST_WAIT;
    loop {
        let begin = Instant::now();
        // Starting a process takes time, so it does not happen in the task that serves all workers.
        let Ok(remains) = shared.tasks.run(task.run()).await else { break };
        if remains.has_adopted || begin.elapsed() > LONGEST_WAIT {
            wait = FIRST_WAIT;
        }
        match start_again(&shared, id, &mut command, &mut wait).await {
            Some(next) => task = next,
            None => break,
        }
    }
}

/// `None` if that is not wanted.
async fn start_again(
    shared: &Arc<Shared>,
    id: WorkerId,
    command: &mut WorkerCommand,
    wait: &mut Duration,
) -> Option<WorkerTask> {
    while command.restart {
        let removed = shared.until(|pool| pool.is_removed(id));
        if timeout(*wait, removed).await.is_ok() {
            break;
        }
        *wait = (*wait * 2).min(LONGEST_WAIT);
        match command.start() {
            Ok((socket, child)) => {
                info!(worker = %id, pid = child.id(), "worker is started again");
                return Some(WorkerTask::new(Arc::clone(shared), id, socket, Process::child(child)));
            }
            Err(error) => warn!(worker = %id, %error, "worker cannot be started again yet"),
        }
    }
    None
}
