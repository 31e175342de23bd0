//! A terminal passed between processes: a server sends 250 bytes and both ends of a pty over a
//! named socket. The client runs a dialogue on the terminal. The server holds the controlling end
//! and acts as the person who types.
//!
//! The example shows a frame with data and two descriptors, and that the terminal works in both
//! processes: it is a tty, both see the same window size, it echoes, a typed line can be corrected,
//! and Ctrl-D ends the input.
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
    /// The path where the server listens. By default in a directory that is removed afterwards.
    #[arg(long)]
    path: Option<PathBuf>,
    /// Be the client of the server that listens on this path.
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
        .map_err(|error| format!("cannot listen on {}: {error}", path.display()))?;
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
        Some(_) => Ok(ExitCode::FAILURE), // the client has printed the reason
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
    // The terminal is closed here as soon as it is sent. So when the client closes its copy, the
    // controller sees the end.
    let frame = Frame::new(&DATA[..]).with_fd(controller.try_clone()?).with_fd(terminal);
    connection
        .send(frame)
        .await
        .map_err(|error| format!("cannot send the terminal to the client: {error}"))?;
    writeln!(std::io::stdout(), "server: sent {} bytes and a pty of 24 x 80", DATA.len())?;

    let controller = File::from(controller);
    let typist = controller.try_clone()?;
    spawn_blocking(move || type_on(typist))
        .await?
        .map_err(|error| format!("the terminal is gone: {error}"))?;
    let report = connection.try_next().await?.ok_or("the client is gone")?.payload;
    let Winsize { ws_row: rows, ws_col: columns, .. } = tcgetwinsize(&controller)?;
    println!("server: the client reports {report:?}; the window is {rows} x {columns}");
    if (&report[..], rows, columns) != (b"end of file", 50, 132) {
        return Err("the client has not used the terminal as agreed".into());
    }
    Ok(())
}

/// Acts as a person at the terminal: reads a question, types an answer with a correction, and
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
        return Err(format!(
            "the frame should have 250 dots, and has {} other bytes",
            payload.len()
        )
        .into());
    }
    let [controller, terminal] = fds
        .into_array()
        .map_err(|fds| format!("two descriptors were expected, and {} came", fds.len()))?;
    if !isatty(&terminal) {
        return Err("the second descriptor is not a terminal".into());
    }
    if ptsname(&controller, vec![]).ok() != Some(ttyname(&terminal, vec![])?) {
        return Err("the descriptors are not the two ends of one terminal".into());
    }
    let Winsize { ws_row: rows, ws_col: columns, .. } = tcgetwinsize(&terminal)?;
    println!(
        "client: got {} bytes and a terminal, {rows} x {columns}; makes it 50 x 132",
        payload.len()
    );
    tcsetwinsize(&terminal, size(50, 132))?;
    // A terminal hangs up when the last copy of its controller is closed. With a copy here, the
    // client would not notice the end of the server.
    drop(controller);
    spawn_blocking(move || converse(terminal.into()))
        .await?
        .map_err(|error| format!("on the terminal: {error}"))?;
    let report = server.send(Frame::new("end of file")).await;
    report.map_err(|error| format!("cannot send a report to the server: {error}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Acts as a program on a terminal: asks, reads a line, answers, and reads on to the end.
fn converse(mut terminal: File) -> io::Result<()> {
    let mut lines = BufReader::new(terminal.try_clone()?).lines();
    writeln!(terminal, "who is there?")?;
    // A hang-up is reported as an error or as the end of the file.
    let Some(Ok(name)) = lines.next() else {
        return Err(io::Error::other("the other end is gone"));
    };
    writeln!(std::io::stdout(), "client: reads  {name:?}")?;
    writeln!(terminal, "welcome, {name}")?;
    match lines.next().transpose()? {
        None => writeln!(std::io::stdout(), "client: reads  the end of the file")?,
        Some(line) => {
            return Err(io::Error::other(format!("the end was expected, and {line:?} came")));
        }
    }
    Ok(())
}
