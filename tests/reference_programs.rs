//! The reference programs among the examples (`fd_cat`, `file_relay`, `open_server` and
//! `pty_share`), run as a user would run them. If a program fails, it prints one line.

mod common;

use std::{
    fs::{self, File, Permissions},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::PermissionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use common::{example, marked, other_uid, run};
use fdwire::{Frame, FrameCodec, Framed, Listener, Socket, SocketKind};
use futures::{SinkExt, TryStreamExt};
use nix::sys::socket::{Shutdown, shutdown};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::ChildStdout,
};

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Runs a program until it and all processes that hold its output have ended.
async fn finish(command: Command) -> Ran {
    let output = tokio::process::Command::from(command).kill_on_drop(true).output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

fn ran(command: Command) -> Ran {
    run(finish(command))
}

/// Checks that a program has ended with status 1, and that this is its whole standard error.
#[track_caller]
fn check_fails(ran: &Ran, line: &str) {
    assert_eq!(
        (ran.code, &ran.err[..]),
        (Some(1), &format!("error: {line}\n")[..]),
        "output: {}",
        ran.out
    );
}

fn with<const N: usize>(mut command: Command, args: [&Path; N]) -> Command {
    command.args(args);
    command
}

/// Makes a directory that every uid can look into.
fn open_directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
    directory
}

/// Copies a program, by another process. A file that this process writes could be held open by
/// children that other tests start meanwhile, and a program that is open for writing cannot be
/// executed.
fn install(program: impl AsRef<Path>, to: &Path) {
    let installed =
        Command::new("install").args(["-m", "755"]).arg(program.as_ref()).arg(to).status().unwrap();
    assert!(installed.success());
}

/// An example that starts a shell script instead of its other process.
struct WithOtherChild {
    directory: TempDir,
    program: File,
}

impl WithOtherChild {
    /// Prepares an example. It finds itself through `/proc/self/exe`, and for a file that was
    /// removed that name ends in " (deleted)". The script has that name.
    fn new(name: &str, script: &str) -> Self {
        let directory = open_directory();
        let path = directory.path().join(name);
        install(example(name).get_program(), &path);
        let program = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let source = directory.path().join("script");
        fs::write(&source, format!("#!/bin/sh\n{script}\n")).unwrap();
        install(source, &directory.path().join(format!("{name} (deleted)")));
        Self { directory, program }
    }

    fn command(&self) -> Command {
        Command::new(format!("/proc/self/fd/{}", self.program.as_raw_fd()))
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }
}

/// Returns the command of an example in the role of the other process, with its socket as standard
/// input, and the other end of that socket.
fn as_child(name: &str, kind: SocketKind) -> (Framed<FrameCodec>, Command) {
    let (ours, childs) = Socket::pair(kind).unwrap();
    let mut command = example(name);
    command.arg("--child").stdin(Stdio::from(OwnedFd::from(childs)));
    (Framed::new(ours, FrameCodec::default()), command)
}

/// Runs a program in the role of the client, with `serve` as its server.
async fn served<F: Future<Output = ()>>(
    name: &str,
    args: &[&str],
    serve: impl FnOnce(Framed<FrameCodec>) -> F,
) -> Ran {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
    let mut command = example(name);
    command.arg("--client-of").arg(&path).args(args);
    let serve =
        async { serve(Framed::new(listener.accept().await.unwrap(), FrameCodec::default())).await };
    tokio::join!(finish(command), serve).0
}

/// A server that listens. Instead of its client, it has started a process that lasts until `end`.
struct LonelyServer {
    program: WithOtherChild,
    process: tokio::process::Child,
    out: BufReader<ChildStdout>,
}

