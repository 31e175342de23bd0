//! The takeovers of a server, as a service manager has to learn of them.

use std::{io::Result, time::Duration};

use super::Notifier;
use crate::takeover::{News, Server};

/// The longest time that the manager has for the last message.
const PATIENCE: Duration = Duration::from_secs(10);

impl Notifier {
    /// Tells of a server and its takeovers, until another process has replaced it for good.
    ///
    /// | event | message |
    /// |---|---|
    /// | the server serves | `READY=1` |
    /// | a new process asks for its listeners | `RELOADING=1` |
    /// | that one is ready, or the takeover was called off or undone | `READY=1` |
    /// | this process can't serve again | `MAINPID=` of the new one, and a barrier |
    ///
    /// systemd ends the whole service when its main process ends. So this process stays the main
    /// one as long as it may have to serve again, and has arranged for its successor when this
    /// returns: it may exit then. `STOPPING=1` is not sent, because the service goes on.
    ///
    /// The main process says everything that counts, but its successor has to know `NOTIFY_SOCKET`
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
    ///     (finished, told) = follow => {
    ///         println!("{} connections are cut", finished.left);
    ///         told?;
    ///     }
    ///     _ = std::future::ready("SIGTERM") => notifier.stopping().await?,
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Those of [`notify`](Self::notify), and `TimedOut` if the manager does not answer at the end.
    ///
    /// # Cancel safety
    /// Called again, it says at first how the server is then.
    pub async fn follow(&self, server: &Server) -> Result<()> {
        let mut told = None;
        loop {
            let news = server.news_after(told).await;
            match news {
                News::Ready => self.ready().await?,
                News::Reloading => self.reloading().await?,
                News::Replaced(Some(successor)) => {
                    self.main_pid(successor).await?;
                    return self.barrier(PATIENCE).await;
                }
                // It is in another PID namespace, or this server has ended or was handed back.
                News::Replaced(None) => return Ok(()),
            }
            told = Some(news);
        }
    }
}
