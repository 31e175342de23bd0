//! Hands accepted connections, and **open file descriptors** of any kind, to other processes on the
//! same host, with tokio.
//!
//! - [`handoff`]: one process accepts TCP or Unix connections and other processes serve them. No
//!   connection is lost on the way, even if a worker dies, hangs or is replaced.
//! - [`takeover`]: a new process replaces a running server. It gets the listeners, and no
//!   connection fails.
//! - [`systemd`]: reports the state of a service and its takeovers to a service manager.
//! - [`Framed`]: messages that carry descriptors. The other modules use them, and you can too.
//!
//! # Hand-off
//!
//! The process that accepts:
//!
//! ```no_run
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
//! use fdwire::handoff::{Dispatcher, WorkerCommand};
//! use tokio::{net::TcpListener, process::Command};
//!
//! let dispatcher = Dispatcher::new();
//! for _ in 0..4 {
//!     dispatcher.spawn_worker(WorkerCommand::from(Command::new("./worker")).restart(true))?;
//! }
//! dispatcher.serve(TcpListener::bind("0.0.0.0:8080").await?).await
//! # }
//! ```
//!
//! A worker:
//!
//! ```no_run
//! # #[tokio::main] async fn main() -> std::io::Result<()> {
//! use fdwire::handoff::Incoming;
//! use tokio::io::AsyncWriteExt;
//!
//! let mut incoming = Incoming::from_stdin()?;
//! let handle = incoming.handle();
//! tokio::spawn(async move {
//!     while let Some(mut connection) = incoming.next().await {
//!         tokio::spawn(async move { connection.write_all(b"hello\n").await });
//!     }
//! });
//! handle.ended().await;
//! # Ok(()) }
//! ```
//!
//! The [module](handoff) documents the promise, the pitfalls, and the behaviour when a worker dies,
//! hangs or is full.
//!
//! # Frames
//!
//! A message consists of bytes and any number of descriptors: files, pipes, listeners, connections.
//! It is sent over a Unix socket of either kind, [SEQPACKET or STREAM](SocketKind), and each
//! descriptor arrives with the message to which it was attached. [`Framed`] is a
//! [`Stream`](futures::Stream) and a [`Sink`](futures::Sink). A [`Sender`] sends from many tasks.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{fs::File, io::Read};
//!
//! use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
//! use futures::{SinkExt, StreamExt};
//!
//! // Usually, the other end is a child's standard input.
//! let (here, there) = Socket::pair(SocketKind::SeqPacket)?;
//!
//! let mut tx = Framed::new(here, FrameCodec::default());
//! tx.send(Frame::new("a file").with_fd(File::open("/proc/version")?)).await?;
//!
//! let mut rx = Framed::new(there, FrameCodec::default());
//! let frame = rx.next().await.ok_or("the peer is gone")??;
//! assert_eq!(&frame.payload[..], b"a file");
//! let [file] = frame.fds.into_array().map_err(|_| "one descriptor expected")?;
//! let mut text = String::new();
//! File::from(file).read_to_string(&mut text)?;
//! # assert!(text.starts_with("Linux"));
//! # Ok(()) }
//! ```
//!
//! A command-line tool or a small helper can send and receive the same frames without a runtime,
//! with [`blocking::Framed`].
//!
//! # What frames guarantee
//!
//! - **Descriptors stay with their messages**, even if the kernel cuts and merges the bytes, and
//!   for any number of descriptors. (253 is the limit of one system call, not of a frame.)
//! - **Nothing leaks and nothing is lost.** This process owns a descriptor until the `sendmsg` that
//!   carries it has succeeded. The receiver owns it, close-on-exec, as soon as its `recvmsg`
//!   returns. A [refused item](SendError) comes back in the error. Items that were accepted and not
//!   sent are in [`Framed::into_parts`].
//! - **Cancel safety** is stated for each method: `next()` and `flush()` can be dropped and called
//!   again.
//! - **Temporary shortages are waited for**: a full socket, too many descriptors in flight
//!   (`ETOOMANYREFS`), no kernel memory for a large packet. Permanent failures are errors: a
//!   receiver at its `RLIMIT_NOFILE` ([`Error::TruncatedControl`]), a peer that closed without
//!   reading everything ([`Error::Reset`]).
//!
//! # What a peer can do
//!
//! A peer may lie, flood, stall, and send unwanted descriptors. Each line has a case and what this
//! crate does. `docs/ARCHITECTURE.md` lists the tests for each line.
//!
//! - A peer **sends bytes or descriptors that are not a message**: the stream yields one typed
//!   [`Error`] and ends, and everything that was received is closed.
//! - A peer **announces more than the [`Limits`] allow**: the same, before memory is reserved.
//! - A peer **never finishes a message, even one that contains its own end of the connection**: the
//!   connection ends after a [time limit](Limits#structfield.max_unfinished_time).
//! - A peer **makes many connections to a [`Listener`]**: together they hold no more than [one uid
//!   may hold](socket::UidLimits).
//! - A peer **is not admitted by a [`Listener`]**: its connection is closed, no matter what it has
//!   sent. The number of connections that wait to be closed is limited.
//! - A peer **sends sockets whose last `close` blocks**: no thread of the runtime waits for it.
//!   Descriptors that the application does not take, and the connection itself, are closed [in the
//!   background](close_in_background), by a fixed number of threads and without delaying other
//!   descriptors.
//! - A peer **sends descriptors faster than they can be closed**: its connection receives nothing
//!   more until they are closed.
//! - A peer **floods a connection**: other tasks get their turns, because both directions, and
//!   descriptors, are charged to tokio's cooperative budget.
//! - A peer **sends out-of-band data, or consists of several processes**: no message is delayed
//!   because of that.
//! - A peer **consists of several processes that write to one message, on a socket that is set to
//!   [report senders](Socket::set_pass_credentials)**: the stream yields [`Error::MixedSenders`]
//!   and ends.
//! - A peer **sends a datagram that is too long, or has more descriptors than this process may
//!   open**: the receive returns a typed error, everything of that datagram is closed, and the next
//!   one is received.
//! - A peer **sends a typed message that lacks a descriptor, or has one too many, twice or of the
//!   wrong kind**: the stream yields one `TypedError` and ends, and everything that was received is
//!   closed.
//! - A peer **dies, or closes after any byte**: everything that it had sent is received, and then
//!   the end.
//!
//! The crate cannot prevent these:
//!
//! - A descriptor that you take out of a message and drop is closed in your thread, which may
//!   block. Pass it to [`close_in_background`] instead.
//! - If this process is at its `RLIMIT_NOFILE`, a receive closes the descriptors that do not fit,
//!   inside the system call. That may block. So keep 253 numbers free for each connection that may
//!   receive at the same time.
//! - A child process has copies of all descriptors until its exec closes them. If this process has
//!   closed a slow descriptor meanwhile, the exec blocks, and `Command::spawn` waits for it. So if
//!   peers send sockets, spawn from a thread that may block.
//! - Freeing a file takes time, for example 190 ms for a memfd of 1 GiB. The thread that closes it
//!   spends that time, and other descriptors wait meanwhile.
//! - When the peer of a connected [`DatagramSocket`](socket::DatagramSocket) is gone, the next send
//!   makes the kernel close all queued descriptors, inside the system call. If one of them is slow
//!   to close, the send blocks. Only
//!   [`DatagramSocket::set_pass_fds`](socket::DatagramSocket::set_pass_fds) prevents that. Sockets
//!   that are not connected are not affected.
//! - A file of a FUSE file system whose daemon does not answer cannot be closed at all. Passing it
//!   on blocks too, because the sender's copy is closed. Only [`Socket::set_pass_fds`] and
//!   [`Listener::set_pass_fds`] prevent that such files are received.
//!
//! # What the kernel does with descriptors
//!
//! The rules of [`FrameCodec`]'s wire format follow from the behaviour of Linux: see unix(7) and
//! cmsg(3). The kernel attaches the descriptors of a `sendmsg` to its first byte, and sends all of
//! them even if it takes only part of the bytes. A `recvmsg` never returns descriptors of two
//! sends. But it may return bytes from before a send together with the bytes and descriptors of
//! that send. So the position inside a read does not show to which message a descriptor belongs.
//! Therefore the header of a frame has the number of its descriptors, and frames take them in the
//! order of arrival.
//!
//! Some facts about passed descriptors:
//!
//! - `O_NONBLOCK`, the file offset and locks belong to the open file. Sender and receiver share it
//!   once a descriptor was passed.
//! - A TCP connection ends when the **last** copy is closed. `shutdown` ends it at once, for all
//!   holders.
//! - If the receiver closes the Unix socket, the kernel closes the descriptors that were not
//!   received. If one of them was the last copy of a TCP connection, that connection ends.
//! - If credentials are on (`SO_PASSCRED`), one read never returns bytes of different processes,
//!   even on a stream. Bytes that were sent before that have no known sender. A privileged sender
//!   may name another process.
//! - If a Unix socket is sent over itself, the kernel keeps it open until its garbage collector
//!   runs.
//!
//! # Other wire formats
//!
//! [`FrameCodec`] is one of the codecs of this crate. [`PacketCodec`](codec::PacketCodec) has no
//! header. [`PayloadCodec`](codec::PayloadCodec) encodes the payload of frames with any codec of
//! `tokio_util`. For a protocol that exists, such as D-Bus or Wayland, [write a codec](guide).
//!
//! The module `typed` (feature `serde`) has messages of your own types, with descriptors in their
//! fields, and the formats of varlink and of JSON-RPC (feature `json`).
//! [`FdPolicy`](fd_policy::FdPolicy) checks the descriptors that a peer has sent.
//!
//! A program without a runtime uses the same frames and codecs in the module [`blocking`].
//!
//! Protocols without a connection use a [`DatagramSocket`](socket::DatagramSocket), and the guide
//! shows how to take a socket that a parent process has left open: [`Socket::from_stdin`] and
//! [`Socket::from_inherited`], and the same for a [`Listener`].
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `handoff` | yes | the module [`handoff`] |
//! | `takeover` | yes | the module [`takeover`], and [`Notifier::follow`](systemd::Notifier::follow) |
//! | `tokio-util` | yes | [`PayloadCodec`](codec::PayloadCodec), for the codecs of tokio-util |
//! | `tokio-seqpacket` | yes | conversions from and into the sockets of tokio-seqpacket |
//! | `serde` | no | the module `typed`: messages whose fields may be descriptors |
//! | `json` | no | `serde`, and the formats of varlink and JSON-RPC in `typed` |
//! | `axum` | no | axum serves an [`Incoming`](handoff::Incoming) or a [`Gated`](takeover::Gated) |
//! | `tonic` | no | tonic serves an [`Incoming`](handoff::Incoming): see the service `grpc` |
//! | `metrics` | no | the module `metrics`: numbers for the `metrics` facade, and so for Prometheus |
//!
//! If you disable the default features, incompatible versions of these 0.x crates do not affect
//! you.
//!
//! # Platform
//!
//! The crate works on Linux. Only frames and codecs are independent of the system.

