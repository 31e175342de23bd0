//! OpenSSH's connection sharing: a session on a real `ssh -M`, whose request has three descriptors,
//! each with a byte of its own behind it.
//! <https://github.com/openssh/openssh-portable/blob/master/PROTOCOL.mux>

use std::{
    io::{PipeReader, Read, Write, pipe},
    process::{Command, Stdio},
};

use bytes::{Buf, BufMut, BytesMut};
use fdwire::{
    Error, Framed, SendError, SendFd, Socket, SocketKind,
    codec::{Codec, Decoder, DryRun, Encoder, FdQueue, SendBuf},
};
use futures::{SinkExt, TryStreamExt};

use crate::{
    Daemon,
    common::{installed, marked, run, skipped},
    raw_recv,
    ssh::{options, start_sshd},
};

const HELLO: u32 = 1;
const VERSION: u32 = 4;
const NEW_SESSION: u32 = 0x1000_0002;
const ALIVE_CHECK: u32 = 0x1000_0004;
const EXIT_MESSAGE: u32 = 0x8000_0004;
const ALIVE: u32 = 0x8000_0005;
const SESSION_OPENED: u32 = 0x8000_0006;

/// A message of a client.
enum Request<F> {
    Hello,
    /// A check with its number.
    AliveCheck(u32),
    /// A session with its number, a command, and the command's standard input, output and error.
    NewSession(u32, &'static str, [F; 3]),
}

/// The codec of the client.
#[derive(Clone)]
struct Mux;

/// The default grouping: the master reads a message without room for descriptors, then each byte
/// with room for one.
impl Codec for Mux {}

impl<F> Encoder<Request<F>, F> for Mux {
    type Error = Error;

    fn encode(
        &mut self,
        request: Request<F>,
        dst: &mut SendBuf<F>,
    ) -> Result<(), SendError<Request<F>>> {
        // The body, which depends on the request.
        let mut body = BytesMut::new();
        let mut stdio = None;
        match request {
            Request::Hello => {
                body.put_u32(HELLO);
                body.put_u32(VERSION);
            }
            Request::AliveCheck(number) => {
                body.put_u32(ALIVE_CHECK);
                body.put_u32(number);
            }
            Request::NewSession(number, command, fds) => {
                body.put_u32(NEW_SESSION);
                body.put_u32(number);
                body.put_u32(0); // reserved
                body.put_bytes(0, 4 * 4); // no terminal, no X11, no agent, no subsystem
                body.put_u32(u32::MAX); // no escape character
                for text in ["", command] {
                    body.put_u32(text.len() as u32);
                    body.put_slice(text.as_bytes());
                }
                stdio = Some(fds);
            }
        }

        // The message, and then each descriptor with a byte of its own.
        dst.put_u32(body.len() as u32);
        dst.put_shared(body.freeze());
        for fd in stdio.into_iter().flatten() {
            dst.end_part();
            dst.put_u8(0);
            dst.put_fd(fd);
        }
        Ok(())
    }
}

impl<F> Decoder<F> for Mux {
    /// The kind of an answer, and the numbers in it.
    type Item = (u32, Vec<u32>);
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        _: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, Error> {
        let Some(length) = src.first_chunk().map(|length| u32::from_be_bytes(*length) as usize)
        else {
            return Ok(None);
        };
        if length > 256 << 10 {
            return Err(Error::invalid("a packet of this length"));
        }
        if src.len() < 4 + length {
            return Ok(None);
        }
        src.advance(4);
        let mut body = src.split_to(length);
        let kind = body.try_get_u32().map_err(Error::invalid)?;
        let numbers = std::iter::from_fn(|| body.try_get_u32().ok()).collect();
        Ok(Some((kind, numbers)))
    }
}

#[test]
fn each_descriptor_of_a_session_has_a_byte_of_its_own() {
    let mut run = DryRun::stream();
    run.encode(&mut Mux, Request::AliveCheck(1)).unwrap();
    run.encode(&mut Mux, Request::NewSession(2, "true", [7, 8, 9])).unwrap();
    run.encode(&mut Mux, Request::AliveCheck(3)).unwrap();
    let calls: Vec<_> = run.map(|call| (call.bytes.len(), call.fds)).collect();
    // The last byte with a descriptor is in one call with the next message. The master reads that
    // byte alone.
    assert_eq!(calls, [(12 + 48, vec![]), (1, vec![7]), (1, vec![8]), (1 + 12, vec![9])]);
}

/// The peer reads as the master does: message by message, and with room for descriptors only when
/// it expects one.
#[test]
fn a_peer_that_reads_one_message_at_a_time_finds_each_descriptor_with_its_byte() {
    run(async {
        let (a, peer) = Socket::pair(SocketKind::Stream).unwrap();
        let (_, write) = Framed::new(a, Mux).into_split();
        let (sender, driver) = write.into_sender();

        // Many tasks send at the same time. Their requests stay whole.
        for number in 0..20 {
            let stdio = [1, 2, 3].map(|mark| SendFd::from(marked(10 * number + mark)));
            let sender = sender.clone();
            tokio::spawn(async move {
                sender.send(Request::NewSession(number, "true", stdio)).await.unwrap();
                sender.send(Request::AliveCheck(number)).await.unwrap();
            });
        }
        drop(sender);
        driver.await.close().await.unwrap();

        // Each session is followed by its three descriptors.
        let (mut sessions, mut checks) = (0, 0);
        loop {
            let (length, fds) = raw_recv(&peer, 4);
            if length.is_empty() {
                break;
            }
            assert_eq!(fds, [0; 0]);
            let (body, fds) =
                raw_recv(&peer, u32::from_be_bytes(length.try_into().unwrap()) as usize);
            assert_eq!(fds, [0; 0]);
            let number = u32::from_be_bytes(body[4..8].try_into().unwrap());
            if body[..4] == NEW_SESSION.to_be_bytes() {
                for mark in [1, 2, 3] {
                    assert_eq!(raw_recv(&peer, 1), (vec![0], vec![10 * number + mark]));
                }
                sessions += 1;
            } else {
                checks += 1;
            }
        }
        assert_eq!((sessions, checks), (20, 20));
    });
}

async fn read_to_end(mut reader: PipeReader) -> String {
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text)
    });
    read.await.unwrap().unwrap()
}

