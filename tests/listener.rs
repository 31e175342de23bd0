//! Listeners: the admission of peers, and the ownership of a path.

mod common;

use std::{
    collections::BTreeMap,
    fmt::Debug,
    fs::{self, Permissions},
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::{MetadataExt, PermissionsExt, symlink},
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, atomic::Ordering::SeqCst, mpsc},
    time::{Duration, Instant},
};

use common::{
    Events, KINDS, abstract_name, check_connected, leave_stale_socket, other_uid, role_socket, run,
    spawn_role,
};
use fdwire::{Listener, Socket, SocketKind};
use futures::future::join_all;
use nix::{
    sys::stat::{Mode, umask},
    unistd::mkfifo,
};
use tracing::{Event, Level, field::Field, subscriber::with_default};

#[test]
fn a_socket_file_is_for_its_owner_only_and_goes_with_the_listener() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("socket");
            let listener = Listener::bind(&path, kind).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            drop(listener);
            let listener = Listener::bind_with_mode(&path, kind, 0o640).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
            drop(listener);
            assert_eq!(
                fs::read_dir(directory.path()).unwrap().count(),
                0,
                "a file was left behind"
            );
        }
    });
}

#[test]
fn a_live_listeners_path_is_not_taken() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("ours");
            let _listener = Listener::bind(&path, kind).unwrap();
            for other in KINDS {
                let error = Listener::bind(&path, other).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::AddrInUse);
                assert!(error.to_string().contains("ours"), "{error}");
            }
        }
        // A socket of another program is at the path. That program takes no lock.
        let path = directory.path().join("foreign");
        let foreign = UnixListener::bind(&path).unwrap();
        for kind in KINDS {
            assert_eq!(Listener::bind(&path, kind).unwrap_err().kind(), ErrorKind::AddrInUse);
        }
        foreign.set_nonblocking(true).unwrap();
        assert_eq!(
            foreign.accept().unwrap_err().kind(),
            ErrorKind::WouldBlock,
            "the owner was disturbed"
        );
        UnixStream::connect(&path).unwrap();
    });
}

#[test]
fn a_stale_socket_is_replaced_and_nothing_else() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("socket");
            leave_stale_socket(&path);
            let listener = Listener::bind(&path, kind).unwrap();
            let (a, b) = tokio::join!(Socket::connect(&path, kind), listener.accept());
            check_connected(a.unwrap(), b.unwrap()).await;
        }
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        for kind in KINDS {
            assert_eq!(Listener::bind(&file, kind).unwrap_err().kind(), ErrorKind::AlreadyExists);
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    });
}

#[test]
fn of_many_listeners_that_bind_a_path_at_once_one_succeeds() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let path = directory.path().join(round.to_string());
        leave_stale_socket(&path); // all threads try to replace it
        let bound: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        run(async { Listener::bind(&path, SocketKind::Stream).map(OwnedFd::from) })
                    })
                })
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect()
        });
        // The socket stays open, so a later thread finds it alive and leaves it.
        assert_eq!(bound.len(), 1, "in round {round}");
        UnixStream::connect(&path).unwrap();
    }
}

#[test]
fn peers_that_are_refused_do_not_keep_the_runtime_busy() {
    const ROLE: &str = "peers_that_are_refused_do_not_keep_the_runtime_busy";
    // A process of another uid connects until the listener is gone.
    if let Some(stdin) = role_socket(ROLE) {
        let mut stdin = UnixStream::from(stdin);
        let mut name = String::new();
        stdin.read_to_string(&mut name).unwrap();
        let addr = SocketAddr::from_abstract_name(name).unwrap();
        while UnixStream::connect_addr(&addr).is_ok() {}
        return;
    }
    let Some(uid) = other_uid() else { return };
    run(async {
        // Three of them connect, and none of their connections is accepted.
        let addr = abstract_name("busy");
        let listener = Arc::new(Listener::bind_addr(&addr, SocketKind::Stream).unwrap());
        let mut children = Vec::new();
        for _ in 0..3 {
            let (mut ours, childs) = UnixStream::pair().unwrap();
            children.push(spawn_role(ROLE, Some(uid), childs.into()));
            ours.write_all(addr.as_abstract_name().unwrap()).unwrap();
        }
        let accepting = tokio::spawn({
            let listener = Arc::clone(&listener);
            async move { drop(listener.accept().await) }
        });
        // This task gets its turns, however many peers of the other task wait to be refused.
        while listener.refused() < 5000 {
            tokio::task::yield_now().await;
        }
        accepting.abort();
        let _ = accepting.await;
        let refused = listener.refused();
        drop(listener);
        for mut child in children {
            child.wait().unwrap();
        }
        assert!(refused < 100_000, "{refused} were refused in a row");
    });
}

