//! Groups of workers: a connection goes to the workers of its group, and waits for no others.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use fdwire::{
    Listener, SocketKind,
    handoff::{Accepted, Dispatcher, Group, GroupStats, NotDispatched, Strategy, WorkerCommand},
};
use futures::{FutureExt, future::join_all};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

use crate::{
    both,
    common::run,
    end_to_end::{command, started},
    raw_worker::{Client, Raw, connections, until},
};

/// The first serial number for the group "b". Connections with lower ones are for the group "a".
const FIRST_OF_B: u32 = 1 << 24;

/// Chooses the group by the first byte, which the worker still reads.
async fn route(stream: TcpStream) -> Option<Accepted> {
    let mut first = [0];
    stream.peek(&mut first).await.ok()?;
    Some(Accepted::from(stream).group(if first == [0] { "a" } else { "b" }))
}

fn stats_of(dispatcher: &Dispatcher, group: &str) -> Option<GroupStats> {
    dispatcher.stats().groups.into_iter().find(|stats| stats.group == Group::from(group))
}

fn pids_of(dispatcher: &Dispatcher, group: &str) -> BTreeSet<u32> {
    let workers = dispatcher.stats().workers.into_iter();
    workers
        .filter(|worker| worker.group == Group::from(group))
        .filter_map(|worker| worker.pid)
        .collect()
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Starts two worker processes in each group.
async fn start_groups(dispatcher: &Dispatcher, directory: &tempfile::TempDir) {
    for group in ["a", "b"] {
        for _ in 0..2 {
            let command = command(&directory.path().join(group));
            dispatcher.in_group(group).spawn_worker(WorkerCommand::from(command)).unwrap();
        }
    }
    started(dispatcher, 4).await;
}

/// Connects clients with these serial numbers. Returns the process ids that they got as answers.
async fn answers(address: SocketAddr, serials: impl Iterator<Item = u32>) -> BTreeSet<u32> {
    let answers = serials.map(|serial| async move {
        let answer = Client::connect(address, serial).await.answer().await;
        answer.parse().unwrap_or_else(|_| panic!("client {serial} got {answer:?}"))
    });
    join_all(answers).await.into_iter().collect()
}

#[test]
fn a_router_sends_connections_to_two_groups_by_their_first_bytes() {
    for strategy in [Strategy::LeastLoaded, Strategy::RoundRobin, Strategy::ByKey] {
        run(async {
            let directory = tempfile::tempdir().unwrap();
            let dispatcher = Dispatcher::builder().strategy(strategy).build();
            start_groups(&dispatcher, &directory).await;
            let (pids_a, pids_b) = (pids_of(&dispatcher, "a"), pids_of(&dispatcher, "b"));
            assert_eq!((pids_a.len(), pids_b.len()), (2, 2));
            let (listener, address) = listen().await;
            let routing = async {
                let (a, b) = tokio::join!(
                    answers(address, 0..50),
                    answers(address, FIRST_OF_B..FIRST_OF_B + 50)
                );
                assert!(a.is_subset(&pids_a) && b.is_subset(&pids_b), "{a:?} {b:?}");
                if strategy != Strategy::ByKey {
                    assert_eq!((a.len(), b.len()), (2, 2));
                }
            };
            tokio::select! {
                ended = dispatcher.serve_with(listener, route) => panic!("{ended:?}"),
                () = routing => {}
            }
            dispatcher.drain(None).await;
        });
    }
}

/// At most 16 connections are prepared or wait at a time. Those of the dead group get half of these
/// places, and further ones are closed.
#[test]
fn a_group_whose_workers_all_die_does_not_harm_the_other() {
    const CLIENTS: u32 = 40;
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let dispatcher = Dispatcher::builder().max_preparing(16).build();
        start_groups(&dispatcher, &directory).await;
        let (listener, address) = listen().await;
        let checking = async {
            answers(address, 0..10).await;
            for pid in pids_of(&dispatcher, "a") {
                kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
            }
            until("the workers have left", || stats_of(&dispatcher, "a").is_none()).await;

            // Clients of the dead group do not keep those of the other one from being served.
            let mut waiting = Vec::new();
            for serial in 0..CLIENTS {
                waiting.push(Client::connect(address, serial).await);
                answers(address, [FIRST_OF_B + serial].into_iter()).await;
            }
            answers(address, FIRST_OF_B..FIRST_OF_B + 50).await;
            until("the others are counted", || dispatcher.stats().lost == u64::from(CLIENTS) - 8)
                .await;
            let group = stats_of(&dispatcher, "a").unwrap();
            assert_eq!((group.workers, group.waiting_for_slot), (0, 8));

            // When the dead group has a worker again, the connections that wait are served.
            let command = command(&directory.path().join("a"));
            dispatcher.in_group("a").spawn_worker(command).unwrap();
            let served = join_all(waiting.into_iter().map(Client::answer)).await;
            assert_eq!(served.iter().filter(|answer| !answer.is_empty()).count(), 8);
        };
        tokio::select! {
            ended = dispatcher.serve_with(listener, route) => panic!("{ended:?}"),
            () = checking => {}
        }
        dispatcher.drain(None).await;
    });
}

/// The group of a connection is known only after it is accepted. So any group with room is enough
/// to accept it.
#[test]
fn connections_to_be_prepared_are_accepted_when_a_worker_of_any_group_has_room() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let (listener, address) = listen().await;
        let checking = async {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(&FIRST_OF_B.to_be_bytes()).await.unwrap();
            until("a connection waits", || dispatcher.stats().slot_wait.is_some()).await;
            assert_eq!(dispatcher.stats().groups, []);
            let mut worker = Raw::start(&dispatcher.in_group("b"), kind, 1).await;
            worker.offer().await.unwrap();
            worker.adopt(1).await;
            until("the connection is adopted", || dispatcher.stats().adopted == 1).await;
        };
        tokio::select! {
            ended = dispatcher.serve_with(listener, route) => panic!("{ended:?}"),
            () = checking => {}
        }
    });
}

