//! Reports the state of this service to systemd, or to another service manager with the same
//! protocol: sd_notify(3).
//!
//! A [`Notifier`] sends to the socket that `NOTIFY_SOCKET` names, and does nothing if the variable
//! is not set. So a program can call it in any case, even if it is started by hand.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
//! use fdwire::systemd::Notifier;
//!
//! let notifier = Notifier::from_env()?;
//! // Bind, read the configuration, warm the caches.
//! notifier.ready().await?;
//! if let Some(period) = notifier.watchdog_period() {
//!     println!("the manager expects a sign of life every {period:?}");
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
//! [`Notifier::follow`] reports the takeovers of a server, in the order that systemd needs.

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

/// A connection to the service manager, if there is one.
///
/// Each method sends one datagram, and waits while the manager's queue is full.
///
/// systemd accepts messages from the service's main process only, unless the unit has
/// `NotifyAccess=exec` or `all`.
#[derive(Debug)]
pub struct Notifier {
    /// `None` if `NOTIFY_SOCKET` is not set: nothing is sent then.
    manager: Option<Manager>,
    watchdog_period: Option<Duration>,
}

#[derive(Debug)]
struct Manager {
    /// Not connected, so that a manager that binds its address anew still gets the next message.
    socket: DatagramSocket,
    address: SocketAddr,
}

impl Notifier {
    /// Finds the manager by `NOTIFY_SOCKET`: a path, or an abstract name after `@`. Without the
    /// variable, nothing is ever sent.
    ///
    /// # Errors
    /// `InvalidInput` if the address is of another kind, such as `vsock:`, and the errors of
    /// socket(2).
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

    /// Reports that the service has started, or has finished reloading (`READY=1`).
    ///
    /// # Errors
    /// The errors of [`notify`](Self::notify).
    pub async fn ready(&self) -> Result<()> {
        self.notify(&["READY=1"], &[]).await
    }

    /// Reports that the service reloads, until [`ready`](Self::ready) is called (`RELOADING=1`,
    /// with the time as `MONOTONIC_USEC`, which `Type=notify-reload` needs).
    ///
    /// # Errors
    /// The errors of [`notify`](Self::notify).
    pub async fn reloading(&self) -> Result<()> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        self.notify(&["RELOADING=1", &format!("MONOTONIC_USEC={}", now.as_micros())], &[]).await
    }

    /// Reports that the service is about to end (`STOPPING=1`). A process that another one has
    /// replaced must not send this, because the service goes on.
    ///
    /// # Errors
    /// The errors of [`notify`](Self::notify).
    pub async fn stopping(&self) -> Result<()> {
        self.notify(&["STOPPING=1"], &[]).await
    }

    /// Reports the state of the service as one line for people (`STATUS=`).
    ///
    /// # Errors
    /// The errors of [`notify`](Self::notify).
    pub async fn status(&self, text: &str) -> Result<()> {
        self.notify(&[&format!("STATUS={text}")], &[]).await
    }

    /// Makes another process the service's main process (`MAINPID=`).
    ///
    /// When the main process ends, systemd ends the whole service. So this message has to arrive
    /// before the old main process exits: call [`barrier`](Self::barrier) after it.
    ///
    /// # Errors
    /// The errors of [`notify`](Self::notify).
    pub async fn main_pid(&self, pid: u32) -> Result<()> {
        self.notify(&[&format!("MAINPID={pid}")], &[]).await
    }

    /// Reports that the service is alive (`WATCHDOG=1`).
    ///
    /// # Errors
    /// The errors of [`notify`](Self::notify).
    pub async fn watchdog(&self) -> Result<()> {
        self.notify(&["WATCHDOG=1"], &[]).await
    }

    /// Returns the interval at which to call [`watchdog`](Self::watchdog): half of the time after
    /// which the manager considers the service dead (`WATCHDOG_USEC`). Returns `None` if the
    /// manager does not watch this process.
    pub fn watchdog_period(&self) -> Option<Duration> {
        self.watchdog_period
    }

    /// Waits until the manager has processed everything that was sent before (`BARRIER=1`, see
    /// sd_notify_barrier(3)).
    ///
    /// # Errors
    /// `TimedOut` if the manager does not answer within `limit`, the errors of
    /// [`notify`](Self::notify), and `EMFILE`.
    ///
    /// # Panics
    /// If the runtime's timer is not enabled.
    pub async fn barrier(&self, limit: Duration) -> Result<()> {
        if !self.is_active() {
            return Ok(());
        }
        // The manager closes its copy of the writing end once it reaches this message. As this
        // process closes its own copy too, the reading end then reports the end of the stream.
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
    /// `InvalidInput` if there is a line feed in an assignment, and the errors of
    /// [`DatagramSocket::send_to`]: among them `NotFound` and `ConnectionRefused` if the manager is
    /// gone.
    ///
    /// # Cancel safety
    /// If this is dropped before it returns, nothing was sent.
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

/// Returns half of `WATCHDOG_USEC`, as sd_watchdog_enabled(3) reads it: the variable does not count
/// if `WATCHDOG_PID` names another process.
fn watchdog_period(variable: impl Fn(&str) -> Option<String>, own: u32) -> Option<Duration> {
    let number = |name| Some(variable(name)?.parse::<u64>());
    match number("WATCHDOG_PID") {
        // The variables were inherited from a parent that is the watched process.
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
