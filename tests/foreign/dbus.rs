//! D-Bus through a real `dbus-daemon`: a handshake in lines of text, then binary messages on the
//! same connection. The header says how many descriptors a message has.
//! <https://dbus.freedesktop.org/doc/dbus-specification.html>

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    process::{Command, Stdio},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fdwire::{
    Error, Fds, Framed, SendError, Socket, SocketKind,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
};
use futures::{SinkExt, TryStreamExt};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::{
    Daemon,
    common::{mark_of, marked, run},
    installed,
};

/// The handshake: lines that end with CR LF.
#[derive(Clone)]
struct AuthCodec;

impl Codec for AuthCodec {}

impl Decoder for AuthCodec {
    type Item = String;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut, _: &mut FdQueue) -> io::Result<Option<String>> {
        let Some(end) = src.windows(2).position(|end| end == b"\r\n") else { return Ok(None) };
        let line = src.split_to(end);
        src.advance(2);
        String::from_utf8(line.into()).map(Some).map_err(invalid)
    }
}

impl Encoder<&str> for AuthCodec {
    type Error = Error;

    fn encode<'a>(&mut self, line: &'a str, dst: &mut SendBuf) -> Result<(), SendError<&'a str>> {
        dst.put_slice(line.as_bytes());
        dst.put_slice(b"\r\n");
        Ok(())
    }
}

/// A message. The text fields of the header are in a map by their numbers; the others have names
/// here.
#[derive(Debug, Default)]
struct Message {
    kind: u8,
    serial: u32,
    reply_serial: u32,
    text: BTreeMap<u8, String>,
    body: Bytes,
    fds: Fds,
}

const CALL: u8 = 1;
const REPLY: u8 = 2;
const SIGNAL: u8 = 4;

const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SENDER: u8 = 7;
const SIGNATURE: u8 = 8;
const UNIX_FDS: u8 = 9;

/// Messages in little-endian order. A daemon on the same little-endian machine sends them too.
#[derive(Clone)]
struct DbusCodec;

impl DbusCodec {
    const FIXED: usize = 16;

    /// Returns the length of a message and that of its header's fields, once they are known.
    fn lengths(src: &[u8]) -> Option<(usize, usize)> {
        let mut header = src.get(4..Self::FIXED)?;
        let (body, _serial, fields) =
            (header.get_u32_le(), header.get_u32_le(), header.get_u32_le());
        Some((Self::FIXED + (fields as usize).next_multiple_of(8) + body as usize, fields as usize))
    }
}

impl Codec for DbusCodec {
    fn grouping(&self) -> Grouping {
        Grouping::FdsFirst // the daemon wants descriptors with the first byte of their message
    }
}

impl Decoder for DbusCodec {
    type Item = Message;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue) -> io::Result<Option<Message>> {
        let Some((length, fields)) = Self::lengths(src) else { return Ok(None) };
        if src[0] != b'l' || length > self.limits().max_payload_bytes {
            return Err(invalid("not a message, or too long"));
        }
        if src.len() < length {
            return Ok(None);
        }

        // The fixed part of the header, and the body.
        let mut whole = src.split_to(length).freeze();
        let body = whole.split_off(Self::FIXED + fields.next_multiple_of(8));
        let mut message = Message {
            kind: whole[1],
            serial: (&whole[8..]).get_u32_le(),
            body,
            ..Message::default()
        };

        // The fields of the header. One of them is the number of descriptors.
        let (mut at, mut fd_count) = (Self::FIXED, 0);
        while at < Self::FIXED + fields {
            // A field: number, length of the type's signature (1), the type, 0, the value, and
            // zeros up to a multiple of 8.
            let (field, kind) = (byte(&whole, at)?, byte(&whole, at + 2)?);
            let value = whole.get(at + 4..).unwrap_or_default();
            let length = match (field, kind) {
                (REPLY_SERIAL, b'u') => int(&mut message.reply_serial, value)?,
                (UNIX_FDS, b'u') => int(&mut fd_count, value)?,
                (_, b'g') => text(message.text.entry(field).or_default(), value, 1)?,
                (_, b's' | b'o') => text(message.text.entry(field).or_default(), value, 4)?,
                _ => return Err(invalid("unknown type of a header field")),
            };
            at = (at + 4 + length).next_multiple_of(8);
        }
        message.fds = fds.claim(fd_count as usize)?;
        Ok(Some(message))
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Self::lengths(src).map(|(length, _)| length - src.len())
    }
}

