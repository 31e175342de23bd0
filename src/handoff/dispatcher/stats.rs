//! The numbers of a dispatcher.

use std::{
    fmt,
    hash::{Hash, Hasher},
    os::unix::process::ExitStatusExt,
    process::ExitStatus,
    time::Duration,
};

use super::{AdoptionTimes, Group};

/// A worker of a [`Dispatcher`](super::Dispatcher). A worker that is started again keeps its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub(super) u64);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Numbers of a dispatcher, from [`Dispatcher::stats`](super::Dispatcher::stats). Those without a
/// unit count connections, from the beginning.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Stats {
    /// The workers, oldest first.
    pub workers: Vec<WorkerStats>,
    /// The groups that have workers, or for which connections wait, by name.
    pub groups: Vec<GroupStats>,
    /// Taken for handing over.
    pub dispatched: u64,
    /// Adopted by a worker.
    pub adopted: u64,
    /// Offers after the first one of a connection.
    pub offered_again: u64,
    /// Given back to the application in a [`DispatchError`](super::DispatchError).
    pub given_back: u64,
    /// Closed by the dispatcher without being adopted, since nobody was there to take them back: of
    /// [`serve`](super::Dispatcher::serve) or a dropped [`Dispatching`](super::Dispatching), after
    /// too many offers or at the end of a drain.
    pub lost: u64,
    /// Waiting for a worker with room, now.
    pub waiting: usize,
    /// Descriptors that are on their way to workers, or may be, now. The kernel limits them for the
    /// whole uid.
    pub in_flight: usize,
    /// How often sending to a worker had to wait because the kernel had too many descriptors in
    /// flight (`ETOOMANYREFS`) or too little memory.
    pub send_shortages: u64,
    /// Processes that the dispatcher has started and that have left and not ended, now. See
    /// [`exit_timeout`](super::DispatcherBuilder::exit_timeout).
    pub leftover: usize,
    /// Workers that left, by cause.
    pub retired: RetireCounts,
    /// Workers that were cut off before they were welcomed: they said no hello in time, no proper
    /// one, or speak another version of the protocol.
    pub refused_workers: u64,
    /// The workers that have left for good most recently, 32 at most, the oldest first.
    pub departed: Vec<WorkerStats>,
    /// How long connections took from being accepted to being adopted.
    pub adoption_times: AdoptionTimes,
    /// How long [`serve`](super::Dispatcher::serve), or a caller of
    /// [`reserve`](super::Dispatcher::reserve), has been waiting for a worker with room, now. As
    /// long as it waits, `serve` accepts nothing.
    pub slot_wait: Option<Duration>,
    /// How often [`serve`](super::Dispatcher::serve) has begun to wait for descriptors, or for
    /// memory of the kernel, to accept with.
    pub accept_pauses: u64,
    /// How long `serve` has been waiting for these, now.
    pub accept_paused_for: Option<Duration>,
}

/// Numbers of one group of workers, now.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct GroupStats {
    /// Which.
    pub group: Group,
    /// The number of its workers, whatever they do. Connections for a group without workers wait
    /// for one.
    pub workers: usize,
    /// Connections that wait for a worker with room.
    pub waiting: usize,
    /// Accept loops, prepared connections and callers of
    /// [`reserve`](super::Dispatcher::reserve) that wait for a worker with room.
    pub waiting_for_slot: usize,
    /// How long the first of these has been waiting.
    pub slot_wait: Option<Duration>,
}

/// How many workers left, by [cause](RetireCause). One that is started again and leaves again
/// counts again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct RetireCounts {
    /// Their process or their socket ended.
    pub ended: u64,
    /// They did not answer pings and were fenced.
    pub hung: u64,
    /// They broke the protocol.
    pub misbehaved: u64,
    /// They were told to drain, or asked for it, and did.
    pub drained: u64,
    /// They were told to drain and did not in time.
    pub overdue: u64,
}

