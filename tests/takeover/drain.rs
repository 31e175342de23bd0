//! The end of a replaced server's connections.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fdwire::takeover::{OpenConnection, Options, Phase, Server};
use futures::{FutureExt, future::join_all};

use crate::{common::*, control_path, first_with, request};

const HOUR: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(30);

fn options(spread: Duration, deadline: Duration) -> Options {
    Options::default().drain(spread, deadline)
}

fn connections(server: &Server, number: usize) -> Vec<OpenConnection> {
    (0..number).map(|_| server.open_connection()).collect()
}

#[test]
fn a_server_stays_until_its_connections_have_ended_and_reports_that_none_is_left() {
    run(async {
        let (_directory, path) = control_path();
        let old = first_with(&path, options(SHORT, HOUR));
        let mut open = connections(&old, 10);
        let mut finish = Box::pin(old.finish());
        assert!(finish.as_mut().now_or_never().is_none(), "nothing has replaced it");
        assert!(!open[0].is_replaced());

        let new = request(&path).await.ready().await.unwrap();
        old.replaced().await;
        // Each of the connections is asked to end.
        for connection in &open {
            assert!(connection.is_replaced());
            connection.ending().await;
        }
        assert!(finish.as_mut().now_or_never().is_none());
        assert!(open[0].deadline().now_or_never().is_none());
        let last = open.pop();
        drop(open);
        assert!(finish.as_mut().now_or_never().is_none(), "one is open");
        drop(last);
        assert_eq!(finish.await.unfinished, 0);
        assert_eq!((old.phase(), new.phase()), (Phase::Replaced, Phase::Serving));
    });
}

#[test]
fn connections_that_are_open_at_the_deadline_are_reported() {
    run(async {
        let (_directory, path) = control_path();
        let old = first_with(&path, options(SHORT, SHORT));
        let open = connections(&old, 3);
        let _new = request(&path).await.ready().await.unwrap();
        assert_eq!(old.finish().await.unfinished, 3);
        join_all(open.iter().map(OpenConnection::deadline)).await;
    });
}

/// A replaced server stays for the spread even without a connection, because its successor may
/// still fail.
#[test]
fn a_takeover_can_be_undone_for_the_whole_spread() {
    run(async {
        let (_directory, path) = control_path();
        let old = first_with(&path, options(HOUR, HOUR));
        let mut finish = Box::pin(old.finish());
        let connection = old.open_connection();
        for _ in 0..2 {
            let new = request(&path).await.ready().await.unwrap();
            new.confirmed().await;
            old.replaced().await;
            assert!(finish.as_mut().now_or_never().is_none() && connection.is_replaced());
            drop(new);
            assert!(old.undone().await);
            assert!(finish.as_mut().now_or_never().is_none() && !connection.is_replaced());
            settle().await;
        }
        assert!(connection.ending().now_or_never().is_none(), "it serves");

        // When the successor is replaced in turn, the takeover can no longer be undone.
        let new = request(&path).await.ready().await.unwrap();
        new.confirmed().await;
        let _newest = request(&path).await.ready().await.unwrap();
        drop(connection);
        assert_eq!(finish.await.unfinished, 0);
    });
}

/// The connections are asked to end one by one over the spread.
#[test]
fn connections_of_a_replaced_server_do_not_end_at_one_moment() {
    run(async {
        let (_directory, path) = control_path();
        let old = first_with(&path, options(Duration::from_secs(2), HOUR));
        let ended = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = connections(&old, 1000)
            .into_iter()
            .map(|connection| {
                let ended = Arc::clone(&ended);
                tokio::spawn(async move {
                    connection.ending().await;
                    ended.fetch_add(1, Ordering::SeqCst);
                })
            })
            .collect();
        let _new = request(&path).await.ready().await.unwrap();
        let mut seen = BTreeSet::new();
        while !seen.contains(&1000) {
            seen.insert(ended.load(Ordering::SeqCst));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        println!("1,000 connections ended at {} moments or more", seen.len());
        assert!(seen.len() > 3, "they ended at one moment");
        join_all(tasks).await;
        assert_eq!(old.finish().await.unfinished, 0);
    });
}

#[test]
fn the_oldest_of_too_many_old_servers_leaves_at_once() {
    run(async {
        // Four servers were replaced, and each has a connection.
        let (_directory, path) = control_path();
        let options = || options(SHORT, HOUR).max_old_generations(2);
        let mut servers = vec![first_with(&path, options())];
        let mut connections = Vec::new();
        for _ in 0..4 {
            let new =
                fdwire::takeover::request(&path, options()).await.unwrap().ready().await.unwrap();
            new.confirmed().await;
            connections.push(servers.last().unwrap().open_connection());
            servers.push(new);
        }
        // Two may stay. The first two have to leave, and cut their connections.
        for server in &servers[..2] {
            assert_eq!(server.finish().await.unfinished, 1);
        }
        assert!(servers[2].finish().now_or_never().is_none());
        let newest = &servers[4];
        assert_eq!(newest.generations().len(), 4, "a server was no longer listed before its end");
        drop(servers.drain(..2));
        assert_eq!(
            servers[0].generations(),
            [],
            "a server that was replaced for good lists no others"
        );
        // When they have ended, the newest lists the other two.
        let newest = servers.last().unwrap();
        while newest.generations().len() > 2 {
            tokio::task::yield_now().await;
        }
        let list = newest.generations();
        assert!(list.iter().all(|old| old.pid == Some(std::process::id())), "{list:?}");
        assert!(list[0].replaced_for >= list[1].replaced_for, "{list:?}");
    });
}
