//! A process that can't start threads, because its uid has reached its limit. Other processes of
//! the uid can cause that.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use fdwire::{Error, Frame, SocketKind};
use futures::{SinkExt, StreamExt, TryStreamExt};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    common::{
        framed_pair, one_thread, other_uid, raw_send, role_socket, run_in, spawn_role,
        with_raw_peer,
    },
    counted,
    slow::{Watchdog, slow_to_close},
};

/// The moment at which the process loses the right to start threads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Since {
    ItsStart,
    ItsFirstSocket,
}

/// Runs as another uid, to which the limit applies. The limit counts all processes of the uid.
fn process_without_threads(mut control: UnixStream) {
    let mut since = [0];
    control.read_exact(&mut since).unwrap();
    let since = if since[0] == 0 { Since::ItsStart } else { Since::ItsFirstSocket };
    let kind = read_kind(&mut control);

    // An honest connection that is echoed, while no thread can be started.
    let (read, first) = slow_to_close();
    let (unread, second) = slow_to_close();
    let watchdog = Watchdog::start(vec![first, second]);
    let mut limit = (since == Since::ItsStart).then(NoThreads::set);
    run_in(one_thread(), async {
        let (mut honest, mut echo) = framed_pair(kind);
        limit.get_or_insert_with(NoThreads::set);
        tokio::spawn(async move {
            while let Some(frame) = echo.try_next().await.unwrap() {
                echo.send(frame).await.unwrap();
            }
        });

        // A hostile connection ends with slow sockets, and the honest one goes on.
        let (mut rx, peer) = with_raw_peer(kind);
        raw_send(&peer, b"?", &[read]);
        raw_send(&peer, b"?", &[unread]);
        assert!(matches!(rx.next().await, Some(Err(Error::BadMagic { .. }))));
        drop(rx);
        for n in 0..100_u8 {
            honest.send(Frame::new(vec![n])).await.unwrap();
            assert_eq!(honest.try_next().await.unwrap().unwrap().payload[0], n);
        }

        // Waiting descriptors are closed when threads can be started again, at the latest with the
        // next descriptor.
        drop(limit);
        let (mut rx, peer) = with_raw_peer(kind);
        raw_send(&peer, b"?", &[std::io::pipe().unwrap().0.into()]);
        assert!(matches!(rx.next().await, Some(Err(Error::BadMagic { .. }))));
        drop(rx);
        watchdog.returned().await;
    });
    control.write_all(b"done").unwrap();
}

/// Runs the test in a process that loses the right to start threads at this moment.
fn check(role: &str, since: Since) {
    if let Some(control) = role_socket(role) {
        return process_without_threads(control.into());
    }
    let Some(uid) = other_uid() else { return };
    counted(async |kind| {
        run_process(role, uid, &[since as u8, u8::from(kind == SocketKind::Stream)]);
    });
}

/// A limit that takes away the right of this process to start threads, until it is dropped. The
/// process must not run as root.
pub(crate) struct NoThreads {
    before: (u64, u64),
}

impl NoThreads {
    pub(crate) fn set() -> Self {
        let before = getrlimit(Resource::RLIMIT_NPROC).unwrap();
        setrlimit(Resource::RLIMIT_NPROC, 1, before.1).unwrap();
        assert!(
            std::thread::Builder::new().spawn(|| ()).is_err(),
            "a thread was started in spite of RLIMIT_NPROC"
        );
        Self { before }
    }
}

impl Drop for NoThreads {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NPROC, self.before.0, self.before.1).unwrap();
    }
}

/// Runs a role process as another uid with these settings, and waits until it reports `done` and
/// exits with success.
pub(crate) fn run_process(role: &str, uid: u32, settings: &[u8]) {
    let (mut control, theirs) = UnixStream::pair().unwrap();
    let mut child = spawn_role(role, Some(uid), theirs.into());
    control.write_all(settings).unwrap();
    let done = control.read_exact(&mut [0; 4]);
    assert!(child.wait().unwrap().success(), "the role process failed, see its output above");
    done.unwrap();
}

/// Reads a setting of [`run_process`]: 0 for packets, 1 for a stream.
pub(crate) fn read_kind(control: &mut UnixStream) -> SocketKind {
    let mut kind = [0];
    control.read_exact(&mut kind).unwrap();
    if kind[0] == 0 { SocketKind::SeqPacket } else { SocketKind::Stream }
}

#[test]
fn a_process_that_never_could_start_a_thread_goes_on_and_closes_descriptors_when_it_can() {
    check(
        concat!(
            "no_threads::a_process_that_never_could_start_a_thread_",
            "goes_on_and_closes_descriptors_when_it_can"
        ),
        Since::ItsStart,
    );
}

#[test]
fn a_process_that_can_start_no_more_threads_goes_on_and_closes_descriptors_when_it_can() {
    check(
        concat!(
            "no_threads::a_process_that_can_start_no_more_threads_",
            "goes_on_and_closes_descriptors_when_it_can"
        ),
        Since::ItsFirstSocket,
    );
}
