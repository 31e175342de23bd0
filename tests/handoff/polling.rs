//! Polling the stream of connections outside of the runtime, and by a task that ends.

use std::{
    pin::pin,
    sync::{Arc, Mutex, mpsc},
    task::{Context, Wake, Waker},
    time::Duration,
};

use fdwire::handoff::{
    Connection, Incoming, Transport,
    protocol::{Offer, RejectReason, ToWorker},
};
use futures::{FutureExt, SinkExt};

use crate::{
    common::counted,
    raw_dispatcher::{offer_of, pair},
};

#[test]
fn connections_can_be_taken_outside_of_the_runtime() {
    counted(async |kind| {
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        let taking = std::thread::spawn(move || {
            loop {
                match incoming.next().now_or_never() {
                    Some(connection) => return (incoming, connection.unwrap()),
                    None => std::thread::yield_now(),
                }
            }
        });
        let (mut client, _copy) = dispatcher.offer().await;
        dispatcher.expect_adopted(1).await;
        let (_incoming, mut connection) = taking.join().unwrap();
        crate::worker::check_reaches(&mut connection, &mut client).await;
    });
}

/// A waker that owns a connection, as that of a task does which is freed with its last waker.
struct Owns {
    _connection: Mutex<Connection>,
}

impl Wake for Owns {
    fn wake(self: Arc<Self>) {}
}

#[test]
fn a_waker_that_owns_a_connection_may_be_dropped_by_polling() {
    counted(async |kind| {
        // The waker that waits for the next connection owns the first one.
        let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder()).await;
        assert!(incoming.next().now_or_never().is_none());
        let _client = dispatcher.offer().await;
        let connection = incoming.next().await.unwrap();
        let waker = Waker::from(Arc::new(Owns { _connection: Mutex::new(connection) }));
        assert!(pin!(incoming.next()).poll_unpin(&mut Context::from_waker(&waker)).is_pending());
        drop(waker);

        // Another waker takes its place, so the waker and the connection are dropped.
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || {
            assert!(incoming.next().now_or_never().is_none());
            done.send(incoming).unwrap();
        });
        let _incoming = is_done.recv_timeout(Duration::from_secs(10)).expect("polling is blocked");
        dispatcher.expect_adopted(1).await;
        dispatcher.expect_finished(1).await;
    });
}

/// Offers are recalled, or rejected as unusable, before the application gets them. The application
/// still waits, so the worker asks for others.
#[test]
fn offers_that_are_rejected_while_the_application_waits_are_asked_for_again() {
    counted(async |kind| {
        for recalled in [false, true] {
            // The application waits for a connection.
            let (mut dispatcher, mut incoming) = pair(kind, Incoming::builder().window(3)).await;
            let taking = tokio::spawn(async move {
                let connection = incoming.next().await;
                (incoming, connection)
            });
            dispatcher.expect_demand(3).await;
            // Three offers and a RECALL come together.
            let mut clients = Vec::new();
            for _ in 0..3 {
                let (client, copy) = dispatcher.accept().await;
                let transport = if recalled { Transport::Tcp } else { Transport::UnixStream };
                let offer = Offer { transport, ..offer_of(&copy) };
                let message = dispatcher.number(offer);
                dispatcher.framed.feed(message).await.unwrap();
                clients.push((client, copy));
            }
            dispatcher.send(ToWorker::Recall { before: 3 }).await;
            // The worker rejects the offers and asks for three more. The application gets the next.
            let reason = if recalled { RejectReason::Recalled } else { RejectReason::Unusable };
            dispatcher.expect_rejected(3, reason).await;
            dispatcher.expect_demand(6).await;
            let (mut client, _copy) = dispatcher.offer().await;
            let (_incoming, connection) = taking.await.unwrap();
            crate::worker::check_reaches(&mut connection.unwrap(), &mut client).await;
        }
    });
}
