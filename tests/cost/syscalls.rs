//! System calls for a batch of frames, counted by strace.

use std::{collections::BTreeMap, process::Command};

use fdwire::SocketKind;
use nix::unistd::getppid;

use crate::{
    BATCH, Connection, Load, Start,
    common::{KINDS, installed, run, skipped},
    half, tasks,
};

/// A measurement, and the most calls that a batch may take.
struct Row {
    what: &'static str,
    load: fn() -> Load,
    frames: usize,
    send_buffer: Option<usize>,
    outgoing: Start,
    /// Most calls for a batch.
    sendmsg: usize,
    recvmsg: usize,
    /// Most calls for each frame: one for a descriptor of an unknown kind, which may be a socket.
    getsockopt: usize,
}

/// Returns all rows. A batch takes at least two receives: the last one finds nothing, and then the
/// receiver waits.
fn rows(kind: SocketKind) -> Vec<Row> {
    let small = Row {
        what: "64 frames of 64 B",
        load: || Load::plain(64),
        frames: BATCH,
        send_buffer: None,
        outgoing: half,
        sendmsg: 1,
        recvmsg: 2,
        getsockopt: 0,
    };

    // Variations of it: descriptors, and many tasks.
    let mut rows = vec![
        Row {
            what: "64 frames of 64 B with a descriptor each",
            load: || Load::with_fd(64),
            getsockopt: 1,
            ..small
        },
        Row {
            what: "64 frames of 64 B with a known file each",
            load: || Load::with_known_file(64),
            ..small
        },
        Row { what: "64 tasks with a frame of 64 B each", outgoing: tasks, ..small },
        Row {
            what: "64 tasks with a frame of 64 B and a descriptor each",
            load: || Load::with_fd(64),
            outgoing: tasks,
            getsockopt: 1,
            ..small
        },
        small,
    ];

    // A large frame that fits into the send buffer.
    let wmem_max: usize =
        std::fs::read_to_string("/proc/sys/net/core/wmem_max").unwrap().trim().parse().unwrap();
    if wmem_max < 1 << 20 {
        eprintln!("skipped: net.core.wmem_max is too small for packets of 1 MiB");
    } else if kind == SocketKind::SeqPacket {
        // The header has its own packet, so that the payload can be received into its final place.
        rows.push(Row {
            what: "a frame of 1 MiB, 4 MiB of send buffer",
            load: || Load::plain(1 << 20),
            frames: 1,
            send_buffer: Some(4 << 20),
            outgoing: half,
            sendmsg: 2,
            recvmsg: 3,
            getsockopt: 0,
        });
    }
    rows
}

const BATCHES: usize = 20;

/// Runs each row between two calls of `getppid`, which mark its begin and its end in strace's
/// output.
fn run_rows(kind: SocketKind) {
    run(async {
        for row in rows(kind) {
            let load = (row.load)();
            let mut connection = Connection::new(kind, row.frames, row.send_buffer, row.outgoing);
            for batch in 0..2 * BATCHES {
                if batch == BATCHES {
                    getppid();
                }
                connection.batch((0..row.frames).map(|_| load.frame())).await;
            }
            getppid();
            connection.end().await; // its last receive must not count for the next row
        }
    });
}

/// Returns the calls between the first and the second call of `getppid`, those between the third
/// and the fourth, and so on. Only calls of the thread that calls `getppid` count, because another
/// thread closes received descriptors.
fn between_marks(trace: &str) -> Vec<BTreeMap<&str, usize>> {
    let mut counts = Vec::new();
    let mut counting = false;
    let mark = trace.lines().find(|line| line.contains("getppid(")).unwrap();
    let thread = mark.split_whitespace().next().unwrap();
    for line in trace.lines() {
        // A line without a parenthesis is the rest of a call, or a signal.
        let Some((start, _)) = line.split_once('(') else { continue };
        let mut words = start.split_whitespace();
        if words.next() != Some(thread) || line.contains("resumed>") {
            continue;
        }
        let call = words.last().unwrap_or_default();
        if call == "getppid" {
            counting = !counting;
            if counting {
                counts.push(BTreeMap::new());
            }
        } else if counting && let Some(counts) = counts.last_mut() {
            *counts.entry(call).or_default() += 1;
        }
    }
    counts
}

#[test]
fn a_batch_takes_one_send_and_two_receives() {
    const ROLE: &str = "syscalls::a_batch_takes_one_send_and_two_receives";
    if let Ok(role) = std::env::var("FDWIRE_ROLE") {
        let kind = KINDS.into_iter().find(|kind| role == format!("{ROLE} {kind:?}"));
        return kind.map_or((), run_rows);
    }
    let Some(strace) = installed("strace") else { return };
    let probe = Command::new(&strace).args(["-qq", "-o", "/dev/null", "true"]).output().unwrap();
    if !probe.status.success() {
        return skipped(&format!(
            "strace may not trace: {}",
            String::from_utf8_lossy(&probe.stderr)
        ));
    }
    let directory = tempfile::tempdir().unwrap();
    for kind in KINDS {
        // Run all rows under strace.
        let trace = directory.path().join(format!("{kind:?}"));
        let mut command = Command::new(&strace);
        command
            .args([
                "-f",
                "-qq",
                "-e",
                "trace=network,?epoll_wait,epoll_pwait,?epoll_pwait2,getppid",
                "-o",
            ])
            .arg(&trace);
        command.arg(std::env::current_exe().unwrap()).args([ROLE, "--exact"]);
        let output = command.env("FDWIRE_ROLE", format!("{ROLE} {kind:?}")).output().unwrap();
        assert!(output.status.success(), "{output:?}");

        // Count the calls of each row.
        let trace = std::fs::read_to_string(trace).unwrap();
        let (rows, counts) = (rows(kind), between_marks(&trace));
        assert_eq!(rows.len(), counts.len());
        for (row, mut counts) in rows.into_iter().zip(counts) {
            let mut per_batch =
                |call: &str| counts.remove(call).unwrap_or(0) as f64 / BATCHES as f64;
            let (sends, receives) = (per_batch("sendmsg"), per_batch("recvmsg"));
            let waits =
                per_batch("epoll_wait") + per_batch("epoll_pwait") + per_batch("epoll_pwait2");
            println!(
                "{}, {kind:?}: {sends} sendmsg, {receives} recvmsg, {waits} epoll_wait",
                row.what
            );
            let getsockopts = per_batch("getsockopt");
            let most = row.getsockopt * row.frames;
            assert!(getsockopts <= most as f64, "{getsockopts} getsockopt for {}", row.what);
            assert!(sends <= row.sendmsg as f64, "{sends} sends for {}", row.what);
            assert!(receives <= row.recvmsg as f64, "{receives} receives for {}", row.what);
            assert!(counts.is_empty(), "other calls for {}: {counts:?}", row.what);
        }
    }
}
