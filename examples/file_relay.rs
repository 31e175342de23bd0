//! Five files, each written by two processes: the parent opens a file, writes a line, sends the
//! file and closes it; the child adds a line to each file that arrives, until the stream ends.
//!
//! The example shows that the **same open file** arrives, not the same name opened again: the file
//! was not opened for appending, and still the child goes on where the parent stopped, because the
//! offset belongs to the open file. It also shows that the sender closes a descriptor as soon as it
//! is sent, and how the end of the stream ends the other process.
//!
//! ```sh
//! cargo run --example file_relay              # in a directory that is removed afterwards
//! cargo run --example file_relay -- /tmp      # leaves relay-1.txt to relay-5.txt there
//! ```

use std::{
    error::Error,
    fs::File,
    io::{self, Seek, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use clap::Parser;
use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
use futures::{SinkExt, TryStreamExt};
use tokio::process::Command;

/// Two processes write five files, passing each on while it is open.
#[derive(Parser)]
struct Args {
    /// The directory to make the files in; none of them may exist. By default a directory that is
    /// removed afterwards.
    directory: Option<PathBuf>,
    /// Be the process that adds lines, with the socket as standard input.
    #[arg(long, hide = true)]
    child: bool,
}

const PARENTS_LINE: &str = "the parent wrote this\n";
const CHILDS_LINE: &str = "the child went on\n";

fn names() -> impl Iterator<Item = String> {
    (1..=5).map(|number| format!("relay-{number}.txt"))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let done = if args.child { append().await } else { parent(args).await };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}

async fn parent(args: Args) -> Result<ExitCode, Box<dyn Error>> {
    let temporary = tempfile::tempdir()?;
    let directory = args.directory.as_deref().unwrap_or(temporary.path());
    let (ours, childs) = Socket::pair(SocketKind::SeqPacket)?;
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--child")
        .stdin(Stdio::from(OwnedFd::from(childs)))
        .spawn()
        .map_err(|error| format!("cannot start the child: {error}"))?;

    let sent = write_and_send(ours, directory).await;
    let status = child.wait().await?;
    if status.code().is_some_and(|code| code != 0) {
        return Ok(ExitCode::FAILURE); // the child has printed the reason
    }
    if !status.success() {
        return Err(format!("the child died ({status})").into());
    }
    sent?;
    for name in names() {
        let content = std::fs::read_to_string(directory.join(&name))?;
        if content != [PARENTS_LINE, CHILDS_LINE].concat() {
            return Err(
                format!("{name}: the child's line is not where it should be: {content:?}").into()
            );
        }
        writeln!(std::io::stdout(), "parent: {name} holds {content:?}")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Sends the files, then the end of the stream.
async fn write_and_send(socket: Socket, directory: &Path) -> Result<(), Box<dyn Error>> {
    let mut child = Framed::new(socket, FrameCodec::default());
    for name in names() {
        let path = directory.join(&name);
        let failed = |error: io::Error| format!("{}: {error}", path.display());
        let mut file = File::options().write(true).create_new(true).open(&path).map_err(failed)?;
        file.write_all(PARENTS_LINE.as_bytes()).map_err(failed)?;
        writeln!(
            std::io::stdout(),
            "parent: {name}: wrote {} bytes, sends it and closes it",
            PARENTS_LINE.len()
        )?;
        let frame = Frame::new(name).with_fd(file);
        child
            .send(frame)
            .await
            .map_err(|error| format!("cannot send {} to the child: {error}", path.display()))?;
    }
    Ok(child.close().await?)
}

async fn append() -> Result<ExitCode, Box<dyn Error>> {
    let mut parent = Framed::new(Socket::from_stdin()?, FrameCodec::default());
    while let Some(Frame { payload, fds }) = parent.try_next().await? {
        let name = String::from_utf8_lossy(&payload);
        let [file] = fds.into_array().map_err(|fds| {
            format!("{name}: one descriptor was expected, and {} came", fds.len())
        })?;
        let mut file = File::from(file);
        if !file.metadata()?.is_file() {
            return Err(format!("{name}: the descriptor is not a regular file").into());
        }
        let failed = |error| format!("{name}: {error}");
        let offset = file.stream_position().map_err(failed)?;
        file.write_all(CHILDS_LINE.as_bytes()).map_err(failed)?;
        writeln!(
            std::io::stdout(),
            "child:  {name}: came at offset {offset}, now at {}",
            file.stream_position()?
        )?;
    }
    writeln!(std::io::stdout(), "child:  the stream has ended")?;
    Ok(ExitCode::SUCCESS)
}
