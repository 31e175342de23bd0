//! The first start and every further one in one call.

use std::{io::ErrorKind, path::Path, time::Duration};

use tokio::time::{Instant, sleep};

use super::{Error, Listeners, Options, Pending, request};
use crate::socket::PathGuard;

/// The time between two attempts while a process that has died is on its way out.
const RETRY: Duration = Duration::from_millis(10);

/// Takes over from the server at a path, or binds the listeners if no server runs.
///
/// Every generation of a server can start with this call, by hand or from a service manager, and go
/// on with [`Pending::ready`]. `bind` is called only if no server runs, and again if an address is
/// still in use by one that is just ending.
///
/// In `bind`, [`Listeners::bind_tcp`] and its siblings adopt what systemd, einhorn or
/// Server::Starter has passed, and bind otherwise. So the same program runs under such a manager
/// and without one. If a server runs that has the same sockets, for example an older process of the
/// same manager, the copies that the manager has passed are closed.
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
/// If two processes start at the same time, one of them may get [`Error::Refused`]: another
/// takeover is under way.
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
        // First the running server, then whatever a manager has passed or can be bound.
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
        // The kernel closes what a dead process had open one thing after another.
        if !is_in_use(&error) || Instant::now() >= until {
            return Err(error);
        }
        sleep(RETRY).await;
    }
}

fn bind_first(
    path: &Path,
    options: &Options,
    bind: &mut impl FnMut() -> Result<Listeners, Error>,
) -> Result<Pending, Error> {
    let guard = PathGuard::take(path)?;
    Ok(Pending::first(options.clone(), guard, bind()?))
}

/// Returns true if no server is at the path, or one that was there has just died.
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

fn is_in_use(error: &Error) -> bool {
    match error {
        Error::Io(error) | Error::Bind { source: error, .. } => {
            error.kind() == ErrorKind::AddrInUse
        }
        _ => false,
    }
}
