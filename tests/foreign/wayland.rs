//! Wayland with a real compositor, `weston` without a screen. The number of descriptors of a
//! message is not in its header. It follows from the kind of object and the number of the request
//! or event.
//! <https://wayland.freedesktop.org/docs/html>

use std::{
    collections::HashMap,
    fs::{File, Permissions},
    io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::Path,
    process::{Command, Stdio},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fdwire::{
    Error, Framed, SendError, Socket, SocketKind,
    codec::{Codec, Decoder, Encoder, FdQueue, Grouping, SendBuf},
};
use futures::{SinkExt, TryStreamExt};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{
    Daemon,
    common::{mark_of, marked, raw_send, run},
    installed,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interface {
    Display,
    Registry,
    Callback,
    Shm,
    ShmPool,
    Buffer,
    Keyboard,
    DataSource,
}

impl Interface {
    /// Returns the number of descriptors of an event.
    fn fds_of_event(self, opcode: u16) -> usize {
        match (self, opcode) {
            (Self::Keyboard, KEYMAP) | (Self::DataSource, SEND) => 1,
            _ => 0,
        }
    }
}

#[derive(Debug)]
struct Request {
    object: u32,
    opcode: u16,
    args: Args,
}

#[derive(Debug)]
struct Event {
    from: Interface,
    object: u32,
    opcode: u16,
    args: Bytes,
    fd: Option<OwnedFd>,
}

/// Encoded arguments of a request. A descriptor takes no bytes among them.
#[derive(Debug, Default)]
struct Args {
    bytes: BytesMut,
    fd: Option<OwnedFd>,
}

impl Args {
    fn int(mut self, value: u32) -> Self {
        self.bytes.put_u32_ne(value);
        self
    }

    /// Adds a text: its length with a zero at the end, its bytes, and zeros up to a multiple of 4.
    fn string(self, value: &str) -> Self {
        let mut this = self.int(value.len() as u32 + 1);
        this.bytes.put_slice(value.as_bytes());
        this.bytes.put_bytes(0, (value.len() + 1).next_multiple_of(4) - value.len());
        this
    }

    fn fd(self, fd: OwnedFd) -> Self {
        Self { fd: Some(fd), ..self }
    }
}

/// A codec that knows the interface of each object: the number of an event's descriptors follows
/// from it.
#[derive(Debug, Clone)]
struct WaylandCodec {
    objects: HashMap<u32, Interface>,
}

impl WaylandCodec {
    const HEADER: usize = 8;

    /// Returns the object, the opcode and the length of the whole message.
    fn header(mut src: &[u8]) -> Option<(u32, u16, usize)> {
        let (object, word) = (src.try_get_u32_ne().ok()?, src.try_get_u32_ne().ok()?);
        Some((object, word as u16, (word >> 16) as usize))
    }
}

impl Codec for WaylandCodec {
    fn grouping(&self) -> Grouping {
        // A compositor has room for 28 descriptors in one read. With `Free` it was seen to fail.
        Grouping::FdsFirst
    }
}

impl Decoder for WaylandCodec {
    type Item = Event;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut, fds: &mut FdQueue) -> io::Result<Option<Event>> {
        let Some((object, opcode, length)) = Self::header(src) else { return Ok(None) };
        if length < Self::HEADER {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "message shorter than its header",
            ));
        }
        if src.len() < length {
            return Ok(None);
        }
        let Some(&from) = self.objects.get(&object) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("event of unknown object {object}"),
            ));
        };
        let fd = fds.claim(from.fds_of_event(opcode))?.pop();
        let args = src.split_to(length).freeze().slice(Self::HEADER..);
        Ok(Some(Event { from, object, opcode, args, fd }))
    }
}

impl Encoder<Request> for WaylandCodec {
    type Error = Error;

    fn encode(&mut self, request: Request, dst: &mut SendBuf) -> Result<(), SendError<Request>> {
        let length = Self::HEADER + request.args.bytes.len();
        if length > u16::MAX.into() {
            return Err(SendError::refused(
                request,
                Error::FrameTooLong { bytes: length, limit: u16::MAX.into() },
            ));
        }
        dst.put_slice(&request.object.to_ne_bytes());
        dst.put_slice(&((length as u32) << 16 | u32::from(request.opcode)).to_ne_bytes());
        dst.put_slice(&request.args.bytes);
        dst.put_fds(request.args.fd);
        Ok(())
    }
}