impl RetireCounts {
    pub(super) fn count(&mut self, cause: &RetireCause) {
        *match cause {
            RetireCause::Ended => &mut self.ended,
            RetireCause::Hung => &mut self.hung,
            RetireCause::Misbehaved(_) => &mut self.misbehaved,
            RetireCause::Drained => &mut self.drained,
            RetireCause::Overdue => &mut self.overdue,
        } += 1;
    }
}

/// Numbers of one worker, from its beginning; over all its processes where it is started again.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Which.
    pub id: WorkerId,
    /// Its group.
    pub group: Group,
    /// The program that the dispatcher has started. `None` for a worker that has connected.
    pub program: Option<String>,
    /// Its process at the moment, if that is known.
    pub pid: Option<u32>,
    /// Its state at the moment.
    pub state: WorkerState,
    /// How often its process was started again.
    pub restarts: u64,
    /// How often its processes left, by cause.
    pub retired: RetireCounts,
    /// How its process before this one left.
    pub last_exit: Option<WorkerExit>,
    /// Offers that it takes at the moment.
    pub credit: u64,
    /// Offers that it has not answered, at the moment.
    pub unanswered: u64,
    /// Connections that it has adopted and that have not ended, at the moment.
    pub active: u64,
    /// Connections that it has adopted.
    pub adopted: u64,
    /// Connections that it has rejected.
    pub rejected: u64,
    /// Its processes that have left and not ended, now.
    pub leftover: usize,
}

/// The state of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WorkerState {
    /// It has not said hello yet, or it waits for the other new workers of a
    /// [replacement](super::Dispatcher::replace_workers).
    Starting,
    /// It takes connections as far as it has room.
    Ready,
    /// It has not answered the last ping in time, and gets no connection until it does.
    Silent,
    /// It finishes what it has.
    Draining,
    /// Its process has ended and is going to be started again.
    Restarting,
    /// It has left for good.
    Gone,
}

/// How a process of a worker left.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerExit {
    /// Why its conversation with the dispatcher ended.
    pub cause: RetireCause,
    /// The process, if that is known.
    pub pid: Option<u32>,
    /// How the process ended, if it has and the dispatcher has started it.
    pub status: Option<ExitStatus>,
    /// The time from its start, or from when it had connected, to the end of the conversation.
    pub lifetime: Duration,
    /// The number of connections that it had not answered for. Others get them.
    pub unanswered: u64,
    /// The number of connections that it had adopted and that had not ended, as far as it has told.
    pub active: u64,
    /// The time from then until the worker is started again, if it is.
    pub restart_in: Option<Duration>,
}

impl Hash for WorkerExit {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let status = self.status.map(ExitStatusExt::into_raw);
        (
            &self.cause,
            self.pid,
            status,
            self.lifetime,
            self.unanswered,
            self.active,
            self.restart_in,
        )
            .hash(state);
    }
}

impl fmt::Display for WorkerExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cause, status, lifetime, restart_in, .. } = self;
        write!(f, "{cause}, after {:.3} s", lifetime.as_secs_f64())?;
        if let Some(status) = status {
            write!(f, " ({status})")?;
        }
        match restart_in {
            Some(wait) => write!(f, "; starting it again in {} s", wait.as_secs_f64()),
            None => Ok(()),
        }
    }
}

/// Why a worker left.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RetireCause {
    /// Its process, or its end of the socket, ended.
    Ended,
    /// It did not answer a ping.
    Hung,
    /// It broke the protocol.
    Misbehaved(String),
    /// It was told to drain, or asked for it, and has finished.
    Drained,
    /// It was told to drain and did not in time.
    Overdue,
}

impl fmt::Display for RetireCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => f.write_str("its process or its socket ended"),
            Self::Hung => f.write_str("it did not answer a ping"),
            Self::Misbehaved(how) => write!(f, "it misbehaved: {how}"),
            Self::Drained => f.write_str("it has drained"),
            Self::Overdue => f.write_str("it did not drain in time"),
        }
    }
}
