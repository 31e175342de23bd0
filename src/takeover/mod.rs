//! A new process replaces a running server, and no connection fails.
//!
//! The running server offers its named listeners at a path: TCP, UDP, and Unix sockets of each
//! kind. A new process, of any parent, asks for them, sets itself up, and reports that it is ready.
//! From then on it accepts, and the old one finishes what it has. If the new one dies meanwhile,
//! the old one accepts again.
//!
//! # The promise
//!
//! > After any crash or timeout of either process, exactly one of the two serves, as long as one of
//! > them lives. Until the new process is ready, nothing has changed for the running server.
//!
//! In detail:
//!
//! - **Both hold the same listening sockets**, so no connection in a queue is lost if one
//!   of them closes its copies. The old process accepts until the new one does.
//! - **One message decides.** The new process serves from the moment at which it has written
//!   *ready* in full. The old one stops when it has read it. In between, both accept from the same
//!   queue. Nobody sees a difference.
//! - **Calling off is atomic.** When the new process is too late, the old one shuts down its
//!   receiving direction first and reads what is there: either *ready* is in it, or it can't be
//!   written from then on.
//! - **The lock of the path decides when a server dies** before it could read *ready*: the
//!   process that serves holds it, and the kernel releases the lock of a dead process.
//! - **Undo.** Until the old process has [drained](Server::drained), it keeps its copies. If the
//!   new one ends, or [hands back](Server::hand_back), it accepts again.
//!
//! A model checker visits every state of both sides, more than 1,700, with crashes, timeouts and
//! halves of messages at every place. The [protocol] is written down byte by byte, and each of its
//! rules is tested by name. Real processes are killed with SIGKILL at each system call that they
//! make in a takeover, and exactly one serves after each kill: docs/TAKEOVER.md has the numbers.
//!
//! # Both sides
//!
//! Every generation runs the same code. [`bind_or_take`] [requests](request()) the listeners of the
//! server that runs. If none does, [`Listeners`] adopts what systemd, einhorn or Server::Starter
//! has passed, and binds the rest. After [ready](Pending::ready), all generations are the same
//! [`Server`].
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
//!                 _ = stream.write_all(b"hello\n") => {} // serve it, and
//!                 () = connection.ending() => {} // end it when its turn has come
//!             }
//!         });
//!     }
//! });
//! // Until another process has taken over and the connections have ended, or their time is over.
//! let finished = server.finish().await;
//! println!("{} connections are cut", finished.unfinished);
//! # Ok(()) }
//! ```
//!
//! # The old process
//!
//! [`Server::finish`] returns when it may leave, with the number of connections that are left.
//!
//! - **No reconnect storm.** Its connections are told to end at moments that are spread evenly over
//!   10 s or [what you choose](Options::drain). With the feature `axum`, `Server::serve_axum` sends
//!   `Connection: close` and GOAWAY.
//! - **It stays for the spread**, so that long a takeover can be undone, **and leaves at the
//!   deadline**.
//! - **Few generations.** A server [lists](Server::generations) the old processes that still run,
//!   and asks the oldest to leave if there are [too many](Options::max_old_generations).
//! - **The truth for a supervisor.** [`launch`] starts a new process and returns once it serves or
//!   has failed; [`status()`] asks from outside who serves.
//!   [`systemd::Notifier`](crate::systemd::Notifier) reports to a service manager.
//!
//! # What happens when
//!
//! | event | the old process | the new process |
//! |---|---|---|
//! | the new one dies, hangs or gives up before ready | serves on | [`Error::Aborted`] at its ready |
//! | the old one dies before the new one is ready | - | serves as soon as it is ready, by the lock |
//! | the new one dies while the old one drains | accepts again | - |
//! | the old one dies while it drains | - | goes on serving |
//! | a second process asks meanwhile | refuses it | - |
//! | a stranger sends anything | closes its connection | - |
//! | the new one is replaced while the old one drains | drains on, can't serve again | drains |
//! | the old one has no descriptor left | serves on | [`Error::Aborted`] or [`Error::TimedOut`] |
//! | the new one has no descriptor left | serves on | [`Error::Connection`] or [`Error::Io`] |
//!
//! # Limits
//!
//! - **Datagrams belong to connections only in the application's protocol.** [`Datagrams`] stops
//!   receiving when another process serves. That one forwards what belongs to older processes if
//!   each datagram shows its owner, as QUIC's connection ids can. If it does not, the new process
//!   gets all of them.
//! - **A `SO_REUSEPORT` group moves as a whole**, since the kernel gives each client to one of its
//!   sockets. A process with fewer workers than sockets lets each worker accept from several; one
//!   with more workers [adds](Server::add) sockets. Nobody closes one: that resets the clients in
//!   its queue, unless `net.ipv4.tcp_migrate_req` is on (80 clients of two sockets, one of which
//!   was closed: 37 resets without, 0 with it).
//! - A server in a process that is stopped (`SIGSTOP`) while it drains keeps its successor from
//!   being replaced, until it is continued or killed.
//! - The lock counts among processes that see the same directory. The path has to be on a file
//!   system with flock(2).
//! - What belongs to a connection does not move. It is finished by the process that has accepted
//!   it.
//! - In a user namespace, a server that runs as the overflow uid (usually 65534) can't be taken
//!   over from: every foreign uid looks like that one.

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
mod news;
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
mod shared;
mod start;
mod status;
mod taker;
mod workers;

pub use datagrams::{Datagrams, Received};
pub use drain::{Finished, OpenConnection};
pub use error::{Error, Mismatch};
pub use gate::{Accepts, Gated};
pub use generations::Generation;
pub use listeners::Listeners;
pub(crate) use news::News;
pub use options::Options;
pub use phase::Phase;
pub use request::{Pending, request};
pub use server::Server;
pub use start::bind_or_take;
pub use status::{ServerStatus, launch, status};
