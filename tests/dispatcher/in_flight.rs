//! The limit on the descriptors of one uid that are in flight. Beyond it, the kernel takes no more
//! (`ETOOMANYREFS`).

use std::{fs::File, pin::pin, time::Duration};

use fdwire::{
    Framed, Socket, SocketKind,
    handoff::{
        Dispatcher,
        protocol::{FromWorker, WorkerCodec},
    },
};
use futures::future::join_all;
use nix::sys::resource::{Resource, setrlimit};
use rustix::io::ioctl_fionread;
use tokio::time::timeout;

use crate::{
    common::{KINDS, PASSED, other_uid, role_socket, run, spawn_role},
    raw_worker::{Raw, connections, greet, serve, until},
};

/// Runs a role as another uid, because root is exempt from the limit on descriptors in flight. No
/// other process has that uid, because all processes of a uid share its limit.
fn in_role_of_other_uid(role: &str) {
    let Some(uid) = other_uid() else { return };
    let mut child = spawn_role(role, Some(uid), File::open("/dev/null").unwrap().into());
    assert_eq!(child.wait().unwrap().code(), Some(PASSED));
}

/// Returns the number of bytes that were sent to a worker and not yet received.
fn unread(worker: &Raw) -> u64 {
    ioctl_fionread(worker.framed.socket()).unwrap()
}

/// The dispatcher keeps the offers that exceed the limit until it can send them, and loses none.
#[test]
fn a_dispatcher_waits_while_too_many_descriptors_are_in_flight() {
    const ROLE: &str = "in_flight::a_dispatcher_waits_while_too_many_descriptors_are_in_flight";
    const HALF: u32 = 100;
    if role_socket(ROLE).is_some() {
        KINDS.into_iter().for_each(|kind| {
            run(async {
                // Half of the offers are in flight.
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
                until("the offers are on their way", || on_their_way() > 0).await;
                let before = on_their_way();
                // These offers exceed the new limit, so the other half cannot be sent. The limit is
                // for the descriptors in flight of all processes of the uid.
                setrlimit(Resource::RLIMIT_NOFILE, 64, 1024).unwrap();
                let second = half();
                until("a send has failed", || dispatcher.stats().send_shortages > 0).await;
                assert_eq!(on_their_way(), before, "the kernel has ignored the limit");
                // The limit is raised, and the worker gets all offers.
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
            });
        });
        std::process::exit(PASSED);
    }
    in_role_of_other_uid(ROLE);
}

/// Workers that do not receive keep descriptors of the uid in flight, even after they are cut off.
#[test]
fn stuck_workers_leave_a_healthy_one_all_that_it_needs() {
    const ROLE: &str = "in_flight::stuck_workers_leave_a_healthy_one_all_that_it_needs";
    const OFFERS: usize = 60;
    if role_socket(ROLE).is_some() {
        return run(async {
            // The limit that counts is the soft one of the sender.
            setrlimit(Resource::RLIMIT_NOFILE, 256, 4096).unwrap();
            let dispatcher = Dispatcher::builder()
                .ping_interval(Duration::from_millis(20))
                .hang_timeout(Duration::from_millis(100))
                .max_fences(100, Duration::from_secs(1))
                .build();
            let mut stuck = Vec::new();
            for round in 0..10 {
                // A worker takes offers and does not receive them, until it is cut off.
                let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
                dispatcher.add_worker(dispatcher_end);
                let mut framed = Framed::new(worker_end, WorkerCodec::default());
                greet(&mut framed, 253).await;
                stuck.push(framed); // nobody reads from it
                let offered = Vec::from_iter((0..OFFERS).map(|_| {
                    dispatcher.dispatch(std::os::unix::net::UnixStream::pair().unwrap().0)
                }));
                until("the worker is cut off", || dispatcher.stats().retired.hung == round + 1)
                    .await;
                assert!(
                    dispatcher.stats().in_flight <= 128 + stuck.len(),
                    "{:?}",
                    dispatcher.stats()
                );
                // A healthy worker adopts all of them.
                let mut healthy = Raw::start(&dispatcher, SocketKind::SeqPacket, 60).await;
                healthy.offers(1).await;
                healthy.adopt(1).await;
                for _ in 1..OFFERS {
                    healthy.offer().await.unwrap();
                    healthy.adopt(1).await;
                }
                assert!(join_all(offered).await.into_iter().all(|adopted| adopted.is_ok()));
                healthy.send(FromWorker::Goodbye).await;
                until("the worker has left", || dispatcher.stats().workers.is_empty()).await;
            }
            std::process::exit(PASSED);
        });
    }
    in_role_of_other_uid(ROLE);
}

/// The PING waits in the dispatcher's queue, so the worker cannot answer it.
#[test]
fn a_worker_is_not_cut_off_while_the_dispatcher_cannot_send() {
    const ROLE: &str = "in_flight::a_worker_is_not_cut_off_while_the_dispatcher_cannot_send";
    const IN_FLIGHT: u32 = 100;
    if role_socket(ROLE).is_some() {
        return run(async {
            // Another dispatcher has many descriptors in flight to a worker that does not receive.
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
            until("the offers are on their way", || unread(&stopped) > 0).await;

            // So this dispatcher cannot send an offer, for longer than a worker may be silent.
            let hang_timeout = Duration::from_secs(1);
            let ping_interval = Duration::from_millis(50);
            let dispatcher = Dispatcher::builder()
                .ping_interval(ping_interval)
                .hang_timeout(hang_timeout)
                .build();
            let mut worker = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
            setrlimit(Resource::RLIMIT_NOFILE, 64, 1024).unwrap();
            let outcome = dispatcher.dispatch(last);
            let work = async {
                let offer = worker.offer().await.expect("the worker has not been cut off");
                worker.adopt(1).await;
                offer
            };
            let mut work = pin!(work);
            let stuck = timeout(2 * hang_timeout, work.as_mut()).await;
            assert!(stuck.is_err(), "the kernel has ignored the limit");
            // When it can, the worker adopts the connection.
            setrlimit(Resource::RLIMIT_NOFILE, 1024, 1024).unwrap();
            drop(work.await);
            outcome.await.unwrap();
            std::process::exit(PASSED);
        });
    }
    in_role_of_other_uid(ROLE);
}

/// The worker itself is the reason why nothing can be sent: it does not receive, so its offers stay
/// in flight.
#[test]
fn a_worker_that_does_not_receive_is_cut_off_also_when_the_dispatcher_cannot_send() {
    const ROLE: &str =
        "in_flight::a_worker_that_does_not_receive_is_cut_off_also_when_the_dispatcher_cannot_send";
    const IN_FLIGHT: u32 = 100;
    if role_socket(ROLE).is_some() {
        return run(async {
            // The worker does not receive its offers.
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
            until("the offers are on their way", || unread(&stopped) > 0).await;
            // The next offer cannot be sent, and the worker is cut off for being silent.
            setrlimit(Resource::RLIMIT_NOFILE, 64, 1024).unwrap();
            let _last = dispatcher.dispatch(last);
            until("the worker was cut off", || dispatcher.stats().retired.hung == 1).await;
            setrlimit(Resource::RLIMIT_NOFILE, 1024, 1024).unwrap();
            std::process::exit(PASSED);
        });
    }
    in_role_of_other_uid(ROLE);
}
