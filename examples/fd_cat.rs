//! The "strange cat": `cat`, but the process that prints a file is not the one that opens it.
//!
//! A child opens the file and passes it, with its name, over a pair of STREAM sockets; the parent
//! prints it. The example shows how to start a child with a socket as its standard input, a frame
//! with one descriptor, and a failure as a frame without one. The parent runs on tokio. The child
//! is a small helper without a runtime (`fdwire::blocking`); the parent cannot tell the difference.
//!
//! ```sh
//! cargo run --example fd_cat -- Cargo.toml
//! cargo run --example fd_cat -- --verbose Cargo.toml    # also prints who has opened the file
//! cargo run --example fd_cat -- missing           # error: missing: No such file or directory
//! ```

use std::{
    error::Error,
    fs::File,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use clap::Parser;
use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind, blocking};
use futures::TryStreamExt;
use nix::libc;
use tokio::{io::AsyncWriteExt, process::Command};

/// Prints a file that another process has opened.
#[derive(Parser)]
struct Args {
    /// Print on standard error which process has opened the file.
    #[arg(long)]
    verbose: bool,
    /// Be the process that opens the file, with the socket as standard input.
    #[arg(long, hide = true)]
    child: bool,
    /// The file to print.
    file: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = if args.child { open_and_pass(&args.file) } else { receive_and_print(&args) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn receive_and_print(args: &Args) -> Result<(), Box<dyn Error>> {
    let (ours, childs) = Socket::pair(SocketKind::Stream)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--child", "--"])
        .arg(&args.file)
        .stdin(Stdio::from(OwnedFd::from(childs)))
        .spawn()
        .map_err(|error| format!("cannot start the child: {error}"))?;

    // The stream ends when the child does, because its end of the socket is open nowhere else.
    let Some(frame) = Framed::new(ours, FrameCodec::default()).try_next().await? else {
        return Err(format!("the child is gone without an answer ({})", child.wait().await?).into());
    };
    let name = Path::new(std::ffi::OsStr::from_bytes(&frame.payload)).display();
    let [file] = match frame.fds.into_array() {
        Ok(file) => file.map(File::from),
        // Without a file, the payload is the reason.
        Err(fds) if fds.is_empty() => return Err(name.to_string().into()),
        Err(fds) => return Err(format!("{} descriptors came for one file", fds.len()).into()),
    };
    if !file.metadata()?.is_file() {
        return Err(format!("{name}: not a regular file").into());
    }
    if args.verbose {
        eprintln!(
            "{name}: opened by process {}, descriptor {} here",
            child.id().unwrap_or(0),
            file.as_raw_fd()
        );
    }
    let mut out = tokio::io::stdout();
    tokio::io::copy(&mut tokio::fs::File::from(file), &mut out)
        .await
        .map_err(|error| format!("{name}: {error}"))?;
    Ok(out.flush().await?)
}

/// Answers with the name and the file, or with one line that has the reason for the failure.
fn open_and_pass(path: &Path) -> Result<(), Box<dyn Error>> {
    let mut parent = blocking::Framed::new(blocking::Socket::from_stdin()?, FrameCodec::default());
    // Without O_NONBLOCK, opening a FIFO that nobody writes to would block. Regular files ignore
    // it.
    let opened =
        File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let answer = match opened {
        Ok(file) => Frame::new(path.as_os_str().as_bytes().to_vec()).with_fd(file),
        Err(error) => Frame::new(format!("{}: {error}", path.display())),
    };
    match parent.send(answer) {
        Err(refused) if refused.error.is_peer_gone() => Err("the parent is gone".into()),
        sent => Ok(sent?),
    }
}
