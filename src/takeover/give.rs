//! The task of one process that takes over from this server.

use std::{
    collections::{BTreeSet, VecDeque},
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
    generations::{Generations, OwnEnd, leash},
    giver::{Giver, GiverStep},
    link::now,
    protocol::{AbortReason, FromTaker, GiverCodec, MAX_MESSAGE_FDS, Refusal, ToTaker},
    shared::{Command, Gift, Shared},
    workers::Succession,
};
use crate::{
    Error, Frame, Framed, SendFd, Socket,
    framed::{ReadHalf, WriteHalf},
    sys,
};

/// The longest time for which a last message is kept for a peer that does not read.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Lets a process take over, if it asks for it in the right way.
pub(super) async fn give(shared: Arc<Shared>, socket: Socket) {
    let (read, write) = Framed::new(socket, GiverCodec::default()).into_split();
    let (to_self, commands) = unbounded_channel();
    let giver = Giver::new(now(), shared.options.giver_limits());
    let mut link = Giving {
        giver,
        read,
        write,
        shared,
        queue: VecDeque::new(),
        gift: None,
        succession: None,
        leash: None,
        reads: true,
        writes: true,
        peer: None,
        last_word: None,
        declined: BTreeSet::new(),
        is_claimed: false,
    };
    let mut commands = Commands { to_self: Some(to_self), receiver: commands };
    while link.take_steps(&mut commands).await {
        link.turn(&mut commands).await;
    }
    let leash = link.leash.take().filter(|_| !link.giver.is_serving());
    let shared = Arc::clone(&link.shared);
    drop(link); // ends the connection
    if let Some(leash) = leash {
        leash.must_leave().await;
        shared.status.send_modify(|status| status.must_leave = true);
        std::future::pending::<()>().await; // the leash tells that this process still runs
    }
}

struct Giving {
    giver: Giver,
    read: ReadHalf<GiverCodec>,
    write: WriteHalf<GiverCodec>,
    shared: Arc<Shared>,
    /// Messages that wait for the socket.
    queue: VecDeque<ToTaker<SendFd>>,
    /// Copies of everything that goes to the taker after READY.
    gift: Option<Gift>,
    /// The dispatcher of the taker, which goes on with the workers of this process.
    succession: Option<Succession>,
    /// Tells this process to leave, once it has been replaced.
    leash: Option<OwnEnd>,
    /// Something may still come from the taker.
    reads: bool,
    /// Something may still be written.
    writes: bool,
    /// A copy of the socket that tells when the taker is gone, after a cut.
    peer: Option<AsyncFd<OwnedFd>>,
    last_word: Option<Instant>,
    /// Numbers of listeners that the taker has no use for.
    declined: BTreeSet<u32>,
    /// This is the one takeover of the server.
    is_claimed: bool,
}

struct Commands {
    to_self: Option<tokio::sync::mpsc::UnboundedSender<Command>>,
    receiver: UnboundedReceiver<Command>,
}

impl Giving {
    /// Does what is to be done now. Returns false at the end.
    async fn take_steps(&mut self, commands: &mut Commands) -> bool {
        while let Some(step) = self.giver.next_step() {
            self.take_step(step, commands).await;
        }
        if !self.giver.is_over() {
            return true;
        }
        if self.giver.is_serving() && std::mem::take(&mut self.is_claimed) {
            self.shared.unclaim();
        }
        let until = *self.last_word.get_or_insert_with(|| Instant::now() + LAST_WORD);
        let is_done = self.queue.is_empty() && self.write.unsent().bytes == 0;
        self.writes && !is_done && Instant::now() < until
    }

