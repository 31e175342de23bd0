//! Workers that die or hang at each point of a hand-over, and who serves their connections.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use fdwire::{
    SocketKind,
    handoff::{Dispatcher, DispatcherBuilder, WorkerCommand, WorkerId, WorkerState},
};
use futures::future::join_all;
use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{MsgFlags, send},
    },
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::net::UnixStream;

use crate::{
    common::{KINDS, run},
    raw_worker::{
        ADOPTED, Client, DEMAND, Point, Raw, adopted, connections, serve, served, served_by, until,
        worker_command,
    },
};

/// The points at which a worker stops, and how many connections it has adopted by then.
const POINTS: [(Point, u32); 4] = [
    (Point::BeforeReading, 0),
    (Point::BeforeAnswering, 0),
    (Point::InAnswer, 0),
    (Point::AfterAnswering, ADOPTED),
];

/// The hang timeout of tests in which a worker hangs. In the others, none counts as hung.
const HANG_TIMEOUT: Duration = Duration::from_secs(2);

fn builder(hang_timeout: Duration) -> DispatcherBuilder {
    Dispatcher::builder()
        .ping_interval(Duration::from_millis(50))
        .hang_timeout(hang_timeout)
        .recall_after(Duration::from_secs(60))
}

fn spawn(
    dispatcher: &Dispatcher,
    kind: SocketKind,
    point: Point,
    signal: Signal,
    log: &Path,
) -> WorkerId {
    let mut command = worker_command(point, signal, log);
    command.env("FDWIRE_KEEP", "1");
    dispatcher.spawn_worker(WorkerCommand::from(command).socket_kind(kind)).unwrap()
}

async fn pid(dispatcher: &Dispatcher, id: WorkerId) -> Pid {
    let mut pid = None;
    until("the worker is ready", || {
        let worker = dispatcher.stats().workers.into_iter().find(|worker| worker.id == id).unwrap();
        pid = worker.pid;
        worker.state == WorkerState::Ready && worker.credit > 0
    })
    .await;
    Pid::from_raw(pid.unwrap() as i32)
}

/// Starts a worker, which gets all connections and is stopped by `signal` at `point`, and then a
/// second one. Checks which of the two serves each connection. Returns both process ids and the
/// clients.
async fn cut(
    dispatcher: &Dispatcher,
    kind: SocketKind,
    (point, adopted): (Point, u32),
    signal: Signal,
    log: &Path,
) -> (Pid, Pid, Vec<Client>) {
    // The first worker gets all connections, and is cut off.
    let first = spawn(dispatcher, kind, point, signal, log);
    let first_pid = pid(dispatcher, first).await;
    let (clients, accepted): (Vec<_>, Vec<_>) =
        connections(DEMAND as u32).await.into_iter().unzip();
    let outcomes =
        Vec::from_iter(accepted.into_iter().map(|connection| dispatcher.dispatch(connection)));
    let gone = || dispatcher.stats().workers.is_empty();
    until("the first worker is gone", gone).await;
    assert_eq!(served(log), [], "{point:?}");

    // The second worker gets those that the first one has not adopted.
    let second = spawn(dispatcher, kind, Point::Never, signal, log);
    let second_pid = pid(dispatcher, second).await;
    let outcomes = Vec::from_iter(join_all(outcomes).await.into_iter().map(Result::unwrap));
    let expected = Vec::from_iter(
        (0..DEMAND as u32).map(|serial| if serial < adopted { first } else { second }),
    );
    assert_eq!(outcomes, expected, "{kind:?} {point:?}");
    // The log shows that it has served them, and that each was served once.
    let others = DEMAND as usize - adopted as usize;
    until("the others are served", || served(log).len() == others).await;
    let expected =
        (adopted..DEMAND as u32).map(|serial| (serial, second_pid.as_raw() as u32)).collect();
    assert_eq!(served_by(log), expected, "{kind:?} {point:?}");
    (first_pid, second_pid, clients)
}

fn points(kind: SocketKind) -> impl Iterator<Item = (Point, u32)> {
    // A packet arrives whole or not at all, so half an answer is only possible on STREAM.
    POINTS
        .into_iter()
        .filter(move |(point, _)| *point != Point::InAnswer || kind == SocketKind::Stream)
}

fn log() -> (TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("served");
    (directory, log)
}

/// Rules: D-COPY, D-HALF, D-LAST-WORDS, W-ADOPTED.
#[test]
fn connections_that_a_killed_worker_has_not_adopted_are_served_by_another() {
    for kind in KINDS {
        for (point, adopted) in points(kind) {
            run(async {
                let (_directory, log) = log();
                let dispatcher = builder(Duration::MAX).build();
                let (.., clients) =
                    cut(&dispatcher, kind, (point, adopted), Signal::SIGKILL, &log).await;
                assert_eq!(dispatcher.stats().retired.ended, 1);
                assert_eq!(dispatcher.stats().lost, 0);
                // Connections that the first worker had adopted end with it.
                for client in clients.into_iter().take(adopted as usize) {
                    assert_eq!(client.answer().await, "");
                }
            });
        }
    }
}

