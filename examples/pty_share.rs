//! A terminal passed between processes: a server sends 250 bytes and both ends of a pty over a
//! named socket; the client talks on the terminal to the server, which holds the controlling end
//! and plays the one who types.
//!
//! Shows a frame with data and two descriptors, and that the terminal works as one on both sides:
//! it is a tty, its window size is one thing seen by both, it echoes, the one who types can correct
//! a line, and Ctrl-D ends the input.
//!
//! ```sh
//! cargo run --example pty_share
//! ```

use std::{
    error::Error,
    fs::File,
    io::{self, BufRead, BufReader, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use fdwire::{Frame, FrameCodec, Framed, Listener, Socket, SocketKind};
use futures::{SinkExt, TryStreamExt};
use rustix::{
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt},
    termios::{Winsize, isatty, tcgetwinsize, tcsetwinsize, ttyname},
};
use tokio::{
    process::{Child, Command},
    task::spawn_blocking,
};

/// Passes a terminal to another process and talks with it there.
#[derive(Parser)]
struct Args {
    /// Where the server listens. By default in a directory that is removed afterwards.
    #[arg(long)]
    path: Option<PathBuf>,
    /// The client of the server that listens there.
    #[arg(long, hide = true)]
    client_of: Option<PathBuf>,
}

const DATA: [u8; 250] = [b'.'; 250];
const BACKSPACE: char = '\x7f';
const CTRL_D: char = '\x04';

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.client_of {
        Some(path) => client(&path).await,
        None => server(args.path).await,
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}

async fn server(path: Option<PathBuf>) -> Result<ExitCode, Box<dyn Error>> {
    let temporary = tempfile::tempdir()?;
    let path = path.unwrap_or_else(|| temporary.path().join("socket"));
    let listener = Listener::bind(&path, SocketKind::SeqPacket)
        .map_err(|error| format!("cannot listen at {}: {error}", path.display()))?;
    let (controller, terminal) =
        open_pty().map_err(|error| format!("cannot open a pty: {error}"))?;
    let mut client = Command::new(std::env::current_exe()?)
        .arg("--client-of")
        .arg(&path)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot start the client: {error}"))?;

    let shared = share(&listener, &mut client, controller, terminal).await;
    let status = client.wait().await?;
    match status.code() {
        Some(0) => shared.map(|()| ExitCode::SUCCESS),
        Some(_) => Ok(ExitCode::FAILURE), // the client has said why
        None => Err(format!("the client died ({status})").into()),
    }
}

fn open_pty() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = openpt(flags)?;
    grantpt(&controller)?;
    unlockpt(&controller)?;
    let terminal = ioctl_tiocgptpeer(&controller, flags)?;
    tcsetwinsize(&controller, size(24, 80))?;
    Ok((controller, terminal))
}

async fn share(
    listener: &Listener,
    client: &mut Child,
    controller: OwnedFd,
    terminal: OwnedFd,
) -> Result<(), Box<dyn Error>> {
    let socket = tokio::select! {
        socket = listener.accept() => socket?,
        status = client.wait() => {
            return Err(format!("the client ended before it connected ({})", status?).into());
        }
    };
    let mut connection = Framed::new(socket, FrameCodec::default());
    // The terminal is closed here once it is sent: the client's end of it is then the end for the
    // controller, too.
    let frame = Frame::new(&DATA[..]).with_fd(controller.try_clone()?).with_fd(terminal);
    connection
        .send(frame)
        .await
        .map_err(|error| format!("the client takes nothing any more: {error}"))?;
    writeln!(std::io::stdout(), "server: sent {} bytes and a pty of 24 x 80", DATA.len())?;

    let controller = File::from(controller);
    let typist = controller.try_clone()?;
    spawn_blocking(move || type_on(typist))
        .await?
        .map_err(|error| format!("the terminal is gone: {error}"))?;
    let report = connection.try_next().await?.ok_or("the client is gone")?.payload;
    let Winsize { ws_row: rows, ws_col: columns, .. } = tcgetwinsize(&controller)?;
    println!("server: the client says {report:?}; the window is {rows} x {columns}");
    if (&report[..], rows, columns) != (b"end of file", 50, 132) {
        return Err("the client has not used the terminal as agreed".into());
    }
    Ok(())
}

/// What one who sits at the terminal does: reads a question, types an answer with a correction, and
/// Ctrl-D.
fn type_on(mut controller: File) -> io::Result<()> {
    let mut screen = BufReader::new(controller.try_clone()?).lines();
    let mut see = || -> io::Result<()> {
        let line = screen.next().ok_or(io::ErrorKind::UnexpectedEof)??;
        writeln!(std::io::stdout(), "server: sees   {line:?}")?;
        Ok(())
    };
    see()?;
    writeln!(controller, "fdwirx{BACKSPACE}e")?;
    see()?; // the echo
    see()?;
    write!(controller, "{CTRL_D}")
}

async fn client(path: &Path) -> Result<ExitCode, Box<dyn Error>> {
    let socket = Socket::connect(path, SocketKind::SeqPacket)
        .await
        .map_err(|error| format!("cannot connect to {}: {error}", path.display()))?;
    let mut server = Framed::new(socket, FrameCodec::default());
    let Frame { payload, fds } = server.try_next().await?.ok_or("the server is gone")?;
    if payload != DATA[..] {
        return Err(format!("{} bytes came that are not the ones agreed on", payload.len()).into());
    }
    let [controller, terminal] =
        fds.into_array().map_err(|fds| format!("two descriptors expected, {} came", fds.len()))?;
    if !isatty(&terminal) {
        return Err("what came is not a terminal".into());
    }
    if ptsname(&controller, vec![]).ok() != Some(ttyname(&terminal, vec![])?) {
        return Err("what came is not the two ends of one terminal".into());
    }
    let Winsize { ws_row: rows, ws_col: columns, .. } = tcgetwinsize(&terminal)?;
    println!(
        "client: got {} bytes and a terminal, {rows} x {columns}; makes it 50 x 132",
        payload.len()
    );
    tcsetwinsize(&terminal, size(50, 132))?;
    // Kept, it would hide the server's end: a terminal hangs up with the last copy of its
    // controller.
    drop(controller);
    spawn_blocking(move || converse(terminal.into()))
        .await?
        .map_err(|error| format!("on the terminal: {error}"))?;
    let report = server.send(Frame::new("end of file")).await;
    report.map_err(|error| format!("the server takes nothing any more: {error}"))?;
    Ok(ExitCode::SUCCESS)
}

/// What a program on a terminal does: asks, reads a line, answers, and reads on to the end.
fn converse(mut terminal: File) -> io::Result<()> {
    let mut lines = BufReader::new(terminal.try_clone()?).lines();
    writeln!(terminal, "who is there?")?;
    // A hang-up is an error or the end of the file, whichever is noticed first.
    let Some(Ok(name)) = lines.next() else {
        return Err(io::Error::other("the other end is gone"));
    };
    writeln!(std::io::stdout(), "client: reads  {name:?}")?;
    writeln!(terminal, "welcome, {name}")?;
    match lines.next().transpose()? {
        None => writeln!(std::io::stdout(), "client: reads  the end of the file")?,
        Some(line) => return Err(io::Error::other(format!("the end was expected, {line:?} came"))),
    }
    Ok(())
}