impl LonelyServer {
    async fn start(name: &str, args: &[&str]) -> Self {
        let program = WithOtherChild::new(name, "echo started; cat");
        let mut command = tokio::process::Command::from(program.command());
        command
            .arg("--path")
            .arg(program.path())
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = command.stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut out = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).await.unwrap();
        assert_eq!(line, "started\n");
        Self { program, process, out }
    }

    async fn connect(&self) -> Framed<FrameCodec> {
        let socket = Socket::connect(self.program.path(), SocketKind::SeqPacket).await.unwrap();
        Framed::new(socket, FrameCodec::default())
    }

    async fn end(mut self) -> Ran {
        drop(self.process.stdin.take());
        let mut out = String::new();
        self.out.read_to_string(&mut out).await.unwrap();
        let output = self.process.wait_with_output().await.unwrap();
        Ran { code: output.status.code(), out, err: String::from_utf8(output.stderr).unwrap() }
    }
}

#[test]
fn wrong_arguments_end_with_status_2_and_the_usage() {
    for (name, args) in [
        ("fd_cat", &[][..]),
        ("fd_cat", &["one", "two"]),
        ("file_relay", &["one", "two"]),
        ("open_server", &[]),
        ("open_server", &["--client-of", "path"]),
        ("pty_share", &["one"]),
        ("pty_share", &["--nonsense"]),
    ] {
        let mut command = example(name);
        command.args(args);
        let ran = ran(command);
        assert_eq!((ran.code, &ran.out[..]), (Some(2), ""), "{name} {args:?}");
        assert!(ran.err.contains(&format!("Usage: {name}")), "{}", ran.err);
    }
}

#[test]
fn other_users_are_refused_with_one_line() {
    let Some(uid) = other_uid() else { return };
    let directory = open_directory();
    let at = |name: &str| directory.path().join(name);
    let secret = at("secret");
    fs::write(&secret, "secret").unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    let as_other = |name: &str| {
        install(example(name).get_program(), &at(name));
        let mut command = Command::new(at(name));
        command.uid(uid).gid(uid);
        command
    };
    let denied = |path: &Path| format!("{}: Permission denied (os error 13)", path.display());

    // Files that the user may not open.
    check_fails(&ran(with(as_other("fd_cat"), [&secret])), &denied(&secret));
    let ran_server = ran(with(as_other("open_server"), [&secret]));
    check_fails(&ran_server, &denied(&secret));
    let note = format!("server: uid {uid}, gid {uid} asks for {}\n", secret.display());
    assert!(ran_server.out.ends_with(&note), "{}", ran_server.out);
    check_fails(
        &ran(with(as_other("file_relay"), [directory.path()])),
        &denied(&at("relay-1.txt")),
    );
    assert_eq!(ran(as_other("pty_share")).code, Some(0));

    // Servers of another user.
    run(async {
        let socket = at("socket");
        for name in ["open_server", "pty_share"] {
            let _listener = Listener::bind(&socket, SocketKind::SeqPacket).unwrap();
            let mut command = as_other(name);
            command.arg("--client-of").arg(&socket);
            if name == "open_server" {
                command.arg(&secret);
            }
            check_fails(&finish(command).await, &format!("cannot connect to {}", denied(&socket)));
        }
    });
}

#[test]
fn a_program_whose_other_process_dies_reports_that() {
    let file = Path::new("Cargo.toml");
    let empty = tempfile::tempdir().unwrap();
    for (name, script, line) in [
        ("fd_cat", "exit 0", "the child is gone without an answer (exit status: 0)"),
        ("fd_cat", "kill -9 $$", "the child is gone without an answer (signal: 9 (SIGKILL))"),
        ("fd_cat", "printf nonsense >&0", "bad magic byte 0x6e where a frame should begin"),
        ("file_relay", "kill -9 $$", "the child died (signal: 9 (SIGKILL))"),
        ("open_server", "kill -9 $$", "the client died (signal: 9 (SIGKILL))"),
        ("pty_share", "kill -9 $$", "the client died (signal: 9 (SIGKILL))"),
        ("pty_share", "exit 0", "the client ended before it connected (exit status: 0)"),
    ] {
        let program = WithOtherChild::new(name, script);
        let args = match name {
            "fd_cat" | "open_server" => &[file][..],
            _ => &[],
        };
        let mut command = program.command();
        command.args(args).current_dir(&empty);
        check_fails(&ran(command), line);
    }
}