/// Rules: W-PONG-TIME, D-HALF.
#[test]
fn connections_that_a_hung_worker_has_not_adopted_are_served_by_another() {
    for kind in KINDS {
        for (point, adopted) in points(kind) {
            run(async {
                let (_directory, log) = log();
                let dispatcher = builder(HANG_TIMEOUT).build();
                let (first, _, clients) =
                    cut(&dispatcher, kind, (point, adopted), Signal::SIGSTOP, &log).await;
                assert_eq!(dispatcher.stats().retired.hung, 1);
                until("the worker was killed and reaped", || kill(first, None).is_err()).await;
                for client in clients.into_iter().take(adopted as usize) {
                    assert_eq!(client.answer().await, "");
                }
            });
        }
    }
}

/// The dispatcher does not kill the worker, which holds stale copies all the time.
///
/// Rules: D-FENCE, W-NOT-SENT, W-TOUCH.
#[test]
fn a_stopped_worker_that_goes_on_adopts_nothing_and_disturbs_nobody() {
    for kind in KINDS {
        for (point, adopted) in points(kind) {
            run(async {
                // The second worker serves the connections that the stopped one has not adopted.
                let (_directory, log) = log();
                let dispatcher = builder(HANG_TIMEOUT).kill_hung(false).build();
                let (first, second, mut clients) =
                    cut(&dispatcher, kind, (point, adopted), Signal::SIGSTOP, &log).await;
                for client in &mut clients[adopted as usize..] {
                    assert_eq!(client.first().await, second.to_string());
                }
                // The first one goes on. It serves only what it had adopted, and ends.
                kill(first, Signal::SIGCONT).unwrap();
                until("the worker has ended", || kill(first, None).is_err()).await;

                let own = (0..adopted).map(|serial| (serial, first.as_raw() as u32));
                let others =
                    (adopted..DEMAND as u32).map(|serial| (serial, second.as_raw() as u32));
                assert_eq!(served_by(&log), own.chain(others).collect(), "{kind:?} {point:?}");
                // The connections of the second one have neither ended nor been reset.
                for client in &mut clients[adopted as usize..] {
                    let nothing = client.0.try_read(&mut [0]).unwrap_err();
                    assert_eq!(
                        nothing.kind(),
                        std::io::ErrorKind::WouldBlock,
                        "{kind:?} {point:?}"
                    );
                }
                kill(second, Signal::SIGKILL).unwrap();
                for client in clients {
                    client.answer().await;
                }
            });
        }
    }
}

#[test]
fn clients_of_a_worker_that_dies_see_the_end_though_a_stopped_one_holds_copies() {
    for kind in KINDS {
        run(async {
            let (_directory, log) = log();
            let dispatcher = builder(HANG_TIMEOUT).kill_hung(false).build();
            let point = (Point::BeforeAnswering, 0);
            let (first, second, clients) =
                cut(&dispatcher, kind, point, Signal::SIGSTOP, &log).await;
            kill(second, Signal::SIGKILL).unwrap();
            for client in clients {
                assert_eq!(client.answer().await, second.to_string());
            }
            kill(first, Signal::SIGKILL).unwrap();
        });
    }
}

/// Rules: W-CTRUNC.
#[test]
fn a_worker_out_of_descriptors_loses_no_connection() {
    for kind in KINDS {
        run(async {
            let (_directory, log) = log();
            let dispatcher = builder(Duration::MAX).build();
            let point = (Point::OutOfDescriptors, 0);
            cut(&dispatcher, kind, point, Signal::SIGKILL, &log).await;
            assert_eq!(dispatcher.stats().retired.ended, 1);
        });
    }
}

#[test]
fn a_dead_worker_is_noticed_though_its_socket_stays_open() {
    for kind in KINDS {
        run(async {
            let (_directory, log) = log();
            let dispatcher = builder(Duration::MAX).build();
            // The worker's child has the socket open, as standard input, and answers nothing.
            let mut command = tokio::process::Command::new("sh");
            command
                .args(["-c", "sleep 600 <&0 & echo $! > \"$FDWIRE_LOG\"; kill -KILL $$"])
                .env("FDWIRE_LOG", &log);
            dispatcher.spawn_worker(WorkerCommand::from(command).socket_kind(kind)).unwrap();
            until("the death of the worker is noticed", || dispatcher.stats().retired.ended == 1)
                .await;
            let child: i32 = std::fs::read_to_string(&log).unwrap().trim().parse().unwrap();
            kill(Pid::from_raw(child), Signal::SIGKILL).unwrap();
        });
    }
}