    async fn take_step(&mut self, step: GiverStep, commands: &mut Commands) {
        let shared = Arc::clone(&self.shared);
        match step {
            GiverStep::Asked => {
                let to_self = commands.to_self.take();
                self.is_claimed = to_self.is_some_and(|to_self| shared.claim(to_self));
                if !self.is_claimed {
                    return self.giver.refuse(Refusal::Busy);
                }
                // The predecessor must not serve beside the successor of this process.
                match shared.release_predecessor().await {
                    Ok(()) => self.giver.welcome(now()),
                    Err(error) => {
                        warn!(%error, "takeover refused: the predecessor of this server does not answer");
                        self.giver.refuse(Refusal::Busy);
                    }
                }
            }
            GiverStep::Offer { version } => self.offer(version),
            GiverStep::Refuse(reason) => self.send(ToTaker::Refused { reason }),
            GiverStep::TellStatus => self.tell_status(),
            GiverStep::Complete => self.send(ToTaker::Complete),
            GiverStep::Cut => {
                self.queue.clear();
                let _ = self.read.socket().shutdown(Shutdown::Read); // an error says that it has ended
                let copy = self.read.socket().as_fd().try_clone_to_owned();
                self.peer = copy.and_then(|copy| sys::register(copy, Interest::WRITABLE)).ok();
            }
            GiverStep::Abort(reason) => {
                warn!(%reason, "takeover called off, this server goes on");
                self.send(ToTaker::Aborted { reason });
            }
            GiverStep::Stop { declined } => {
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
                shared.set_may_remove(false); // the other one serves at these paths
                if !shared.options.has_baton {
                    self.giver.give(bytes::Bytes::new());
                }
            }
            GiverStep::Give { baton } => {
                let Some(Gift { control, control_lock, locks }) = self.gift.take() else { return };
                let locks = locks.into_iter().filter(|(number, _)| !self.declined.contains(number));
                let mut locks =
                    locks.map(|(_, lock)| lock).collect::<Vec<_>>().into_iter().peekable();
                while locks.peek().is_some() {
                    let fds = locks.by_ref().take(MAX_MESSAGE_FDS).map(SendFd::from).collect();
                    self.send(ToTaker::Locks { fds });
                }
                self.send(ToTaker::Yours {
                    baton,
                    fds: [control, control_lock].into_iter().map(SendFd::from).collect(),
                });
            }
            GiverStep::Resume(undone) => {
                info!(?undone, "takeover undone, this server accepts again");
                shared.set_declined(BTreeSet::new());
                shared.set_may_remove(true);
                self.succession.take().iter_mut().for_each(Succession::undo);
                shared.set_phase(Phase::Serving);
            }
            GiverStep::TellResumed => self.send(ToTaker::Resumed),
            GiverStep::GiveUpCopies => shared.give_up(),
            GiverStep::TellDrained => self.send(ToTaker::Drained),
        }
    }

    /// Queues everything that the taker needs to get ready.
    fn offer(&mut self, version: u8) {
        let gift = self.shared.gift().and_then(|gift| {
            let mut messages = self.offer_generations()?;
            messages.extend(self.shared.offer_lanes()?);
            messages.extend(self.offer_workers()?);
            Ok((gift, messages))
        });
        let mut offered = self.shared.offered();
        let listeners = offered.len() as u32;
        self.send(ToTaker::Welcome { version, listeners });
        while !offered.is_empty() {
            let rest = offered.split_off(offered.len().min(MAX_MESSAGE_FDS));
            self.send(ToTaker::Listeners(std::mem::replace(&mut offered, rest)));
        }
        for frame in self.shared.application_state() {
            let fds = frame.fds.into_iter().map(SendFd::from).collect();
            self.send(ToTaker::State { bytes: frame.payload, fds });
        }
        match gift {
            Ok((gift, messages)) => {
                self.gift = Some(gift);
                self.queue.extend(messages);
            }
            Err(error) => return self.abort(&error),
        }
        self.giver.offered(now(), listeners);
    }

    /// Makes the leash of this process, and messages that tell of all generations.
    fn offer_generations(&mut self) -> std::io::Result<Vec<ToTaker<SendFd>>> {
        let mut generations = self.shared.with_generations(Generations::copies)?;
        let (own, other) = leash()?;
        self.leash = Some(own);
        generations.push((0, other));
        let mut messages = Vec::new();
        while !generations.is_empty() {
            let rest = generations.split_off(generations.len().min(MAX_MESSAGE_FDS));
            let (replaced_for, fds): (_, Vec<_>) =
                std::mem::replace(&mut generations, rest).into_iter().unzip();
            messages.push(ToTaker::Generations {
                replaced_for,
                fds: fds.into_iter().map(SendFd::from).collect(),
            });
        }
        Ok(messages)
    }