mod fd_cat {
    use super::*;

    #[test]
    fn it_prints_files_of_any_size_and_content() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("--file");
        let large: String = "0123456789".repeat(300_000);
        for content in ["a line\n", "", &large] {
            fs::write(&path, content).unwrap();
            let ran = ran(with(example("fd_cat"), [Path::new("--"), &path]));
            assert_eq!((ran.code, &ran.err[..]), (Some(0), ""));
            assert!(ran.out == content);
        }
        // The size of this file is 0, but it has contents.
        let version = ran(with(example("fd_cat"), [Path::new("/proc/version")]));
        assert_eq!(
            (version.code, version.out),
            (Some(0), fs::read_to_string("/proc/version").unwrap())
        );

        let verbose = ran(with(example("fd_cat"), [Path::new("--verbose"), &path]));
        assert!(
            verbose.err.starts_with(&format!("{}: opened by process ", path.display())),
            "{}",
            verbose.err
        );
    }

    #[test]
    fn it_reports_why_a_file_cannot_be_printed_and_does_not_hang() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name| directory.path().join(name);
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (name, reason) in [
            ("missing", "No such file or directory (os error 2)"),
            ("", "not a regular file"),
            ("fifo", "not a regular file"),
        ] {
            let path = at(name);
            check_fails(
                &ran(with(example("fd_cat"), [&path])),
                &format!("{}: {reason}", path.display()),
            );
        }
    }

    #[test]
    fn its_child_ends_when_the_parent_is_gone() {
        run(async {
            let (parent, mut child) = as_child("fd_cat", SocketKind::Stream);
            child.arg("Cargo.toml");
            // The shutdown also ends copies that a child of another test may have for a moment.
            shutdown(parent.socket().as_fd().as_raw_fd(), Shutdown::Both).unwrap();
            drop(parent);
            check_fails(&finish(child).await, "the parent is gone");
        });
    }

    #[test]
    fn its_child_refuses_standard_input_that_is_no_socket() {
        let mut child = example("fd_cat");
        child.args(["--child", "Cargo.toml"]).stdin(Stdio::null());
        check_fails(&ran(child), "standard input: descriptor cannot be used: it is not a socket");
    }
}

mod file_relay {
    use super::*;

    #[test]
    fn two_processes_write_the_same_open_files() {
        let directory = tempfile::tempdir().unwrap();
        let ran = ran(with(example("file_relay"), [directory.path()]));
        assert_eq!((ran.code, &ran.err[..]), (Some(0), ""));
        for number in 1..=5 {
            let name = format!("relay-{number}.txt");
            let content = fs::read_to_string(directory.path().join(&name)).unwrap();
            assert_eq!(content, "the parent wrote this\nthe child went on\n");
            for line in [
                format!("parent: {name}: wrote 22 bytes, sends it and closes it"),
                format!("child:  {name}: came at offset 22, now at 40"),
                format!("parent: {name} holds {content:?}"),
            ] {
                assert!(ran.out.lines().any(|printed| printed == line), "no {line} in {}", ran.out);
            }
        }
        assert!(ran.out.contains("child:  the stream has ended\n"));
    }

    #[test]
    fn it_leaves_no_files_if_no_directory_is_given() {
        let temporary = tempfile::tempdir().unwrap();
        let mut command = example("file_relay");
        command.env("TMPDIR", temporary.path());
        assert_eq!(ran(command).code, Some(0));
        assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
    }

    #[test]
    fn it_overwrites_no_file_and_refuses_a_path_that_is_no_directory() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("relay-3.txt");
        fs::write(&file, "precious").unwrap();
        let found = ran(with(example("file_relay"), [directory.path()]));
        check_fails(&found, &format!("{}: File exists (os error 17)", file.display()));
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");

