//! Codecs for two protocols that the guide does not show. They were written from the guide and the
//! documentation alone, as a user would write them.

use std::{
    io::{IoSlice, IoSliceMut, PipeReader, Read, pipe},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use bytes::BytesMut;
use fdwire::{
    Error, Framed, Listener, SendFd, Socket, SocketKind,
    codec::{Decoder, Encoder, FdQueue, SendBuf},
};
use futures::{SinkExt, StreamExt, stream};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde_json::json;

use fd_store::{Notify, codec};
use qmp::{MAX_LINE, Message, Qmp};

/// QEMU's monitor protocol: a line of JSON is a message, and `getfd` has one descriptor.
mod qmp {
    use bytes::{Buf, BytesMut};
    use fdwire::{
        Error, SendError,
        codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
    };
    use serde_json::Value;

    pub(crate) const MAX_LINE: usize = 64 << 10; // without its line feed

    #[derive(Debug, PartialEq)]
    pub(crate) struct Message<F> {
        pub(crate) json: Value,
        pub(crate) fd: Option<F>,
    }

    impl<F> Message<F> {
        pub(crate) fn new(json: Value) -> Self {
            Self { json, fd: None }
        }

        pub(crate) fn getfd(name: &str, fd: impl Into<F>) -> Self {
            let json = serde_json::json!({"execute": "getfd", "arguments": {"fdname": name}});
            Self { json, fd: Some(fd.into()) }
        }
    }

    #[derive(Debug, Clone, Default)]
    pub(crate) struct Qmp {
        searched: usize, // bytes at the front of `src` without a line feed
    }

    fn too_long(bytes: usize) -> Error {
        Error::FrameTooLong { bytes, limit: MAX_LINE }
    }

    fn has_fd(json: &Value) -> bool {
        json.get("execute").is_some_and(|command| command == "getfd")
    }

    impl Codec for Qmp {
        fn grouping(&self) -> Grouping {
            Grouping::FdsFirst
        }
    }

    impl<F> Decoder<F> for Qmp {
        type Item = Message<F>;
        type Error = Error;

        fn decode(
            &mut self,
            src: &mut BytesMut,
            fds: &mut FdQueue<F>,
        ) -> Result<Option<Message<F>>, Error> {
            let Some(at) = src[self.searched..].iter().position(|&byte| byte == b'\n') else {
                self.searched = src.len();
                return if src.len() > MAX_LINE { Err(too_long(src.len())) } else { Ok(None) };
            };
            let length = std::mem::take(&mut self.searched) + at;
            if length > MAX_LINE {
                return Err(too_long(length));
            }
            let json = serde_json::from_slice(&src[..length]).map_err(Error::invalid)?;
            src.advance(length + 1);
            let fd = match has_fd(&json) {
                true => Some(fds.claim_one()?),
                false => None,
            };
            // A descriptor comes with the first byte of its message. So if no byte is left, no
            // descriptor may be left.
            if src.is_empty() && !fds.is_empty() {
                return Err(Error::UnclaimedFds { fds: fds.len() });
            }
            Ok(Some(Message { json, fd }))
        }
    }

    impl<F> Encoder<Message<F>, F> for Qmp {
        type Error = Error;

        fn encode(
            &mut self,
            message: Message<F>,
            dst: &mut SendBuf<F>,
        ) -> Result<(), SendError<Message<F>>> {
            if has_fd(&message.json) != message.fd.is_some() {
                return Err(SendError::refused(
                    message,
                    Error::invalid("getfd has one descriptor, no other has"),
                ));
            }
            let line = message.json.to_string();
            if line.len() > MAX_LINE {
                return Err(SendError::refused(message, too_long(line.len())));
            }
            dst.put_slice(line.as_bytes());
            dst.put_slice(b"\n");
            dst.put_fds(message.fd);
            Ok(())
        }
    }
}

/// A protocol in the style of `sd_notify`: a packet has lines of `KEY=VALUE`, and one with
/// `FDSTORE=1` has descriptors.
mod fd_store {
    use fdwire::{
        Error, Fds, Frame, Limits, SendError,
        codec::{Codec, Decoder, Encoder, PacketCodec},
    };

    #[derive(Debug, PartialEq)]
    pub(crate) struct Notify<F> {
        pub(crate) lines: Vec<(String, String)>,
        pub(crate) fds: Fds<F>,
    }

    impl<F> Notify<F> {
        pub(crate) fn new<const N: usize>(
            lines: [(&str, &str); N],
            fds: impl IntoIterator<Item = F>,
        ) -> Self {
            let lines = lines.map(|(key, value)| (key.into(), value.into())).into();
            Self { lines, fds: fds.into_iter().collect() }
        }

        fn check(&self) -> Result<(), Error> {
            let has = |key, value: &str| {
                self.lines.iter().any(|(k, v)| k == key && (value.is_empty() || v == value))
            };
            match (has("FDSTORE", "1"), self.fds.len()) {
                (true, 0) => Err(Error::MissingFds { expected: 1, received: 0 }),
                (true, _) if !has("FDNAME", "") => Err(Error::invalid("FDSTORE without FDNAME")),
                (false, fds @ 1..) => Err(Error::UnclaimedFds { fds }),
                _ => Ok(()),
            }
        }
    }

    fn decoded<F>(frame: Frame<F>) -> Result<Notify<F>, Error> {
        let text = str::from_utf8(&frame.payload).map_err(Error::invalid)?;
        let text =
            text.strip_suffix('\n').ok_or_else(|| Error::invalid("no line feed at the end"))?;
        let pair = |line: &str| line.split_once('=').map(|(key, value)| (key.into(), value.into()));
        let lines = text.split('\n').map(pair).collect::<Option<_>>();
        let notify = Notify {
            lines: lines.ok_or_else(|| Error::invalid("a line without `=`"))?,
            fds: frame.fds,
        };
        notify.check().map(|()| notify)
    }

    fn encoded<F>(notify: Notify<F>) -> Result<Frame<F>, SendError<Notify<F>>> {
        let broken =
            |(key, value): &(String, String)| key.contains(['=', '\n']) || value.contains('\n');
        if notify.lines.is_empty() || notify.lines.iter().any(broken) {
            return Err(SendError::refused(notify, Error::invalid("not lines of KEY=VALUE")));
        }
        if let Err(error) = notify.check() {
            return Err(SendError::refused(notify, error));
        }
        let text: String =
            notify.lines.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
        Ok(Frame { payload: text.into(), fds: notify.fds })
    }

    #[rustfmt::skip] // it would not break the bounds at 100 columns
    pub(crate) fn codec<F, G>() -> impl Decoder<F, Item = Notify<F>, Error = Error>
        + Encoder<Notify<G>, G, Error = Error> + Clone
    {
        PacketCodec::new(Limits::default().max_payload_bytes(4096)).map(decoded::<F>, encoded::<G>)
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("takes too long")
}

/// Makes a pipe. The test gives the writing end away, and the reading end shows when that is
/// closed.
fn tracked() -> (PipeReader, OwnedFd) {
    let (reader, writer) = pipe().unwrap();
    (reader, writer.into())
}

async fn all_writers_closed(mut reader: PipeReader) {
    let read = soon(tokio::task::spawn_blocking(move || reader.read(&mut [0]))).await;
    assert_eq!(read.unwrap().unwrap(), 0);
}

#[test]
fn qmp_messages_are_lines_and_only_getfd_has_a_descriptor() {
    // Encode two messages, and decode them byte by byte.
    let mut sent = SendBuf::<i32>::new();
    Qmp::default().encode(Message::new(json!({"execute": "stop"})), &mut sent).unwrap();
    Qmp::default().encode(Message::getfd("net0", 7), &mut sent).unwrap();
    let (bytes, fds) = sent.into_parts();
    let (mut src, mut fds, mut codec) = (BytesMut::new(), FdQueue::from_iter(fds), Qmp::default());
    let mut messages = Vec::new();
    for byte in bytes {
        src.extend_from_slice(&[byte]);
        // Descriptor 7 is there before its message, as after a read that merged both messages. So
        // the first message is decoded only when a byte of the second is there.
        if !(byte == b'\n' && messages.is_empty()) {
            messages.extend(codec.decode(&mut src, &mut fds).unwrap());
        }
    }
    assert_eq!(messages, [Message::new(json!({"execute": "stop"})), Message::getfd("net0", 7)]);

    // Lines that do not fit their descriptors, are no JSON, or are too long are errors.
    let decode = |line: &str, fds: &[i32]| {
        Qmp::default().decode(&mut line.into(), &mut fds.iter().copied().collect())
    };
    assert!(matches!(
        decode("{\"execute\":\"getfd\"}\n", &[]),
        Err(Error::MissingFds { expected: 1, received: 0 })
    ));
    assert!(matches!(
        decode("{\"execute\":\"stop\"}\n", &[7]),
        Err(Error::UnclaimedFds { fds: 1 })
    ));
    assert!(matches!(
        decode("{\"execute\":\"getfd\"}\n", &[7, 8]),
        Err(Error::UnclaimedFds { fds: 1 })
    ));
    assert!(matches!(decode("hello\n", &[]), Err(Error::Invalid(_))));
    assert!(matches!(decode(&" ".repeat(MAX_LINE), &[]), Ok(None)));
    assert!(matches!(decode(&" ".repeat(MAX_LINE + 1), &[]), Err(Error::FrameTooLong { .. })));
    let longest = format!("\"{}\"\n", "x".repeat(MAX_LINE - 2));
    assert!(matches!(decode(&longest, &[]), Ok(Some(_))));
    assert!(matches!(decode(&format!(" {longest}"), &[]), Err(Error::FrameTooLong { .. })));

    // Such messages are not sent, and come back.
    let refused =
        |message| Qmp::default().encode(message, &mut SendBuf::new()).unwrap_err().item.unwrap();
    assert_eq!(refused(Message { json: json!({"execute": "stop"}), fd: Some(7) }).fd, Some(7));
    assert_eq!(refused(Message { json: json!({"execute": "getfd"}), fd: None }).fd, None);
    assert_eq!(refused(Message::getfd(&"x".repeat(MAX_LINE), 7)).fd, Some(7));
}

/// Receives a single byte and the descriptors that come with it, as QEMU does.
fn read_byte(socket: &UnixStream) -> (u8, Vec<RawFd>) {
    let (mut byte, mut control) = ([0], nix::cmsg_space!([RawFd; 8]));
    let mut into = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut into,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .unwrap();
    let fds = message.cmsgs().unwrap().flat_map(|cmsg| match cmsg {
        ControlMessageOwned::ScmRights(fds) => fds,
        other => panic!("{other:?}"),
    });
    let fds = fds.collect();
    assert_eq!(message.bytes, 1);
    (byte[0], fds)
}

#[tokio::test]
async fn qmp_descriptors_are_attached_to_the_first_byte_of_getfd() {
    let (a, raw) = Socket::pair(SocketKind::Stream).unwrap();
    let (mut a, raw) = (Framed::new(a, Qmp::default()), UnixStream::from(OwnedFd::from(raw)));
    raw.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let null = || std::fs::File::open("/dev/null").unwrap();
    let query = || Message::new(json!({"execute": "query-status"}));

    // The peer receives byte by byte.
    let batch = [query(), Message::getfd("a", null()), Message::getfd("b", null()), query()];
    soon(a.send_all(&mut stream::iter(batch.map(Ok)))).await.unwrap();
    for with_fd in [false, true, true, false] {
        for at in 0.. {
            let (byte, fds) = read_byte(&raw);
            assert_eq!(fds.len(), usize::from(with_fd && at == 0), "at byte {at}");
            for fd in fds {
                nix::unistd::close(fd).unwrap();
            }
            if byte == b'\n' {
                break;
            }
        }
    }

    // The peer sends, in pieces.
    let send = |text: &str, fds: &[RawFd]| {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[] } else { &rights[..] };
        sendmsg::<()>(
            raw.as_raw_fd(),
            &[IoSlice::new(text.as_bytes())],
            rights,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    };
    let (pipe, writer) = tracked();
    send("{\"QMP\": {}}\r\n", &[]);
    send("{\"execute\": \"ge", &[writer.as_raw_fd()]);
    send("tfd\"}\n", &[]);
    assert_eq!(soon(a.next()).await.unwrap().unwrap().json, json!({"QMP": {}}));
    assert!(soon(a.next()).await.unwrap().unwrap().fd.is_some());
    send("{\"execute\": \"stop\"}\n", &[writer.as_raw_fd()]);
    drop(writer);
    assert!(matches!(soon(a.next()).await, Some(Err(Error::UnclaimedFds { fds: 1 }))));
    assert!(soon(a.next()).await.is_none());
    all_writers_closed(pipe).await;
}

#[tokio::test]
async fn qemu_takes_descriptors_and_closes_them_by_their_names() {
    // Start QEMU, which connects its monitor to the test.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = Listener::bind(&path, SocketKind::Stream).unwrap();
    let spawned = tokio::process::Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-S",
            "-mon",
            "chardev=c,mode=control",
        ])
        .args(["-chardev", &format!("socket,id=c,path={}", path.display())])
        .kill_on_drop(true)
        .spawn();
    let mut qemu = match spawned {
        Ok(qemu) => qemu,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return eprintln!("skipped: qemu-system-x86_64 is not installed");
        }
        Err(error) => panic!("{error}"),
    };
    let socket = soon(async {
        tokio::select! {
            socket = listener.accept() => socket.unwrap(),
            status = qemu.wait() => panic!("qemu has ended: {status:?}"),
        }
    });
    let mut monitor = Framed::new(socket.await, Qmp::default());
    assert!(soon(monitor.next()).await.unwrap().unwrap().json.get("QMP").is_some());

    // QEMU takes two descriptors under their names, and closes them.
    let ((first, a), (second, b)) = (tracked(), tracked());
    let closefd = |name| Message::new(json!({"execute": "closefd", "arguments": {"fdname": name}}));
    let commands = [
        Message::new(json!({"execute": "qmp_capabilities"})),
        Message::getfd("a", a),
        Message::getfd("b", b),
        closefd("b"),
        closefd("a"),
    ];
    let count = commands.len();
    soon(monitor.send_all(&mut stream::iter(commands.map(Ok)))).await.unwrap();
    for _ in 0..count {
        assert_eq!(soon(monitor.next()).await.unwrap().unwrap().json, json!({"return": {}}));
    }
    all_writers_closed(first).await;
    all_writers_closed(second).await;

    // An unknown name is an error. Then QEMU ends.
    soon(monitor.send(closefd("a"))).await.unwrap();
    assert!(soon(monitor.next()).await.unwrap().unwrap().json.get("error").is_some());
    soon(monitor.send(Message::new(json!({"execute": "quit"})))).await.unwrap();
    assert!(soon(qemu.wait()).await.unwrap().success());
}

