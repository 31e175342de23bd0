//! sd_notify(3): datagrams of text with descriptors, between services and their manager. The tests
//! are the manager of systemd-notify and libsystemd, and they are a service of a manager in Python
//! that checks what systemd documents.

use std::{
    fs::File,
    io::Read,
    os::{fd::AsFd, linux::net::SocketAddrExt},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use fdwire::{
    socket::{Datagram, DatagramSocket, PassCredentials},
    systemd::Notifier,
};

use crate::{
    Daemon,
    common::{PASSED, abstract_name, marked, run, run_and_pass, settle},
    installed, skipped,
};

/// Makes two sockets of a manager, one at a path and one at an abstract name, each with its value
/// of `NOTIFY_SOCKET`.
fn managers(test: &str, directory: &Path) -> [(DatagramSocket, String); 2] {
    let path = directory.join("notify");
    let name = abstract_name(test);
    let text = format!("@{}", str::from_utf8(name.as_abstract_name().unwrap()).unwrap());
    let sockets = [DatagramSocket::bind(&path).unwrap(), DatagramSocket::bind_addr(&name).unwrap()];
    let sockets = sockets.map(|socket| {
        socket.set_pass_credentials(PassCredentials::Ids).unwrap();
        socket
    });
    let [at_path, abstract_socket] = sockets;
    [(at_path, path.to_str().unwrap().to_owned()), (abstract_socket, text)]
}

/// Returns the datagram's lines.
fn lines(datagram: &Datagram) -> Vec<&str> {
    str::from_utf8(&datagram.payload).unwrap().lines().collect()
}

#[test]
fn systemd_notify_reports_that_it_is_ready_and_waits_for_the_barrier() {
    let Some(program) = installed("systemd-notify") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for (manager, address) in managers("ready", directory.path()) {
            let mut command = Command::new(&program);
            command
                .args(["--ready", "--status=all is well"])
                .env("NOTIFY_SOCKET", address)
                .stdin(Stdio::null());
            let mut service = Daemon::start(&mut command, directory.path());

            // The report comes with its sender.
            let ready = manager.recv().await.unwrap();
            assert_eq!(
                (lines(&ready), ready.fds.len()),
                (vec!["READY=1", "STATUS=all is well"], 0)
            );
            // As root, systemd-notify names its parent as the sender, which is the script that
            // calls it.
            let sender = ready.credentials.as_ref().unwrap();
            let [child, parent] =
                [service.child.id(), std::process::id()].map(|pid| Some(pid as i32));
            assert!(sender.pid == child || sender.pid == parent, "{sender:?}");
            assert_eq!(sender.uid, nix::unistd::getuid().as_raw());

            // The service ends when the descriptor of the barrier is closed.
            let barrier = manager.recv().await.unwrap();
            assert_eq!((lines(&barrier), barrier.fds.len()), (vec!["BARRIER=1"], 1));
            assert_eq!(barrier.credentials.as_ref().unwrap().pid, child);
            settle().await;
            assert!(
                service.child.try_wait().unwrap().is_none(),
                "it does not wait for the barrier"
            );
            drop(barrier);
            assert!(service.ended().await.success());
        }
    });
}

/// Stores two files, and waits until the manager has taken them.
const STORE: &str = r#"
import ctypes, os, sys
systemd = ctypes.CDLL("libsystemd.so.0", use_errno=True)
files = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
fds = (ctypes.c_int * len(files))(*files)
state = b"FDSTORE=1\nFDNAME=stored"
sent = systemd.sd_pid_notify_with_fds(0, 0, state, fds, ctypes.c_uint(len(files)))
assert sent > 0, os.strerror(-sent)
passed = systemd.sd_notify_barrier(0, ctypes.c_uint64(30_000_000))
assert passed > 0, os.strerror(-passed)
"#;

