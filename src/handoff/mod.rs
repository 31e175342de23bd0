//! The hand-off of accepted connections: a [`Dispatcher`] accepts them, and worker processes serve
//! them, each from its [`Incoming`].
//!
//! The dispatcher's process accepts TCP or Unix connections. It starts the workers, or waits for
//! workers to connect to a path. A worker serves with any library that takes a stream: tokio,
//! hyper, axum. Clients connect to one address. They notice nothing if a worker is replaced, or if
//! it hangs or dies before it has adopted their connection.
//!
//! # The promise
//!
//! > A connection that was accepted is given to the application of **at most one** worker, and is
//! > **never lost before that worker has adopted it**: whatever dies, hangs, refuses or overflows,
//! > as long as the dispatcher lives.
//!
//! A worker adopts a connection when its application asks [`Incoming`] for one. It sends the
//! adoption to the dispatcher before the application gets the connection. Until then the dispatcher
//! keeps a copy. After that the connection is the worker's: **an adopted connection ends with its
//! worker**. It is not repeated elsewhere, because nobody could know how much of it was done.
//!
//! The promise is tested on the shipped code in two ways: with random events of every kind, and by
//! visiting all states of a dispatcher with two workers and three connections while one worker
//! crashes, one hangs, a socket fails and a worker refuses, in each order: 2,634,189 states, or
//! 54,813,855 if a worker's application may drain, too.
//!
//! A connection waits longest at a worker that has stopped. The worker is pinged after at most one
//! [`ping_interval`](DispatcherBuilder::ping_interval), and is cut off when the ping has been
//! unanswered for the [`hang_timeout`](DispatcherBuilder::hang_timeout): then the connection goes
//! to another worker, 6 s after it was offered with the defaults. It takes longer if that worker
//! stops, too, or if [too many](DispatcherBuilder::max_fences) hang at a time.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | dispatch | give a connection to the dispatcher, which hands it over to a worker |
//! | group | a name for workers that serve the same connections; each connection goes to one group |
//! | slot | room for one connection at a worker |
//! | offer | a connection, with its descriptor, sent to one worker |
//! | adopt | the worker takes an offer for its application; from then on the connection is the worker's |
//! | reject | the worker gives an offer back |
//! | demand | the total number of offers a worker has asked for |
//! | recall | the dispatcher asks a busy worker to reject what it has not adopted |
//! | fence | cut a worker off, so that it can adopt nothing from that moment on |
//! | retire | end a worker's link, whatever the cause |
//! | drain | take nothing new and finish what is there |
//! | stale copy | a descriptor of a connection that a fenced process may still hold |
//! | give back | return a connection that no worker has adopted to the application that dispatched it |
//! | link | one worker's connection to the dispatcher |
//!
//! # Both sides
//!
//! To be short, this example has both sides in one process. Usually the dispatcher
//! [starts](Dispatcher::spawn_worker) the workers, and a worker begins with
//! [`Incoming::from_stdin`]; or workers [connect](Incoming::connect) to a
//! [path](Dispatcher::serve_workers).
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use fdwire::{Socket, SocketKind, handoff::{Dispatcher, Incoming}};
//! use tokio::{io::{AsyncReadExt, AsyncWriteExt}, net::{TcpListener, TcpStream}};
//!
//! let (here, there) = Socket::pair(SocketKind::SeqPacket)?;
//!
//! // One side accepts.
//! let listener = TcpListener::bind("127.0.0.1:0").await?;
//! let address = listener.local_addr()?;
//! let dispatcher = Dispatcher::new();
//! dispatcher.add_worker(here);
//! let accepting = tokio::spawn({
//!     let dispatcher = dispatcher.clone();
//!     async move { dispatcher.serve(listener).await }
//! });
//!
//! // The other serves.
//! let serving = tokio::spawn(async move {
//!     let mut incoming = Incoming::new(there);
//!     let handle = incoming.handle();
//!     while let Some(mut connection) = incoming.next().await {
//!         tokio::spawn(async move { connection.write_all(b"hello").await });
//!     }
//!     handle.ended().await // everything that was adopted has ended, and the dispatcher knows
//! });
//!
//! let mut answer = String::new();
//! TcpStream::connect(address).await?.read_to_string(&mut answer).await?;
//! assert_eq!(answer, "hello");
//!
//! dispatcher.drain(None).await; // accepts no more; the workers finish what they have, and leave
//! accepting.await??;
//! println!("{}", serving.await?);
//! # Ok(()) }
//! ```
//!
//! Whole programs: the example `accept_handoff` serves with hyper and kills its own workers to show
//! that nothing is lost; `axum_worker` serves with axum (feature `axum`).
//!
//! # What happens when
//!
//! | event | connections that it has not adopted | connections that it serves |
//! |---|---|---|
//! | a worker dies | go to others | end |
//! | it hangs: no answer to a ping within [`hang_timeout`](DispatcherBuilder::hang_timeout) | it is cut off, so that it can adopt nothing more, and they go to others | end with its process, which is [killed](DispatcherBuilder::kill_hung) if the dispatcher started it |
//! | it is busy: answers pings, and does not ask for connections | are recalled after [`recall_after`](DispatcherBuilder::recall_after), and go to others | go on |
//! | it is full: [`max_connections`](IncomingBuilder::max_connections), or no descriptors to spare | it gets none | go on |
//! | it has no descriptor left when offers come, or its event loop has no room for them | go to others | go on |
//! | all workers are full | [`serve`](Dispatcher::serve) does not accept: clients wait in the kernel's backlog | go on |
//! | it [drains](IncomingHandle::drain), or is [removed](Dispatcher::remove_worker) | go to others | are finished, until the deadline |
//! | it is [replaced](Dispatcher::replace_workers) | go to others, when the new workers are ready | are finished, until the deadline |
//! | its [group](Dispatcher::in_group) has no workers | wait for one, and hold up no other group | - |
//! | it breaks the protocol | as when it hangs | as when it hangs |
//! | it does not say hello within [`hello_timeout`](DispatcherBuilder::hello_timeout): it is cut off, and killed if the dispatcher started it | it has none | it has none |
//! | its process lives on after the end of its link | go to others | go on, until it is killed after [`exit_timeout`](DispatcherBuilder::exit_timeout) if the dispatcher started it |
//! | something else reads from its socket | it leaves, since an offer is missing, and they go to others | go on |
//! | the dispatcher [drains](Dispatcher::drain) | are handed over first, for half of the time | are finished, until the deadline |
//! | the dispatcher is [replaced](Dispatcher::prepare_succession) | go to the dispatcher that goes on | go on, and the worker with the other dispatcher |
//! | the dispatcher dies | are closed, or [served](IncomingBuilder::serve_unanswered) | go on, and the worker [ends](IncomingHandle::ended) after them |
//!
//! A worker that was started by the dispatcher can be [started again](WorkerCommand::restart) when
//! it ends.
//!
//! # A dispatcher is replaced
//!
//! A dispatcher in another process can go on with the workers of this one, which keep their
//! connections. In a [takeover](crate::takeover),
//! [`Server::keep_workers`](crate::takeover::Server::keep_workers) does that. Without a takeover,
//! use [`Dispatcher::prepare_succession`] and [`Dispatcher::take_workers`]. The replacement can be
//! undone until the old dispatcher ends.
//!
//! - Each connection has one owner at any time. If no worker has adopted it, the new dispatcher
//!   adopts it from the old one, and from then on it is lost only if the new dispatcher dies.
//! - Workers that the old dispatcher has started are not children of the new one. The new one sees
//!   their end and can kill them, but it does not learn their exit status. To start them again it
//!   needs a command of its own.
//! - Nothing in the old process ends a worker that has moved, not even
//!   [`kill_on_drop`](tokio::process::Command::kill_on_drop). A parent-death signal
//!   (`PR_SET_PDEATHSIG`) does, and so does a service manager that kills all processes of a unit.
//! - A worker that cannot move finishes its connections, and leaves.
//!
//! # Limits
//!
//! - A connection is given up once several workers have died or hung while holding it and no worker
//!   is left that has not: the connection may be the cause. See
//!   [`max_offers`](DispatcherBuilder::max_offers). A worker that has no room or no time for a
//!   connection has not failed with it. A request that makes the *application* crash costs one
//!   worker, because the connection was adopted before.
//! - When many workers hang at a time, only [some](DispatcherBuilder::max_fences) are cut off: the
//!   machine may be the cause.
//! - A worker whose processes never live for long is [started again](WorkerCommand::longest_wait)
//!   less and less often. It is not started as long as two of its processes have left the
//!   dispatcher and not ended.
//! - The already-read bytes and the metadata of a connection have to fit one message, of
//!   [`MAX_MESSAGE_BYTES`](protocol::MAX_MESSAGE_BYTES).
//! - The dispatcher holds one descriptor for each connection that is not adopted, and none after
//!   that, unless a worker that was cut off may hold a copy. The
//!   [`window`s](IncomingBuilder::window) of all workers together should fit its `RLIMIT_NOFILE`.
//!   If they do not, clients wait. Handing over an accepted connection takes no further descriptor.
//! - The kernel limits the descriptors in flight for a whole uid (`ETOOMANYREFS`), and a worker
//!   that does not receive keeps them. So all workers of a dispatcher together get half of the soft
//!   `RLIMIT_NOFILE`, and each worker gets at most half of what the others leave of that, but
//!   always at least one.
//! - Descriptors that belong to a connection can [come with it](Accepted::with_fd), and state can
//!   come as metadata. Nothing else moves along. So hand a TLS connection over before the
//!   handshake, with the [bytes](Accepted::with_prefix) that were read from it.
//!
//! # Traps
//!
//! The library takes care of these. If you bypass it, you have to:
//!
//! - **A passed socket has to leave the sender's epoll set before it is passed.** A registration
//!   lives as long as any copy of the socket, even one in another process. [`Accepted`] takes a
//!   tokio stream out of its event loop, but not a duplicate that is registered elsewhere.
//! - **A close does not end a connection as long as another process has a copy.** The client sees
//!   the end when the connection is shut down. Dropping a [`Connection`] does that. After
//!   [`into_parts`](Connection::into_parts), shut it down yourself, and do the same with a
//!   connection that came back in a [`DispatchError`].
//! - **Options and `O_NONBLOCK` belong to the connection**, not to a copy. [`Accepted`] makes it
//!   non-blocking. After that, neither side changes them before the adoption.
//! - The last close of a connection with `SO_LINGER` blocks. A `Connection` is closed without
//!   lingering.
//!
//! The application has to take care of these:
//!
//! - **To ask is to adopt.** A loop that asks without end adopts every connection that there is. If
//!   that is too much, [`max_connections`](IncomingBuilder::max_connections) leaves the rest to
//!   other workers.
//! - A worker that **blocks every thread of its runtime** answers no pings, so the dispatcher
//!   fences it as one that hangs.
//! - A graceful shutdown of hyper, and so of axum, ends at once the connections that are idle and
//!   those that have sent nothing yet. But their requests may be on the way. So let a moment pass
//!   between [`drain_requested`](IncomingHandle::drain_requested) and the shutdown, and answer with
//!   `Connection: close` while [`is_draining`](IncomingHandle::is_draining), as the examples do.
//!   Then no busy client sees its connection cut.
//! - **Adopted connections go on as long as the process does**, even if the dispatcher has died. So
//!   await [`ended`](IncomingHandle::ended) before the process ends: it waits for all of them, even
//!   for idle ones that are kept alive. A graceful shutdown ends those.
//! - `axum::serve` does not return by itself, and a process that waits for it outlives its
//!   dispatcher. [`serve_axum`](Incoming::serve_axum) returns.
//! - **A listener that is closed resets its backlog.** Keep the future of
//!   [`serve`](Dispatcher::serve) until the dispatcher has [drained](Dispatcher::drain): the drain
//!   hands the backlog over first.
//! - Ctrl-C reaches all processes of a terminal, and a service manager may signal all processes of
//!   a service. Workers that should finish their work ignore the signal and wait to be drained.

mod dispatcher;
mod ending;
mod incoming;
pub mod protocol;
mod reserve;
mod span;
#[cfg(feature = "tonic")]
mod tonic;
mod transport;

pub use dispatcher::{
    Accepted, AdoptionTimes, DispatchError, DispatchPermit, Dispatcher, DispatcherBuilder,
    Dispatching, Group, GroupStats, IntoListener, NotDispatched, NotReplaced, Replaced,
    RetireCause, RetireCounts, Stats, Strategy, Succession, TakenWorker, TakenWorkers, Unadopted,
    WorkerCommand, WorkerExit, WorkerId, WorkerState, WorkerStats,
};
pub use incoming::{
    Connection, ConnectionParts, ConnectionStream, Incoming, IncomingBuilder, IncomingEnd,
    IncomingHandle, IncomingStats, ServingGuard,
};
pub use transport::Transport;

pub use crate::address::Address;
