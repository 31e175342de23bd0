//! Reports the takeovers of a server to the service manager.

use std::{io::Result, time::Duration};

use super::Notifier;
use crate::takeover::{Server, ServiceState};

/// The longest time for which the last message waits for the manager.
const BARRIER_LIMIT: Duration = Duration::from_secs(10);

impl Notifier {
    /// Reports a server and its takeovers to the manager. Returns when another process has replaced
    /// this one for good.
    ///
    /// | event | message |
    /// |---|---|
    /// | the server serves | `READY=1` |
    /// | a new process asks for its listeners | `RELOADING=1` |
    /// | the new process is ready, or the takeover was called off or undone | `READY=1` |
    /// | this process can't serve again | `MAINPID=` of the new process, and a barrier |
    ///
    /// systemd ends the whole service when its main process ends. So this process stays the main
    /// process as long as it may have to serve again. When this method returns, its successor is
    /// the main process, and this one may exit. `STOPPING=1` is not sent, because the service goes
    /// on.
    ///
    /// Only the main process sends messages that matter, but its successor needs `NOTIFY_SOCKET`
    /// too. So the unit needs `NotifyAccess=exec` if `ExecReload=` starts the new process. If the
    /// main process dies while it drains, systemd ends its successor as well.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fdwire::{
    ///     systemd::Notifier,
    ///     takeover::{self, Listeners, Options},
    /// };
    ///
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("app.takeover");
    /// let notifier = Notifier::from_env()?;
    /// let bind = || Ok(Listeners::new());
    /// let pending = takeover::bind_or_take(&path, Options::default(), bind).await?;
    /// let server = pending.ready().await?;
    /// let follow = async { tokio::join!(server.finish(), notifier.follow(&server)) };
    /// tokio::select! {
    ///     (finished, reported) = follow => {
    ///         println!("{finished}");
    ///         reported?;
    ///     }
    ///     _ = std::future::ready("SIGTERM") => notifier.stopping().await?,
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// The errors of [`notify`](Self::notify), and `TimedOut` if the manager does not answer the
    /// barrier.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped. The next call begins with a report of the state at that
    /// moment.
    pub async fn follow(&self, server: &Server) -> Result<()> {
        let mut reported = None;
        loop {
            let state = server.next_service_state(reported).await;
            match state {
                ServiceState::Ready => self.ready().await?,
                ServiceState::Reloading => self.reloading().await?,
                ServiceState::Replaced(Some(successor)) => {
                    self.main_pid(successor).await?;
                    // systemd must know the new main process before this one exits.
                    return self.barrier(BARRIER_LIMIT).await;
                }
                // The successor is in another PID namespace, or there is none: this server has
                // ended, or was handed back.
                ServiceState::Replaced(None) => return Ok(()),
            }
            reported = Some(state);
        }
    }
}
