//! Helpers of several test binaries.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]

mod events;
mod programs;
pub(crate) mod raw_receiver;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    future::Future,
    io::{IoSlice, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::FileExt,
            net::{SocketAddr, UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

pub(crate) use events::Events;
pub(crate) use programs::{attachable_strace, demo_of, installed, skipped};

use fdwire::{Frame, FrameCodec, Framed, Limits, Socket, SocketKind};
use futures::{SinkExt, StreamExt, TryStreamExt};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    resource::{Resource, getrlimit, setrlimit},
    socket::{ControlMessage, MsgFlags, SockType, UnixAddr, sendmsg},
};
use tokio::runtime::{Builder, Runtime};

pub(crate) const KINDS: [SocketKind; 2] = [SocketKind::SeqPacket, SocketKind::Stream];

/// Runs a test in a runtime of its own. Fails if the test takes longer than a minute.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    run_in(one_thread(), test)
}

pub(crate) fn one_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) fn one_worker() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

pub(crate) fn some_threads() -> Runtime {
    Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap()
}

/// Does the same as [`run`], in the given runtime.
pub(crate) fn run_in<T>(runtime: Runtime, test: impl Future<Output = T>) -> T {
    raise_fd_limit();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs")
    })
}

/// Runs a test on both kinds of socket, and checks that the process has as many descriptors
/// afterwards as before. All tests of its binary have to use this function, because only these run
/// one at a time.
pub(crate) fn counted(test: impl AsyncFn(SocketKind)) {
    counted_in(one_thread, test);
}

/// Does the same as [`counted`], in runtimes that `runtime` makes.
pub(crate) fn counted_in(runtime: fn() -> Runtime, test: impl AsyncFn(SocketKind)) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // Before anything is counted, tokio opens its two descriptors for signals, and the closer the
    // one for its queue. Both keep them until the process ends.
    run(async {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        fdwire::close_in_background([a]);
        let ended = tokio::task::spawn_blocking(move || std::io::Read::read(&mut &b, &mut [0]));
        assert_eq!(ended.await.unwrap().unwrap(), 0);
    });
    for kind in KINDS {
        let before = open_fds();
        run_in(runtime(), test(kind));
        let begin = Instant::now();
        while open_fds() != before && begin.elapsed() < Duration::from_secs(10) {
            std::thread::yield_now(); // a thread closes the descriptors that nobody has taken
        }
        assert_eq!(open_fds(), before, "descriptors leaked on {kind:?}");
    }
}

/// Lets the other tasks run until each of them waits for an event from outside.
pub(crate) async fn settle() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

/// Raises the limit of descriptors as far as possible. The usual 1,024 are too few for all tests of
/// a process, which run at the same time.
fn raise_fd_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

pub(crate) fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Leaves a socket file on which nobody listens. A child that another test is starting may have a
/// copy of the socket for a moment, so this waits until no connection is accepted.
pub(crate) fn leave_stale_socket(path: &Path) {
    drop(UnixListener::bind(path).unwrap());
    while UnixStream::connect(path).is_ok() {
        std::thread::yield_now();
    }
}

/// Returns a codec that accepts large frames with many descriptors.
pub(crate) fn large() -> FrameCodec {
    FrameCodec::new(Limits::default().max_payload_bytes(16 << 20).max_fds_per_frame(3000))
}

pub(crate) fn framed_pair(kind: SocketKind) -> (Framed<FrameCodec>, Framed<FrameCodec>) {
    let (a, b) = Socket::pair(kind).unwrap();
    (Framed::new(a, large()), Framed::new(b, large()))
}

/// Returns a socket and the bare descriptor of its peer, for a test whose peer misbehaves.
pub(crate) fn with_raw_peer(kind: SocketKind) -> (Framed<FrameCodec>, OwnedFd) {
    let (a, b) = Socket::pair(kind).unwrap();
    (Framed::new(a, large()), b.into())
}

/// Waits until the other end of a socket is closed. Connections are closed in the background.
pub(crate) fn wait_for_close_of_peer(socket: &impl AsFd) {
    let mut poll = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    while !poll[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)) {
        nix::poll::poll(&mut poll, PollTimeout::NONE).unwrap();
    }
}

