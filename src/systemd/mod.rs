//! Tells systemd, or another service manager with the same protocol, how this service does:
//! sd_notify(3).
//!
//! A [`Notifier`] sends to the socket that `NOTIFY_SOCKET` names, and does nothing if there is
//! none. So a program calls it in any case, and runs by hand as well.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
//! use fdwire::systemd::Notifier;
//!
//! let notifier = Notifier::from_env()?;
//! // Bind, read the configuration, warm the caches.
//! notifier.ready().await?;
//! if let Some(period) = notifier.watchdog_period() {
//!     println!("to be told every {period:?} that this process is alive");
//! }
//! // Serve.
//! notifier.stopping().await?;
//! # Ok(()) }
//! ```
//!
//! # The descriptor store
//!
//! [`store`](Notifier::store) leaves copies of descriptors with systemd (`FileDescriptorStoreMax=`
//! of the unit has to allow them). They survive a crash of the service: its next process finds them
//! with [`take_stored`], and [`Listeners::adopt`](crate::takeover::Listeners::adopt) finds
//! listeners among them by their names.
//!
//! # Takeovers
//!
//! [`Notifier::follow`] tells of the takeovers of a server, in the order that systemd needs.

#[cfg(feature = "takeover")]
mod follow;
mod store;

use std::{
    env,
    io::{Error, ErrorKind, Result},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::SocketAddr,
    },
    process,
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
pub use store::take_stored;
use tokio::{net::unix::pipe, time::timeout};

use crate::socket::DatagramSocket;

/// The way to the service manager, if there is one.
///
/// Each method sends one datagram, and waits while the manager's queue is full.
///
/// systemd takes messages of the service's main process only, unless the unit has
/// `NotifyAccess=exec` or `all`.
#[derive(Debug)]
pub struct Notifier {
    manager: Option<Manager>,
    watchdog_period: Option<Duration>,
}

#[derive(Debug)]
struct Manager {
    socket: DatagramSocket,
    address: SocketAddr,
}

impl Notifier {
    /// Finds the manager by `NOTIFY_SOCKET`: a path, or an abstract name after `@`. Without the
    /// variable, nothing is ever sent.
    ///
    /// # Errors
    /// `InvalidInput` if the address is of another kind, such as `vsock:`, and those of socket(2).
    ///
    /// # Panics
    /// Outside of a tokio runtime, or if its I/O driver is not enabled.
    pub fn from_env() -> Result<Self> {
        let manager = match env::var("NOTIFY_SOCKET") {
            Ok(address) if !address.is_empty() => Some(Manager {
                socket: DatagramSocket::unbound()?,
                address: parse_address(&address)?,
            }),
            _ => None,
        };
        let watchdog_period = watchdog_period(|name| env::var(name).ok(), process::id());
        Ok(Self { manager, watchdog_period })
    }

    /// Returns true if there is a manager.
    pub fn is_active(&self) -> bool {
        self.manager.is_some()
    }

    /// Says that the service has started, or has finished reloading (`READY=1`).
    ///
    /// # Errors
    /// Those of [`notify`](Self::notify).
    pub async fn ready(&self) -> Result<()> {
        self.notify(&["READY=1"], &[]).await
    }