#[test]
fn a_worker_is_started_again_if_its_command_asks_for_it() {
    run(async {
        let (_directory, log) = log();
        let dispatcher = builder(Duration::MAX).build();
        let command = worker_command(Point::Never, Signal::SIGKILL, &log);
        let id = dispatcher.spawn_worker(WorkerCommand::from(command).restart(true)).unwrap();
        let mut pids = Vec::new();
        for round in 0..3 {
            let pid = pid(&dispatcher, id).await;
            assert!(!pids.contains(&pid));
            pids.push(pid);
            let (client, connection) = connections(1).await.pop().unwrap();
            assert_eq!(dispatcher.dispatch(connection).await.unwrap(), id);
            assert_eq!(client.answer().await, pid.to_string());
            kill(pid, Signal::SIGKILL).unwrap();
            until("the worker was started again", || {
                dispatcher.stats().workers[0].restarts == round + 1
            })
            .await;
        }
        let last = pid(&dispatcher, id).await;
        kill(last, Signal::SIGKILL).unwrap();
        assert!(dispatcher.remove_worker(id, Some(Duration::from_secs(30))).await);
        assert!(dispatcher.stats().workers.is_empty());
    });
}

#[test]
fn no_more_hung_workers_are_fenced_than_max_fences_allows() {
    for kind in KINDS {
        run(async {
            let dispatcher = Dispatcher::builder()
                .ping_interval(Duration::from_millis(20))
                .hang_timeout(Duration::from_secs(1))
                .max_fences(2, Duration::from_secs(3600))
                .build();
            // Three workers do not answer pings. Two are fenced, and no more may be.
            let mut workers = Vec::new();
            for _ in 0..3 {
                workers.push(Raw::start(&dispatcher, kind, 1).await);
            }
            until("two are cut off", || dispatcher.stats().retired.hung == 2).await;
            until("one is silent", || dispatcher.stats().workers[0].state == WorkerState::Silent)
                .await;
            let left = dispatcher.stats().workers[0].id;

            // The third one gets nothing as long as it is silent. When it answers, it gets the
            // connection that waits.
            let (client, connection) = connections(1).await.pop().unwrap();
            let outcome = dispatcher.dispatch(connection);
            let mut worker = workers.into_iter().find(|worker| worker.id == left).unwrap();
            let offer = worker.offer().await.unwrap();
            worker.adopt(1).await;
            assert_eq!(outcome.await.unwrap(), left);
            serve(offer, "late").unwrap();
            assert_eq!(client.answer().await, "late");
            assert_eq!(dispatcher.stats().retired.hung, 2);
        });
    }
}

/// The worker is fenced at one instant. Before it, an answer can be written and counts. After it,
/// none can be written.
///
/// Rules: D-FENCE, D-LAST-WORDS.
#[test]
fn every_answer_that_could_be_written_counts_whenever_the_worker_is_fenced() {
    const OFFERS: usize = 200;
    for kind in KINDS {
        run(async {
            let mut in_the_middle = 0;
            for _ in 0..30 {
                // A worker has many offers.
                let dispatcher = Dispatcher::builder().build();
                let mut worker = Raw::start(&dispatcher, kind, OFFERS as u64).await;
                let (id, mut outcomes, mut clients) = (worker.id, Vec::new(), Vec::new());
                for _ in 0..OFFERS {
                    let (client, connection) = UnixStream::pair().unwrap();
                    clients.push(client);
                    outcomes.push(dispatcher.dispatch(connection));
                }
                let copies = worker.offers(OFFERS).await;
                // A thread answers one after the other, until the worker is fenced.
                let socket = OwnedFd::from(worker.framed.into_parts().socket);
                let answering = std::thread::spawn(move || {
                    let written = (0..OFFERS).take_while(|first| {
                        let answer = adopted(*first as u64, 1);
                        let begin = std::time::Instant::now();
                        while begin.elapsed() < Duration::from_micros(20) {}
                        send(socket.as_raw_fd(), &answer, MsgFlags::MSG_NOSIGNAL).is_ok()
                    });
                    written.count()
                });
                dispatcher.remove_worker(id, Some(Duration::from_millis(2))).await;
                // The dispatcher has counted exactly the answers that were written.
                let written = answering.join().unwrap();
                assert_eq!(dispatcher.stats().adopted, written as u64, "{kind:?}");
                in_the_middle += usize::from((1..OFFERS).contains(&written));
                let adopted = outcomes.drain(..written);
                assert!(
                    join_all(adopted)
                        .await
                        .into_iter()
                        .all(|outcome| outcome.is_ok_and(|worker| worker == id))
                );
                assert_eq!(dispatcher.stats().waiting, OFFERS - written);
                drop(copies);
            }
            assert!(in_the_middle > 0, "no worker was fenced between two answers");
        });
    }
}
