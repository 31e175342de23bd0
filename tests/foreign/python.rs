//! fdwire's frames in a few lines of Python, with its `socket.send_fds` and `recv_fds`, on both
//! kinds of socket.

use std::{
    os::fd::OwnedFd,
    process::{Command, Stdio},
};

use bytes::Bytes;
use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind, codec::PacketCodec};
use futures::{SinkExt, StreamExt, TryStreamExt};

use crate::{
    Daemon,
    common::{KINDS, mark_of, marked, marks, run},
    installed,
};

/// Two functions in Python: `receive` returns the payload and the descriptors of the next frame,
/// and `send` sends a frame in a call of its own.
const FRAMES: &str = r#"
import os, socket, struct
peer, data, fds = socket.socket(fileno=0), b"", []

def receive():
    global data, fds
    while len(data) < 8 or len(data) < 8 + struct.unpack_from(">I", data, 4)[0]:
        more, arrived, _, _ = socket.recv_fds(peer, 1 << 20, 253)
        if not more:
            raise SystemExit
        data, fds = data + more, fds + list(arrived)
    count, length = struct.unpack_from(">HI", data, 2)
    payload, data = data[8:8 + length], data[8 + length:]
    mine, fds = fds[:count], fds[count:]
    return payload, mine

def send(payload, fds):
    socket.send_fds(peer, [struct.pack(">BBHI", 0xFD, 0x10, len(fds), len(payload)), payload], fds)
"#;

/// Sends each frame back, with its descriptors in the opposite order and with their contents behind
/// the payload.
const ECHO_FRAMES: &str = "
while True:
    payload, mine = receive()
    contents = b''.join(os.pread(fd, 4, 0) for fd in mine)
    send(payload[:100] + b'%d' % len(payload) + contents, mine[::-1])
    for fd in mine:
        os.close(fd)
";

const ECHO_PACKETS: &str = "
import socket
peer = socket.socket(fileno=0)
while True:
    packet, fds, _, _ = socket.recv_fds(peer, 65536, 253)
    if not packet:
        break
    socket.send_fds(peer, [packet.upper()], fds)
";

/// Starts a Python program. Its standard input is the other end of the socket that is returned.
fn start(kind: SocketKind, program: &str) -> Option<(Daemon, tempfile::TempDir, Socket)> {
    let python = installed("python3")?;
    let directory = tempfile::tempdir().unwrap();
    let (ours, its_stdin) = Socket::pair(kind).unwrap();
    let mut command = Command::new(python);
    command.args(["-c", program]).stdin(OwnedFd::from(its_stdin)).stdout(Stdio::null());
    let daemon = Daemon::start(&mut command, directory.path());
    Some((daemon, directory, ours))
}

fn with_marks(payload: impl AsRef<[u8]>, marks: impl IntoIterator<Item = u32>) -> Frame {
    Frame::new(Bytes::copy_from_slice(payload.as_ref())).with_fds(marks.into_iter().map(marked))
}

#[test]
fn frames_with_descriptors_go_to_python_and_back() {
    for kind in KINDS {
        run(async {
            let Some((mut daemon, _directory, socket)) =
                start(kind, &[FRAMES, ECHO_FRAMES].concat())
            else {
                return;
            };
            let mut python = Framed::new(socket, FrameCodec::default());
            for (length, count) in
                [(0, 0), (5, 1), (100, 0), (64 << 10, 3), (300_000, 253), (10, 2)]
            {
                let payload = vec![b'x'; length];
                python.send(with_marks(&payload, 1..=count)).await.unwrap();
                let answer = python.try_next().await.unwrap().unwrap();
                let mut expected =
                    [&payload[..length.min(100)], length.to_string().as_bytes()].concat();
                (1..=count).for_each(|mark| expected.extend(mark.to_be_bytes()));
                assert!(answer.payload == expected, "{length} bytes on {kind:?}");
                assert!(
                    marks(&answer).into_iter().eq((1..=count).rev()),
                    "{count} descriptors on {kind:?}"
                );
            }
            python.close().await.unwrap();
            assert!(python.next().await.is_none());
            assert!(daemon.ended().await.success());
        });
    }
}

/// Python reads all bytes that are there: several frames at a time, with as many of their
/// descriptors as the kernel merges.
#[test]
fn many_frames_in_one_flush_go_to_python_and_back() {
    for kind in KINDS {
        run(async {
            let Some((_daemon, _directory, socket)) = start(kind, &[FRAMES, ECHO_FRAMES].concat())
            else {
                return;
            };
            let (mut from_python, mut to_python) =
                Framed::new(socket, FrameCodec::default()).into_split();
            for n in 0..200 {
                to_python.feed(with_marks(n.to_string(), (0..n % 4).map(|_| n))).await.unwrap();
            }
            let answers = async {
                for n in 0..200 {
                    let answer = from_python.try_next().await.unwrap().unwrap();
                    let marks_of_n = vec![n; n as usize % 4];
                    assert_eq!(marks(&answer), marks_of_n, "frame {n} on {kind:?}");
                }
            };
            let (flushed, ()) = tokio::join!(to_python.flush(), answers);
            flushed.unwrap();
        });
    }
}

#[test]
fn packets_with_descriptors_go_to_python_and_back() {
    run(async {
        let Some((_daemon, _directory, socket)) = start(SocketKind::SeqPacket, ECHO_PACKETS) else {
            return;
        };
        let mut python = Framed::new(socket, PacketCodec::default());
        for n in 1..=20 {
            python.feed(with_marks(format!("packet {n}"), 0..n)).await.unwrap();
        }
        python.flush().await.unwrap();
        for n in 1..=20 {
            let answer = python.try_next().await.unwrap().unwrap();
            assert_eq!(answer.payload, format!("PACKET {n}"));
            let fds: Vec<OwnedFd> = answer.fds.into_iter().collect();
            assert!(fds.iter().map(mark_of).eq(0..n));
        }
    });
}