        let missing = directory.path().join("missing");
        let expected = format!(
            "{}: No such file or directory (os error 2)",
            missing.join("relay-1.txt").display()
        );
        check_fails(&ran(with(example("file_relay"), [&missing])), &expected);
        let expected =
            format!("{}: Not a directory (os error 20)", file.join("relay-1.txt").display());
        check_fails(&ran(with(example("file_relay"), [&file])), &expected);
    }

    #[test]
    fn a_child_that_appends_nothing_is_noticed() {
        let program = WithOtherChild::new("file_relay", "exit 0");
        let ran = ran(program.command());
        assert_eq!((ran.code, ran.err.lines().count()), (Some(1), 1), "{}", ran.err);
    }

    #[test]
    fn its_child_refuses_descriptors_that_are_not_one_regular_file() {
        let null = || File::open("/dev/null").unwrap();
        let read_only = File::open(tempfile::NamedTempFile::new().unwrap()).unwrap();
        run(async {
            for (frame, line) in [
                (Frame::new("a").with_fd(null()), "a: the descriptor is not a regular file"),
                (Frame::new("b"), "b: one descriptor was expected, and 0 came"),
                (
                    Frame::new("c").with_fd(marked(1)).with_fd(marked(2)),
                    "c: one descriptor was expected, and 2 came",
                ),
                (Frame::new("d").with_fd(read_only), "d: Bad file descriptor (os error 9)"),
            ] {
                let (mut parent, child) = as_child("file_relay", SocketKind::SeqPacket);
                parent.send(frame).await.unwrap();
                check_fails(&finish(child).await, line);
            }
        });
    }

    #[test]
    fn its_child_goes_on_at_the_offset_of_the_file_that_it_receives() {
        run(async {
            let (mut parent, child) = as_child("file_relay", SocketKind::SeqPacket);
            let file = marked(7); // 4 bytes written
            parent.send(Frame::new("memory").with_fd(file.try_clone().unwrap())).await.unwrap();
            parent.close().await.unwrap();
            let ran = finish(child).await;
            assert_eq!(ran.code, Some(0));
            assert!(
                ran.out.starts_with("child:  memory: came at offset 4, now at 22\n"),
                "{}",
                ran.out
            );
            assert_eq!(common::mark_of(&file), 7);
        });
    }
}

mod open_server {
    use super::*;

    #[test]
    fn it_answers_with_files_and_with_error_numbers() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name| directory.path().join(name);
        fs::write(at("one"), "first\n").unwrap();
        fs::write(at("empty"), "").unwrap();
        fs::write(at("two"), "second\n").unwrap();
        let files = ["one", "missing", "empty", "", "two"].map(at);
        let ran = ran(with(example("open_server"), files.each_ref().map(PathBuf::as_path)));

