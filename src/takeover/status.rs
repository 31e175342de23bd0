//! Questions from outside: which process serves, and whether a new one has started to.

use std::{path::Path, time::Duration};

use futures::{SinkExt, StreamExt};
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

use super::{
    Error, Generation, Options,
    protocol::{FromTaker, TakerCodec, ToTaker},
    request::connect,
};
use crate::Framed;

/// The time between two questions.
const POLL: Duration = Duration::from_millis(20);

/// The state of the server at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerStatus {
    /// Process id of the server, in its PID namespace.
    pub pid: u32,
    /// Another process is taking over.
    pub is_under_way: bool,
    /// The processes that were replaced and still finish their connections, the oldest first.
    pub generations: Vec<Generation>,
}

/// Asks the server at a path for its state.
///
/// While one process replaces another, the question waits for the new one.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::takeover::{self, Listeners, Options, Server};
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("app.takeover");
/// let server = Server::bind(&path, Listeners::new(), Options::default())?;
/// let status = takeover::status(&path, &Options::default()).await?;
/// assert_eq!(status.pid, std::process::id());
/// # Ok(()) }
/// ```
///
/// # Errors
/// As for [`request`](super::request()), without those of listeners.
///
/// # Panics
/// Outside of a tokio runtime, or if its I/O driver or its timer is not enabled.
pub async fn status(path: impl AsRef<Path>, options: &Options) -> Result<ServerStatus, Error> {
    let socket = connect(path.as_ref(), options).await?;
    let mut connection = Framed::new(socket, TakerCodec::default());
    let answer = async {
        connection
            .send(FromTaker::Status)
            .await
            .map_err(|refused| Error::Connection(refused.error))?;
        // The server sends one answer, and closes the connection.
        match connection.next().await {
            Some(Ok(ToTaker::Status { pid, is_under_way, generations })) => {
                let generation = |(pid, milliseconds)| Generation {
                    pid: Some(pid).filter(|&pid| pid > 0),
                    replaced_for: Duration::from_millis(milliseconds),
                };
                Ok(ServerStatus {
                    pid,
                    is_under_way,
                    generations: generations.into_iter().map(generation).collect(),
                })
            }
            Some(Ok(_)) => Err(Error::Misbehaved),
            Some(Err(error)) if !error.is_peer_gone() => Err(Error::Connection(error)),
            _ => Err(Error::GiverGone),
        }
    };
    timeout(options.answer_timeout, answer).await.map_err(|_| Error::TimedOut)?
}

/// Starts a new server process, and waits until it serves at a path. A command of a service manager
/// or of a deployment can use the result as its exit code.
///
/// The process has to become the server itself, with [`bind_or_take`](super::bind_or_take): this
/// waits until the server at the path has its process id. It lives on when the [`Child`] is
/// dropped.
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
///
/// use fdwire::takeover::{self, Options};
/// use tokio::process::Command;
///
/// let mut command = Command::new("/usr/bin/app");
/// let limit = Duration::from_secs(60);
/// let (path, options) = ("/run/app/takeover", Options::default());
/// let child = takeover::launch(&mut command, path, &options, limit).await?;
/// println!("process {:?} serves", child.id());
/// # Ok(()) }
/// ```
///
/// # Errors
/// [`Error::Ended`] if it ends before it serves, [`Error::TooLate`] if it does not serve within
/// `limit`, and [`Error::Io`] if it can't be started. It does not run then, and a server that ran
/// before it goes on.
///
/// # Panics
/// Outside of a tokio runtime, or if its I/O driver or its timer is not enabled.
///
/// # Cancel safety
/// When dropped, the process goes on.
pub async fn launch(
    command: &mut Command,
    path: impl AsRef<Path>,
    options: &Options,
    limit: Duration,
) -> Result<Child, Error> {
    let mut child = command.spawn()?;
    let pid = child.id();
    let outcome = timeout(limit, async {
        tokio::select! {
            biased;
            // Its end comes first: a process that has ended does not serve.
            ended = child.wait() => Err(Error::Ended { status: ended? }),
            () = serves(path.as_ref(), options, pid) => Ok(()),
        }
    });
    match outcome.await {
        Ok(outcome) => outcome.map(|()| child),
        Err(_) => {
            // Otherwise it might serve after the caller was told that it does not.
            child.kill().await?;
            Err(Error::TooLate { limit })
        }
    }
}

/// Waits until a process serves.
async fn serves(path: &Path, options: &Options, pid: Option<u32>) {
    while status(path, options).await.ok().map(|status| status.pid) != pid {
        sleep(POLL).await;
    }
}
