//! The "open server" of *Advanced Programming in the UNIX Environment*: a client asks for files by
//! path and mode, a server opens them and answers with the descriptor, or with the number of the
//! error.
//!
//! The example shows a protocol with types of its own, made of `FrameCodec` by `map`. A reply is a
//! file, an `errno`, or a note; notes may come before the other two. Each side asks the kernel for
//! the uid of the other one. The server is this process, on tokio. It starts the client, a
//! command-line tool without a runtime (`fdwire::blocking`), which connects to a named socket and
//! waits at most ten seconds for each reply.
//!
//! ```sh
//! cargo run --example open_server -- Cargo.toml missing       # one file, and one error
//! cargo run --example open_server -- --append "one more" /tmp/notes.txt
//! ```

use std::{
    convert::Infallible,
    error::Error as StdError,
    ffi::OsStr,
    fs::File,
    io::{self, ErrorKind, Seek, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use fdwire::{
    Error, Frame, FrameCodec, Framed, Listener, Socket, SocketKind, blocking,
    codec::{Codec, Decoder, Encoder},
};
use futures::{SinkExt, TryStreamExt};
use nix::libc;
use tokio::{fs::OpenOptions, process::Command};

/// Prints files that a server opens.
#[derive(Parser)]
struct Args {
    /// Append this line to each file before printing it.
    #[arg(long, value_name = "LINE")]
    append: Option<String>,
    /// The path where the server listens. By default in a directory that is removed afterwards.
    #[arg(long)]
    path: Option<PathBuf>,
    /// Be the client of the server that listens on this path.
    #[arg(long, hide = true)]
    client_of: Option<PathBuf>,
    /// Files to ask for.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// The time that the client waits for a reply. A server that has hung must not hang its clients.
const PATIENCE: Duration = Duration::from_secs(10);

enum Reply {
    File(File),
    Failed(io::Error),
    Note(String),
}

/// Makes the codec of replies: `F` with a descriptor, `E` and an error number, or `N` and a text.
/// A request is `r` (read) or `a` (append), and the path.
fn replies() -> impl Decoder<Item = Reply, Error = Error> + Encoder<Reply, Error = Error> {
    FrameCodec::default().map(
        |Frame { payload, fds }: Frame| match (&payload[..], fds.into_array()) {
            (b"F", Ok([file])) => Ok(Reply::File(file.into())),
            (&[b'E', a, b, c, d], Err(_)) => {
                Ok(Reply::Failed(io::Error::from_raw_os_error(i32::from_be_bytes([a, b, c, d]))))
            }
            ([b'N', text @ ..], Err(_)) => {
                Ok(Reply::Note(String::from_utf8_lossy(text).into_owned()))
            }
            _ => Err(nonsense("reply")),
        },
        |reply: Reply| {
            Ok(match reply {
                Reply::File(file) => Frame::new("F").with_fd(file),
                Reply::Failed(error) => {
                    let number = error.raw_os_error().unwrap_or(libc::EIO);
                    Frame::new([&b"E"[..], &number.to_be_bytes()].concat())
                }
                Reply::Note(text) => Frame::new(format!("N{text}")),
            })
        },
    )
}

fn nonsense(what: &str) -> Error {
    Error::invalid(format!("the {what} is malformed"))
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = if args.client_of.is_some() { client(args) } else { server(args) };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}

/// Serves until the client that it starts has ended.
#[tokio::main(flavor = "current_thread")]
async fn server(args: Args) -> Result<ExitCode, Box<dyn StdError>> {
    let temporary = tempfile::tempdir()?;
    let path = args.path.unwrap_or_else(|| temporary.path().join("socket"));
    let listener = Listener::bind(&path, SocketKind::SeqPacket)
        .map_err(|error| format!("cannot listen on {}: {error}", path.display()))?;
    let mut client = Command::new(std::env::current_exe()?)
        .arg("--client-of")
        .arg(&path)
        .args(args.append.map(|line| format!("--append={line}")))
        .arg("--")
        .args(args.files)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot start the client: {error}"))?;
    let status = tokio::select! {
        status = client.wait() => status?,
        failed = serve(&listener) => match failed? {},
    };
    match status.code() {
        Some(0) => Ok(ExitCode::SUCCESS),
        Some(_) => Ok(ExitCode::FAILURE), // the client has printed the reason
        None => Err(format!("the client died ({status})").into()),
    }
}

async fn serve(listener: &Listener) -> io::Result<Infallible> {
    loop {
        let socket = listener.accept().await?;
        tokio::spawn(async {
            if let Err(error) = answer(socket).await {
                eprintln!("server: a client is disconnected: {error}");
            }
        });
    }
}

async fn answer(socket: Socket) -> Result<(), Error> {
    let who = socket.peer_cred()?;
    let mut client = Framed::with_codecs(socket, FrameCodec::default(), replies());
    while let Some(request) = client.try_next().await? {
        let (append, path) = match &request.payload[..] {
            [b'r', path @ ..] => (false, Path::new(OsStr::from_bytes(path))),
            [b'a', path @ ..] => (true, Path::new(OsStr::from_bytes(path))),
            _ => return Err(nonsense("request")),
        };
        let note = format!("uid {}, gid {} asks for {}", who.uid, who.gid, path.display());
        client.feed(Reply::Note(note)).await?; // is sent together with the next reply
        // Without O_NONBLOCK, opening a FIFO that nobody writes to would block. Regular files
        // ignore it.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let opened =
            OpenOptions::new().read(true).append(append).custom_flags(flags).open(path).await;
        let reply = match opened {
            Ok(file) => Reply::File(file.into_std().await),
            Err(error) => Reply::Failed(error),
        };
        client.send(reply).await?;
    }
    Ok(())
}

fn client(args: Args) -> Result<ExitCode, Box<dyn StdError>> {
    let path = args.client_of.unwrap_or_default();
    let socket = blocking::Socket::connect(&path, SocketKind::SeqPacket)
        .map_err(|error| format!("cannot connect to {}: {error}", path.display()))?;
    let who = socket.peer_cred()?;
    let mut out = io::stdout();
    writeln!(out, "client: connected to a server of uid {}, gid {}", who.uid, who.gid)?;
    let mut server = blocking::Framed::with_codecs(socket, replies(), FrameCodec::default());
    server.set_read_timeout(Some(PATIENCE));
    let mode = if args.append.is_some() { b"a" } else { b"r" };
    let mut code = ExitCode::SUCCESS;
    for path in args.files {
        let request = Frame::new([mode, path.as_os_str().as_bytes()].concat());
        server
            .send(request)
            .map_err(|error| format!("cannot send a request to the server: {error}"))?;
        let opened = loop {
            match server.next().ok_or("the server is gone")?? {
                Reply::Note(text) => writeln!(out, "server: {text}")?,
                Reply::File(file) => break Ok(file),
                Reply::Failed(error) => break Err(error),
            }
        };
        if let Err(error) = opened.and_then(|file| show(&path, file, args.append.as_deref())) {
            eprintln!("error: {}: {error}", path.display());
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

fn show(path: &Path, mut file: File, append: Option<&str>) -> io::Result<()> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    if let Some(line) = append {
        writeln!(file, "{line}")?;
        file.rewind()?;
    }
    let mut out = io::stdout();
    writeln!(out, "==> {} <==", path.display())?;
    io::copy(&mut file, &mut out)?;
    Ok(())
}