/// The address of sshd in the test of this file.
const ADDRESS: &str = "127.0.0.6";

#[test]
fn a_master_accepts_a_session_that_is_sent_as_one_item() {
    let (Some(sshd), Some(client), Some(keygen)) =
        (installed("sshd"), installed("ssh"), installed("ssh-keygen"))
    else {
        return;
    };
    if !nix::unistd::geteuid().is_root() {
        return skipped("needs root to log in through sshd");
    }
    run(async {
        // Start sshd, and a master that is logged in there.
        let directory = tempfile::tempdir().unwrap();
        let (_sshd, port) = start_sshd(&sshd, &keygen, directory.path(), ADDRESS).await;
        let (socket, logs) = (directory.path().join("mux"), directory.path().join("master"));
        std::fs::create_dir(&logs).unwrap();
        let mut command = Command::new(&client);
        command
            .args(["-M", "-N", "-S"])
            .arg(&socket)
            .args(options(directory.path(), port))
            .arg(ADDRESS);
        let mut master = Daemon::start(command.stdin(Stdio::null()).stdout(Stdio::null()), &logs);
        let socket =
            master.ready(async || Socket::connect(&socket, SocketKind::Stream).await).await;

        // Send everything in one flush: other requests wait before the session and behind it.
        let ((input, mut typed), (printed, output), (errors, error)) =
            (pipe().unwrap(), pipe().unwrap(), pipe().unwrap());
        let mut framed = Framed::new(socket, Mux);
        framed.feed(Request::Hello).await.unwrap();
        framed.feed(Request::AliveCheck(1)).await.unwrap();
        let stdio =
            [SendFd::assume_file(input), SendFd::assume_file(output), SendFd::assume_file(error)];
        framed.feed(Request::NewSession(2, "cat; echo failed >&2; exit 5", stdio)).await.unwrap();
        framed.feed(Request::AliveCheck(3)).await.unwrap();
        framed.flush().await.unwrap();
        typed.write_all(b"typed").unwrap();
        drop(typed);

        // The master answers each request, and reports the exit of the session's command.
        let mut next = async || framed.try_next().await.unwrap().unwrap();
        assert_eq!(next().await, (HELLO, vec![VERSION]));
        let (kind, numbers) = next().await;
        assert_eq!((kind, numbers[0]), (ALIVE, 1));
        let (mut opened, mut alive, mut exit) = (None, false, None);
        while exit.is_none() || !alive {
            match next().await {
                (SESSION_OPENED, numbers) => opened = Some((numbers[0], numbers[1])),
                (ALIVE, numbers) => alive = numbers[0] == 3,
                (EXIT_MESSAGE, numbers) => exit = Some((numbers[0], numbers[1])),
                other => panic!("{other:?}"),
            }
        }

        // The command has used the descriptors of the session.
        let (request, session) = opened.expect("the session was opened");
        assert_eq!((request, exit), (2, Some((session, 5))));
        assert_eq!(read_to_end(printed).await, "typed");
        assert_eq!(read_to_end(errors).await.trim_end(), "failed");
    });
}
