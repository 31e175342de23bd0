//! The task of one process that takes over from this server.

use std::{
    collections::BTreeSet,
    io,
    net::Shutdown,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    task::unconstrained,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{
    Phase,
    control::Handover,
    generations::{Generations, OwnLeash, leash},
    giver::Giver,
    link::now,
    outbox::{Outbox, SendFailed},
    protocol::{AbortReason, FromTaker, GiverCodec, Refusal, ToTaker, in_messages},
    shared::{Command, Shared},
    steps::GiverStep,
    workers::Succession,
};
use crate::{Error, Frame, Framed, SendFd, Socket, framed::ReadHalf, sys};

/// The longest time for which the last messages wait for the peer to read them.
const LAST_MESSAGES: Duration = Duration::from_secs(1);

/// Lets a connected process take over, and returns when the connection has ended.
pub(super) async fn give(shared: Arc<Shared>, socket: Socket) {
    let (read, write) = Framed::new(socket, GiverCodec::default()).into_split();
    let (to_self, commands) = unbounded_channel();
    let giver = Giver::new(now(), shared.options.giver_settings());
    let mut task = GiverTask {
        giver,
        read,
        out: Outbox::new(write),
        shared,
        handover: None,
        succession: None,
        leash: None,
        can_read: true,
        can_write: true,
        peer_copy: None,
        peer: None,
        last_messages_until: None,
        declined: BTreeSet::new(),
        is_claimed: false,
    };
    let mut commands = Commands { to_self: Some(to_self), receiver: commands };
    while task.take_steps(&mut commands).await {
        task.wait(&mut commands).await;
    }
    // If this process was replaced, its leash outlives the connection: a later process may ask it
    // to leave.
    let leash = task.leash.take().filter(|_| !task.giver.is_serving());
    let shared = Arc::clone(&task.shared);
    drop(task); // closes the connection
    if let Some(leash) = leash {
        leash.must_leave().await;
        shared.status.send_modify(|status| status.must_leave = true);
        // Keep the leash open until this process exits: it shows that the process still runs.
        std::future::pending::<()>().await;
    }
}

/// A [`Giver`] with its connection, and everything that it needs to take its steps.
struct GiverTask {
    giver: Giver,
    read: ReadHalf<GiverCodec>,
    out: Outbox<GiverCodec, ToTaker<SendFd>>,
    shared: Arc<Shared>,
    /// Copies of everything that goes to the taker after READY.
    handover: Option<Handover>,
    /// The move of this process's workers to the dispatcher of the taker.
    succession: Option<Succession>,
    /// The socket by which a later process asks this one to leave.
    leash: Option<OwnLeash>,
    /// False once the end of the data was read.
    can_read: bool,
    /// False once the socket has refused to send.
    can_write: bool,
    /// A copy of the socket for `peer`, made at a time when a failure changes nothing.
    peer_copy: Option<OwnedFd>,
    /// Set after a cut, to notice the end of the taker without reading.
    peer: Option<AsyncFd<OwnedFd>>,
    /// Set when the takeover is over: the time at which the connection is closed.
    last_messages_until: Option<Instant>,
    /// Numbers of listeners that the taker does not use.
    declined: BTreeSet<u32>,
    /// True while this is the one takeover that the server allows.
    is_claimed: bool,
}

/// The channel over which the application's calls reach this task.
struct Commands {
    /// The sending end, until the takeover begins and the server gets it.
    to_self: Option<tokio::sync::mpsc::UnboundedSender<Command>>,
    receiver: UnboundedReceiver<Command>,
}

impl GiverTask {
    /// Takes the steps that are due. Returns false at the end.
    async fn take_steps(&mut self, commands: &mut Commands) -> bool {
        while let Some(step) = self.giver.next_step() {
            self.take_step(step, commands).await;
        }
        if !self.giver.is_over() {
            return true;
        }
        // The next takeover may begin while the last messages of this one are sent.
        if self.giver.is_serving() && std::mem::take(&mut self.is_claimed) {
            self.shared.unclaim();
        }
        let until = *self.last_messages_until.get_or_insert_with(|| Instant::now() + LAST_MESSAGES);
        self.can_write && !self.out.is_empty() && Instant::now() < until
    }

    async fn take_step(&mut self, step: GiverStep, commands: &mut Commands) {
        let shared = Arc::clone(&self.shared);
        match step {
            GiverStep::Decide => {
                // One takeover at a time.
                let to_self = commands.to_self.take();
                self.is_claimed = to_self.is_some_and(|to_self| shared.claim(to_self));
                if !self.is_claimed {
                    return self.giver.refuse(Refusal::Busy);
                }
                // If the predecessor of this process could still serve again, it might do so beside
                // the taker.
                match shared.release_predecessor().await {
                    Ok(()) => self.giver.welcome(now()),
                    Err(error) => {
                        warn!(%error, "takeover refused: the server before this does not answer");
                        self.giver.refuse(Refusal::Busy);
                    }
                }
            }
            GiverStep::SendOffer { version } => self.offer(version),
            GiverStep::SendRefused(reason) => self.send(ToTaker::Refused { reason }),
            GiverStep::SendStatus => self.send_status(),
            GiverStep::SendComplete => self.send(ToTaker::Complete),
            GiverStep::Cut => {
                self.out.clear();
                // An error means that the connection has ended, which reading notices.
                let _ = self.read.socket().shutdown(Shutdown::Read);
                let copy = self.peer_copy.take();
                self.peer = copy.and_then(|copy| sys::register(copy, Interest::WRITABLE).ok());
            }
            GiverStep::SendAborted(reason) => {
                warn!(%reason, "takeover called off; this server goes on");
                self.send(ToTaker::Aborted { reason });
            }
            GiverStep::Stop { declined } => {
                // Waiters wake when the phase changes, so the facts that they read are set first.
                self.declined.clone_from(&declined);
                shared.set_declined(declined);
                let taker = self
                    .read
                    .socket()
                    .peer_cred()
                    .ok()
                    .and_then(|taker| u32::try_from(taker.pid?).ok());
                shared.status.send_modify(|status| status.successor = taker);
                shared.set_phase(Phase::Draining);
                self.succession.iter_mut().for_each(Succession::begin);
                shared.set_may_remove(false); // the taker serves at these paths
                // Without a baton, nobody has to put one down: COMMIT follows at once.
                if !shared.options.has_baton {
                    self.giver.give(bytes::Bytes::new());
                }
            }
            GiverStep::SendCommit { baton } => {
                let Some(Handover { control, control_lock, locks }) = self.handover.take() else {
                    return;
                };
                // The locks come before COMMIT, which completes the takeover.
                let locks = locks.into_iter().filter(|(number, _)| !self.declined.contains(number));
                for locks in in_messages(locks.map(|(_, lock)| SendFd::from(lock)).collect()) {
                    self.send(ToTaker::Locks { fds: locks.into_iter().collect() });
                }
                self.send(ToTaker::Commit {
                    baton,
                    fds: [control, control_lock].into_iter().map(SendFd::from).collect(),
                });
            }
            GiverStep::Resume(undone) => {
                info!(?undone, "takeover undone; this server accepts again");
                shared.set_declined(BTreeSet::new());
                shared.set_may_remove(true);
                self.succession.take().iter_mut().for_each(Succession::undo);
                shared.set_phase(Phase::Serving);
            }
            GiverStep::SendResumed => self.send(ToTaker::Resumed),
            GiverStep::GiveUpCopies => shared.give_up(),
            GiverStep::SendDrained => self.send(ToTaker::Drained),
        }
    }

    /// Queues everything that the taker needs to get ready.
    fn offer(&mut self, version: u8) {
        // First everything that can fail: nothing was sent yet.
        let prepared = match self.prepare() {
            Ok(prepared) => prepared,
            Err(error) => return self.abort(&error),
        };
        let offered = self.shared.offered();
        let listeners = offered.len() as u32;
        self.send(ToTaker::Welcome { version, listeners });
        in_messages(offered).for_each(|offered| self.send(ToTaker::Listeners(offered)));
        for frame in self.shared.application_state() {
            let fds = frame.fds.into_iter().map(SendFd::from).collect();
            self.send(ToTaker::State { bytes: frame.payload, fds });
        }
        prepared.into_iter().for_each(|message| self.send(message));
        self.giver.offered(now(), listeners);
    }

    /// Makes all descriptors that the takeover needs, at a time when a failure changes nothing.
    /// Returns the messages with generations, lanes and workers.
    fn prepare(&mut self) -> io::Result<Vec<ToTaker<SendFd>>> {
        self.handover = Some(self.shared.handover()?);
        self.peer_copy = Some(self.read.socket().as_fd().try_clone_to_owned()?);
        let mut messages = self.offer_generations()?;
        messages.extend(self.shared.offer_lanes()?);
        messages.extend(self.offer_workers()?);
        Ok(messages)
    }

    /// Makes the leash of this process, and the messages with the leashes of all generations.
    fn offer_generations(&mut self) -> io::Result<Vec<ToTaker<SendFd>>> {
        let mut generations = self.shared.with_generations(Generations::copies)?;
        let (own, other) = leash()?;
        self.leash = Some(own);
        // This process is the newest of the old ones: it is replaced now, 0 ms ago.
        generations.push((0, other));
        let message = |generations: Vec<_>| {
            let (replaced_for, fds): (_, Vec<_>) = generations.into_iter().unzip();
            ToTaker::Generations { replaced_for, fds: fds.into_iter().map(SendFd::from).collect() }
        };
        Ok(in_messages(generations).map(message).collect())
    }

    /// Prepares for the taker's dispatcher to go on with the workers of this process.
    fn offer_workers(&mut self) -> io::Result<Vec<ToTaker<SendFd>>> {
        let prepared = self.shared.with_workers(|workers| workers.prepare())?;
        let Some((succession, frames)) = prepared else { return Ok(Vec::new()) };
        self.succession = Some(succession);
        let message = |frame: Frame| ToTaker::Workers {
            bytes: frame.payload,
            fds: frame.fds.into_iter().map(SendFd::from).collect(),
        };
        Ok(frames.into_iter().map(message).collect())
    }

    fn send_status(&mut self) {
        let generations =
            self.shared.with_generations(Generations::list).into_iter().map(|generation| {
                let milliseconds =
                    generation.replaced_for.as_millis().try_into().unwrap_or(u64::MAX);
                (generation.pid.unwrap_or_default(), milliseconds)
            });
        let takeover_in_progress = self.shared.status.borrow().is_claimed;
        let generations = generations.collect();
        self.send(ToTaker::Status { pid: std::process::id(), takeover_in_progress, generations });
    }

    /// Waits until something happens, and applies it to the giver.
    async fn wait(&mut self, commands: &mut Commands) {
        let deadline = [self.giver.next_timeout().map(Instant::from_std), self.last_messages_until];
        let deadline = deadline.into_iter().flatten().min();
        let Self { read, out, peer, can_read, can_write, giver, .. } = self;
        let is_unsent = *can_write && !out.is_empty();
        tokio::select! {
            biased;
            // Reading comes first: a READY that was written counts, whatever else has happened.
            message = read.next(), if *can_read => self.on_read(message),
            () = peer_closed(peer), if peer.is_some() && !*can_read => {
                self.peer = None;
                self.giver.on_taker_gone();
            }
            sent = out.flush(), if is_unsent => {
                if let Err(error) = sent {
                    self.on_send_failed(&error);
                }
            }
            Some(command) = commands.receiver.recv() => self.on_command(command).await,
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                giver.on_timeout(now());
            }
        }
    }

    fn on_read(&mut self, message: Option<Result<FromTaker, Error>>) {
        match message {
            Some(Ok(message)) => self.giver.on_message(message),
            Some(Err(error)) if error.is_peer_gone() => {} // the end follows
            Some(Err(error)) => {
                warn!(%error, "takeover: the new process does not follow the protocol");
                self.giver.on_violation();
            }
            None => {
                self.can_read = false;
                if self.peer.is_none() {
                    self.out.clear(); // nobody reads it
                }
                self.giver.on_end();
            }
        }
    }

    async fn on_command(&mut self, command: Command) {
        match command {
            Command::PutDown(baton) => self.giver.give(baton),
            Command::Withdraw => self.giver.abort(AbortReason::Withdrawn),
            Command::Drained => {
                // If the taker has ended or has handed back, that comes first. Yielding lets the
                // runtime poll the socket, and the loop reads everything that is there.
                tokio::task::yield_now().await;
                while self.can_read && self.giver.is_draining() {
                    let Some(message) = unconstrained(self.read.next()).now_or_never() else {
                        break;
                    };
                    self.on_read(message);
                }
                self.giver.drained();
            }
        }
    }

    fn send(&mut self, message: ToTaker<SendFd>) {
        self.out.push(message);
    }

    /// Calls the takeover off because something can't be sent. The end of the taker is handled when
    /// it is read.
    fn on_send_failed(&mut self, error: &SendFailed) {
        match error {
            SendFailed::Message(error) => self.abort(error),
            SendFailed::Socket(error) => {
                self.can_write = false;
                self.out.clear();
                if error.is_peer_gone() {
                    self.giver.abort(AbortReason::Failed);
                } else {
                    self.abort(error);
                }
            }
        }
    }

    /// Logs the reason, and calls the takeover off.
    fn abort(&mut self, error: &(dyn std::error::Error + 'static)) {
        warn!(error, "takeover: the listeners can't be sent to the new process; calling it off");
        self.giver.abort(AbortReason::Failed);
    }
}

/// Waits until the other end is closed. After `SHUT_RD` a read does not show that. But the kernel
/// reports `EPOLLHUP` once neither direction is open, and tokio counts that as closed for writing.
async fn peer_closed(peer: &Option<AsyncFd<OwnedFd>>) {
    let Some(peer) = peer else { return };
    while let Ok(mut ready) = peer.writable().await {
        if ready.ready().is_write_closed() {
            return;
        }
        ready.clear_ready();
    }
}
