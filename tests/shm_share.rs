//! The example `shm_share`, whose two processes share an image. It is run as a user would run it,
//! and its child is run with a hostile parent.

mod common;

use std::{
    fs::{File, Permissions, set_permissions},
    io::{Read, pipe},
    net::Shutdown,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, PermissionsExt},
    },
    process::{Output, Stdio},
};

use fdwire::{Socket, SocketKind};
use rustix::{
    event::{EventfdFlags, eventfd},
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    process::{Pid, Signal, geteuid, kill_process},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::Command,
};

/// The seals that fix the size of a memfd.
const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// The width, the height and the bytes of a row.
const PAYLOAD: &[u8] = b"101 67 448";
const BYTES: u64 = 448 * 67;

fn shm_share(arguments: &[&str]) -> Command {
    let mut command = Command::from(common::example("shm_share"));
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn small(rounds: &str) -> Command {
    shm_share(&["--width", "101", "--height", "67", "--rounds", rounds])
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
    let file =
        File::from(memfd_create("image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(bytes).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file.into()
}

fn doorbell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn good() -> [OwnedFd; 2] {
    [memfd(BYTES, SIZE_SEALS), doorbell()]
}

/// Runs the child. Its parent, the test, sends these messages and then closes.
fn child_given(messages: &[(&[u8], &[OwnedFd])]) -> Output {
    common::run(async {
        let (ours, theirs) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let child =
            shm_share(&["--child"]).stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
        for (payload, fds) in messages {
            common::raw_send(&ours, &common::encoded(payload, fds.len() as u16), fds);
        }
        ours.shutdown(Shutdown::Write).unwrap();
        child.wait_with_output().await.unwrap()
    })
}

/// Checks that a process has ended with exit code 1, and that it has printed only one line, with
/// this reason.
fn check_failed(output: &Output, reason: &str) {
    assert_eq!(text(&output.stderr), format!("shm_share: {reason}\n"));
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""));
}

fn check_refused(payload: &[u8], fds: &[OwnedFd], reason: &str) {
    check_failed(&child_given(&[(payload, fds)]), reason);
}

#[test]
fn two_processes_draw_in_one_image_and_both_ways_are_measured() {
    let output = common::run(async { small("3").output().await.unwrap() });
    let stdout = text(&output.stdout);
    assert_eq!((text(&output.stderr), output.status.code()), ("", Some(0)), "{stdout}");
    // A row of 101 pixels takes 404 bytes and begins at a multiple of 64.
    assert!(stdout.starts_with("101 x 67 pixels, 30016 bytes"), "{stdout}");
    let drawn = 7u32.wrapping_mul(0x9E37_79B9);
    assert!(stdout.contains(&format!("was 00000000, and is {drawn:08x}")), "{stdout}");
    for row in [
        "median of 3",
        "draw the image, hand it over",
        "hand over what is drawn",
        "in a frame",
        "pidfd_getfd",
    ] {
        assert!(stdout.contains(row), "{row} in {stdout}");
    }
}

#[test]
fn the_child_draws_in_the_memory_that_it_is_given() {
    let [memfd, mut doorbell] = good().map(File::from);
    let fds = [memfd.try_clone().unwrap().into(), doorbell.try_clone().unwrap().into()];
    let output = child_given(&[(PAYLOAD, &fds), (b"draw 3", &[])]);
    assert_eq!((text(&output.stderr), output.status.code()), ("", Some(0)));
    let mut rings = [0; 8];
    doorbell.read_exact(&mut rings).unwrap();
    assert_eq!(u64::from_ne_bytes(rings), 1);
    let mut pixel = [0; 4];
    memfd.read_exact_at(&mut pixel, 66 * 448 + 4 * 100).unwrap();
    assert_eq!(u32::from_ne_bytes(pixel), ((100u32 ^ 66) + 3).wrapping_mul(0x9E37_79B9));
}

#[test]
fn a_memfd_shorter_than_the_image_is_not_mapped() {
    let reason = "the memfd has 30015 bytes, the image needs 30016";
    check_refused(PAYLOAD, &[memfd(BYTES - 1, SIZE_SEALS), doorbell()], reason);
}

#[test]
fn a_memfd_whose_size_could_change_is_not_mapped() {
    for seals in [SealFlags::empty(), SealFlags::SHRINK, SealFlags::GROW] {
        let reason = "the memfd is not sealed against shrinking and growing";
        check_refused(PAYLOAD, &[memfd(BYTES, seals), doorbell()], reason);
    }
}

#[test]
fn a_memfd_that_cannot_be_written_to_is_refused() {
    let fds = [memfd(BYTES, SIZE_SEALS | SealFlags::WRITE), doorbell()];
    let reason = "the memfd cannot be mapped: Operation not permitted (os error 1)";
    check_refused(PAYLOAD, &fds, reason);
}

#[test]
fn descriptors_of_another_kind_are_refused() {
    let (reader, writer) = pipe().unwrap();
    let [memfd, eventfd] = good();
    check_refused(PAYLOAD, &[reader.into(), eventfd], "the descriptor is not a memfd");
    check_refused(PAYLOAD, &[memfd, writer.into()], "the doorbell is not an eventfd");
}

#[test]
fn another_number_of_descriptors_is_refused() {
    let [memfd, eventfd] = good();
    check_refused(PAYLOAD, &[], "two descriptors are due, not 0");
    check_refused(PAYLOAD, &[memfd.try_clone().unwrap()], "two descriptors are due, not 1");
    let three = [memfd, eventfd, doorbell()];
    check_refused(PAYLOAD, &three, "two descriptors are due, not 3");
}

#[test]
fn an_image_of_no_valid_size_is_refused() {
    for nonsense in
        [&b""[..], b"\xFF\n\xFF", b"101 67", b"101 67 448 1", b"101 67 448 x", b"-1 67 448"]
    {
        check_refused(nonsense, &good(), "no width, height and stride");
    }
    for [width, height, stride] in [
        [0, 67, 448],
        [101, 0, 448],
        [101, 67, 400],
        [101, 67, 446],
        [8192, 8193, 32768],
        [1, u32::MAX, u32::MAX - 3],
    ] {
        let reason = format!("no image has {width} x {height} pixels and {stride} bytes a row");
        check_refused(format!("{width} {height} {stride}").as_bytes(), &good(), &reason);
    }
}

#[test]
fn a_request_that_is_not_known_ends_the_child() {
    for request in ["", "paint 1", "draw", "draw x", "copy -1", "number 1"] {
        let output = child_given(&[(PAYLOAD, &good()), (request.as_bytes(), &[])]);
        check_failed(&output, &format!("request {request:?} is not known"));
    }
}

#[test]
fn a_parent_that_closes_before_it_has_sent_the_image_is_gone() {
    check_failed(&child_given(&[]), "the other process is gone");
}

#[test]
fn a_parent_that_closes_before_it_takes_the_answer_is_gone() {
    let output = common::run(async {
        let (ours, theirs) = Socket::pair(SocketKind::SeqPacket).unwrap();
        common::raw_send(&ours, &common::encoded(PAYLOAD, 2), &good());
        common::raw_send(&ours, &common::encoded(b"copy 1", 0), &[]);
        ours.shutdown(Shutdown::Both).unwrap();
        shm_share(&["--child"]).stdin(Stdio::from(OwnedFd::from(theirs))).output().await.unwrap()
    });
    check_failed(&output, "the other process is gone: Broken pipe (os error 32)");
}

#[test]
fn a_child_that_is_killed_is_noticed() {
    common::run(async {
        let mut parent = small("1000000000").spawn().unwrap();
        let mut stdout = BufReader::new(parent.stdout.take().unwrap()).lines();
        stdout.next_line().await.unwrap();
        let drew = stdout.next_line().await.unwrap().unwrap();
        let child =
            drew.strip_prefix("process ").unwrap().split_once(" drew").unwrap().0.parse().unwrap();
        kill_process(Pid::from_raw(child).unwrap(), Signal::KILL).unwrap();
        let output = parent.wait_with_output().await.unwrap();
        check_failed(&output, "the other process is gone (signal: 9 (SIGKILL))");
    });
}

#[test]
fn the_child_ends_with_its_parent() {
    common::run(async {
        let mut parent = small("1000000000").spawn().unwrap();
        let mut stdout = BufReader::new(parent.stdout.take().unwrap());
        stdout.read_line(&mut String::new()).await.unwrap();
        parent.kill().await.unwrap();
        // Both processes hold these pipes, which end with the last of them.
        let mut stderr = String::new();
        stdout.read_to_end(&mut Vec::new()).await.unwrap();
        parent.stderr.take().unwrap().read_to_string(&mut stderr).await.unwrap();
        // The child may be waiting for a request, or be about to send.
        assert!(stderr.lines().count() <= 1, "{stderr}");
    });
}

/// A user cannot take descriptors from a process whose program the user may not read.
#[test]
fn a_refused_pidfd_getfd_is_reported_and_is_no_failure() {
    let directory = tempfile::tempdir().unwrap();
    set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
    let copy = directory.path().join("shm_share");
    // Another process writes the copy. Children of this one would keep it open for writing until
    // they have called exec.
    let mut install = std::process::Command::new("install");
    install.args(["-m", "0111"]).arg(common::example("shm_share").get_program()).arg(&copy);
    assert!(install.status().unwrap().success());
    let mut command = Command::new(&copy);
    if geteuid().is_root() {
        let uid = 1_000_000 + std::process::id();
        command.uid(uid).gid(uid);
    }
    let output = common::run(async {
        command.args(["--rounds", "2"]).kill_on_drop(true).output().await.unwrap()
    });
    let stdout = text(&output.stdout);
    assert_eq!((text(&output.stderr), output.status.code()), ("", Some(0)), "{stdout}");
    assert!(
        stdout.contains("pidfd_getfd: refused: Operation not permitted (os error 1)"),
        "{stdout}"
    );
}

#[test]
fn nonsense_arguments_are_refused() {
    for nonsense in
        [["--width", "0"], ["--height", "8193"], ["--rounds", "0"], ["--rounds", "many"]]
    {
        let output = common::run(async { shm_share(&nonsense).output().await.unwrap() });
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{nonsense:?}");
        assert!(text(&output.stderr).starts_with("error: invalid value"), "{nonsense:?}");
    }
}