#[test]
fn a_listener_of_a_group_waits_for_its_workers_only() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let (group, other) = (dispatcher.in_group("a"), dispatcher.in_group("b"));
        let (listener, address) = listen().await;
        let (full, full_address) = listen().await;
        let mut worker = Raw::start(&other, kind, 2).await;
        let checking = async {
            let _waits = Client::connect(full_address, 0).await;
            until("a connection waits", || stats_of(&dispatcher, "a").is_some()).await;
            for serial in 0..2 {
                let _client = Client::connect(address, serial).await;
                worker.offer().await.unwrap();
                worker.adopt(1).await;
            }
            until("both are adopted", || dispatcher.stats().adopted == 2).await;
            assert_eq!(dispatcher.stats().dispatched, 2, "the first one was not accepted");
        };
        tokio::select! {
            ended = group.serve(full) => panic!("{ended:?}"),
            ended = other.serve(listener) => panic!("{ended:?}"),
            () = checking => {}
        }
    });
}

/// The path to which a worker connects decides, and nothing that it sends.
#[test]
fn a_worker_that_connects_gets_connections_of_the_group_of_its_path() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let dispatcher = Dispatcher::builder().build();
        let mut serving = Vec::new();
        for group in ["a", "b"] {
            let listener =
                Listener::bind(directory.path().join(group), SocketKind::SeqPacket).unwrap();
            let group = dispatcher.in_group(group);
            serving.push(tokio::spawn(async move { group.serve_workers(listener).await }));
        }
        // A worker connects to the path of each group.
        let mut workers = Vec::new();
        for group in ["a", "b"] {
            let mut command = command(&directory.path().join("log"));
            command.env("FDWIRE_CONNECT", directory.path().join(group));
            workers.push(command.spawn().unwrap());
        }
        // Each connection is served by the worker of its group.
        for (index, (client, accepted)) in connections(20).await.into_iter().enumerate() {
            let group = ["a", "b"][index % 2];
            let id = dispatcher.in_group(group).dispatch(accepted).await.unwrap();
            let stats = dispatcher.stats();
            let worker = stats.workers.iter().find(|worker| worker.id == id).unwrap();
            assert_eq!(worker.group, group.into());
            assert_eq!(client.answer().await, worker.pid.unwrap().to_string());
        }
        dispatcher.drain(None).await;
        for mut worker in workers {
            assert!(worker.wait().await.unwrap().success());
        }
        for serving in serving {
            serving.await.unwrap().unwrap();
        }
    });
}

#[test]
fn a_connection_is_given_up_when_all_workers_of_its_group_have_failed_with_it() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().max_offers(2).build();
        let _other = Raw::start(&dispatcher, kind, 10).await;
        let group = dispatcher.in_group("a");
        let (mut client, accepted) = connections(1).await.pop().unwrap();
        let mut outcome = group.dispatch(accepted);
        for _ in 0..2 {
            assert!((&mut outcome).now_or_never().is_none());
            let mut worker = Raw::start(&group, kind, 1).await;
            worker.offer().await.unwrap();
        }
        let failed = outcome.await.unwrap_err();
        assert!(matches!(failed.reason, NotDispatched::TooManyOffers { offers: 2, .. }));
        assert_eq!(stats_of(&dispatcher, "a"), None);

        // The connection is the application's again, which has another group serve it.
        let mut other = Raw::start(&dispatcher.in_group("b"), kind, 1).await;
        let outcome = dispatcher.dispatch(failed.connection.group("b"));
        other.offer().await.unwrap();
        other.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), other.id);
        client.0.write_all(b"x").await.unwrap();
    });
}

/// The permit was for a slot in one group, and its connection turns out to be for another.
#[test]
fn a_permit_of_one_group_frees_its_slot_when_the_connection_is_for_another() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut a = Raw::start(&dispatcher.in_group("a"), kind, 1).await;
        let mut b = Raw::start(&dispatcher.in_group("b"), kind, 1).await;
        let mut accepted = connections(2).await;
        let permit = dispatcher.in_group("a").reserve().await.unwrap();
        assert!(dispatcher.in_group("a").reserve().now_or_never().is_none());
        let (_first, connection) = accepted.pop().unwrap();
        let outcome = permit.dispatch(Accepted::from(connection).group("b"));
        b.offer().await.unwrap();
        b.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), b.id);
        let (_second, connection) = accepted.pop().unwrap();
        let outcome = dispatcher.in_group("a").reserve().await.unwrap().dispatch(connection);
        a.offer().await.unwrap();
        a.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), a.id);
    });
}

/// If the connections stayed, the drain would wait for a group that no worker serves.
#[test]
fn a_drain_gives_back_connections_that_wait_for_a_group_without_workers() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        let (client, accepted) = connections(1).await.pop().unwrap();
        let outcome = dispatcher.in_group("nobody").dispatch(accepted);
        assert_eq!(stats_of(&dispatcher, "nobody").unwrap().waiting, 1);
        let drain = dispatcher.drain(Some(Duration::from_secs(3600)));
        let ((), ()) = tokio::join!(drain, worker.leave());
        let failed = outcome.await.unwrap_err();
        assert!(matches!(failed.reason, NotDispatched::Draining));
        drop(failed);
        assert_eq!(client.answer().await, "");
    });
}
