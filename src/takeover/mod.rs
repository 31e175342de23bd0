//! A new process replaces a running server, and no connection fails.
//!
//! The running server offers its named listeners at a path: TCP, UDP, and Unix sockets of each
//! kind. A new process requests them, sets itself up, and reports that it is ready. Any process may
//! do that, whoever its parent is. From then on the new process accepts, and the old one finishes
//! its connections. If the new process dies while the old one does that, the old one accepts again.
//!
//! # The promise
//!
//! > After any crash or timeout of either process, exactly one of the two serves, as long as one of
//! > them lives. Until the new process is ready, nothing has changed for the running server.
//!
//! In detail:
//!
//! - **Both processes hold the same listening sockets**, so no connection in a queue is lost if one
//!   of them closes its copies. The old process accepts until the new one does.
//! - **One message decides.** The new process serves from the moment at which it has written
//!   *ready* in full. The old process stops when it has read *ready*. In between, both accept from
//!   the same queue, and clients notice no difference.
//! - **Calling off is atomic.** If the new process is too late, the old one shuts down its
//!   receiving direction first and reads what is there. Either *ready* is in it, or *ready* can no
//!   longer be written.
//! - **The lock of the path decides if a server dies** before it could read *ready*: the process
//!   that serves holds the lock, and the kernel releases the lock of a dead process.
//! - **Undo.** Until the old process has [drained](Server::drained), it keeps its copies of the
//!   listeners. If the new process ends, or [hands back](Server::hand_back), the old one accepts
//!   again.
//!
//! A model checker visits every state of both sides, more than 1,700, with crashes, timeouts and
//! half-written messages at every place. The [protocol] is written down byte by byte, and each of
//! its rules is tested by name. Real processes are killed with SIGKILL at each system call that
//! they make in a takeover, and exactly one serves after each kill: docs/TAKEOVER.md has the
//! numbers.
//!
//! # Both sides
//!
//! Every generation of a server runs the same code. [`bind_or_take`] [requests](request()) the
//! listeners of the server that runs. If no server runs, [`Listeners`] adopts what systemd, einhorn
//! or Server::Starter has passed, and binds the rest. [`Pending::ready`] returns a [`Server`] in
//! either case.
//!
//! ```no_run
//! # async fn set_up() {}
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//!
//! use fdwire::takeover::{self, Listeners, Options};
//! use tokio::{io::AsyncWriteExt, net::TcpListener};
//!
//! let bind = || {
//!     let mut listeners = Listeners::new();
//!     listeners.bind_tcp("http", "0.0.0.0:8080".parse().expect("an address"))?;
//!     Ok(listeners)
//! };
//! let pending = takeover::bind_or_take("/run/app/takeover", Options::default(), bind).await?;
//! set_up().await; // a crash here costs nothing
//! let server = Arc::new(pending.ready().await?);
//!
//! let http = server.gated::<TcpListener>("http", 0)?;
//! let accepting = Arc::clone(&server);
//! tokio::spawn(async move {
//!     while let Ok((mut stream, _)) = http.accept().await {
//!         let connection = accepting.open_connection();
//!         tokio::spawn(async move {
//!             tokio::select! {
//!                 _ = stream.write_all(b"hello\n") => {} // serve the client
//!                 () = connection.ending() => {} // the server was replaced: end the connection
//!             }
//!         });
//!     }
//! });
//! // Until another process has taken over and the connections have ended, or their time is over.
//! let finished = server.finish().await;
//! println!("{finished}"); // "all connections have ended", or how many are cut
//! # Ok(()) }
//! ```
//!
//! # The old process
//!
//! [`Server::finish`] returns when the old process may exit, with the number of connections that
//! are still open.
//!
//! - **No reconnect storm.** [`OpenConnection::ending`] returns for each connection at a moment of
//!   its own, and the moments are spread evenly over 10 s or [what you choose](Options::drain).
//!   With the feature `axum`, `Server::serve_axum` sends `Connection: close` and GOAWAY.
//! - **The old process stays for the whole spread**, because the takeover can be undone for that
//!   time. **It leaves at the deadline.**
//! - **Few generations.** A server [lists](Server::generations) the old processes that still run,
//!   and asks the oldest to leave if there are [too many](Options::max_old_generations).
//! - **Reliable answers for a supervisor.** [`launch`] starts a new process and returns once it
//!   serves or has failed. [`status()`] returns from outside which process serves.
//!   [`systemd::Notifier`](crate::systemd::Notifier) reports to a service manager.
//!
//! # What happens when
//!
//! | event | the old process | the new process |
//! |---|---|---|
//! | the new one hangs before ready | goes on | [`Error::Aborted`] when it is ready |
//! | the new one gives up before ready | goes on | - |
//! | the old one dies before the new one is ready | - | gets the lock, and serves once ready |
//! | the new one dies before ready | goes on | - |
//! | the new one dies while the old one drains | accepts again | - |
//! | the old one dies while it drains | - | goes on serving |
//! | a second process requests a takeover meanwhile | refuses it | - |
//! | a stranger sends anything | closes the stranger's connection | - |
//! | the new one is replaced while the old one drains | drains, can't serve again | drains |
//! | the old one has no descriptor left | goes on | [`Error::Aborted`] or [`Error::TimedOut`] |
//! | the new one has no descriptor left | goes on | [`Error::Connection`] or [`Error::Io`] |
//!
//! # Limits
//!
//! - **The kernel does not know which datagrams belong together.** [`Datagrams`] stops receiving
//!   when another process serves. The new process forwards the datagrams of older processes if each
//!   datagram shows its owner, as QUIC's connection ids can. Otherwise the new process gets all of
//!   them.
//! - **A `SO_REUSEPORT` group moves as a whole**, because the kernel assigns each client to one of
//!   its sockets. A process with fewer workers than sockets lets each worker accept from several. A
//!   process with more workers [adds](Server::add) sockets. No socket of a group is closed, because
//!   that resets the clients in its queue, unless `net.ipv4.tcp_migrate_req` is on. (80 clients of
//!   two sockets, one of which was closed: 37 resets without this option, 0 with it.)
//! - If a server is stopped (`SIGSTOP`) while it drains, its successor can't be replaced until the
//!   stopped process is continued or killed.
//! - The lock works among processes that see the same directory. The path has to be on a file
//!   system that supports flock(2).
//! - A connection does not move. The process that has accepted it finishes it.
//! - In a user namespace, nothing can take over from a server that runs as the overflow uid
//!   (usually 65534), because every foreign uid has that number there.

#[cfg(feature = "axum")]
mod axum;
mod connections;
mod control;
mod datagrams;
mod drain;
mod error;
mod gate;
mod generations;
mod give;
mod giver;
mod inspect;
#[cfg(feature = "handoff")]
mod keep_workers;
mod lanes;
mod link;
mod listeners;
#[cfg(test)]
mod model;
mod options;
mod outbox;
mod passed;
mod phase;
mod predecessor;
pub mod protocol;
#[cfg(test)]
mod random;
mod request;
#[cfg(test)]
mod rules;
mod server;
mod service_state;
mod shared;
mod start;
mod status;
mod steps;
mod taker;
mod workers;

pub use datagrams::{Datagrams, Received};
pub use drain::{Finished, OpenConnection};
pub use error::{Error, Mismatch};
pub use gate::{Accepts, Gated};
pub use generations::Generation;
pub use listeners::Listeners;
pub use options::Options;
pub use phase::Phase;
pub use request::{Pending, request};
pub use server::Server;
pub(crate) use service_state::ServiceState;
pub use start::bind_or_take;
pub use status::{ServerStatus, launch, status};