#[test]
fn fd_store_packets_have_descriptors_only_if_a_line_announces_them() {
    let codec = codec::<i32, i32>;
    let mut sent = SendBuf::new();
    let store = || Notify::new([("FDSTORE", "1"), ("FDNAME", "web")], [7, 8]);
    codec().encode(store(), &mut sent).unwrap();
    let (mut bytes, fds) = sent.into_parts();
    assert_eq!(bytes, "FDSTORE=1\nFDNAME=web\n");
    assert_eq!(codec().decode(&mut bytes, &mut fds.into_iter().collect()).unwrap(), Some(store()));

    let decode = |text: &str, fds: &[i32]| {
        codec().decode(&mut text.into(), &mut fds.iter().copied().collect())
    };
    assert_eq!(decode("READY=1\n", &[]).unwrap(), Some(Notify::new([("READY", "1")], [])));
    assert!(matches!(decode("READY=1\n", &[7]), Err(Error::UnclaimedFds { fds: 1 })));
    assert!(matches!(decode("FDSTORE=1\nFDNAME=web\n", &[]), Err(Error::MissingFds { .. })));
    for text in ["FDSTORE=1\n", "READY\n", "READY=1"] {
        assert!(
            matches!(decode(text, if text.len() > 8 { &[7] } else { &[] }), Err(Error::Invalid(_))),
            "{text}"
        );
    }

    let refused = |notify| codec().encode(notify, &mut SendBuf::new()).unwrap_err().item;
    assert_eq!(
        refused(Notify::new([("READY", "1")], [7])),
        Some(Notify::new([("READY", "1")], [7]))
    );
    // A frame that the inner codec refuses does not come back.
    assert_eq!(refused(Notify::new([("STATUS", &*"x".repeat(5000))], [])), None);
}

#[tokio::test]
async fn fd_store_packets_bring_their_descriptors_over_a_socket() {
    let (a, b) = Socket::pair(SocketKind::SeqPacket).unwrap();
    let codec = codec::<OwnedFd, SendFd>;
    let (mut a, mut b) = (Framed::new(a, codec()), Framed::new(b, codec()));
    let ((first, x), (second, y)) = (tracked(), tracked());
    let batch = [
        Notify::new([("READY", "1")], []),
        Notify::new([("FDSTORE", "1"), ("FDNAME", "pipes")], [x, y].map(SendFd::from)),
        Notify::new([("STATUS", "stored")], []),
    ];
    soon(a.send_all(&mut stream::iter(batch.map(Ok)))).await.unwrap();
    for (key, count) in [("READY", 0), ("FDSTORE", 2), ("STATUS", 0)] {
        let notify = soon(b.next()).await.unwrap().unwrap();
        assert_eq!((notify.lines[0].0.as_str(), notify.fds.len()), (key, count));
    }
    all_writers_closed(first).await;
    all_writers_closed(second).await;
    drop(a);
    assert!(soon(b.next()).await.is_none());
}
