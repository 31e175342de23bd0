//! The process of the attackers: a thread for each of them, without the library.

use std::{
    fs::File,
    io::{IoSlice, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::mpsc,
    thread,
    time::Duration,
};

use fdwire::SocketKind;
use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg, setsockopt, sockopt},
};
use serde::{Deserialize, Serialize};

use super::{
    kind_of,
    sorts::{LARGE, Sort, fills},
    victim::{MAX_QUEUED_FDS, TAKE},
};
use crate::{
    common::{encoded, wait_for_close_of_peer},
    raw,
    slow::{Client, slow_to_close},
};

pub(super) const SENT_OF_PROMISED: usize = 3;
pub(super) const OWN_ENDS: usize = 20;

/// Connections that an attacker makes without waiting for the end of earlier ones.
pub(super) const QUICK_ROUNDS: usize = 50;

/// The pause of an attacker between two steps, if nothing else slows it down.
const PACE: Duration = Duration::from_millis(10);

#[derive(Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) sort: Sort,
    pub(super) attackers: usize,
    /// The abstract name at which the victim listens.
    pub(super) name: String,
    pub(super) is_stream: bool,
}

/// Attacks until it is killed, or the test has ended.
pub(super) fn run(mut control: UnixStream, settings: Settings) {
    // A low priority: the test checks the victim's turns, and not its share of the processor.
    rustix::process::nice(19).unwrap();
    let (started, all_started) = mpsc::channel();
    for index in 0..settings.attackers {
        let attacker = Attacker {
            sort: settings.sort.of_attacker(index),
            index,
            name: settings.name.clone(),
            kind: kind_of(settings.is_stream),
            null: File::open("/dev/null").unwrap().into(),
        };
        let started = started.clone();
        thread::spawn(move || attacker.attack(|| started.send(()).unwrap()));
    }
    assert_eq!(all_started.iter().take(settings.attackers).count(), settings.attackers);
    control.write_all(b"null\n").unwrap();
    let _ = control.read(&mut [0]);
}

struct Attacker {
    sort: Sort,
    index: usize,
    name: String,
    kind: SocketKind,
    /// A descriptor that is quick to close.
    null: OwnedFd,
}

/// Fails when the victim has closed the connection.
type Result = nix::Result<()>;

impl Attacker {
    /// Attacks in rounds, each with another connection.
    fn attack(&self, started: impl FnOnce()) {
        let mut started = Some(started);
        let mut clients = Vec::new();
        for _ in 0..self.rounds() {
            let connection = raw::connected_to_name(self.name.as_bytes(), self.kind);
            if let Some(started) = started.take() {
                started();
            }
            // If the victim is faster, the attacker's own `close` of a slow socket is the last one
            // and blocks. The other attackers go on.
            let begun = self.begin(&connection, &mut clients);
            match self.sort {
                Sort::OwnEnd | Sort::ConnectsAndCloses => drop(connection),
                _ => {
                    let ended = begun.and_then(|()| self.go_on(&connection));
                    // The next connection begins when the victim has closed this one. So each
                    // attacker has one at a time.
                    if ended.is_ok() {
                        wait_for_close_of_peer(&connection);
                    }
                }
            }
            thread::sleep(PACE);
        }
        loop {
            thread::park();
        }
    }

    fn rounds(&self) -> usize {
        match self.sort {
            Sort::OwnEnd => 1,
            Sort::ConnectsAndCloses => QUICK_ROUNDS,
            // Each slow socket takes much of the kernel's memory.
            sort if sort.sends_slow_sockets() => 3,
            _ => usize::MAX,
        }
    }