#[test]
fn a_path_can_be_taken_and_left_by_many_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let holders = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                run(async {
                    for _ in 0..500 {
                        if let Ok(listener) = Listener::bind(&path, SocketKind::Stream) {
                            assert_eq!(holders.fetch_add(1, SeqCst), 0, "two hold the path");
                            assert!(path.exists(), "the socket was removed by another");
                            holders.fetch_sub(1, SeqCst);
                            drop(listener);
                        }
                    }
                });
            });
        }
    });
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "a file was left behind");
}

/// Whoever may write to the directory may put something else at the path of the lock.
#[test]
fn only_a_regular_file_is_taken_as_the_lock() {
    // Each file at the path of the lock makes the bind fail at once.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let lock = directory.path().join("socket.lock");
    let target = directory.path().join("target");
    let check_refused = |what: &str| {
        let (done, outcome) = mpsc::channel();
        let path = path.clone();
        std::thread::spawn(move || {
            run(async move { done.send(Listener::bind(&path, SocketKind::Stream).map(drop)) })
        });
        let outcome = outcome
            .recv_timeout(Duration::from_secs(10))
            .unwrap_or_else(|_| panic!("bind waits for {what}"));
        let error = outcome.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{what}: {error}");
        assert!(error.to_string().contains("socket.lock is not a regular file"), "{what}: {error}");
    };

    mkfifo(&lock, Mode::S_IRWXU).unwrap();
    check_refused("a FIFO without a reader");
    let reader = fs::File::options().read(true).write(true).open(&lock).unwrap();
    check_refused("a FIFO with a reader");
    drop(reader);
    fs::remove_file(&lock).unwrap();

    fs::create_dir(&lock).unwrap();
    check_refused("a directory");
    fs::remove_dir(&lock).unwrap();

    symlink(&target, &lock).unwrap();
    check_refused("a symbolic link to nothing");
    assert!(!target.exists(), "the link was followed");
    fs::write(&target, "").unwrap();
    check_refused("a symbolic link to a file");
    fs::remove_file(&lock).unwrap();

    drop(UnixListener::bind(&lock).unwrap());
    check_refused("a socket");
    fs::remove_file(&lock).unwrap();
    // When it is gone, the bind succeeds.
    run(async { Listener::bind(&path, SocketKind::Stream) }).unwrap();
}

#[test]
fn a_listener_removes_no_socket_but_its_own() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path, SocketKind::Stream).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        drop(listener);
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    });
}

#[test]
fn a_listener_that_is_handed_on_keeps_its_path() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("socket");
            let handed_on = OwnedFd::from(Listener::bind(&path, kind).unwrap());
            assert_eq!(Listener::bind(&path, kind).unwrap_err().kind(), ErrorKind::AddrInUse);
            let listener = Listener::try_from(handed_on).unwrap();
            let (a, b) = tokio::join!(Socket::connect(&path, kind), listener.accept());
            check_connected(a.unwrap(), b.unwrap()).await;
            drop(listener);
            while Socket::connect(&path, kind).await.is_ok() {
                // A child that another test is starting may have a copy for a moment.
                tokio::task::yield_now().await;
            }
            drop(Listener::bind(&path, kind).unwrap()); // stale now
        }
    });
}