    /// Says that the service reloads, until [`ready`](Self::ready) (`RELOADING=1`, with the time as
    /// `MONOTONIC_USEC`, which `Type=notify-reload` needs).
    ///
    /// # Errors
    /// Those of [`notify`](Self::notify).
    pub async fn reloading(&self) -> Result<()> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        self.notify(&["RELOADING=1", &format!("MONOTONIC_USEC={}", now.as_micros())], &[]).await
    }

    /// Says that the service is about to end (`STOPPING=1`). Not for a process that another one has
    /// replaced: the service goes on.
    ///
    /// # Errors
    /// Those of [`notify`](Self::notify).
    pub async fn stopping(&self) -> Result<()> {
        self.notify(&["STOPPING=1"], &[]).await
    }

    /// Says how the service does, in one line for people (`STATUS=`).
    ///
    /// # Errors
    /// Those of [`notify`](Self::notify).
    pub async fn status(&self, text: &str) -> Result<()> {
        self.notify(&[&format!("STATUS={text}")], &[]).await
    }

    /// Says which process is the service's main process from here on (`MAINPID=`).
    ///
    /// When the main process ends, systemd ends the whole service. So this has to have arrived
    /// before the old main process leaves: call [`barrier`](Self::barrier) after it.
    ///
    /// # Errors
    /// Those of [`notify`](Self::notify).
    pub async fn main_pid(&self, pid: u32) -> Result<()> {
        self.notify(&[&format!("MAINPID={pid}")], &[]).await
    }

    /// Says that the service is alive (`WATCHDOG=1`).
    ///
    /// # Errors
    /// Those of [`notify`](Self::notify).
    pub async fn watchdog(&self) -> Result<()> {
        self.notify(&["WATCHDOG=1"], &[]).await
    }

    /// Returns how often to call [`watchdog`](Self::watchdog): half of the time after which the
    /// manager takes the service for dead (`WATCHDOG_USEC`). `None` if it does not watch this
    /// process.
    pub fn watchdog_period(&self) -> Option<Duration> {
        self.watchdog_period
    }

    /// Waits until the manager has dealt with everything that was sent before (`BARRIER=1`, see
    /// sd_notify_barrier(3)).
    ///
    /// # Errors
    /// `TimedOut`, those of [`notify`](Self::notify), and `EMFILE`.
    ///
    /// # Panics
    /// If the runtime's timer is not enabled.
    pub async fn barrier(&self, limit: Duration) -> Result<()> {
        if !self.is_active() {
            return Ok(());
        }
        // The manager closes its copy of one end, and this process sees the end of the other one.
        let (reader, writer) = std::io::pipe()?;
        self.notify(&["BARRIER=1"], &[writer.as_fd()]).await?;
        drop(writer);
        let reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
        let ended = async {
            loop {
                reader.readable().await?;
                match reader.try_read(&mut [0]) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    ended => return ended.map(drop),
                }
            }
        };
        match timeout(limit, ended).await {
            Ok(ended) => ended,
            Err(_) => Err(Error::new(ErrorKind::TimedOut, "the service manager does not answer")),
        }
    }

    /// Sends assignments of sd_notify(3) in one datagram, with at most 253 descriptors.
    ///
    /// # Errors
    /// `InvalidInput` if there is a line feed in an assignment, and those of
    /// [`DatagramSocket::send_to`]: among them `NotFound` and `ConnectionRefused` if the manager is
    /// gone.
    ///
    /// # Cancel safety
    /// When dropped, nothing was sent.
    pub async fn notify(&self, assignments: &[&str], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if assignments.iter().any(|assignment| assignment.contains('\n')) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "a line feed would begin another assignment",
            ));
        }
        match &self.manager {
            Some(Manager { socket, address }) => {
                socket.send_to(assignments.join("\n"), fds, address).await
            }
            None => Ok(()),
        }
    }
}

/// Reads `NOTIFY_SOCKET`.
fn parse_address(text: &str) -> Result<SocketAddr> {
    match text.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None if text.starts_with('/') => SocketAddr::from_pathname(text),
        None => {
            let reason =
                format!("NOTIFY_SOCKET is {text:?}, which is neither a path nor an abstract name");
            Err(Error::new(ErrorKind::InvalidInput, reason))
        }
    }
}

/// Reads `WATCHDOG_USEC`, as sd_watchdog_enabled(3) does: it does not count if `WATCHDOG_PID` names
/// another process.
fn watchdog_period(variable: impl Fn(&str) -> Option<String>, own: u32) -> Option<Duration> {
    let number = |name| Some(variable(name)?.parse::<u64>());
    match number("WATCHDOG_PID") {
        Some(pid) if pid != Ok(own.into()) => return None,
        _ => {}
    }
    let micros = number("WATCHDOG_USEC")?.ok().filter(|&micros| micros > 0)?;
    Some(Duration::from_micros(micros) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_watches_the_process_that_it_names() {
        let period = |variables: &[(&str, &str)]| {
            let variable =
                |name: &str| Some(variables.iter().find(|it| it.0 == name)?.1.to_owned());
            watchdog_period(variable, 7)
        };
        let ten = Some(Duration::from_secs(10));
        assert_eq!(period(&[("WATCHDOG_USEC", "20000000")]), ten);
        assert_eq!(period(&[("WATCHDOG_USEC", "20000000"), ("WATCHDOG_PID", "7")]), ten);
        for other in ["8", "x", ""] {
            assert_eq!(period(&[("WATCHDOG_USEC", "20000000"), ("WATCHDOG_PID", other)]), None);
        }
        for nonsense in ["0", "-1", "x", ""] {
            assert_eq!(period(&[("WATCHDOG_USEC", nonsense)]), None);
        }
        assert_eq!(period(&[]), None);
    }

    #[test]
    fn an_address_is_a_path_or_an_abstract_name() {
        assert_eq!(
            parse_address("/run/notify").unwrap().as_pathname(),
            Some("/run/notify".as_ref())
        );
        assert_eq!(parse_address("@a/b").unwrap().as_abstract_name(), Some(&b"a/b"[..]));
        let long = format!("/{}", "x".repeat(200));
        for other in ["vsock:2:1234", "relative", &long] {
            assert_eq!(
                parse_address(other).unwrap_err().kind(),
                ErrorKind::InvalidInput,
                "{other}"
            );
        }
    }
}
