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

/// The numbers of a dispatcher, from [`Dispatcher::stats`](super::Dispatcher::stats). A field
/// counts connections since the beginning if it says nothing else.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Stats {
    /// The workers, oldest first.
    pub workers: Vec<WorkerStats>,
    /// The groups that have workers, or for which connections wait, by name.
    pub groups: Vec<GroupStats>,
    /// Connections that were dispatched or accepted.
    pub dispatched: u64,
    /// Connections that a worker has adopted.
    pub adopted: u64,
    /// Offers after the first offer of a connection.
    pub offered_again: u64,
    /// Connections that were given back to the application in a
    /// [`DispatchError`](super::DispatchError).
    pub given_back: u64,
    /// Connections that the dispatcher closed because no worker adopted them and nobody was waiting
    /// for them: they came from [`serve`](super::Dispatcher::serve), or their
    /// [`Dispatching`](super::Dispatching) was dropped. They were offered too often, could not be
    /// prepared, or were left at the end of a drain.
    pub lost: u64,
    /// Connections that wait for a worker with room, now.
    pub waiting: usize,
    /// Descriptors that are on their way to workers, or may be, now. The kernel limits them for the
    /// whole uid.
    pub in_flight: usize,
    /// The number of times that sending to a worker had to wait because the kernel had too many
    /// descriptors in flight (`ETOOMANYREFS`) or too little memory.
    pub send_shortages: u64,
    /// Processes that the dispatcher has started and that have left and not ended, now. See
    /// [`exit_timeout`](super::DispatcherBuilder::exit_timeout).
    pub leftover: usize,
    /// Workers that left, by cause.
    pub retired: RetireCounts,
    /// Workers that were cut off before their welcome: their HELLO was late or invalid, or had
    /// another version of the protocol.
    pub refused_workers: u64,
    /// The workers that have left for good most recently, at most 32, the oldest first.
    pub departed: Vec<WorkerStats>,
    /// The times from accepting connections to their adoption.
    pub adoption_times: AdoptionTimes,
    /// The time that [`serve`](super::Dispatcher::serve), or a caller of
    /// [`reserve`](super::Dispatcher::reserve), has been waiting for a worker with room, now. While
    /// it waits, `serve` accepts nothing.
    pub slot_wait: Option<Duration>,
    /// The number of times that [`serve`](super::Dispatcher::serve) had to wait because accepting
    /// needs a descriptor or memory of the kernel, and there was none.
    pub accept_pauses: u64,
    /// The time that `serve` has been waiting for a descriptor or memory, now.
    pub accept_paused_for: Option<Duration>,
}

/// The numbers of one group of workers, now.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct GroupStats {
    /// The name of the group.
    pub group: Group,
    /// The number of its workers in any state. Connections for a group without workers wait for
    /// one.
    pub workers: usize,
    /// Connections that wait for a worker with room.
    pub waiting: usize,
    /// Accept loops, prepared connections and callers of
    /// [`reserve`](super::Dispatcher::reserve) that wait for a worker with room.
    pub waiting_for_slot: usize,
    /// The time that the first of these has been waiting.
    pub slot_wait: Option<Duration>,
}

/// The number of workers that left, by [cause](RetireCause). A worker that is started again and
/// leaves again counts again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct RetireCounts {
    /// Their process or their socket ended.
    pub ended: u64,
    /// They did not answer pings and were fenced.
    pub hung: u64,
    /// They broke the protocol.
    pub misbehaved: u64,
    /// They were asked to drain, or drained by themselves, and finished.
    pub drained: u64,
    /// They were asked to drain and did not finish in time.
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

/// The numbers of one worker since its beginning. If it was started again, they are those of all
/// its processes together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct WorkerStats {
    /// The id of the worker.
    pub id: WorkerId,
    /// Its group.
    pub group: Group,
    /// The program that the dispatcher has started. `None` for a worker that has connected.
    pub program: Option<String>,
    /// The pid of its current process, if it is known.
    pub pid: Option<u32>,
    /// Its state at the moment.
    pub state: WorkerState,
    /// The number of times that its process was started again.
    pub restarts: u64,
    /// The number of times that its processes left, by cause.
    pub retired: RetireCounts,
    /// The exit of its previous process.
    pub last_exit: Option<WorkerExit>,
    /// Offers that it has asked for and not got, at the moment.
    pub credit: u64,
    /// Connections that are planned for it or offered to it, and not answered, at the moment.
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
    /// It has sent no HELLO yet, or it waits for the other new workers of a
    /// [replacement](super::Dispatcher::replace_workers).
    Starting,
    /// It takes connections if it has room.
    Ready,
    /// It has not answered the last ping in time, and gets no connection until it does.
    Silent,
    /// It finishes its connections.
    Draining,
    /// Its process has ended and is going to be started again.
    Restarting,
    /// It has left for good.
    Gone,
}

impl fmt::Display for WorkerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Silent => "silent",
            Self::Draining => "draining",
            Self::Restarting => "restarting",
            Self::Gone => "gone",
        })
    }
}

/// The way in which a process of a worker left.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerExit {
    /// The reason for which its link to the dispatcher ended.
    pub cause: RetireCause,
    /// The pid of the process, if it is known.
    pub pid: Option<u32>,
    /// The exit status, if the process has ended and the dispatcher has started it.
    pub status: Option<ExitStatus>,
    /// The time from its start, or from its connecting, to the end of the link.
    pub lifetime: Duration,
    /// The number of connections that were planned for it or offered to it, and not answered. Other
    /// workers get them.
    pub unanswered: u64,
    /// The number of connections that it had adopted and that had not ended, as far as it has
    /// reported.
    pub active: u64,
    /// The time from the end of the link until the worker is started again, if it is.
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

/// The reason for which a worker left.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RetireCause {
    /// Its process, or its end of the socket, ended.
    Ended,
    /// It did not answer a ping.
    Hung,
    /// It broke the protocol.
    Misbehaved(String),
    /// It was asked to drain, or drained by itself, and has finished.
    Drained,
    /// It was asked to drain and did not finish in time.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::{Strategy, Transport};

    #[test]
    fn states_are_printed_as_plain_words() {
        let restarting = (WorkerState::Restarting.to_string(), WorkerState::Ready.to_string());
        assert_eq!(restarting, ("restarting".to_owned(), "ready".to_owned()));
        assert_eq!(Strategy::ByKey.to_string(), "by key");
        assert_eq!(Transport::Tcp.to_string(), "TCP");
    }
}
