//! One call that binds the listeners in the first process and takes over in every further one.

use std::{io::ErrorKind, path::Path, time::Duration};

use tokio::time::{Instant, sleep};

use super::{Error, Listeners, Options, Pending, request};
use crate::socket::PathGuard;

/// The time between two attempts while the kernel closes the files of a process that has died.
const RETRY: Duration = Duration::from_millis(10);

/// Takes over from the server at a path, or binds the listeners if no server runs.
///
/// Every generation of a server can start with this call, by hand or from a service manager, and go
/// on with [`Pending::ready`]. `bind` is called only if no server runs. It is called again if an
/// address is still in use by a server that is just ending.
///
/// In `bind`, use [`Listeners::bind_tcp`] and its siblings. They adopt a listener that systemd,
/// einhorn or Server::Starter has passed, and bind it otherwise. So the same program runs under
/// such a manager and without one. If a running server has the same sockets, for example because
/// the same manager has started it, the copies that the manager has passed to this process are
/// closed.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::takeover::{self, Listeners, Options};
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("takeover");
/// let bind = || {
///     let mut listeners = Listeners::new();
///     listeners.bind_tcp("http", "127.0.0.1:0".parse().expect("an address"))?;
///     Ok(listeners)
/// };
/// let first = takeover::bind_or_take(&path, Options::default(), bind).await?.ready().await?;
/// let second = takeover::bind_or_take(&path, Options::default(), bind).await?.ready().await?;
/// assert_eq!(first.identities(), second.identities());
/// # Ok(()) }
/// ```
///
/// # Errors
/// The errors of [`request()`], except those for a path without a server, and the errors of `bind`.
/// If two processes start at the same time, one of them may get [`Error::Refused`], because the
/// other one is taking over.
///
/// # Panics
/// Outside of a tokio runtime, or if its I/O driver or its timer is not enabled.
///
/// # Cancel safety
/// Nothing is left behind when dropped: a server that runs goes on.
pub async fn bind_or_take(
    path: impl AsRef<Path>,
    options: Options,
    mut bind: impl FnMut() -> Result<Listeners, Error>,
) -> Result<Pending, Error> {
    let path = path.as_ref();
    let until = Instant::now() + options.lock_timeout;
    loop {
        // Try the running server first. If there is none, adopt or bind the listeners.
        let started = match request(path, options.clone()).await {
            Err(error) if is_absent(&error) => bind_first(path, &options, &mut bind),
            requested => requested,
        };
        let error = match started {
            Ok(pending) => {
                pending.close_passed_copies();
                return Ok(pending);
            }
            Err(error) => error,
        };
        // A dead process may still own an address or the lock: the kernel closes its files one
        // after another.
        if !is_in_use(&error) || Instant::now() >= until {
            return Err(error);
        }
        sleep(RETRY).await;
    }
}

/// Gets the lock of the path, and then the listeners.
fn bind_first(
    path: &Path,
    options: &Options,
    bind: &mut impl FnMut() -> Result<Listeners, Error>,
) -> Result<Pending, Error> {
    let guard = PathGuard::take(path)?;
    Ok(Pending::first(options.clone(), guard, bind()?))
}

/// Returns true if no server is at the path, or the server that was there has just died.
fn is_absent(error: &Error) -> bool {
    match error {
        Error::Io(error) => matches!(
            error.kind(),
            ErrorKind::NotFound
                | ErrorKind::ConnectionRefused
                | ErrorKind::ConnectionReset
                | ErrorKind::BrokenPipe
        ),
        Error::GiverGone => true,
        _ => false,
    }
}

/// Returns true if an address, or the lock of the path, is in use.
fn is_in_use(error: &Error) -> bool {
    match error {
        Error::Io(error) | Error::Bind { source: error, .. } => {
            error.kind() == ErrorKind::AddrInUse
        }
        _ => false,
    }
}
