//! Two processes draw in one image: its memory is a memfd, passed in a frame together with an eventfd as doorbell.
//!
//! ```text
//!             frame: width, height, stride + memfd + eventfd
//!   parent ───────────────────────────────────────────────────► child
//!     │    ───────────────────────────────────────────────────►   │
//!     │                   frame: draw picture 7                   │
//!     │    ◄───────────────────────────────────────────────────   │
//!     ▼                  eventfd: it is drawn                     ▼
//!   reads ◄─────────────── the same memory ◄─────────────────── writes
//! ```
//!
//! `image.rs` checks and maps the memory, `parent.rs` and `child.rs` are the two processes, `measure.rs` the figures.
//!
//! ```text
//! cargo run --release --example shm_share
//! cargo run --release --example shm_share -- --width 3840 --height 2160 --rounds 50
//! cargo run --example shm_share -- --sabotage short       # or unsealed, kind, doorbell, gone: one line, exit code 1
//! cargo run --example shm_share -- --sabotage untraceable # pidfd_getfd is refused, the rest works
//! ```
//!
//! Prints a pixel before and after, then what it saves to share an image instead of copying it through the socket, and
//! what it takes to get the descriptor by `pidfd_getfd` instead of in a frame. Drawing has its own price in shared
//! memory, an atomic at a time, so what sharing saves shows where an image is handed over that is drawn already.

mod child;
mod image;
mod measure;
mod parent;

use std::{
    error::Error as StdError,
    io::{self, ErrorKind},
    process::ExitCode,
};

use clap::{Parser, ValueEnum};
use fdwire::{Error, FrameCodec, Framed, Limits, Socket};

type Result<T> = std::result::Result<T, Box<dyn StdError>>;

/// Shares the memory of an image with another process, and measures it against copying and against pidfd_getfd.
#[derive(Parser)]
#[command(name = "shm_share")]
struct Arguments {
    /// Width of the image in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 1920, value_parser = clap::value_parser!(u32).range(1..=8192))]
    width: u32,

    /// Height of the image in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 1080, value_parser = clap::value_parser!(u32).range(1..=8192))]
    height: u32,

    /// How often each way is measured
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Show what happens when something is wrong
    #[arg(long, value_name = "WHAT")]
    sabotage: Option<Sabotage>,

    /// Be the other process, with the socket as standard input
    #[arg(long, hide = true)]
    child: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sabotage {
    /// The memfd is shorter than the image
    Short,
    /// The memfd can still be cut short
    Unsealed,
    /// A pipe comes in place of the memfd
    Kind,
    /// A pipe comes in place of the eventfd
    Doorbell,
    /// The child dies before it has drawn
    Gone,
    /// The child does not let itself be traced, and so nobody takes its descriptors
    Untraceable,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.child {
        true => child::run(arguments.sabotage).await,
        false => parent::run(&arguments).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shm_share: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Frames that may be as long as the largest image.
fn framed(socket: Socket) -> io::Result<Framed<FrameCodec>> {
    // The default holds a fortieth of a full HD image, and the sender would sleep as often.
    socket.set_send_buffer_size(4 << 20)?;
    Ok(Framed::new(socket, FrameCodec::new(Limits::default().max_payload_bytes(image::LARGEST_BYTES))))
}

/// Whether the error says only that the other process has ended.
fn is_end(error: &Error) -> bool {
    match error {
        Error::Io(error) => error.kind() == ErrorKind::BrokenPipe,
        error => matches!(error, Error::Reset),
    }
}