#[test]
fn other_uids_are_admitted_only_if_listed() {
    const ROLE: &str = "other_uids_are_admitted_only_if_listed";
    if let Some(stdin) = role_socket(ROLE) {
        let (stdin, addr) = arguments_of(stdin);
        return client(stdin, &addr);
    }
    let Some(uid) = other_uid() else { return };
    run(async {
        let addr = abstract_name("uid");
        let listener = Listener::bind_addr(&addr, SocketKind::Stream).unwrap();
        tokio::select! {
            answer = answer_to(ROLE, Some(uid), &addr) => assert_eq!(answer, "<>"),
            () = greet(&listener) => panic!("admitted"),
        }
        assert_eq!(listener.refused(), 1);

        let listener = listener.allow_uids([uid]);
        let (answer, ()) = tokio::join!(answer_to(ROLE, Some(uid), &addr), greet(&listener));
        assert_eq!((&answer[..], listener.refused()), ("<welcome>", 1));
        drop(listener);

        // Use another name: a child that another test is starting may have a copy of the listener
        // for a moment.
        let addr = abstract_name("any uid");
        let listener = Listener::bind_addr(&addr, SocketKind::Stream).unwrap().allow_any_uid();
        let (answer, ()) = tokio::join!(answer_to(ROLE, Some(uid), &addr), greet(&listener));
        assert_eq!(answer, "<welcome>");
    });
}

#[test]
fn refused_peers_are_logged_once_a_second() {
    const ROLE: &str = "refused_peers_are_logged_once_a_second";
    if let Some(stdin) = role_socket(ROLE) {
        let (stdin, arguments) = arguments_of(stdin);
        return match &arguments[..] {
            "listen" => refuse_and_log(ROLE),
            addr => client(stdin, addr),
        };
    }
    if other_uid().is_none() {
        return;
    }
    // The test has a process of its own. Other tests of this process log refusals without a
    // subscriber, and `tracing` may then skip these lines in all threads.
    let (mut ours, stdin) = UnixStream::pair().unwrap();
    let mut server = spawn_role(ROLE, None, stdin.into());
    send(&mut ours, "listen");
    assert!(server.wait().unwrap().success());
}

fn refuse_and_log(role: &'static str) {
    // A subscriber keeps the warnings of a listener at a path where all uids may connect.
    let uid = other_uid().unwrap();
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let path = directory.path().join("socket");
    let lines = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&lines);
    let keep = move |event: &Event<'_>| kept.lock().unwrap().push(fields_of(event));
    with_default(Events(Level::WARN, keep), || {
        run(async {
            let listener = Listener::bind_with_mode(&path, SocketKind::Stream, 0o666).unwrap();
            let addr = listener.local_addr().unwrap();
            tokio::select! {
                () = greet(&listener) => panic!("admitted"),
                () = async {
                    // Ten refusals are logged with one line at least, and one each second at most.
                    let begin = Instant::now();
                    for _ in 0..10 {
                        assert_eq!(answer_to(role, Some(uid), &addr).await, "<>");
                    }
                    let seconds = begin.elapsed().as_secs() as usize + 1;
                    let lines = lines.lock().unwrap().len();
                    let expected = 1..=seconds;
                    assert!(expected.contains(&lines), "{lines} lines in less than {seconds} s");
                    // This refusal comes more than a second later, so it certainly gets a line. No
                    // event announces that moment.
                    tokio::time::sleep(Duration::from_millis(1100)).await;
                    assert_eq!(answer_to(role, Some(uid), &addr).await, "<>");
                } => {}
            }
            assert_eq!(listener.refused(), 11);
        });
    });
    // The lines name the peers and the listener, and count all refusals.
    let lines = lines.lock().unwrap();
    let mut refused = 0;
    for line in lines.iter() {
        assert_eq!(line["uid"], uid.to_string());
        assert_ne!(line["pid"], "");
        assert_eq!(line["listener"], format!("{path:?}"));
        assert!(line["message"].contains("allow_uids"), "{line:?}");
        refused += line["refused"].parse::<u64>().unwrap();
    }
    assert_eq!(refused, 11, "each refusal belongs to a line");
}