const DISPLAY: u32 = 1;
const SYNC: u16 = 0;
const GET_REGISTRY: u16 = 1;
const BIND: u16 = 0;
const CREATE_POOL: u16 = 0;
const CREATE_BUFFER: u16 = 0;

const ERROR: u16 = 0;
const GLOBAL: u16 = 0;
const KEYMAP: u16 = 0;
const SEND: u16 = 1;

struct Client {
    wire: Framed<WaylandCodec>,
    last_object: u32,
    globals: HashMap<String, u32>,
}

impl Client {
    async fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self::new(Socket::connect(path, SocketKind::Stream).await?))
    }

    fn new(socket: Socket) -> Self {
        let codec = WaylandCodec { objects: [(DISPLAY, Interface::Display)].into() };
        Self { wire: Framed::new(socket, codec), last_object: DISPLAY, globals: HashMap::new() }
    }

    /// Returns the number of a new object. The decoder has to know it before its first event.
    fn new_object(&mut self, interface: Interface) -> u32 {
        self.last_object += 1;
        self.wire.decoder_mut().objects.insert(self.last_object, interface);
        self.last_object
    }

    /// Adds a request to the unsent ones, which [`round_trip`](Self::round_trip) sends.
    async fn request(&mut self, object: u32, opcode: u16, args: Args) {
        self.wire.feed(Request { object, opcode, args }).await.unwrap();
    }

    async fn get_registry(&mut self) {
        let registry = self.new_object(Interface::Registry);
        self.request(DISPLAY, GET_REGISTRY, Args::default().int(registry)).await;
        for event in self.round_trip().await.unwrap() {
            if event.from == Interface::Registry && event.opcode == GLOBAL {
                let mut args = event.args;
                let (name, length) = (args.get_u32_ne(), args.get_u32_ne() as usize);
                self.globals.insert(String::from_utf8(args[..length - 1].to_vec()).unwrap(), name);
            }
        }
    }

    async fn bind(&mut self, interface: Interface, name: &str, version: u32) -> u32 {
        let object = self.new_object(interface);
        let args = Args::default().int(self.globals[name]).string(name).int(version).int(object);
        let registry = DISPLAY + 1;
        self.request(registry, BIND, args).await;
        object
    }

    async fn create_pool(&mut self, shm: u32, file: OwnedFd, size: u32) -> u32 {
        let pool = self.new_object(Interface::ShmPool);
        self.request(shm, CREATE_POOL, Args::default().int(pool).fd(file).int(size)).await;
        pool
    }

    /// Sends all requests, and returns the events up to the answer, which comes after all earlier
    /// requests were handled.
    ///
    /// # Errors
    /// Returns the text of the compositor's error event.
    async fn round_trip(&mut self) -> Result<Vec<Event>, String> {
        let callback = self.new_object(Interface::Callback);
        self.request(DISPLAY, SYNC, Args::default().int(callback)).await;
        self.wire.flush().await.unwrap();
        let mut events = Vec::new();
        loop {
            let event = self.wire.try_next().await.unwrap().expect("the compositor is there");
            if event.object == callback {
                return Ok(events);
            }
            if event.from == Interface::Display && event.opcode == ERROR {
                return Err(String::from_utf8_lossy(&event.args).into_owned());
            }
            events.push(event);
        }
    }
}