#![cfg_attr(
    not(all(feature = "handoff", feature = "takeover")),
    allow(dead_code, unused_imports, reason = "one of these alone uses some items below it")
)]

#[cfg(not(target_os = "linux"))]
compile_error!("fdwire works on Linux");

#[cfg(any(feature = "handoff", feature = "takeover"))]
mod address;
mod backoff;
pub mod blocking;
mod closer;
pub mod codec;
mod credentials;
mod error;
pub mod fd_policy;
#[cfg(any(feature = "handoff", feature = "takeover"))]
mod fields;
pub mod frame;
pub mod framed;
#[doc = include_str!("guide.md")]
pub mod guide {}
#[cfg(feature = "handoff")]
pub mod handoff;
mod limits;
#[cfg(feature = "metrics")]
pub mod metrics;
mod send_fd;
pub mod socket;
mod sys;
pub mod systemd;
#[cfg(feature = "takeover")]
pub mod takeover;
mod transport;
#[cfg(feature = "serde")]
pub mod typed;
#[cfg(feature = "handoff")]
#[doc = include_str!("watching.md")]
pub mod watching {}

pub use closer::close_in_background;
pub use codec::FrameCodec;
pub use error::{Error, SendError};
pub use frame::{Fds, Frame};
pub use framed::{Framed, Sender};
pub use limits::Limits;
pub use send_fd::SendFd;
pub use socket::{Listener, Socket, SocketKind};

/// Compiles the examples of README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