type Fields = BTreeMap<String, String>;

/// Returns the fields of an event.
fn fields_of(event: &Event<'_>) -> Fields {
    let mut fields = Fields::new();
    event.record(&mut |field: &Field, value: &dyn Debug| {
        fields.insert(field.to_string(), format!("{value:?}"));
    });
    fields
}

#[test]
fn a_socket_file_gets_the_given_mode_whatever_the_umask_is() {
    const ROLE: &str = "a_socket_file_gets_the_given_mode_whatever_the_umask_is";
    if let Some(stdin) = role_socket(ROLE) {
        let (stdin, arguments) = arguments_of(stdin);
        return match arguments.strip_prefix("listen ") {
            Some(arguments) => run(listen_with_umask(stdin, arguments)),
            None => client(stdin, &arguments),
        };
    }
    for umask in ["022", "077", "000", "377"] {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        let server = start_server(ROLE, &format!("listen {umask} {}", directory.path().display()));
        for (mode, may_connect) in MODES {
            let path = directory.path().join(format!("{mode:o}"));
            let found = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
            assert_eq!(format!("{found:o}"), format!("{mode:o}"), "with umask {umask}");
            if let Some(uid) = other_uid() {
                let addr = SocketAddr::from_pathname(&path).unwrap();
                let answer = run(answer_to(ROLE, Some(uid), &addr));
                let expected = if may_connect { "<welcome>" } else { "permission denied" };
                assert_eq!(answer, expected, "mode {mode:o}, umask {umask}");
            }
        }
        drop(server);
    }
}

/// `SO_PEERCRED` reports each uid that a user namespace does not map as 65534. A server that runs
/// as such a uid sees every other one as its own.
#[test]
fn a_uid_that_may_stand_for_any_other_is_not_admitted_by_its_number() {
    const ROLE: &str = "a_uid_that_may_stand_for_any_other_is_not_admitted_by_its_number";
    if let Some(stdin) = role_socket(ROLE) {
        let (stdin, arguments) = arguments_of(stdin);
        return match arguments.strip_prefix("listen ") {
            Some(directory) => run(listen_in_namespace(stdin, Path::new(directory))),
            None => client(stdin, &arguments),
        };
    }
    if !Command::new("unshare")
        .args(["--user", "true"])
        .output()
        .is_ok_and(|output| output.status.success())
    {
        return eprintln!("skipped: a user namespace cannot be made here");
    }
    // A server in a user namespace without mappings listens at paths and names.
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let mut unshare = Command::new("unshare");
    unshare.arg("--user").arg(std::env::current_exe().unwrap());
    let arguments = format!("listen {}", directory.path().display());
    let _server = start_server_by(&mut unshare, ROLE, &arguments);

    let path = |name: &str| SocketAddr::from_pathname(directory.path().join(name)).unwrap();
    let name = |name: &str| namespace_name(directory.path(), name);
    let answers = |uid, addr| run(answer_to(ROLE, uid, &addr));
    // A peer has the uid of the server, which has no mapping in the server's namespace. Only the
    // kernel can distinguish it from others.
    assert_eq!(answers(None, path("0600")), "<welcome>");
    assert_eq!(answers(None, path("0666")), "<>");
    assert_eq!(answers(None, path("made 0666 later")), "<>");
    assert_eq!(answers(None, path("0666 at first")), "<>");
    assert_eq!(answers(None, name("name")), "<>");
    assert_eq!(answers(None, name("allow_any_uid")), "<welcome>");

    // A peer has another uid.
    let Some(uid) = other_uid() else { return };
    assert_eq!(answers(Some(uid), path("0600")), "permission denied");
    assert_eq!(answers(Some(uid), path("0666")), "<>");
    assert_eq!(answers(Some(uid), path("made 0666 later")), "<>");
    assert_eq!(answers(Some(uid), name("name")), "<>");
    assert_eq!(answers(Some(uid), name("allow_any_uid")), "<welcome>");
}

