use std::{io, path::Path};

use super::{Incoming, settings::Settings};
use crate::{Socket, SocketKind, handoff::protocol::MAX_OFFER_FDS};

/// The settings of an [`Incoming`].
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
/// use fdwire::handoff::Incoming;
///
/// let incoming = Incoming::builder().max_connections(500).connect("/run/front.sock").await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default)]
#[must_use]
pub struct IncomingBuilder(Settings);

impl IncomingBuilder {
    /// Sets the most connections that are on their way to this worker or wait in it for their
    /// adoption, 1 to 253. Default: 64.
    ///
    /// If the window is too small, the worker waits for the dispatcher between connections. Each
    /// waiting connection takes a descriptor in this process. Connections on their way to all
    /// workers together count against the dispatcher's `RLIMIT_NOFILE`.
    pub const fn window(mut self, connections: usize) -> Self {
        self.0.window = if connections == 0 { 1 } else { connections as u64 };
        self
    }

    /// Sets the most connections that this worker has at a time. A connection counts from when the
    /// worker asks the dispatcher for it until it has ended.
    ///
    /// By default only `RLIMIT_NOFILE` limits them. That limit applies in any case: an eighth of
    /// it, at most 64 descriptors, is left to the application.
    pub const fn max_connections(mut self, connections: usize) -> Self {
        self.0.max_connections = connections as u64;
        self
    }

    /// Sets whether this worker serves the connections that wait in it when the dispatcher has
    /// gone. By default it closes them, so they are lost with the dispatcher.
    ///
    /// If it serves them, two workers may serve one connection: the dispatcher may have fenced this
    /// worker right before it died, and offered its connections to another one. The dispatcher
    /// reports the fence, but the report may not arrive, for example if this worker had not read
    /// the messages before it.
    pub const fn serve_unanswered(mut self, yes: bool) -> Self {
        self.0.serve_unanswered = yes;
        self
    }

    /// Sets the most descriptors that a connection may have together with its
    /// [bundle](crate::handoff::Accepted::with_fd), 1 to [`MAX_OFFER_FDS`]. Default: 1, the
    /// connection alone.
    ///
    /// The worker keeps that many descriptors free for each connection that it asks for.
    pub const fn max_fds(mut self, fds: usize) -> Self {
        self.0.max_fds = if fds == 0 {
            1
        } else if fds > MAX_OFFER_FDS {
            MAX_OFFER_FDS as u8
        } else {
            fds as u8
        };
        self
    }

    /// Receives connections from the dispatcher that started this process, as
    /// [`Incoming::from_stdin`] does.
    ///
    /// # Errors
    /// The errors of [`Socket::from_stdin`].
    ///
    /// # Panics
    /// Panics outside of a tokio runtime with I/O and time enabled.
    pub fn from_stdin(self) -> io::Result<Incoming> {
        Ok(self.build(Socket::from_stdin()?))
    }

    /// Receives connections from the dispatcher that listens at a path, as [`Incoming::connect`]
    /// does.
    ///
    /// # Errors
    /// The errors of [`Socket::connect`].
    ///
    /// # Panics
    /// Panics outside of a tokio runtime with I/O and time enabled.
    pub async fn connect(self, path: impl AsRef<Path>) -> io::Result<Incoming> {
        Ok(self.build(Socket::connect(path, SocketKind::SeqPacket).await?))
    }

    /// Receives connections from the dispatcher at the other end of a socket, as [`Incoming::new`]
    /// does.
    ///
    /// # Panics
    /// Panics outside of a tokio runtime with I/O and time enabled.
    pub fn build(self, socket: Socket) -> Incoming {
        Incoming::open(socket, self.0)
    }
}
