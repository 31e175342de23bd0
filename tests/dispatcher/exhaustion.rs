//! Workers whose process has no descriptors left.

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use fdwire::{
    Socket,
    handoff::{Dispatcher, Incoming, WorkerState},
};
use futures::future::join_all;
use nix::sys::resource::{Resource, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::{
    both,
    common::{role_socket, run, spawn_role},
    raw_worker::{Client, Raw, connections, serve, until},
};

/// Opens files until all descriptors with numbers below this are in use.
fn fill_fds(below: i32) -> Vec<File> {
    let open = std::iter::repeat_with(|| File::open("/dev/null").ok());
    open.map_while(|file| file.filter(|file| file.as_raw_fd() < below)).collect()
}

/// Is a worker that closes every connection at once. When its application has got the first one, it
/// opens files until all descriptors below `filled` are in use.
fn work_without_descriptors(socket: OwnedFd, limit: u64, filled: i32) {
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap();
    run(async {
        let mut incoming = Incoming::new(Socket::try_from(socket).unwrap());
        let first = incoming.next().await.unwrap();
        drop(first); // a LOAD is sent when this task awaits something
        let _files = fill_fds(filled);
        while let Some(connection) = incoming.next().await {
            drop(connection);
        }
    });
}

/// The worker rejects an offer because it has no descriptor left. It then counts the free
/// descriptors, and does not ask for the same connection at once.
#[test]
fn a_connection_is_not_offered_again_and_again_to_a_worker_without_descriptors() {
    const ROLE: &str =
        "exhaustion::a_connection_is_not_offered_again_and_again_to_a_worker_without_descriptors";
    if let Some(socket) = role_socket(ROLE) {
        return work_without_descriptors(socket, 1024, 1000);
    }
    both(async |kind| {
        let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
        let dispatcher = Dispatcher::builder().build();
        let mut child = spawn_role(ROLE, None, worker_end.into());
        let worker = dispatcher.add_worker(dispatcher_end);
        let mut all = connections(2).await.into_iter();
        let (_first, accepted) = all.next().unwrap();
        dispatcher.dispatch(accepted).await.unwrap();
        until("the worker has no descriptors left", || dispatcher.stats().workers[0].active == 0)
            .await;
        let (_client, accepted) = all.next().unwrap();
        let mut outcome = dispatcher.dispatch(accepted);
        until("the worker has rejected it", || dispatcher.stats().workers[0].rejected > 0).await;
        assert!(timeout(Duration::from_millis(300), &mut outcome).await.is_err());
        assert_eq!(dispatcher.stats().workers[0].rejected, 1);
        tokio::join!(dispatcher.drain(Some(Duration::ZERO)), async { drop(outcome.await) });
        assert!(!dispatcher.remove_worker(worker, None).await);
        child.wait().unwrap();
    });
}

/// The worker has asked for more connections than it has room for later. After it has rejected one,
/// only its later demand counts.
#[test]
fn a_worker_that_had_no_descriptors_left_asks_for_as_many_as_it_has_later() {
    const ROLE: &str =
        "exhaustion::a_worker_that_had_no_descriptors_left_asks_for_as_many_as_it_has_later";
    // The worker's first client makes it open files ("f") and close some of them ("e").
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
                        // Then 8 descriptors below the reserve are free.
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
        // The worker has room for many connections at first.
        let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
        let dispatcher = Dispatcher::builder().ping_interval(Duration::from_millis(20)).build();
        let mut child = spawn_role(ROLE, None, worker_end.into());
        let worker = dispatcher.add_worker(dispatcher_end);
        let mut all = connections(2).await.into_iter();
        let (mut control, accepted) = all.next().unwrap();
        dispatcher.dispatch(accepted).await.unwrap();
        until("the worker has asked for more than 8", || dispatcher.stats().workers[0].credit > 12)
            .await;
        // The worker has no descriptors left, so it rejects a connection.
        control.0.write_all(b"f").await.unwrap();
        control.0.read_exact(&mut [0]).await.unwrap();
        let (client, accepted) = all.next().unwrap();
        let outcome = dispatcher.dispatch(accepted);
        until("the worker has rejected it", || dispatcher.stats().workers[0].rejected > 0).await;
        // Some are free again, so the worker adopts the connection and asks for up to 8 more.
        control.0.write_all(b"e").await.unwrap();
        control.0.read_exact(&mut [0]).await.unwrap();
        assert_eq!(outcome.await.unwrap(), worker);
        assert_eq!(client.answer().await, "served");
        until("the worker asks for as many as it has room for", || {
            (1..=8).contains(&dispatcher.stats().workers[0].credit)
        })
        .await;
        assert_eq!(dispatcher.stats().retired, Default::default());
        drop(control);
        assert!(dispatcher.remove_worker(worker, None).await);
        assert!(child.wait().unwrap().success());
    });
}

/// The application itself uses up the descriptors, down to the reserve of the worker.
#[test]
fn a_worker_at_its_reserve_of_descriptors_rejects_and_lives() {
    const ROLE: &str = "exhaustion::a_worker_at_its_reserve_of_descriptors_rejects_and_lives";
    if let Some(socket) = role_socket(ROLE) {
        return work_without_descriptors(socket, 64, 60);
    }
    both(async |kind| {
        // After its first connection, the worker has no descriptors left.
        let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
        let dispatcher = Dispatcher::builder().build();
        let mut child = spawn_role(ROLE, None, worker_end.into());
        let full = dispatcher.add_worker(dispatcher_end);
        until("the worker is ready", || dispatcher.stats().workers[0].credit > 3).await;
        let mut all = connections(4).await.into_iter();
        let (_first, accepted) = all.next().unwrap();
        dispatcher.dispatch(accepted).await.unwrap();
        until("the worker has no descriptors left", || dispatcher.stats().workers[0].active == 0)
            .await;

        // Another worker adopts all further connections.
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
        // The full worker has rejected some, and goes on.
        let stats = dispatcher.stats();
        assert_eq!(stats.retired, Default::default());
        let full_one = stats.workers.iter().find(|worker| worker.id == full).unwrap();
        assert!(full_one.state == WorkerState::Ready && full_one.rejected > 0);
        drop(clients);
        assert!(dispatcher.remove_worker(full, None).await);
        assert!(child.wait().unwrap().success());
    });
}