/// Listens at paths and names, in a user namespace without mappings.
async fn listen_in_namespace(mut stdin: UnixStream, directory: &Path) {
    assert_eq!(nix::unistd::geteuid().as_raw(), 65534);
    let kind = SocketKind::Stream;
    let path =
        |name: &str, mode| Listener::bind_with_mode(directory.join(name), kind, mode).unwrap();
    let name = |name: &str| Listener::bind_addr(&namespace_name(directory, name), kind).unwrap();
    let listeners = [
        path("0600", 0o600),
        path("0666", 0o666).allow_uids([65534]),
        path("made 0666 later", 0o600).allow_uids([65534]),
        path("0666 at first", 0o666).allow_uids([65534]),
        name("name").allow_uids([65534]),
        name("allow_any_uid").allow_any_uid(),
    ];
    fs::set_permissions(directory.join("made 0666 later"), Permissions::from_mode(0o666)).unwrap();
    fs::set_permissions(directory.join("0666 at first"), Permissions::from_mode(0o600)).unwrap();
    stdin.write_all(b"!").unwrap();
    greet_all(&listeners).await;
}

/// Returns an abstract name of the server in [`listen_in_namespace`].
fn namespace_name(directory: &Path, name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(format!("{} {name}", directory.display())).unwrap()
}

/// The modes of paths, and whether another uid may connect with each.
const MODES: [(u32, bool); 6] =
    [(0o600, false), (0o640, false), (0o660, false), (0o666, true), (0o602, true), (0o777, true)];

/// Listens at one path for each mode, in the given directory, and admits every uid. The umask
/// belongs to the process, so this needs a process of its own.
async fn listen_with_umask(mut stdin: UnixStream, arguments: &str) {
    let (mask, directory) = arguments.split_once(' ').unwrap();
    umask(Mode::from_bits_truncate(u32::from_str_radix(mask, 8).unwrap()));
    let listeners = MODES.map(|(mode, _)| {
        let path = Path::new(directory).join(format!("{mode:o}"));
        Listener::bind_with_mode(&path, SocketKind::Stream, mode).unwrap().allow_any_uid()
    });
    stdin.write_all(b"!").unwrap();
    greet_all(&listeners).await;
}

async fn greet_all(listeners: &[Listener]) {
    join_all(listeners.iter().map(async |listener| {
        loop {
            greet(listener).await;
        }
    }))
    .await;
}

/// Starts a role process that listens, with these arguments. Waits until it does.
fn start_server(role: &str, arguments: &str) -> Killed {
    start_server_by(&mut Command::new("/proc/self/exe"), role, arguments)
}

/// Does the same with a command that runs this binary.
fn start_server_by(command: &mut Command, role: &str, arguments: &str) -> Killed {
    let (mut ours, stdin) = UnixStream::pair().unwrap();
    command.args([role, "--exact", "--nocapture"]).env("FDWIRE_ROLE", role);
    let server = Killed(command.stdin(OwnedFd::from(stdin)).stdout(Stdio::null()).spawn().unwrap());
    command.stdin(Stdio::null()); // the server's death is seen only if this process has no copy
    send(&mut ours, arguments);
    ours.read_exact(&mut [0]).expect("the server has failed");
    server
}

/// A role process that ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Accepts a client and greets it.
async fn greet(listener: &Listener) {
    let mut client = UnixStream::try_from(listener.accept().await.unwrap()).unwrap();
    client.write_all(b"welcome").unwrap();
}

/// Connects in a role process, as another uid if one is given. Returns the listener's answer in
/// angle brackets (nothing is in them if the client was refused), or the error of the connect.
async fn answer_to(role: &'static str, uid: Option<u32>, addr: &SocketAddr) -> String {
    let addr = match (addr.as_pathname(), addr.as_abstract_name()) {
        (Some(path), _) => path.to_str().unwrap().to_owned(),
        (_, name) => format!("@{}", str::from_utf8(name.unwrap()).unwrap()),
    };
    tokio::task::spawn_blocking(move || {
        let (mut ours, stdin) = UnixStream::pair().unwrap();
        let mut child = spawn_role(role, uid, stdin.into());
        send(&mut ours, &addr);
        let mut answer = String::new();
        ours.read_to_string(&mut answer).unwrap();
        child.wait().unwrap();
        answer
    })
    .await
    .unwrap()
}

