//! The fate of workers, told by what is logged and by their processes.

use std::{
    fmt::{Debug, Write},
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    pin::pin,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fdwire::{
    Framed, Listener, Socket, SocketKind,
    handoff::{
        Dispatcher, Incoming, RetireCause, WorkerCommand, WorkerState,
        protocol::{FromWorker, WorkerCodec},
    },
};
use futures::{StreamExt, future::join_all};
use nix::{
    sys::{
        resource::{Resource, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use rustix::io::ioctl_fionread;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::{sleep, timeout},
};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::Field,
    span,
    subscriber::{set_default, with_default},
};

use crate::{
    both,
    common::{
        KINDS, PASSED, encoded, marked, other_uid, raw_send, role_socket, run, run_in,
        some_threads, spawn_role,
    },
    descriptors::alone,
    raw_worker::{Client, HELLO, Raw, adopted, connections, greet, serve, until},
};

/// Gives each event of a level to a function.
pub(crate) struct Events<F>(pub(crate) Level, pub(crate) F);

impl<F: Fn(&Event<'_>) + 'static> Subscriber for Events<F>
where
    Self: Send + Sync,
{
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == self.0
    }
    fn event(&self, event: &Event<'_>) {
        (self.1)(event);
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Keeps a warning as text.
pub(crate) fn write_to(log: &Mutex<String>, event: &Event<'_>) {
    let mut log = log.lock().unwrap();
    event
        .record(&mut |field: &Field, value: &dyn Debug| write!(log, "{field}={value:?} ").unwrap());
    log.push('\n');
}

#[test]
fn it_is_logged_why_a_worker_was_dropped() {
    let cases: [(&[u8], u32, &str); 6] = [
        (b"GET / HTTP/1.1\r\n\r\n", 0, "bad magic byte 0x47"),
        (&encoded(b"\x01FDHO\x02\x09\x01", 0), 0, "it supports versions 2 to 9, not 1"),
        (&encoded(&[2, 0, 0, 0, 0, 0, 0, 0, 1], 0), 0, "its first message is not a hello"),
        (&[encoded(HELLO, 0), adopted(0, 1)].concat(), 0, "it answered 1 offers, but 0 were"),
        (
            &[encoded(HELLO, 0), encoded(&[0x3E], 0)].concat(),
            0,
            "not a message of a worker of the hand-off protocol",
        ),
        (&encoded(b"\x07", 1), 1, "1 descriptors"),
    ];
    for (bytes, fds, reason) in cases {
        for kind in KINDS {
            let log = Arc::new(Mutex::new(String::new()));
            let kept = Arc::clone(&log);
            with_default(
                Events(Level::WARN, move |event: &Event<'_>| write_to(&kept, event)),
                || {
                    run(async {
                        let dispatcher = Dispatcher::builder().build();
                        let (here, there) = Socket::pair(kind).unwrap();
                        let id = dispatcher.add_worker(there);
                        raw_send(&here, bytes, &Vec::from_iter((0..fds).map(marked)));
                        until("it is gone", || dispatcher.stats().workers.is_empty()).await;
                        assert_eq!(dispatcher.stats().retired.misbehaved, 1);
                        let log = log.lock().unwrap();
                        assert!(log.contains("message=worker is gone: "), "{log}");
                        assert!(
                            log.contains(&format!("worker={id}")) && log.contains(reason),
                            "{reason:?}: {log}"
                        );
                    });
                },
            );
        }
    }
}

/// A subscriber that panics ends the task that looks after the worker, and a drain has nothing to
/// wait for.
#[test]
fn a_drain_ends_though_a_subscriber_panics() {
    with_default(
        Events(Level::WARN, |_: &Event<'_>| panic!("a log that cannot be written")),
        || {
            run(async {
                let dispatcher = Dispatcher::builder().build();
                let (here, there) = Socket::pair(SocketKind::SeqPacket).unwrap();
                dispatcher.add_worker(here);
                drop(there); // which is worth a warning
                dispatcher.drain(None).await;
                assert!(dispatcher.stats().workers.is_empty());
            });
        },
    );
}

/// It ends the conversation with the worker, and what was on its way goes to another one.
#[test]
fn a_connection_is_handed_over_though_a_subscriber_panics_at_its_offer() {
    // Subscribers of other threads would have a say in what is logged.
    alone("workers::a_connection_is_handed_over_though_a_subscriber_panics_at_its_offer", async {
        let panicked = AtomicBool::new(false);
        let panics_once = move |event: &Event<'_>| {
            let log = Mutex::default();
            write_to(&log, event);
            let is_offer = log.into_inner().unwrap().contains("connection is offered");
            assert!(
                !is_offer || panicked.swap(true, Ordering::Relaxed),
                "a log that cannot be written"
            );
        };
        let _guard = set_default(Events(Level::DEBUG, panics_once));
        let dispatcher = Dispatcher::builder().build();
        let _first = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let (_client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        until("it is gone", || dispatcher.stats().retired.misbehaved == 1).await;
        let mut second = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        second.offer().await.unwrap();
        second.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), second.id);
    });
}

#[test]
fn it_is_known_why_the_process_before_left() {
    run(async {
        let dispatcher = Dispatcher::builder().build();
        let id = dispatcher
            .spawn_worker(WorkerCommand::from(Command::new("true")).restart(true))
            .unwrap();
        until("it was started again", || dispatcher.stats().workers[0].restarts > 0).await;
        let worker = &dispatcher.stats().workers[0];
        assert_eq!(
            (worker.id, &worker.last_exit.as_ref().unwrap().cause),
            (id, &RetireCause::Ended)
        );
        dispatcher.drain(None).await;
    });
}

/// Its socket does not tell: another process has it open, which might be the one that serves.
///
/// Rules: W-SOCKET-END.
#[test]
fn the_death_of_a_connected_worker_is_noticed_by_silence_if_its_socket_stays_open() {
    const ROLE: &str =
        "workers::the_death_of_a_connected_worker_is_noticed_by_silence_if_its_socket_stays_open";
    if let Some(path) = std::env::var_os("FDWIRE_CONNECT") {
        return run(async {
            let socket = Socket::connect(path, SocketKind::SeqPacket).await.unwrap();
            let copy = socket.as_fd().try_clone_to_owned().unwrap();
            // Its pid is for the test to end it.
            let holder = Command::new("sleep").arg("600").stdin(Stdio::from(copy)).spawn().unwrap();
            let mut framed = Framed::new(socket, WorkerCodec::default());
            greet(&mut framed, 1).await;
            std::fs::write(
                std::env::var_os("FDWIRE_LOG").unwrap(),
                holder.id().unwrap().to_string(),
            )
            .unwrap();
            while framed.next().await.is_some() {}
        });
    }
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (path, log) = (directory.path().join("front.sock"), directory.path().join("holder"));
        let dispatcher = Dispatcher::builder()
            .ping_interval(Duration::from_millis(50))
            .hang_timeout(Duration::from_millis(500))
            .recall_after(Duration::MAX)
            .build();
        let listener = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        let accepting = tokio::spawn({
            let dispatcher = dispatcher.clone();
            async move { dispatcher.serve_workers(listener).await }
        });
        let mut command = Command::new("/proc/self/exe");
        command
            .args([ROLE, "--exact", "--nocapture"])
            .env("FDWIRE_CONNECT", &path)
            .env("FDWIRE_LOG", &log);
        let mut worker = command.stdout(Stdio::null()).kill_on_drop(true).spawn().unwrap();
        until("it has a child", || std::fs::read_to_string(&log).is_ok_and(|pid| !pid.is_empty()))
            .await;
        let holder: i32 = std::fs::read_to_string(&log).unwrap().parse().unwrap();
        let (client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        until("it was offered", || {
            dispatcher.stats().workers.iter().any(|worker| worker.unanswered == 1)
        })
        .await;

        worker.start_kill().unwrap();
        until("its death is noticed", || dispatcher.stats().retired.hung == 1).await;
        assert!(kill(Pid::from_raw(holder), None).is_ok(), "the holder lives");
        let mut other = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        let offer = other.offer().await.unwrap();
        other.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), other.id);
        drop(serve(offer, "served").unwrap());
        kill(Pid::from_raw(holder), Signal::SIGKILL).unwrap();
        let mut client = client;
        assert_eq!(client.first().await, "served");
        accepting.abort();
    });
}

/// Runs a role as another uid: root is exempt from the limit on descriptors in flight, and others
/// share theirs.
fn in_role_of_other_uid(role: &str) {
    let Some(uid) = other_uid() else { return };
    let mut child = spawn_role(role, Some(uid), File::open("/dev/null").unwrap().into());
    assert_eq!(child.wait().unwrap().code(), Some(PASSED));
}

/// Opens descriptors until all with numbers below this are in use, and no others.
fn fill_fds(below: i32) -> Vec<File> {
    let open = std::iter::repeat_with(|| File::open("/dev/null").ok());
    open.map_while(|file| file.filter(|file| file.as_raw_fd() < below)).collect()
}

/// The bytes on their way to a worker.
fn unread(worker: &Raw) -> u64 {
    ioctl_fionread(worker.framed.socket()).unwrap()
}

/// More connections on their way than descriptors of one uid may be: the dispatcher waits, and none
/// is lost.
#[test]
fn too_many_descriptors_in_flight_are_waited_for() {
    const ROLE: &str = "workers::too_many_descriptors_in_flight_are_waited_for";
    const HALF: u32 = 100;
    if role_socket(ROLE).is_some() {
        KINDS.into_iter().for_each(|kind| {
            run(async {
                let dispatcher = Dispatcher::builder()
                    .recall_after(Duration::MAX)
                    .ping_interval(Duration::MAX)
                    .build();
                let mut worker = Raw::start(&dispatcher, kind, u64::from(2 * HALF)).await;
                let (clients, accepted): (Vec<_>, Vec<_>) =
                    connections(2 * HALF).await.into_iter().unzip();
                let mut accepted = accepted.into_iter();
                let mut half = || {
                    Vec::from_iter(
                        accepted.by_ref().take(HALF as usize).map(|it| dispatcher.dispatch(it)),
                    )
                };
                let first = half();
                let on_their_way = || unread(&worker);
                until("they are on their way", || on_their_way() > 0).await;
                let before = on_their_way();
                // In flight, over all processes of the uid: no more than this, checked before more
                // are added.
                setrlimit(Resource::RLIMIT_NOFILE, 64, 1024).unwrap();
                let second = half();
                sleep(Duration::from_millis(200)).await;
                assert_eq!(on_their_way(), before, "the limit is not there, they were sent");
                setrlimit(Resource::RLIMIT_NOFILE, 1024, 1024).unwrap();
                let work = async {
                    for _ in 0..2 * HALF {
                        let offer = worker.offer().await.unwrap();
                        worker.adopt(1).await;
                        serve(offer, "served").unwrap();
                    }
                };
                let (outcomes, ()) = tokio::join!(join_all(first.into_iter().chain(second)), work);
                assert!(outcomes.into_iter().all(|outcome| outcome.is_ok()));
                for client in clients {
                    assert_eq!(client.answer().await, "served");
                }
                let stats = dispatcher.stats();
                assert_eq!((stats.adopted, stats.offered_again), (u64::from(2 * HALF), 0));
                assert!(stats.send_shortages > 0);
            });
        });
        std::process::exit(PASSED);
    }
    in_role_of_other_uid(ROLE);
}

/// Workers that do not receive keep descriptors of the uid in flight, also after they were cut off.
#[test]
fn stuck_workers_leave_a_healthy_one_all_that_it_needs() {
    const ROLE: &str = "workers::stuck_workers_leave_a_healthy_one_all_that_it_needs";
    const OFFERS: usize = 60;
    if role_socket(ROLE).is_some() {
        return run(async {
            setrlimit(Resource::RLIMIT_NOFILE, 256, 4096).unwrap();
            let dispatcher = Dispatcher::builder()
                .ping_interval(Duration::from_millis(20))
                .hang_timeout(Duration::from_millis(100))
                .max_fences(100, Duration::from_secs(1))
                .build();
            // Clients are not what the limit is about. It is the sender's soft one, which is set
            // again to send.
            let mut stuck = Vec::new();
            for round in 0..10 {
                let (here, there) = Socket::pair(SocketKind::SeqPacket).unwrap();
                dispatcher.add_worker(there);
                let mut framed = Framed::new(here, WorkerCodec::default());
                greet(&mut framed, 253).await;
                stuck.push(framed); // not read from
                let offered = Vec::from_iter((0..OFFERS).map(|_| {
                    dispatcher.dispatch(std::os::unix::net::UnixStream::pair().unwrap().0)
                }));
                until("it is cut off", || dispatcher.stats().retired.hung == round + 1).await;
                assert!(
                    dispatcher.stats().in_flight <= 128 + stuck.len(),
                    "{:?}",
                    dispatcher.stats()
                );
                let mut healthy = Raw::start(&dispatcher, SocketKind::SeqPacket, 60).await;
                healthy.offers(1).await;
                healthy.adopt(1).await;
                for _ in 1..OFFERS {
                    healthy.offer().await.unwrap();
                    healthy.adopt(1).await;
                }
                assert!(join_all(offered).await.into_iter().all(|adopted| adopted.is_ok()));
                healthy.say(FromWorker::Goodbye).await;
                until("it has left", || dispatcher.stats().workers.is_empty()).await;
            }
            std::process::exit(PASSED);
        });
    }
    in_role_of_other_uid(ROLE);
}

/// Its messages wait in the dispatcher's queue then, and so it cannot answer.
#[test]
fn a_worker_is_not_cut_off_while_the_dispatcher_cannot_send() {
    const ROLE: &str = "workers::a_worker_is_not_cut_off_while_the_dispatcher_cannot_send";
    const IN_FLIGHT: u32 = 100;
    if role_socket(ROLE).is_some() {
        return run(async {
            let other = Dispatcher::builder()
                .recall_after(Duration::MAX)
                .hang_timeout(Duration::MAX)
                .build();
            let stopped = Raw::start(&other, SocketKind::Stream, u64::from(IN_FLIGHT)).await;
            let (_clients, mut accepted): (Vec<_>, Vec<_>) =
                connections(IN_FLIGHT + 1).await.into_iter().unzip();
            let last = accepted.pop().unwrap();
            let _outcomes =
                Vec::from_iter(accepted.into_iter().map(|connection| other.dispatch(connection)));
            until("they are on their way", || unread(&stopped) > 0).await;

            let hang_timeout = Duration::from_millis(200);
            let ping_interval = Duration::from_millis(50);
            let dispatcher = Dispatcher::builder()
                .ping_interval(ping_interval)
                .hang_timeout(hang_timeout)
                .build();
            let mut worker = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
            setrlimit(Resource::RLIMIT_NOFILE, 64, 1024).unwrap();
            let outcome = dispatcher.dispatch(last);
            let work = async {
                let offer = worker.offer().await.expect("it was not cut off");
                worker.adopt(1).await;
                offer
            };
            let mut work = pin!(work);
            let stuck = timeout(5 * hang_timeout, work.as_mut()).await;
            assert!(stuck.is_err(), "the limit is not there");
            setrlimit(Resource::RLIMIT_NOFILE, 1024, 1024).unwrap();
            drop(work.await);
            outcome.await.unwrap();
            std::process::exit(PASSED);
        });
    }
    in_role_of_other_uid(ROLE);
}

/// An offer that comes when it has no room is a reason to count what is free, not to ask for the
/// same one at once.
#[test]
fn a_connection_does_not_go_to_and_fro_to_a_worker_without_descriptors() {
    const ROLE: &str =
        "workers::a_connection_does_not_go_to_and_fro_to_a_worker_without_descriptors";
    if let Some(socket) = role_socket(ROLE) {
        setrlimit(Resource::RLIMIT_NOFILE, 1024, 1024).unwrap();
        return run(async {
            let mut incoming = Incoming::new(Socket::try_from(socket).unwrap());
            drop(incoming.next().await.unwrap());
            let _files = fill_fds(1000);
            while let Some(connection) = incoming.next().await {
                drop(connection);
            }
        });
    }
    both(async |kind| {
        let (here, there) = Socket::pair(kind).unwrap();
        let dispatcher = Dispatcher::builder().build();
        let mut child = spawn_role(ROLE, None, there.into());
        let worker = dispatcher.add_worker(here);
        let mut all = connections(2).await.into_iter();
        let (_first, accepted) = all.next().unwrap();
        dispatcher.dispatch(accepted).await.unwrap();
        until("it has no descriptors left", || dispatcher.stats().workers[0].active == 0).await;
        let (_client, accepted) = all.next().unwrap();
        let mut outcome = dispatcher.dispatch(accepted);
        until("it has refused", || dispatcher.stats().workers[0].rejected > 0).await;
        assert!(timeout(Duration::from_millis(300), &mut outcome).await.is_err());
        assert_eq!(dispatcher.stats().workers[0].rejected, 1);
        tokio::join!(dispatcher.drain(Some(Duration::ZERO)), async { drop(outcome.await) });
        assert!(!dispatcher.remove_worker(worker, None).await);
        child.wait().unwrap();
    });
}

/// It had asked for more than there is room for later, and the dispatcher takes it at its word only
/// until it refuses.
#[test]
fn a_worker_that_had_no_descriptors_left_asks_for_as_many_as_it_has_later() {
    const ROLE: &str =
        "workers::a_worker_that_had_no_descriptors_left_asks_for_as_many_as_it_has_later";
    if let Some(socket) = role_socket(ROLE) {
        setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
        return run(async {
            let mut incoming = Incoming::new(Socket::try_from(socket).unwrap());
            let mut control = incoming.next().await.unwrap();
            let control = async {
                let mut command = [0; 4]; // a client's serial number
                control.read_exact(&mut command).await.unwrap();
                let mut files = Vec::new();
                while let Ok(1..) = control.read(&mut command[..1]).await {
                    match command[0] {
                        b'f' => files = fill_fds(60),
                        // 8 below the reserve are free.
                        _ => files.retain(|file| file.as_raw_fd() < 48),
                    }
                    control.write_all(&command[..1]).await.unwrap();
                }
            };
            let work = async {
                while let Some(mut connection) = incoming.next().await {
                    connection.write_all(b"served").await.unwrap();
                }
            };
            tokio::join!(control, work);
        });
    }
    both(async |kind| {
        let (here, there) = Socket::pair(kind).unwrap();
        let dispatcher = Dispatcher::builder().ping_interval(Duration::from_millis(20)).build();
        let mut child = spawn_role(ROLE, None, there.into());
        let worker = dispatcher.add_worker(here);
        let mut all = connections(2).await.into_iter();
        let (mut control, accepted) = all.next().unwrap();
        dispatcher.dispatch(accepted).await.unwrap();
        until("it has asked for more than 8", || dispatcher.stats().workers[0].credit > 12).await;
        control.0.write_all(b"f").await.unwrap();
        control.0.read_exact(&mut [0]).await.unwrap();
        let (client, accepted) = all.next().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        until("it has refused", || dispatcher.stats().workers[0].rejected > 0).await;
        control.0.write_all(b"e").await.unwrap();
        control.0.read_exact(&mut [0]).await.unwrap();
        assert_eq!(outcome.await.unwrap(), worker);
        assert_eq!(client.answer().await, "served");
        until("it asks for what it has room for", || {
            (1..=8).contains(&dispatcher.stats().workers[0].credit)
        })
        .await;
        assert_eq!(dispatcher.stats().retired, Default::default());
        drop(control);
        assert!(dispatcher.remove_worker(worker, None).await);
        assert!(child.wait().unwrap().success());
    });
}

/// The same limit, and its own fault: it does not receive.
#[test]
fn a_worker_that_does_not_receive_is_cut_off_also_when_the_dispatcher_cannot_send() {
    const ROLE: &str =
        "workers::a_worker_that_does_not_receive_is_cut_off_also_when_the_dispatcher_cannot_send";
    const IN_FLIGHT: u32 = 100;
    if role_socket(ROLE).is_some() {
        return run(async {
            let interval = Duration::from_millis(50);
            let dispatcher = Dispatcher::builder()
                .ping_interval(interval)
                .hang_timeout(20 * interval)
                .recall_after(Duration::MAX)
                .build();
            let (_clients, mut accepted): (Vec<_>, Vec<_>) =
                connections(IN_FLIGHT + 1).await.into_iter().unzip();
            let stopped =
                Raw::start(&dispatcher, SocketKind::SeqPacket, u64::from(IN_FLIGHT + 1)).await;
            let last = accepted.pop().unwrap();
            let _outcomes = Vec::from_iter(
                accepted.into_iter().map(|connection| dispatcher.dispatch(connection)),
            );
            until("they are on their way", || unread(&stopped) > 0).await;
            setrlimit(Resource::RLIMIT_NOFILE, 64, 1024).unwrap();
            let _last = dispatcher.dispatch(last);
            until("it was cut off", || dispatcher.stats().retired.hung == 1).await;
            setrlimit(Resource::RLIMIT_NOFILE, 1024, 1024).unwrap();
            std::process::exit(PASSED);
        });
    }
    in_role_of_other_uid(ROLE);
}

/// A recalled connection waits for an application. That of a worker which comes back is one, its
/// library is none.
#[test]
fn a_recalled_connection_does_not_go_around_busy_workers() {
    both(async |kind| {
        let interval = Duration::from_millis(10);
        let dispatcher =
            Dispatcher::builder().ping_interval(interval).recall_after(interval).build();
        let mut workers = Vec::new();
        let mut all = connections(3).await.into_iter();
        for _ in 0..2 {
            let (here, there) = Socket::pair(kind).unwrap();
            dispatcher.add_worker(here);
            let mut incoming = Incoming::new(there);
            let (client, accepted) = all.next().unwrap();
            let (outcome, connection) =
                tokio::join!(dispatcher.dispatch(accepted), incoming.next());
            outcome.unwrap();
            workers.push((incoming, client, connection));
        }
        let (_client, accepted) = all.next().unwrap();
        let mut outcome = dispatcher.dispatch(accepted);
        let rejected =
            || dispatcher.stats().workers.iter().map(|worker| worker.rejected).sum::<u64>();
        until("both have rejected it", || rejected() == 2).await;
        assert!(timeout(20 * interval, &mut outcome).await.is_err());
        assert_eq!(rejected(), 2);
        assert!(workers[0].0.next().await.is_some());
        outcome.await.unwrap();
    });
}

/// The application itself takes descriptors, down to the reserve.
#[test]
fn a_worker_at_its_reserve_of_descriptors_rejects_and_lives() {
    const ROLE: &str = "workers::a_worker_at_its_reserve_of_descriptors_rejects_and_lives";
    if let Some(socket) = role_socket(ROLE) {
        setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
        return run(async {
            let mut incoming = Incoming::new(Socket::try_from(socket).unwrap());
            let first = incoming.next().await.unwrap();
            drop(first); // which the other side is told when this awaits something
            let _files = fill_fds(60);
            while let Some(connection) = incoming.next().await {
                drop(connection);
            }
        });
    }
    both(async |kind| {
        let (here, there) = Socket::pair(kind).unwrap();
        let dispatcher = Dispatcher::builder().build();
        let mut child = spawn_role(ROLE, None, there.into());
        let full = dispatcher.add_worker(here);
        until("it is ready", || dispatcher.stats().workers[0].credit > 3).await;
        let mut all = connections(4).await.into_iter();
        let (_first, accepted) = all.next().unwrap();
        dispatcher.dispatch(accepted).await.unwrap();
        until("it has no descriptors left", || dispatcher.stats().workers[0].active == 0).await;

        let mut other = Raw::start(&dispatcher, kind, 9).await;
        let (clients, accepted): (Vec<Client>, Vec<_>) = all.unzip();
        let outcomes =
            Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
        let work = async {
            loop {
                let offer = other.offer().await.unwrap();
                other.adopt(1).await;
                drop(serve(offer, "other").unwrap());
            }
        };
        let outcomes = tokio::select! {
            outcomes = join_all(outcomes) => outcomes,
            () = work => unreachable!(),
        };
        assert!(outcomes.into_iter().all(|outcome| outcome.is_ok_and(|worker| worker != full)));
        let stats = dispatcher.stats();
        assert_eq!(stats.retired, Default::default());
        let full_one = stats.workers.iter().find(|worker| worker.id == full).unwrap();
        assert!(full_one.state == WorkerState::Ready && full_one.rejected > 0);
        drop(clients);
        assert!(dispatcher.remove_worker(full, None).await);
        assert!(child.wait().unwrap().success());
    });
}

/// Blocked in its application, on one thread of several: what waits for it is recalled, and it is
/// not cut off.
#[test]
fn a_worker_whose_application_blocks_for_long_is_recalled_and_goes_on() {
    for kind in KINDS {
        run_in(some_threads(), async move {
            let dispatcher = Dispatcher::builder()
                .ping_interval(Duration::from_millis(50))
                .hang_timeout(Duration::from_secs(1))
                .recall_after(Duration::from_millis(100))
                .build();
            let (here, there) = Socket::pair(kind).unwrap();
            let busy = dispatcher.add_worker(here);
            let (release, released) = std::sync::mpsc::channel();
            let (began, beginning) = tokio::sync::oneshot::channel();
            let there = OwnedFd::from(there);
            let worker = std::thread::spawn(move || {
                run_in(some_threads(), async move {
                    let application = async move {
                        let mut incoming = Incoming::new(Socket::try_from(there).unwrap());
                        drop(incoming.next().await);
                        began.send(()).unwrap();
                        released.recv().unwrap(); // blocks a thread of the runtime
                        drop(incoming.next().await);
                        let handle = incoming.handle();
                        drop(incoming);
                        handle.ended().await
                    };
                    tokio::spawn(application).await.unwrap()
                })
            });
            let mut all = connections(4).await.into_iter();
            dispatcher.dispatch(all.next().unwrap().1).await.unwrap();
            beginning.await.unwrap();
            let waiting = Vec::from_iter(
                all.by_ref().take(2).map(|(_, accepted)| dispatcher.dispatch(accepted)),
            );
            until("they were given back", || dispatcher.stats().workers[0].rejected >= 2).await;
            let mut other = Raw::start(&dispatcher, kind, 2).await;
            other.offers(2).await;
            other.adopt(2).await;
            for outcome in join_all(waiting).await {
                assert_eq!(outcome.unwrap(), other.id);
            }
            // Longer than it may be silent.
            assert!(
                tokio::time::timeout(Duration::from_millis(1500), other.ended()).await.is_err()
            );
            assert_eq!(dispatcher.stats().retired, Default::default());
            release.send(()).unwrap();
            assert_eq!(dispatcher.dispatch(all.next().unwrap().1).await.unwrap(), busy);
            worker.join().unwrap();
        });
    }
}