        let [one, missing, empty, itself, two] = files.map(|path| path.display().to_string());
        let reasons = [
            format!("error: {missing}: No such file or directory (os error 2)\n"),
            format!("error: {itself}: not a regular file\n"),
        ];
        assert_eq!((ran.code, ran.err), (Some(1), reasons.concat()));
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        let note = |path: &str| format!("server: uid {uid}, gid {gid} asks for {path}\n");
        let expected = [
            format!("client: connected to a server of uid {uid}, gid {gid}\n"),
            note(&one) + &format!("==> {one} <==\nfirst\n"),
            note(&missing),
            note(&empty) + &format!("==> {empty} <==\n"),
            note(&itself),
            note(&two) + &format!("==> {two} <==\nsecond\n"),
        ];
        assert_eq!(ran.out, expected.concat());
    }

    #[test]
    fn it_opens_files_in_the_requested_mode() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "first\n").unwrap();

        // A value that looks like an option is refused, unless it follows a `=`.
        let ran = ran(with(
            example("open_server"),
            [Path::new("--append"), Path::new("--second"), &file],
        ));
        assert_eq!(ran.code, Some(2));
        let ran = super::ran(with(example("open_server"), [Path::new("--append=--second"), &file]));
        assert_eq!((ran.code, &ran.err[..]), (Some(0), ""));
        assert!(ran.out.ends_with("<==\nfirst\n--second\n"), "{}", ran.out);
        assert_eq!(fs::read_to_string(&file).unwrap(), "first\n--second\n");
    }

    #[test]
    fn it_does_not_replace_a_file_at_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut server = example("open_server");
        server.arg("--path").arg(&path).arg("Cargo.toml");
        assert_eq!(ran(server).code, Some(0));
        assert!(!path.exists(), "the socket is left over");

        fs::write(&path, "precious").unwrap();
        for name in ["open_server", "pty_share"] {
            let mut server = example(name);
            server.arg("--path").arg(&path).args((name == "open_server").then_some("Cargo.toml"));
            let ran = ran(server);
            assert_eq!((ran.code, ran.err.lines().count()), (Some(1), 1), "{}", ran.err);
            assert!(
                ran.err.starts_with(&format!("error: cannot listen on {}: ", path.display())),
                "{}",
                ran.err
            );
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_client_without_a_server_reports_that() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        for name in ["open_server", "pty_share"] {
            let mut client = example(name);
            client.arg("--client-of").arg(&path).args((name == "open_server").then_some("file"));
            let expected = format!(
                "cannot connect to {}: No such file or directory (os error 2)",
                path.display()
            );
            check_fails(&ran(client), &expected);
        }
    }

    #[test]
    fn a_client_has_no_runtime() {
        run(async {
            let ran = served("open_server", &["a file"], async |mut client| {
                let request = client.try_next().await.unwrap().unwrap();
                assert_eq!(request.payload, "ra file");
                // Tokio's event loop is an epoll instance.
                let process = client.socket().peer_cred().unwrap().pid.unwrap();
                let links = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
                let opened =
                    Vec::from_iter(links.map(|link| fs::read_link(link.unwrap().path()).unwrap()));
                assert!(
                    !opened.iter().any(|file| file.ends_with("anon_inode:[eventpoll]")),
                    "{opened:?}"
                );
                client.send(Frame::new(&b"E\0\0\0\x0d"[..])).await.unwrap();
            })
            .await;
            check_fails(&ran, "a file: Permission denied (os error 13)");
        });
    }

    #[test]
    fn a_client_checks_each_reply_of_the_server() {
        /// Runs a client whose server sends this, and checks its error.
        async fn check(answer: impl AsyncFnOnce(&mut Framed<FrameCodec>), line: &str) {
            let ran = served("open_server", &["a file"], async |mut client| {
                assert_eq!(client.try_next().await.unwrap().unwrap().payload, "ra file");
                answer(&mut client).await;
            })
            .await;
            check_fails(&ran, line);
        }
        run(async {
            // Replies.
            let null = || File::open("/dev/null").unwrap();
            for (reply, line) in [
                (Frame::new("F").with_fd(null()), "a file: not a regular file"),
                (Frame::new(&b"E\0\0\0\x0d"[..]), "a file: Permission denied (os error 13)"),
                (Frame::new("F"), "invalid message: the reply is malformed"),
                (
                    Frame::new("F").with_fd(null()).with_fd(null()),
                    "invalid message: the reply is malformed",
                ),
                (
                    Frame::new("Nwith a file").with_fd(null()),
                    "invalid message: the reply is malformed",
                ),
                (Frame::new("E"), "invalid message: the reply is malformed"),
                (Frame::new("?"), "invalid message: the reply is malformed"),
                (Frame::new(""), "invalid message: the reply is malformed"),
            ] {
                check(async |client| client.send(reply).await.unwrap(), line).await;
            }

            // The server goes without a reply.
            check(
                async |client| client.send(Frame::new("Nsoon")).await.unwrap(),
                "the server is gone",
            )
            .await;
            check(async |_| (), "the server is gone").await;
        });
    }

    #[test]
    fn a_malformed_request_ends_only_the_connection_of_its_client() {
        run(async {
            let server = LonelyServer::start("open_server", &["file"]).await;
            let mut strange = server.connect().await;
            strange.send(Frame::new("nonsense")).await.unwrap();
            assert!(strange.try_next().await.unwrap().is_none());
            let mut sensible = server.connect().await;
            sensible.send(Frame::new("rCargo.toml")).await.unwrap();
            let note = sensible.try_next().await.unwrap().unwrap();
            assert!(note.payload.starts_with(b"Nuid "));
            let reply = sensible.try_next().await.unwrap().unwrap();
            assert_eq!((&reply.payload[..], reply.fds.len()), (&b"F"[..], 1));

            let ran = server.end().await;
            assert_eq!(
                (ran.code, &ran.err[..]),
                (
                    Some(0),
                    "server: a client is disconnected: invalid message: the request is malformed\n"
                )
            );
        });
    }
}

