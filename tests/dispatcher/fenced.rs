//! A worker that goes on after its dispatcher has fenced it.

use std::{os::fd::OwnedFd, time::Duration};

use fdwire::{
    Socket,
    handoff::{
        Dispatcher, Incoming, IncomingEnd,
        protocol::{FromWorker, ToWorker},
    },
};

use crate::{
    both,
    common::{KINDS, one_thread, run},
    raw_worker::{Raw, connections, until},
};

/// Rules: D-FENCED.
#[test]
fn the_last_message_to_a_worker_that_is_cut_off_says_so() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 1).await;
        worker.say(FromWorker::Pong { nonce: 99 }).await; // to no ping
        let mut last = None;
        while let Some(message) = worker.step().await {
            last = Some(message);
        }
        assert!(matches!(last, Some(ToWorker::Fenced)), "{last:?}");
    });
}

/// It learns at once that it gets nothing more, and what it has adopted it finishes.
#[test]
fn a_worker_that_was_fenced_and_goes_on_learns_that() {
    for kind in KINDS {
        run(async {
            let dispatcher = Dispatcher::builder()
                .ping_interval(Duration::from_millis(20))
                .hang_timeout(Duration::from_millis(100))
                .build();
            let (here, there) = Socket::pair(kind).unwrap();
            dispatcher.add_worker(here);
            let there = OwnedFd::from(there);
            let (release, released) = std::sync::mpsc::channel::<()>();
            let worker = std::thread::spawn(move || {
                one_thread().block_on(async move {
                    let mut incoming = Incoming::new(Socket::try_from(there).unwrap());
                    let handle = incoming.handle();
                    let connection = incoming.next().await.unwrap();
                    released.recv().unwrap(); // the only thread of its runtime
                    assert!(incoming.next().await.is_none());
                    let end = handle.link_ended().await;
                    drop(connection);
                    handle.ended().await;
                    end
                })
            });
            let (_client, connection) = connections(1).await.pop().unwrap();
            dispatcher.dispatch(connection).await.unwrap();
            until("it is fenced", || dispatcher.stats().retired.hung == 1).await;
            release.send(()).unwrap();
            let end = tokio::task::spawn_blocking(|| worker.join().unwrap()).await.unwrap();
            assert!(matches!(end, IncomingEnd::Fenced), "{end:?}");
        });
    }
}
