//! Functions for a process outside of the server: which process serves, and whether a new process
//! has begun to serve.

use std::{fmt, path::Path, time::Duration};

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

/// The time between two requests for the status.
const POLL: Duration = Duration::from_millis(20);

/// The state of the server at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerStatus {
    /// The process id of the server, in the PID namespace of the server.
    pub pid: u32,
    /// True while another process is taking over.
    pub takeover_in_progress: bool,
    /// The processes that were replaced and still finish their connections, the oldest first.
    pub generations: Vec<Generation>,
}

impl fmt::Display for ServerStatus {
    /// Writes one line for each process, for example:
    ///
    /// ```text
    /// process 812 serves
    /// process 700 was replaced 12 s ago
    /// ```
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} serves", self.pid)?;
        if self.takeover_in_progress {
            f.write_str("\nanother process is taking over")?;
        }
        self.generations.iter().try_for_each(|generation| write!(f, "\n{generation}"))
    }
}

/// Returns the state of the server at a path.
///
/// While one process replaces another, the request waits until the new process answers it.
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
/// The errors of [`request`](super::request()), except those that concern listeners.
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
        // The server sends one answer and closes the connection.
        match connection.next().await {
            Some(Ok(ToTaker::Status { pid, takeover_in_progress, generations })) => {
                let generation = |(pid, milliseconds)| Generation {
                    pid: Some(pid).filter(|&pid| pid > 0),
                    replaced_for: Duration::from_millis(milliseconds),
                };
                Ok(ServerStatus {
                    pid,
                    takeover_in_progress,
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

/// Starts a new server process, and waits until it serves at a path. A program that a service
/// manager or a deployment runs can derive its exit code from the result.
///
/// The started process itself has to become the server, with
/// [`bind_or_take`](super::bind_or_take): this function waits until the server at the path has its
/// process id. The process goes on when the [`Child`] is dropped.
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
/// [`Error::Ended`] if the process ends before it serves, [`Error::TooLate`] if it does not serve
/// within `limit`, and [`Error::Io`] if it can't be started. In each of these cases it no longer
/// runs, and a server that ran before goes on.
///
/// # Panics
/// Outside of a tokio runtime, or if its I/O driver or its timer is not enabled.
///
/// # Cancel safety
/// If this is dropped, the started process goes on.
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
            // The end of the process comes first, because a process that has ended does not serve.
            ended = child.wait() => Err(Error::Ended { status: ended? }),
            () = serves(path.as_ref(), options, pid) => Ok(()),
        }
    });
    match outcome.await {
        Ok(outcome) => outcome.map(|()| child),
        Err(_) => {
            // Without this, the process might still begin to serve after the caller got the error.
            child.kill().await?;
            Err(Error::TooLate { limit })
        }
    }
}

/// Waits until the process with this id serves.
async fn serves(path: &Path, options: &Options, pid: Option<u32>) {
    while status(path, options).await.ok().map(|status| status.pid) != pid {
        sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_has_one_line_for_each_process() {
        let mut status =
            ServerStatus { pid: 812, takeover_in_progress: false, generations: Vec::new() };
        assert_eq!(status.to_string(), "process 812 serves");
        status.takeover_in_progress = true;
        status.generations = vec![
            Generation { pid: Some(700), replaced_for: Duration::from_millis(12_900) },
            Generation { pid: None, replaced_for: Duration::ZERO },
        ];
        let lines = [
            "process 812 serves",
            "another process is taking over",
            "process 700 was replaced 12 s ago",
            "a process in another PID namespace was replaced 0 s ago",
        ];
        assert_eq!(status.to_string(), lines.join("\n"));
    }
}