#[test]
fn libsystemd_stores_descriptors_and_waits_for_the_barrier() {
    let Some(python) = installed("python3") else { return };
    let loads = Command::new(&python)
        .args(["-c", "import ctypes; ctypes.CDLL('libsystemd.so.0')"])
        .output()
        .unwrap();
    if !loads.status.success() {
        return skipped("libsystemd is not installed");
    }
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let files = ["first", "second"].map(|name| directory.path().join(name));
        files.iter().for_each(|path| {
            std::fs::write(path, path.file_name().unwrap().as_encoded_bytes()).unwrap()
        });
        for (manager, address) in managers("store", directory.path()) {
            let mut command = Command::new(&python);
            command
                .args(["-c", STORE])
                .args(&files)
                .env("NOTIFY_SOCKET", address)
                .stdin(Stdio::null());
            let mut service = Daemon::start(&mut command, directory.path());

            // The files come in order.
            let store = manager.recv().await.unwrap();
            assert_eq!(lines(&store), ["FDSTORE=1", "FDNAME=stored"]);
            let contents = store.fds.into_iter().map(|fd| {
                let mut content = String::new();
                File::from(fd).read_to_string(&mut content).unwrap();
                content
            });
            assert_eq!(Vec::from_iter(contents), ["first", "second"]);

            // The service ends when the descriptor of the barrier is closed.
            let barrier = manager.recv().await.unwrap();
            assert_eq!((lines(&barrier), barrier.fds.len()), (vec!["BARRIER=1"], 1));
            assert_eq!(barrier.credentials.as_ref().unwrap().pid, Some(service.child.id() as i32));
            settle().await;
            assert!(
                service.child.try_wait().unwrap().is_none(),
                "it does not wait for the barrier"
            );
            drop(barrier);
            assert!(service.ended().await.success());
        }
    });
}

/// A manager in Python, as sd_notify(3) and sd_notify_barrier(3) describe it. Prints the messages
/// that it receives.
const MANAGER: &str = r#"
import array, os, socket, struct, sys, time
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
name = sys.argv[1]
manager.bind("\0" + name[1:] if name[0] == "@" else name)
manager.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
open(sys.argv[2], "w").close() # it listens
while True:
    data, control, flags, _ = manager.recvmsg(4096, 4096, socket.MSG_CMSG_CLOEXEC)
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    fds, pid = array.array("i"), None
    for level, kind, value in control:
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(value)
        elif kind == socket.SCM_CREDENTIALS:
            pid = struct.unpack("iII", value)[0]
    assert pid, "systemd takes nothing from an unknown sender"
    lines = data.decode().split("\n")
    assert all("=" in line for line in lines), "each is an assignment"
    if lines == ["BARRIER=1"]:
        assert len(fds) == 1 # "a single file descriptor", and nothing else in the message
        break
    if "RELOADING=1" in lines:
        # "together with a MONOTONIC_USEC= field": CLOCK_MONOTONIC when the message was made
        [at] = [int(line[15:]) for line in lines if line.startswith("MONOTONIC_USEC=")]
        assert 0 <= time.monotonic() - at / 1e6 < 60
        lines.remove(f"MONOTONIC_USEC={at}")
    if "FDSTORE=1" in lines:
        name = [line[7:] for line in lines if line.startswith("FDNAME=")]
        print(pid, *name, *(struct.unpack(">I", os.pread(fd, 4, 0))[0] for fd in fds), flush=True)
    else:
        print(pid, *lines, len(fds), flush=True)
    [os.close(fd) for fd in fds]
print("barrier", flush=True)
# When this program ends, the barrier's descriptor is closed.
"#;

const ROLE: &str = "sd_notify::a_service_notifies_a_manager_and_stores_descriptors_there";

/// Runs a service, in a process of its own.
async fn notify() {
    let notifier = Notifier::from_env().unwrap();
    assert!(notifier.is_active());
    assert_eq!(notifier.watchdog_period(), Some(Duration::from_secs(2)));
    notifier.ready().await.unwrap();
    notifier.status("all is well").await.unwrap();
    notifier.watchdog().await.unwrap();
    let files = [1, 2, 3].map(marked);
    notifier.store("files", &files.each_ref().map(AsFd::as_fd)).await.unwrap();
    notifier.remove_stored("files").await.unwrap();
    let injected = notifier.status("x\nMAINPID=1").await.unwrap_err();
    assert_eq!(injected.kind(), std::io::ErrorKind::InvalidInput);
    notifier.reloading().await.unwrap();
    notifier.main_pid(812).await.unwrap();
    notifier.stopping().await.unwrap();
    notifier.barrier(Duration::from_secs(30)).await.unwrap();
}

