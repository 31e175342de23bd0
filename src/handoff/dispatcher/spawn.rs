//! Workers that the dispatcher starts, and starts again.

use std::{io, os::fd::OwnedFd, process::Stdio, sync::Arc, time::Duration};

use tokio::{
    process::{Child, Command},
    time::{Instant, timeout},
};
use tracing::{info, warn};

use super::{
    Dispatcher, LONGEST, Shared, WorkerId, WorkerTask, handover::Handover, pool::Pool,
    shared::WorkerEntryGuard,
};
use crate::{
    backoff::Backoff,
    socket::{Socket, SocketKind},
};

/// The first wait before a worker is started again. It doubles each time, until a process has lived
/// for longer than the longest wait.
const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The most processes of a worker that have left the dispatcher and not ended. With that many, the
/// worker is not started again.
const MAX_LEFTOVER: usize = 2;

/// The time that a process may take to end after its link, so that its exit status is logged.
const TIME_TO_END: Duration = Duration::from_secs(1);

/// The command that starts a worker, from a `Command` of tokio or std, and whether the worker is
/// started again when it ends.
///
/// The worker gets its end of the socket as standard input.
/// [`Incoming::from_stdin`](crate::handoff::Incoming::from_stdin) takes it from there.
///
/// The process that is started has to be the worker itself. A shell script that prepares something
/// has to end with `exec my-worker`. Otherwise the dispatcher would wait for the shell and kill the
/// shell, and the worker would live on unnoticed.
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
    longest_wait: Duration,
    kind: SocketKind,
}

impl From<Command> for WorkerCommand {
    fn from(command: Command) -> Self {
        Self { command, restart: false, longest_wait: LONGEST_WAIT, kind: SocketKind::SeqPacket }
    }
}

impl From<std::process::Command> for WorkerCommand {
    fn from(command: std::process::Command) -> Self {
        Command::from(command).into()
    }
}

impl WorkerCommand {
    /// Sets whether the worker is started again when it leaves and was not removed. The first wait
    /// is 10 ms. It doubles each time, up to the [longest wait](Self::longest_wait), until a
    /// process has lived for longer than that. Default: no.
    ///
    /// As long as two of its processes have left and not ended, it is not started again.
    #[must_use]
    pub fn restart(mut self, restart: bool) -> Self {
        self.restart = restart;
        self
    }

    /// Sets the longest wait before the worker is started again. If it is short, and a request
    /// makes the application crash, the worker starts as often as clients repeat the request.
    /// Default: 10 s.
    #[must_use]
    pub fn longest_wait(mut self, wait: Duration) -> Self {
        self.longest_wait = wait.clamp(FIRST_WAIT, LONGEST);
        self
    }

    /// Sets the kind of the socket. Default: [`SocketKind::SeqPacket`].
    #[must_use]
    pub fn socket_kind(mut self, kind: SocketKind) -> Self {
        self.kind = kind;
        self
    }

    fn program(&self) -> String {
        self.command.as_std().get_program().to_string_lossy().into_owned()
    }

    /// # Errors
    /// The errors of starting a process, with the name of the program.
    fn start(&mut self) -> io::Result<(Socket, Child)> {
        self.try_start().map_err(|error| {
            io::Error::new(error.kind(), format!("cannot start {}: {error}", self.program()))
        })
    }

    fn try_start(&mut self) -> io::Result<(Socket, Child)> {
        let (ours, theirs) = Socket::pair(self.kind)?;
        let child = self.command.stdin(Stdio::from(OwnedFd::from(theirs))).spawn();
        // The command keeps its standard input. As long as the worker's end were open in this
        // process, the worker's death would not end the socket.
        self.command.stdin(Stdio::null());
        Ok((ours, child?))
    }
}