/// Opens a file that contains `mark`, so that a test recognizes its descriptor after it was passed.
pub(crate) fn marked(mark: u32) -> OwnedFd {
    let mut file = File::from(memfd_create("mark", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(&mark.to_be_bytes()).unwrap();
    file.into()
}

pub(crate) fn mark_of(fd: &impl AsFd) -> u32 {
    let mut mark = [0; 4];
    File::from(fd.as_fd().try_clone_to_owned().unwrap()).read_exact_at(&mut mark, 0).unwrap();
    u32::from_be_bytes(mark)
}

pub(crate) fn marks(frame: &Frame) -> Vec<u32> {
    frame.fds.iter().map(mark_of).collect()
}

/// Encodes a frame without the codec under test.
pub(crate) fn encoded(payload: &[u8], fds: u16) -> Vec<u8> {
    let mut bytes = vec![0xFD, 0x10];
    bytes.extend_from_slice(&fds.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Sends exactly these bytes and descriptors with one `sendmsg`, without the code under test.
pub(crate) fn raw_send(socket: &impl AsFd, bytes: &[u8], fds: &[OwnedFd]) {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &control[..] };
    let socket = socket.as_fd().as_raw_fd();
    let sent =
        sendmsg::<UnixAddr>(socket, &[IoSlice::new(bytes)], control, MsgFlags::empty(), None)
            .unwrap();
    assert_eq!(sent, bytes.len());
}

/// Starts the test `name` of this binary again as a process of its own, with `socket` as standard
/// input and `FDWIRE_ROLE` set.
pub(crate) fn spawn_role(name: &str, uid: Option<u32>, socket: OwnedFd) -> Child {
    // Another uid may have no access to the path of the binary.
    let mut command = Command::new("/proc/self/exe");
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    spawn_role_by(command, name, socket)
}

/// Does the same as [`spawn_role`], with a command that executes this binary with the arguments
/// that it gets.
pub(crate) fn spawn_role_by(mut command: Command, name: &str, socket: OwnedFd) -> Child {
    command.args([name, "--exact", "--nocapture"]).env("FDWIRE_ROLE", name);
    command.stdin(Stdio::from(socket)).stdout(Stdio::null()).spawn().unwrap()
}

/// Returns standard input as a socket, in a process that [`spawn_role`] has started for this test.
/// Returns `None` in the ordinary test run.
pub(crate) fn role_socket(name: &str) -> Option<OwnedFd> {
    (std::env::var("FDWIRE_ROLE").ok()? == name)
        .then(|| std::io::stdin().as_fd().try_clone_to_owned().unwrap())
}

/// The exit status of a test's process that has done all that it should. It is not 0, because a
/// process that finds no test by its name ends with 0.
pub(crate) const PASSED: i32 = 42;

/// Runs the part of a test that is a process of its own, and ends the process with [`PASSED`].
pub(crate) fn run_and_pass(role: impl Future<Output = ()>) {
    run(role);
    std::process::exit(PASSED)
}

/// Starts a program and returns the list of its descriptors, as `ls` prints it.
pub(crate) fn descriptors_of_a_child() -> String {
    let output =
        Command::new("ls").args(["-l", "/proc/self/fd"]).stdin(Stdio::inherit()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Returns a uid without rights. Returns `None` if the test cannot change to it, with the reason
/// printed.
pub(crate) fn other_uid() -> Option<u32> {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root to change to another uid");
    }
    // Each run has another uid, because limits on a uid count all its processes.
    root.then(|| 1_000_000 + std::process::id())
}

/// Returns the command of an example, after building it. `cargo test` builds all examples. A run of
/// a single test binary does not build them, and without the build here it would run an old one.
pub(crate) fn example(name: &str) -> Command {
    let profile = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
    static UP_TO_DATE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut up_to_date = UP_TO_DATE.lock().unwrap();
    if up_to_date.insert(name.to_owned()) {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--example", name]);
        // With the features of `cargo test`, nothing is built again.
        let features = [
            ("axum", cfg!(feature = "axum")),
            ("serde", cfg!(feature = "serde")),
            ("json", cfg!(feature = "json")),
            ("metrics", cfg!(feature = "metrics")),
            ("tonic", cfg!(feature = "tonic")),
        ];
        for (feature, _) in features.into_iter().filter(|(_, is_on)| *is_on) {
            build.args(["--features", feature]);
        }
        if profile.ends_with("release") {
            build.arg("--release");
        }
        // cargo has set these variables for this test. A build script that reads them, as that of
        // ring does, would run again, and cargo would build again whatever depends on it.
        let is_of_package =
            |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        for (name, _) in std::env::vars().filter(|(name, _)| is_of_package(name)) {
            build.env_remove(name);
        }
        assert!(build.status().unwrap().success());
    }
    Command::new(profile.join("examples").join(name))
}

/// Runs the demo of an example. Returns its last lines: numbers with their names.
pub(crate) fn demo(name: &str, arguments: &[&str]) -> BTreeMap<String, f64> {
    demo_of(example(name), arguments)
}

/// Checks that a frame with a descriptor gets from one end to the other, and so does the end of the
/// stream.
pub(crate) async fn check_connected(a: Socket, b: Socket) {
    let (mut a, mut b) =
        (Framed::new(a, FrameCodec::default()), Framed::new(b, FrameCodec::default()));
    a.send(Frame::new("hello").with_fd(marked(1))).await.unwrap();
    let frame = b.try_next().await.unwrap().unwrap();
    assert_eq!((&frame.payload[..], frame.fds.len()), (&b"hello"[..], 1));
    b.close().await.unwrap();
    assert!(a.next().await.is_none());
}

/// Returns an abstract name that no other run uses.
pub(crate) fn abstract_name(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(format!("fdwire-test-{name}-{}", std::process::id())).unwrap()
}

pub(crate) fn sock_type(kind: SocketKind) -> SockType {
    match kind {
        SocketKind::SeqPacket => SockType::SeqPacket,
        SocketKind::Stream => SockType::Stream,
        other => panic!("the tests do not know {other:?}"),
    }
}