mod pty_share {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};

    use super::*;

    fn pty() -> (OwnedFd, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = openpt(flags).unwrap();
        unlockpt(&controller).unwrap();
        let terminal = ioctl_tiocgptpeer(&controller, flags).unwrap();
        (controller, terminal)
    }

    #[test]
    fn two_processes_share_a_terminal() {
        let ran = ran(example("pty_share"));
        assert_eq!((ran.code, &ran.err[..]), (Some(0), ""));
        for line in [
            "server: sent 250 bytes and a pty of 24 x 80",
            "client: got 250 bytes and a terminal, 24 x 80; makes it 50 x 132",
            r#"server: sees   "who is there?""#,
            r#"server: sees   "fdwirx\u{8} \u{8}e""#, // echo, and the correction of the line
            r#"client: reads  "fdwire""#,
            r#"server: sees   "welcome, fdwire""#,
            "client: reads  the end of the file",
            r#"server: the client reports b"end of file"; the window is 50 x 132"#,
        ] {
            assert!(ran.out.lines().any(|printed| printed == line), "no {line} in {}", ran.out);
        }
    }

    #[test]
    fn the_client_refuses_descriptors_that_are_not_a_terminal() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let data = || Frame::new(vec![b'.'; 250]);
        let ((controller, terminal), (_other_controller, other_terminal)) = (pty(), pty());
        run(async {
            for (frame, line) in [
                (
                    Some(data().with_fd(null()).with_fd(null())),
                    "the second descriptor is not a terminal",
                ),
                (
                    Some(data().with_fd(controller.try_clone().unwrap()).with_fd(other_terminal)),
                    "the descriptors are not the two ends of one terminal",
                ),
                (
                    Some(data().with_fd(null()).with_fd(terminal)),
                    "the descriptors are not the two ends of one terminal",
                ),
                (Some(data().with_fd(null())), "two descriptors were expected, and 1 came"),
                (Some(Frame::new("less")), "the frame should have 250 dots, and has 4 other bytes"),
                (None, "the server is gone"),
            ] {
                let serve = async |mut client: Framed<FrameCodec>| {
                    if let Some(frame) = frame {
                        client.send(frame).await.unwrap();
                    }
                };
                check_fails(&served("pty_share", &[], serve).await, line);
            }
        });
    }

    /// The terminal hangs up when the server's copy of the controller is closed.
    #[test]
    fn a_client_whose_server_dies_on_the_terminal_ends() {
        run(async {
            let serve = async |mut client: Framed<FrameCodec>| {
                let (controller, terminal) = pty();
                let frame = Frame::new(vec![b'.'; 250])
                    .with_fd(controller.try_clone().unwrap())
                    .with_fd(terminal);
                client.send(frame).await.unwrap();
                let mut question = [0; 15];
                tokio::fs::File::from_std(controller.into())
                    .read_exact(&mut question)
                    .await
                    .unwrap();
                assert_eq!(&question, b"who is there?\r\n");
            };
            let ran = served("pty_share", &[], serve).await;
            check_fails(&ran, "on the terminal: the other end is gone");
        });
    }

    #[test]
    fn a_server_whose_client_leaves_the_terminal_reports_that() {
        run(async {
            let server = LonelyServer::start("pty_share", &[]).await;
            let frame = server.connect().await.try_next().await.unwrap().unwrap();
            assert_eq!((frame.payload.len(), frame.fds.len()), (250, 2));
            drop(frame);
            check_fails(
                &server.end().await,
                "the terminal is gone: Input/output error (os error 5)",
            );
        });
    }
}