    /// Prepares for the taker's dispatcher to go on with the workers of this process.
    fn offer_workers(&mut self) -> std::io::Result<Vec<ToTaker<SendFd>>> {
        let prepared = self.shared.with_workers(|workers| workers.prepare())?;
        let Some((succession, frames)) = prepared else { return Ok(Vec::new()) };
        self.succession = Some(succession);
        let message = |frame: Frame| ToTaker::Workers {
            bytes: frame.payload,
            fds: frame.fds.into_iter().map(SendFd::from).collect(),
        };
        Ok(frames.into_iter().map(message).collect())
    }

    fn tell_status(&mut self) {
        let generations =
            self.shared.with_generations(Generations::list).into_iter().map(|generation| {
                let milliseconds =
                    generation.replaced_for.as_millis().try_into().unwrap_or(u64::MAX);
                (generation.pid.unwrap_or_default(), milliseconds)
            });
        let is_under_way = self.shared.status.borrow().is_claimed;
        let generations = generations.collect();
        self.send(ToTaker::Status { pid: std::process::id(), is_under_way, generations });
    }

    /// Waits until something happens, and tells the giver.
    async fn turn(&mut self, commands: &mut Commands) {
        let deadline = [self.giver.next_timeout().map(Instant::from_std), self.last_word];
        let deadline = deadline.into_iter().flatten().min();
        let Self { read, write, queue, peer, reads, writes, giver, .. } = self;
        let is_unsent = *writes && (!queue.is_empty() || write.unsent().bytes > 0);
        tokio::select! {
            biased;
            message = read.next(), if *reads => self.on_read(message),
            () = peer_closed(peer), if peer.is_some() && !*reads => {
                self.peer = None;
                self.giver.on_taker_gone();
            }
            sent = send(write, queue), if is_unsent => {
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
                warn!(%error, "the process that takes over does not follow the protocol");
                self.giver.on_violation();
            }
            None => {
                self.reads = false;
                if self.peer.is_none() {
                    self.queue.clear(); // nobody reads it
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
                // A taker that has ended by now, or has given everything back, is noticed first.
                // The runtime learns of it while this task waits for its next turn.
                tokio::task::yield_now().await;
                while self.reads && self.giver.is_draining() {
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
        self.queue.push_back(message);
    }

    /// A message can't be sent, or nothing more can. A taker that is gone is noticed by reading.
    fn on_send_failed(&mut self, error: &SendFailed) {
        match error {
            SendFailed::Message(error) => self.abort(error),
            SendFailed::Socket(error) => {
                self.writes = false;
                self.queue.clear();
                if error.is_peer_gone() {
                    self.giver.abort(AbortReason::Failed);
                } else {
                    self.abort(error);
                }
            }
        }
    }

    fn abort(&mut self, error: &(dyn std::error::Error + 'static)) {
        warn!(error, "listeners can't be sent to the process that takes over");
        self.giver.abort(AbortReason::Failed);
    }
}

/// The reason why sending failed.
enum SendFailed {
    /// A message was refused, for example because it is too long. Others can be sent.
    Message(Error),
    /// The socket takes nothing more.
    Socket(Error),
}

/// Sends what waits.
async fn send(
    write: &mut WriteHalf<GiverCodec>,
    queue: &mut VecDeque<ToTaker<SendFd>>,
) -> Result<(), SendFailed> {
    while !queue.is_empty() {
        let permit = write.reserve().await.map_err(SendFailed::Socket)?;
        if let Some(message) = queue.pop_front() {
            permit.send(message).map_err(|refused| SendFailed::Message(refused.error))?;
        }
    }
    write.flush().await.map_err(SendFailed::Socket)
}

/// Waits until the other end is closed. Reading tells nothing after `SHUT_RD`, but the kernel
/// reports that neither direction is open any longer (`EPOLLHUP`).
async fn peer_closed(peer: &Option<AsyncFd<OwnedFd>>) {
    let Some(peer) = peer else { return };
    while let Ok(mut ready) = peer.writable().await {
        if ready.ready().is_write_closed() {
            return;
        }
        ready.clear_ready();
    }
}