fn byte(bytes: &[u8], at: usize) -> io::Result<u8> {
    bytes.get(at).copied().ok_or_else(|| invalid("header too short"))
}

fn int(into: &mut u32, value: &[u8]) -> io::Result<usize> {
    let bytes = value.first_chunk().ok_or_else(|| invalid("header too short"))?;
    *into = u32::from_le_bytes(*bytes);
    Ok(4)
}

/// Reads a length of `prefix` bytes, the text, and a zero. Returns the number of bytes.
fn text(into: &mut String, value: &[u8], prefix: usize) -> io::Result<usize> {
    let length = value
        .get(..prefix)
        .ok_or_else(|| invalid("header too short"))?
        .iter()
        .rfold(0, |n, &b| n << 8 | b as usize);
    let text = value.get(prefix..prefix + length).ok_or_else(|| invalid("text too short"))?;
    *into = std::str::from_utf8(text).map_err(invalid)?.to_owned();
    Ok(prefix + length + 1)
}

impl Encoder<Message> for DbusCodec {
    type Error = Error;

    fn encode(&mut self, message: Message, dst: &mut SendBuf) -> Result<(), SendError<Message>> {
        // The header's fields, each at a multiple of 8 bytes.
        let mut fields = BytesMut::new();
        let mut field = |number: u8, kind: u8, value: &[u8]| {
            fields.put_bytes(0, fields.len().next_multiple_of(8) - fields.len());
            fields.put_slice(&[number, 1, kind, 0]);
            fields.put_slice(value);
        };
        for (&number, text) in &message.text {
            let length = text.len() as u32;
            let (kind, length) = match number {
                SIGNATURE => (b'g', &length.to_le_bytes()[..1]),
                PATH => (b'o', &length.to_le_bytes()[..]),
                _ => (b's', &length.to_le_bytes()[..]),
            };
            field(number, kind, &[length, text.as_bytes(), b"\0"].concat());
        }
        for (number, value) in
            [(REPLY_SERIAL, message.reply_serial), (UNIX_FDS, message.fds.len() as u32)]
        {
            if value > 0 {
                field(number, b'u', &value.to_le_bytes());
            }
        }

        // The fixed part, the fields up to a multiple of 8, and the body.
        let mut header = BytesMut::from(&[b'l', message.kind, 0, 1][..]);
        header.put_u32_le(message.body.len() as u32);
        header.put_u32_le(message.serial);
        header.put_u32_le(fields.len() as u32);
        fields.put_bytes(0, fields.len().next_multiple_of(8) - fields.len());
        dst.put_shared(header.freeze());
        dst.put_shared(fields.freeze());
        dst.put_shared(message.body);
        dst.put_fds(message.fds);
        Ok(())
    }
}