/// Starts a compositor for the test. Returns when it listens.
async fn start_weston(program: &Path, directory: &Path) -> (Daemon, Client) {
    std::fs::set_permissions(directory, Permissions::from_mode(0o700)).unwrap();
    let version = Command::new(program).arg("--version").output().unwrap().stdout;
    let version = String::from_utf8(version).unwrap();
    let major = version
        .trim()
        .trim_start_matches("weston ")
        .split('.')
        .next()
        .unwrap()
        .parse::<u32>()
        .unwrap();
    let mut command = Command::new(program);
    command.arg(if major < 12 { "--backend=headless-backend.so" } else { "--backend=headless" });
    command
        .args(["--socket=wire", "--no-config", "--idle-time=0"])
        .env("XDG_RUNTIME_DIR", directory);
    command.env_remove("WAYLAND_DISPLAY").stdin(Stdio::null()).stdout(Stdio::null());
    let mut daemon = Daemon::start(&mut command, directory);
    let client = daemon.ready(async || Client::connect(&directory.join("wire")).await).await;
    (daemon, client)
}

fn memfd(size: u32) -> OwnedFd {
    let file = File::from(memfd_create("pool", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size.into()).unwrap();
    file.into()
}

#[test]
fn a_real_compositor_takes_a_pool_of_shared_memory() {
    let Some(program) = installed("weston") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (_daemon, mut client) = start_weston(&program, directory.path()).await;
        client.get_registry().await;
        let shm = client.bind(Interface::Shm, "wl_shm", 1).await;
        let formats = client.round_trip().await.unwrap();
        assert!(
            formats.iter().any(|event| event.from == Interface::Shm),
            "the compositor sends its pixel formats"
        );

        let (width, height) = (16, 16);
        let pool = client.create_pool(shm, memfd(width * height * 4), width * height * 4).await;
        let buffer = client.new_object(Interface::Buffer);
        let args =
            [buffer, 0, width, height, width * 4, 0].into_iter().fold(Args::default(), Args::int);
        client.request(pool, CREATE_BUFFER, args).await;
        client.round_trip().await.unwrap();

        // More pools than a compositor has room for in one read, all in one flush.
        for _ in 0..100 {
            client.create_pool(shm, memfd(4096), 4096).await;
        }
        client.round_trip().await.unwrap();
    });
}

#[test]
fn a_pool_without_a_size_is_refused_by_a_real_compositor() {
    let Some(program) = installed("weston") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (_daemon, mut client) = start_weston(&program, directory.path()).await;
        client.get_registry().await;
        let shm = client.bind(Interface::Shm, "wl_shm", 1).await;
        client.create_pool(shm, memfd(0), 0).await;
        let error = client.round_trip().await.unwrap_err();
        assert!(error.contains("size"), "{error}");
    });
}

/// The test plays the compositor, because weston without a screen has no keyboard either.
#[test]
fn an_event_brings_the_descriptor_that_its_object_and_number_imply() {
    run(async {
        let (here, compositor) = Socket::pair(SocketKind::Stream).unwrap();
        let mut client = Client::new(here);
        let keyboard = client.new_object(Interface::Keyboard);
        let source = client.new_object(Interface::DataSource);
        let callback = source + 1; // of the round trip

        // Events with and without descriptors. As by libwayland, two are sent in one call.
        let event = |object: u32, opcode: u32, args: &[u32]| {
            let length = 8 + 4 * args.len() as u32;
            let words = [object, length << 16 | opcode].into_iter().chain(args.iter().copied());
            words.flat_map(u32::to_ne_bytes).collect::<Vec<u8>>()
        };
        raw_send(&compositor, &event(DISPLAY, 1, &[99]), &[]);
        let mime_type = u32::from_ne_bytes(*b"a/b\0");
        let both =
            [event(keyboard, KEYMAP.into(), &[1, 4]), event(source, SEND.into(), &[4, mime_type])]
                .concat();
        raw_send(&compositor, &both, &[marked(1), marked(2)]);
        raw_send(&compositor, &event(keyboard, 3, &[7, 0, 30, 1]), &[]);
        raw_send(&compositor, &event(callback, 0, &[0]), &[]);

        // Each descriptor belongs to its event.
        let events = client.round_trip().await.unwrap();
        let seen: Vec<_> =
            events.iter().map(|event| (event.from, event.fd.as_ref().map(mark_of))).collect();
        let [display, keyboard, source] =
            [Interface::Display, Interface::Keyboard, Interface::DataSource];
        assert_eq!(
            seen,
            [(display, None), (keyboard, Some(1)), (source, Some(2)), (keyboard, None)]
        );
    });
}