/// Is the role process of [`answer_to`].
fn client(mut stdin: UnixStream, addr: &str) {
    let addr = match addr.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(addr),
    };
    let answer = match UnixStream::connect_addr(&addr.unwrap()) {
        Ok(mut client) => {
            let mut answer = String::new();
            // A refused connection ends, or is reset.
            let _ = client.read_to_string(&mut answer);
            format!("<{answer}>")
        }
        Err(error) => error.kind().to_string(),
    };
    stdin.write_all(answer.as_bytes()).unwrap();
}

/// Sends a role process its arguments.
fn send(role: &mut UnixStream, arguments: &str) {
    role.write_all(arguments.as_bytes()).unwrap();
    role.shutdown(Shutdown::Write).unwrap();
}

/// Receives the arguments of this role process. Returns them with the stream for its answer.
fn arguments_of(stdin: OwnedFd) -> (UnixStream, String) {
    let mut stdin = UnixStream::from(stdin);
    let mut arguments = String::new();
    stdin.read_to_string(&mut arguments).unwrap();
    (stdin, arguments)
}

mod blocking {
    //! The same listener for a program without a runtime.

    use fdwire::{blocking, socket::UidLimits};

    use super::*;

    #[test]
    fn a_listener_owns_its_path_and_shares_the_rules() {
        let directory = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let path = directory.path().join("socket");
            leave_stale_socket(&path);
            let listener = blocking::Listener::bind_with_mode(&path, kind, 0o640).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
            assert_eq!(
                blocking::Listener::bind(&path, kind).unwrap_err().kind(),
                ErrorKind::AddrInUse
            );
            assert_eq!(listener.local_addr().unwrap().as_pathname(), Some(&*path));
            assert_eq!(listener.kind(), kind);
            let client = blocking::Socket::connect(&path, kind).unwrap();
            let server = listener.accept().unwrap();
            assert_eq!(server.peer_cred().unwrap().pid, Some(std::process::id() as i32));
            run(async {
                check_connected(client.try_into().unwrap(), server.try_into().unwrap()).await
            });
            drop(listener);
            // The socket is closed in the background, but its path is removed at once.
            assert_eq!(
                fs::read_dir(directory.path()).unwrap().count(),
                0,
                "a file was left behind"
            );
        }
    }

    #[test]
    fn accept_waits_no_longer_than_its_timeout() {
        for kind in KINDS {
            let name = abstract_name(&format!("blocking-accept-{kind:?}"));
            let mut listener = blocking::Listener::bind_addr(&name, kind).unwrap();
            for timeout in [Duration::ZERO, Duration::from_millis(5)] {
                listener.set_accept_timeout(Some(timeout));
                assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::TimedOut);
            }
            let _early = blocking::Socket::connect_addr(&name, kind).unwrap();
            listener.set_accept_timeout(Some(Duration::ZERO));
            listener.accept().unwrap();

            listener.set_accept_timeout(None);
            std::thread::scope(|scope| {
                let threads = [(); 4].map(|()| scope.spawn(|| listener.accept().unwrap()));
                let clients =
                    [(); 4].map(|()| blocking::Socket::connect_addr(&name, kind).unwrap());
                threads.into_iter().for_each(|thread| drop(thread.join().unwrap()));
                drop(clients);
            });
        }
    }

    #[test]
    fn a_listener_and_its_connections_keep_their_settings_when_they_are_converted() {
        run(async {
            let directory = tempfile::tempdir().unwrap();
            for kind in KINDS {
                // A blocking listener has a limit for each uid. A connection is converted.
                let path = directory.path().join("socket");
                let listener = blocking::Listener::bind(&path, kind).unwrap();
                let mut listener = listener.limit_each_uid(UidLimits::default().max_connections(1));
                listener.set_accept_timeout(Some(Duration::ZERO));
                let first = blocking::Socket::connect(&path, kind).unwrap();
                let accepted = Socket::try_from(listener.accept().unwrap()).unwrap();

                // The listener is converted. It keeps the limit and its path.
                let listener = Listener::try_from(listener).unwrap();
                let refused = Socket::connect(&path, kind).await.unwrap();
                assert!(futures::FutureExt::now_or_never(listener.accept()).is_none());
                tokio::task::yield_now().await;
                while listener.refused() == 0 {
                    assert!(
                        tokio::time::timeout(Duration::from_millis(1), listener.accept())
                            .await
                            .is_err()
                    );
                }
                drop((first, refused));
                assert!(path.exists());

                // Both are converted back. The connection counts until it is dropped.
                let accepted = blocking::Socket::from(accepted);
                let mut listener = blocking::Listener::from(listener);
                listener.set_accept_timeout(Some(Duration::ZERO));
                let _second = blocking::Socket::connect(&path, kind).unwrap();
                assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::TimedOut);
                assert_eq!(listener.refused(), 2);
                drop(accepted);
                let _third = blocking::Socket::connect(&path, kind).unwrap();
                listener.accept().unwrap();
                drop(listener);
                assert!(!path.exists());
            }
        });
    }

    #[test]
    fn other_uids_are_admitted_only_if_listed() {
        const ROLE: &str = "blocking::other_uids_are_admitted_only_if_listed";
        // A process connects, and stays until its connection ends.
        if let Some(stdin) = role_socket(ROLE) {
            let mut stdin = UnixStream::from(stdin);
            let mut name = String::new();
            stdin.read_to_string(&mut name).unwrap();
            let name = SocketAddr::from_abstract_name(name).unwrap();
            let mut stream = UnixStream::connect_addr(&name).unwrap();
            let _ = stream.read(&mut [0]);
            return;
        }
        let Some(uid) = other_uid() else { return };
        // That process has another uid, which is not listed, or is.
        for listed in [false, true] {
            let name = abstract_name(&format!("blocking-uids-{listed}"));
            let listener = blocking::Listener::bind_addr(&name, SocketKind::Stream).unwrap();
            let mut listener = if listed { listener.allow_uids([uid]) } else { listener };
            let (ours, childs) = UnixStream::pair().unwrap();
            let mut child = spawn_role(ROLE, Some(uid), childs.into());
            (&ours).write_all(name.as_abstract_name().unwrap()).unwrap();
            ours.shutdown(Shutdown::Write).unwrap();
            if listed {
                assert_eq!(listener.accept().unwrap().peer_cred().unwrap().uid, uid);
            } else {
                listener.set_accept_timeout(Some(Duration::from_millis(5)));
                while listener.refused() == 0 {
                    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::TimedOut);
                }
            }
            assert!(child.wait().unwrap().success());
        }
    }

    #[test]
    fn a_descriptor_that_is_no_listener_or_no_connection_is_refused_with_a_reason() {
        let (stream, _peer) = UnixStream::pair().unwrap();
        let reason = |error: std::io::Error| error.to_string();
        let no_listener =
            blocking::Listener::try_from(OwnedFd::from(stream.try_clone().unwrap())).unwrap_err();
        assert!(reason(no_listener).contains("it is not a listening socket"));
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let no_connection =
            blocking::Socket::try_from(OwnedFd::from(listener.try_clone().unwrap())).unwrap_err();
        assert!(reason(no_connection).contains("it is a listening socket"));
        let null = blocking::Socket::try_from(OwnedFd::from(fs::File::open("/dev/null").unwrap()))
            .unwrap_err();
        assert!(reason(null).contains("it is not a socket"));
        assert_eq!(blocking::Socket::try_from(stream).unwrap().kind(), SocketKind::Stream);
        assert_eq!(blocking::Listener::try_from(listener).unwrap().kind(), SocketKind::Stream);
    }
}
