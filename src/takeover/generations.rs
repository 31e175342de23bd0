//! The processes that were replaced and still finish their connections.

use std::{
    fmt,
    io::{self, ErrorKind, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use nix::{
    libc,
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};
use tracing::info;

use crate::{close_in_background, sys};

/// A process that was replaced, and still runs to finish its connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Generation {
    /// Its process id. `None` if it is in another PID namespace.
    pub pid: Option<u32>,
    /// The time for which it has been replaced.
    pub replaced_for: Duration,
}

impl fmt::Display for Generation {
    /// Writes for example `process 700 was replaced 12 s ago`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid}")?,
            None => f.write_str("a process in another PID namespace")?,
        }
        write!(f, " was replaced {} s ago", self.replaced_for.as_secs())
    }
}

/// The processes that a server, or one before it, has replaced, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Generations(Vec<OldProcess>);

/// A process that was replaced, with the socket that shows whether it still runs.
#[derive(Debug)]
struct OldProcess {
    /// `None` if it is in another PID namespace.
    pid: Option<u32>,
    replaced_at: Instant,
    /// The other end is open as long as that process runs. A byte written here asks it to leave.
    leash: UnixStream,
    /// True once it was asked to leave.
    was_asked: bool,
}

/// This process's end of its own leash.
#[derive(Debug)]
pub(super) struct OwnLeash(tokio::net::UnixStream);

/// Makes a leash: returns the end of this process, and the end for the process that takes over.
pub(super) fn leash() -> io::Result<(OwnLeash, OwnedFd)> {
    let (own, other) = UnixStream::pair()?;
    own.set_nonblocking(true)?;
    Ok((OwnLeash(tokio::net::UnixStream::from_std(own)?), other.into()))
}

impl OwnLeash {
    /// Waits until another process asks this one to leave. Never returns if all processes that hold
    /// the other end have ended.
    pub(super) async fn must_leave(&self) {
        while self.0.readable().await.is_ok() {
            match self.0.try_read(&mut [0]) {
                Ok(1..) => return,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => break, // the other end is closed in all processes
            }
        }
        std::future::pending().await
    }
}

impl Generations {
    /// Adds a process with its leash. It was replaced this number of milliseconds ago.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is not a Unix socket.
    pub(super) fn add(&mut self, milliseconds: u64, leash: OwnedFd) -> io::Result<()> {
        if getsockopt(&leash, sys::Domain) != Ok(libc::AF_UNIX) {
            close_in_background([leash]);
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                "the leash of an old process is not a Unix socket",
            ));
        }
        // The kernel returns the process that has made the pair of sockets, whichever process has
        // sent this end. The number 0 stands for a process in another PID namespace.
        let made_by = getsockopt(&leash, PeerCredentials)?.pid();
        let leash = UnixStream::from(leash);
        leash.set_nonblocking(true)?;
        let now = Instant::now();
        let replaced_at = now.checked_sub(Duration::from_millis(milliseconds)).unwrap_or(now);
        let pid = u32::try_from(made_by).ok().filter(|&pid| pid > 0);
        self.0.push(OldProcess { pid, replaced_at, leash, was_asked: false });
        Ok(())
    }

    /// Sets the time of the newest process's replacement to this moment: this process does it now.
    pub(super) fn last_was_replaced(&mut self) {
        if let Some(last) = self.0.last_mut() {
            last.replaced_at = Instant::now();
        }
    }

    /// Lists the processes that still run.
    pub(super) fn list(&mut self) -> Vec<Generation> {
        self.0.retain(OldProcess::runs);
        let list = self.0.iter();
        list.map(|it| Generation { pid: it.pid, replaced_for: it.replaced_at.elapsed() }).collect()
    }

    /// Returns what the next process needs: the milliseconds since each process was replaced, and a
    /// copy of its leash.
    pub(super) fn copies(&mut self) -> io::Result<Vec<(u64, OwnedFd)>> {
        self.0.retain(OldProcess::runs);
        let milliseconds = |it: &OldProcess| {
            u64::try_from(it.replaced_at.elapsed().as_millis()).unwrap_or(u64::MAX)
        };
        self.0.iter().map(|it| Ok((milliseconds(it), it.leash.try_clone()?.into()))).collect()
    }

    /// Asks the oldest processes to leave if more than `most` still run.
    pub(super) fn limit(&mut self, most: usize) {
        self.0.retain(OldProcess::runs);
        // The oldest come first.
        let surplus = self.0.len().saturating_sub(most);
        for it in self.0[..surplus].iter_mut().filter(|it| !it.was_asked) {
            info!(
                pid = it.pid,
                most, "takeover: too many old processes, asking the oldest to leave"
            );
            // An error means that it has just ended.
            it.was_asked = (&it.leash).write(b"x").is_ok();
        }
    }
}

impl OldProcess {
    /// Returns true if the process still runs. It never writes to its leash, so a read finds either
    /// nothing (`EAGAIN`) or the end of the stream.
    fn runs(&self) -> bool {
        let read = (&self.leash).read(&mut [0]);
        read.is_err_and(|error| {
            matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn generations_are_listed_while_they_run() {
        let mut generations = Generations::default();
        let mut ends = Vec::new();
        for milliseconds in [3000, 2000, 0] {
            let (own, other) = leash().unwrap();
            generations.add(milliseconds, other).unwrap();
            ends.push(own);
        }
        let list = generations.list();
        assert!(list.iter().all(|it| it.pid == Some(std::process::id())), "{list:?}");
        assert!(list.is_sorted_by_key(|it| std::cmp::Reverse(it.replaced_for)), "{list:?}");
        // The next process knows the same.
        let mut next = Generations::default();
        generations
            .copies()
            .unwrap()
            .into_iter()
            .for_each(|(age, leash)| next.add(age, leash).unwrap());
        drop(generations);
        ends.remove(1);
        assert_eq!(next.list().len(), 2);
        drop(ends);
        assert_eq!(next.list(), []);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(next.add(0, file.into()).is_err());
    }

    /// Rules: G-LEAVE, G-LEASH-END.
    #[tokio::test]
    async fn the_oldest_are_asked_to_leave() {
        let mut generations = Generations::default();
        let mut ends = Vec::new();
        for _ in 0..4 {
            let (own, other) = leash().unwrap();
            generations.add(0, other).unwrap();
            ends.push(own);
        }
        generations.limit(2);
        ends[0].must_leave().await;
        ends[1].must_leave().await;
        assert_eq!(generations.list().len(), 4, "they still run");
        let mut left =
            futures::future::select_all(ends[2..].iter().map(|own| Box::pin(own.must_leave())));
        assert!(futures::FutureExt::now_or_never(&mut left).is_none());
        drop(generations);
        tokio::task::yield_now().await;
        assert!(futures::FutureExt::now_or_never(&mut left).is_none(), "nobody asked it to");
    }
}