impl Dispatcher {
    /// Starts a worker: a process with the worker's end of a socket as its standard input. The
    /// process inherits no other descriptor of this crate, because all of them are close-on-exec.
    ///
    /// When the dispatcher is gone, the worker sees the end of the socket. It is also killed then
    /// if the command's [`kill_on_drop`](Command::kill_on_drop) is set.
    ///
    /// # Errors
    /// The errors of starting a process, with the name of the program, and of making a pair of
    /// sockets. If a later start fails, it is tried again until it succeeds.
    ///
    /// A program that is no worker causes no error here. It is killed after
    /// [`hello_timeout`](super::DispatcherBuilder::hello_timeout), or when it writes something else
    /// to the socket. [`WorkerStats::last_exit`](super::WorkerStats::last_exit) and the log have
    /// the reason.
    pub fn spawn_worker(&self, command: impl Into<WorkerCommand>) -> io::Result<WorkerId> {
        let group = self.group.clone();
        self.start_worker(command.into(), |pool, program| pool.add_worker(group, Some(program)))
    }

    /// Starts a process for the worker that `add` adds.
    pub(super) fn start_worker(
        &self,
        mut command: WorkerCommand,
        add: impl FnOnce(&mut Pool<Box<Handover>>, String) -> WorkerId,
    ) -> io::Result<WorkerId> {
        let _context = self.shared.runtime.enter();
        let (socket, child) = command.start()?;
        let id = self.shared.with_pool(|pool| add(pool, command.program()));
        let process = self.shared.processes().child(child);
        let task = WorkerTask::new(Arc::clone(&self.shared), id, socket, process);
        self.supervise(id, command, task);
        Ok(id)
    }

    pub(super) fn supervise(&self, id: WorkerId, command: WorkerCommand, task: WorkerTask) {
        self.shared.runtime.spawn(supervise(Arc::clone(&self.shared), id, command, task));
    }
}

/// Runs one process of the worker after the other.
async fn supervise(
    shared: Arc<Shared>,
    id: WorkerId,
    mut command: WorkerCommand,
    mut task: WorkerTask,
) {
    let _entry = WorkerEntryGuard::new(&shared, id);
    let mut backoff = Backoff::new(FIRST_WAIT, command.longest_wait);
    loop {
        let begin = Instant::now();
        // This task starts the processes, because that takes time. The links of all workers share
        // another task.
        if shared.tasks.run(task.run()).await.is_err() {
            break;
        }
        if begin.elapsed() > command.longest_wait {
            backoff = Backoff::new(FIRST_WAIT, command.longest_wait);
        }
        // Usually a process ends right after its link. Wait for its exit status, which is logged.
        let _ = timeout(TIME_TO_END, shared.until(|pool| pool.leftover_of(id) == 0)).await;
        if command.restart {
            // A dispatcher that was replaced starts no process, unless the replacement is undone.
            shared.until(|pool| !pool.is_succeeded() || pool.is_removed(id)).await;
        }
        let is_wanted = command.restart && !shared.with_pool(|pool| pool.is_removed(id));
        if !is_wanted {
            return shared.log_exit(id);
        }
        let wait = backoff.next();
        shared.with_pool(|pool| pool.restart_in(id, wait));
        shared.log_exit(id);
        match start_again(&shared, id, &mut command, &mut backoff, wait).await {
            Some(next) => task = next,
            None => return,
        }
    }
}

/// Starts the worker again after this wait, or a longer one if that fails. Returns `None` if the
/// worker is removed meanwhile.
async fn start_again(
    shared: &Arc<Shared>,
    id: WorkerId,
    command: &mut WorkerCommand,
    backoff: &mut Backoff,
    mut wait: Duration,
) -> Option<WorkerTask> {
    loop {
        let _ = timeout(wait, shared.until(|pool| pool.is_removed(id))).await;
        let may_start =
            |pool: &Pool<_>| pool.leftover_of(id) < MAX_LEFTOVER && !pool.is_succeeded();
        shared.until(|pool| pool.is_removed(id) || may_start(pool)).await;
        if shared.with_pool(|pool| pool.is_removed(id)) {
            return None;
        }
        match command.start() {
            Ok((socket, child)) => {
                info!(worker = %id, pid = child.id(), "worker is started again");
                let process = shared.processes().child(child);
                return Some(WorkerTask::new(Arc::clone(shared), id, socket, process));
            }
            Err(error) => {
                wait = backoff.next();
                warn!(
                    worker = %id, %error,
                    "worker is not started again yet; trying it in {wait:?}"
                );
            }
        }
    }
}