fn invalid(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

type Bus = Framed<DbusCodec>;

/// Connects. Sends the last line of the handshake and the first message, `Hello`, in one flush.
/// Returns the connection's unique name too.
async fn connect(path: &Path) -> (Bus, String) {
    let socket = Socket::connect(path, SocketKind::Stream).await.unwrap();
    let mut auth = Framed::new(socket, AuthCodec);
    let uid: String =
        nix::unistd::geteuid().to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
    auth.send(&*format!("\0AUTH EXTERNAL {uid}")).await.unwrap();
    assert!(auth.try_next().await.unwrap().unwrap().starts_with("OK "));
    auth.send("NEGOTIATE_UNIX_FD").await.unwrap();
    assert_eq!(auth.try_next().await.unwrap().unwrap(), "AGREE_UNIX_FD");
    auth.feed("BEGIN").await.unwrap(); // still unsent when the codec changes

    let mut bus = auth.map_codecs(|_, _| (DbusCodec, DbusCodec));
    let hello =
        call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello");
    bus.send(Message { serial: 1, ..hello }).await.unwrap();
    let reply = next(&mut bus).await;
    assert_eq!((reply.kind, reply.reply_serial, &*reply.text[&SIGNATURE]), (REPLY, 1, "s"));
    let name = read_string(&reply.body);
    assert!(name.starts_with(':'), "a unique name: {name}");
    (bus, name)
}

fn call(destination: &str, path: &str, interface: &str, member: &str) -> Message {
    let text = [(DESTINATION, destination), (PATH, path), (INTERFACE, interface), (MEMBER, member)];
    let text = text.map(|(number, text)| (number, text.to_owned())).into();
    Message { kind: CALL, text, ..Message::default() }
}

/// Returns the next message that is no signal.
async fn next(bus: &mut Bus) -> Message {
    loop {
        let message = bus.try_next().await.unwrap().expect("the daemon is there");
        if message.kind != SIGNAL {
            return message;
        }
    }
}

fn read_string(mut body: &[u8]) -> String {
    let length = body.get_u32_le() as usize;
    String::from_utf8(body[..length].to_vec()).unwrap()
}

/// Returns a body with the indices of `count` descriptors, which are of type `h`.
fn indices(count: u32) -> Bytes {
    (0..count).flat_map(u32::to_le_bytes).collect()
}

const CONFIG: &str = r#"<!DOCTYPE busconfig PUBLIC
 "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path=SOCKET</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"#;

/// Starts a bus for the test. Returns the path of its socket when it listens.
async fn start_bus(program: &Path, directory: &Path) -> (Daemon, std::path::PathBuf) {
    let (config, socket) = (directory.join("bus.conf"), directory.join("bus"));
    std::fs::write(&config, CONFIG.replace("SOCKET", socket.to_str().unwrap())).unwrap();
    let mut command = Command::new(program);
    command
        .arg("--config-file")
        .arg(&config)
        .args(["--nofork", "--print-address"])
        .stdout(Stdio::piped());
    let mut daemon = Daemon::start(&mut command, directory);
    let stdout =
        tokio::process::ChildStdout::from_std(daemon.child.stdout.take().unwrap()).unwrap();
    let address = BufReader::new(stdout)
        .lines()
        .next_line()
        .await
        .unwrap()
        .expect("the daemon prints its address");
    assert!(address.starts_with("unix:path="), "{address}");
    (daemon, socket)
}

#[test]
fn a_call_with_descriptors_goes_through_a_real_bus_and_is_answered_with_one() {
    let Some(program) = installed("dbus-daemon") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (_daemon, socket) = start_bus(&program, directory.path()).await;
        let ((mut here, here_name), (mut there, there_name)) =
            tokio::join!(connect(&socket), connect(&socket));
        assert_ne!(here_name, there_name);

        // A call with two descriptors.
        let mut message = call(&there_name, "/files", "io.fdwire.Files", "Take");
        message.text.insert(SIGNATURE, "hh".into());
        let (body, fds) = (indices(2), [marked(7), marked(8)].into_iter().collect());
        here.send(Message { serial: 2, body, fds, ..message }).await.unwrap();

        let taken = next(&mut there).await;
        assert_eq!(
            (taken.kind, &*taken.text[&MEMBER], &taken.text[&SENDER]),
            (CALL, "Take", &here_name)
        );
        assert_eq!(taken.body, indices(2));
        assert_eq!(taken.fds.iter().map(mark_of).collect::<Vec<_>>(), [7, 8]);

        // The reply with one.
        let text = [(DESTINATION, here_name), (SIGNATURE, "h".to_owned())].into();
        let fds = [marked(9)].into_iter().collect();
        let reply = Message {
            kind: REPLY,
            serial: 2,
            reply_serial: taken.serial,
            text,
            body: indices(1),
            fds,
        };
        there.send(reply).await.unwrap();
        let reply = next(&mut here).await;
        assert_eq!((reply.kind, reply.reply_serial, &reply.text[&SENDER]), (REPLY, 2, &there_name));
        assert_eq!(mark_of(&reply.fds[0]), 9);
    });
}

#[test]
fn many_calls_in_one_flush_each_keep_their_own_descriptors() {
    let Some(program) = installed("dbus-daemon") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (_daemon, socket) = start_bus(&program, directory.path()).await;
        let ((mut here, _), (mut there, there_name)) =
            tokio::join!(connect(&socket), connect(&socket));

        for n in 1..=60 {
            let fds: Fds = (0..n % 4).map(|_| marked(n)).collect();
            let mut message = call(&there_name, "/files", "io.fdwire.Files", "Take");
            let body = if fds.is_empty() { Bytes::new() } else { indices(fds.len() as u32) };
            if !fds.is_empty() {
                message.text.insert(SIGNATURE, "h".repeat(fds.len()));
            }
            here.feed(Message { serial: n + 1, body, fds, ..message }).await.unwrap();
        }
        here.flush().await.unwrap();
        for n in 1..=60 {
            let taken = next(&mut there).await;
            assert_eq!(taken.serial, n + 1);
            assert_eq!(taken.fds.iter().map(mark_of).collect::<Vec<_>>(), vec![n; n as usize % 4]);
        }
    });
}
