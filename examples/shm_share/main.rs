//! Two processes draw in one image: its memory is a memfd, passed in a frame together with an
//! eventfd as doorbell.
//!
//! ```text
//!             frame: width, height, stride + memfd + eventfd
//!   parent ───────────────────────────────────────────────────► child
//!     │    ────────────────── frame: draw 7 ──────────────────►   │
//!     │    ◄────────────── eventfd: it is drawn ───────────────   │
//!     ▼                                                           ▼
//!   reads ◄─────────────── the same memory ◄─────────────────── writes
//! ```
//!
//! ```text
//! cargo run --example shm_share
//! cargo run --release --example shm_share -- --rounds 50     # measures what sharing saves
//! ```
//!
//! `image.rs` checks and maps the memory. `measure.rs` compares sharing with a copy through the
//! socket, and a descriptor in a frame with `pidfd_getfd`.

mod image;
mod measure;

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, ExitCode, Stdio};
use std::{error::Error, fs, io, io::Write, sync::atomic::Ordering::Relaxed};

use bytes::Bytes;
use clap::{Parser, value_parser};
use fdwire::{Frame, FrameCodec, Framed, Limits, Socket, SocketKind};
use futures::{SinkExt, TryStreamExt};
use image::{Image, Layout};
use rustix::event::{EventfdFlags, eventfd};
use tokio::{io::AsyncReadExt, net::unix::pipe};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Shares the memory of an image with another process, and measures it against copying.
#[derive(Parser)]
struct Arguments {
    /// Width of the image in pixels
    #[arg(long, default_value_t = 1920, value_parser = value_parser!(u32).range(1..=8192))]
    width: u32,
    /// Height of the image in pixels
    #[arg(long, default_value_t = 1080, value_parser = value_parser!(u32).range(1..=8192))]
    height: u32,
    /// Number of times that each way is measured [default: as many as take two seconds]
    #[arg(long, value_parser = value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Be the other process, with the socket as standard input
    #[arg(long, hide = true)]
    child: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = if arguments.child { child().await } else { parent(&arguments).await };
    let Err(error) = done else { return ExitCode::SUCCESS };
    eprintln!("shm_share: {error}");
    ExitCode::FAILURE
}

const GONE: &str = "the other process is gone";

/// Frames that may be as long as the largest image.
fn framed(socket: Socket) -> io::Result<Framed<FrameCodec>> {
    // The default buffer holds a fortieth of a full HD image: the sender would sleep 40 times.
    socket.set_send_buffer_size(4 << 20)?;
    Ok(Framed::new(
        socket,
        FrameCodec::new(Limits::default().max_payload_bytes(image::LARGEST_BYTES)),
    ))
}

/// Owns the image and asks for drawings.
async fn parent(arguments: &Arguments) -> Result<()> {
    let (ours, theirs) = Socket::pair(SocketKind::SeqPacket)?;
    let stdin = Stdio::from(OwnedFd::from(theirs));
    let mut child = Command::new(std::env::current_exe()?).arg("--child").stdin(stdin).spawn()?;
    let shared = share(arguments, framed(ours)?, &child).await;
    // The socket is closed by now, so the child has ended or is about to. If the child has failed,
    // that is why sharing has failed too.
    let status = child.wait()?;
    if status.success() { shared } else { Err(format!("{GONE} ({status})").into()) }
}

async fn share(arguments: &Arguments, mut socket: Framed<FrameCodec>, child: &Child) -> Result<()> {
    let Arguments { width, height, rounds, .. } = *arguments;
    let stride = (width * 4).next_multiple_of(64);
    let image = Image::new(Layout { width, height, stride })?;
    let doorbell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let frame = Frame::new(format!("{width} {height} {stride}"));
    socket.send(frame.with_fd(image.file.try_clone()?).with_fd(doorbell.try_clone()?)).await?;
    // An event loop treats an eventfd like a pipe: it is readable or not. `unchecked`, because it
    // is not a pipe.
    let mut peer = Peer { socket, doorbell: pipe::Receiver::from_owned_fd_unchecked(doorbell)? };

    let before = image.pixel(0)?.load(Relaxed);
    peer.draw(7).await?;
    image.check(7)?;
    let (we, they, after) = (std::process::id(), child.id(), image.pixel(0)?.load(Relaxed));
    writeln!(
        io::stdout(),
        "{width} x {height} pixels, {} bytes, in a sealed memfd",
        image.layout.bytes()
    )?;
    writeln!(
        io::stdout(),
        "process {they} drew: in process {we} one pixel was {before:08x}, and is {after:08x}\n"
    )?;
    measure::run(&mut peer, &image, child, rounds).await
}

/// The child, from its parent.
struct Peer {
    socket: Framed<FrameCodec>,
    doorbell: pipe::Receiver,
}

impl Peer {
    async fn ask(&mut self, request: String) -> Result<Frame> {
        self.socket.send(Frame::new(request)).await?;
        Ok(self.socket.try_next().await?.ok_or(GONE)?)
    }

    /// Waits until the child has drawn. A child that has died never rings, so the socket is watched
    /// too.
    async fn draw(&mut self, number: u32) -> Result<()> {
        self.socket.send(Frame::new(format!("draw {number}"))).await?;
        let mut rings = [0; 8];
        tokio::select! {
            rung = self.doorbell.read_exact(&mut rings) => Ok(rung.map(drop)?),
            other = self.socket.try_next() => {
                Err(format!("the doorbell should ring, and this came: {other:?}").into())
            }
        }
    }
}

/// Receives the image and draws in it. Trusts nothing: neither the payload nor the kinds of the
/// descriptors.
async fn child() -> Result<()> {
    let mut parent = framed(Socket::from_stdin()?)?;
    let Frame { payload, fds } = parent.try_next().await?.ok_or(GONE)?;
    let layout = Layout::from_payload(&payload)?;
    let [memfd, doorbell] =
        fds.into_array().map_err(|fds| format!("two descriptors are due, not {}", fds.len()))?;
    let image = Image::map(memfd, layout)?;
    // A write to anything else, such as a full pipe, could block. No system call tells what is an
    // eventfd.
    if fs::read_link(format!("/proc/self/fd/{}", doorbell.as_raw_fd()))?.as_os_str()
        != "anon_inode:[eventfd]"
    {
        return Err("the doorbell is not an eventfd".into());
    }
    let mut doorbell = fs::File::from(doorbell);

    // A request that is repeated is not drawn again, so that handing over can be measured alone.
    let (mut last, mut copy) = (Bytes::new(), Bytes::new());
    while let Some(Frame { payload, .. }) = parent.try_next().await? {
        let request = String::from_utf8_lossy(&payload);
        let (what, number) = request.split_once(' ').unwrap_or((&request, ""));
        let answer = match (what, number.parse().ok()) {
            ("draw", Some(_)) if payload == last => None,
            ("draw", Some(number)) => image.draw(number).map(|()| None)?,
            ("copy", Some(number)) => {
                copy = if payload == last { copy } else { layout.draw_copy(number).into() };
                Some(Frame::new(copy.clone()))
            }
            ("descriptor", None) => Some(Frame::new("").with_fd(image.file.try_clone()?)),
            ("number", None) => Some(Frame::new(image.file.as_raw_fd().to_string())),
            _ => return Err(format!("request {request:?} is not known").into()),
        };
        last = payload;
        match answer {
            Some(frame) => parent.send(frame).await.map_err(|error| format!("{GONE}: {error}"))?,
            None => doorbell.write_all(&1u64.to_ne_bytes())?,
        }
    }
    Ok(())
}