/// Returns a command that runs this binary as the service.
fn service(role: &str, address: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([role, "--exact", "--nocapture"]).env("FDWIRE_ROLE", role);
    command.env("NOTIFY_SOCKET", address).env("WATCHDOG_USEC", "4000000");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

#[test]
fn a_service_notifies_a_manager_and_stores_descriptors_there() {
    if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == ROLE) {
        return run_and_pass(notify());
    }
    let Some(python) = installed("python3") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = abstract_name("service");
        let text = format!("@{}", str::from_utf8(name.as_abstract_name().unwrap()).unwrap());
        for (n, address) in [path.to_str().unwrap().to_owned(), text].into_iter().enumerate() {
            // Start the manager, and then the service.
            let (printed, output) = std::io::pipe().unwrap();
            let listens = directory.path().join(format!("listens {n}"));
            let mut command = Command::new(&python);
            command
                .args(["-c", MANAGER, &address])
                .arg(&listens)
                .stdin(Stdio::null())
                .stdout(output);
            let mut manager = Daemon::start(&mut command, directory.path());
            drop(command);
            manager.ready(async || File::open(&listens)).await;
            let mut service = Daemon::start(&mut service(ROLE, &address), directory.path());
            assert_eq!(service.ended().await.code(), Some(PASSED));
            assert!(manager.ended().await.success());

            // The manager has printed each message.
            let pid = service.child.id();
            let expected = [
                "READY=1 0",
                "STATUS=all is well 0",
                "WATCHDOG=1 0",
                "files 1 2 3",
                "FDSTOREREMOVE=1 FDNAME=files 0",
                "RELOADING=1 0",
                "MAINPID=812 0",
                "STOPPING=1 0",
            ];
            let expected = expected.map(|line| format!("{pid} {line}\n")).concat() + "barrier\n";
            assert_eq!(std::io::read_to_string(printed).unwrap(), expected);
        }
    });
}

#[test]
fn a_service_sends_the_same_as_systemd_notify() {
    const TEST: &str = "sd_notify::a_service_sends_the_same_as_systemd_notify";
    if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == TEST) {
        return run_and_pass(async {
            let notifier = Notifier::from_env().unwrap();
            notifier.ready().await.unwrap();
            notifier.status("all is well").await.unwrap();
            notifier.stopping().await.unwrap();
            notifier.watchdog().await.unwrap();
            notifier.main_pid(812).await.unwrap();
            notifier.barrier(Duration::from_secs(30)).await.unwrap();
        });
    }
    let Some(program) = installed("systemd-notify") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for (manager, address) in managers("same", directory.path()) {
            // The messages of a service.
            let mut ours = Daemon::start(&mut service(TEST, &address), directory.path());
            let mut sent = Vec::new();
            for _ in 0..5 {
                sent.push(manager.recv().await.unwrap().payload);
            }
            drop(manager.recv().await.unwrap()); // the barrier
            assert_eq!(ours.ended().await.code(), Some(PASSED));

            // The same messages of systemd-notify.
            for (argument, ours) in
                ["--ready", "--status=all is well", "STOPPING=1", "WATCHDOG=1", "--pid=812"]
                    .into_iter()
                    .zip(sent)
            {
                let mut command = Command::new(&program);
                command
                    .args(["--no-block", argument])
                    .env("NOTIFY_SOCKET", &address)
                    .stdin(Stdio::null());
                let mut theirs = Daemon::start(&mut command, directory.path());
                assert_eq!(manager.recv().await.unwrap().payload, ours);
                assert!(theirs.ended().await.success());
            }
        }
    });
}

#[test]
fn a_service_learns_that_its_manager_does_not_answer_a_barrier_or_is_gone() {
    const TEST: &str =
        "sd_notify::a_service_learns_that_its_manager_does_not_answer_a_barrier_or_is_gone";
    if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == TEST) {
        return run_and_pass(async {
            let notifier = Notifier::from_env().unwrap();
            let late = notifier.barrier(Duration::from_millis(20)).await.unwrap_err();
            assert_eq!(late.kind(), std::io::ErrorKind::TimedOut);
            while notifier.ready().await.is_ok() {
                tokio::task::yield_now().await;
            }
        });
    }
    run(async {
        let directory = tempfile::tempdir().unwrap();
        for (manager, address) in managers("gone", directory.path()) {
            let mut service = Daemon::start(&mut service(TEST, &address), directory.path());
            let _barrier = manager.recv().await.unwrap();
            manager.recv().await.unwrap();
            drop(manager);
            assert_eq!(service.ended().await.code(), Some(PASSED));
        }
    });
}

#[test]
fn without_a_manager_a_notifier_sends_nothing() {
    run(async {
        if std::env::var_os("NOTIFY_SOCKET").is_some() {
            return; // the tests themselves run as a service
        }
        let notifier = Notifier::from_env().unwrap();
        assert!(!notifier.is_active());
        notifier.ready().await.unwrap();
        notifier.barrier(Duration::from_secs(30)).await.unwrap();
    });
}