    /// Sends the first message. Clients are kept, so that their sockets stay slow.
    fn begin(&self, connection: &OwnedFd, clients: &mut Vec<Client>) -> Result {
        let mut slow = || {
            let (slow, client) = slow_to_close();
            clients.push(client);
            slow
        };
        let null = &self.null;

        // Sorts that send nothing first do everything in `go_on`.
        match self.sort {
            Sort::PromisedFds => {
                send(connection, &encoded(b"part", 253)[..10], &[null; SENT_OF_PROMISED])
            }
            Sort::UnclaimedFds => send(connection, b"\xFD", &[null; MAX_QUEUED_FDS]),
            Sort::OwnEnd => send(connection, b"\xFD", &[connection; OWN_ENDS]),
            Sort::SlowSocket => send(connection, b"?", &[&slow()]),
            Sort::SlowSocketFirst => {
                let slow = slow();
                let mut fds = [null; 253];
                fds[0] = &slow;
                send(connection, b"?", &fds)
            }
            Sort::SlowSocketInFrame => send(connection, &encoded(b"", 2), &[&slow(), null]),
            Sort::SlowSocketEchoed => send(connection, &encoded(b"", 1), &[&slow()]),
            Sort::Nested => send(connection, b"?", &[&self.nested(slow())]),
            // A small buffer, so that only few frames wait in the kernel.
            Sort::Flood | Sort::FloodTaken => setsockopt(connection, sockopt::SndBuf, &(8 << 10)),
            Sort::BadFlood => send(connection, b"?", &[null; 253]),
            Sort::Garbage => {
                send(connection, &Vec::from_iter((0..1000).map(|_| fastrand::u8(..))), &[])
            }
            Sort::EmptyPackets => send(connection, b"", &[null; 253]),
            Sort::Mix => unreachable!("each attacker has a sort of its own"),
            _ => Ok(()),
        }
    }

    /// Sends the messages after the first. Most sorts go on until the victim ends the connection.
    fn go_on(&self, connection: &OwnedFd) -> Result {
        let whole = encoded(&[7; 10_000], 0);

        // Sorts that only begin something do nothing more.
        match self.sort {
            Sort::Drip => whole.iter().try_for_each(|byte| {
                thread::sleep(PACE);
                send(connection, &[*byte], &[])
            }),
            Sort::LargeFrame => {
                send(connection, &header(LARGE), &[])?;
                let filled = if fills(self.index) { LARGE - 1 } else { 0 };
                let part = [7; 60_000];
                (0..filled).step_by(part.len()).try_for_each(|sent| {
                    send(connection, &part[..part.len().min(filled - sent)], &[])
                })
            }
            Sort::Flood | Sort::FloodTaken => {
                let payload = if self.sort == Sort::Flood { &b""[..] } else { TAKE };
                let frame = encoded(payload, 253);
                loop {
                    send(connection, &frame, &[&self.null; 253])?;
                }
            }
            Sort::NeverReads => loop {
                send(connection, &whole, &[])?;
            },
            Sort::OutOfBand => loop {
                send(connection, &encoded(b"", 0), &[])?;
                nix::sys::socket::send(connection.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
                let _ = raw::receive(connection, false);
                thread::sleep(PACE);
            },
            _ => Ok(()),
        }
    }

    /// Makes a Unix socket whose queue holds a Unix socket, and so on; the last one holds the
    /// descriptor.
    fn nested(&self, bottom: OwnedFd) -> OwnedFd {
        (0..20).fold(bottom, |inner, _| {
            let (outer, sender) = raw::pair(self.kind);
            let _ = send(&sender, b"?", &[&inner]);
            outer
        })
    }
}

/// Returns the header of a frame without descriptors.
fn header(payload: usize) -> [u8; 8] {
    let mut header = [0xFD, 0x10, 0, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&(payload as u32).to_be_bytes());
    header
}

/// Sends all bytes, and the descriptors with the first one.
fn send(connection: &OwnedFd, bytes: &[u8], fds: &[&OwnedFd]) -> Result {
    let fds = Vec::from_iter(fds.iter().map(|fd| fd.as_raw_fd()));
    let control = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &control[..] };
    loop {
        let parts = [IoSlice::new(bytes)];
        match sendmsg::<UnixAddr>(connection.as_raw_fd(), &parts, control, MsgFlags::empty(), None)
        {
            Ok(sent) if sent < bytes.len() => return send(connection, &bytes[sent..], &[]),
            Ok(_) => return Ok(()),
            // Too many descriptors of this uid are in flight.
            Err(Errno::ETOOMANYREFS) => thread::sleep(PACE),
            Err(error) => return Err(error),
        }
    }
}
