//! The log of a dispatcher, and subscribers that panic.

use std::{
    fmt::{Debug, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use fdwire::{Socket, SocketKind, handoff::Dispatcher};
use tracing::{
    Event, Level,
    field::Field,
    subscriber::{set_default, with_default},
};

use crate::{
    common::{Events, KINDS, encoded, marked, raw_send, run},
    descriptors::alone,
    raw_worker::{HELLO, Raw, adopted, connections, until},
};

/// Appends an event to a log, as one line of text.
pub(crate) fn write_to(log: &Mutex<String>, event: &Event<'_>) {
    let mut log = log.lock().unwrap();
    event
        .record(&mut |field: &Field, value: &dyn Debug| write!(log, "{field}={value:?} ").unwrap());
    log.push('\n');
}

#[test]
fn the_reason_why_a_worker_was_cut_off_is_logged() {
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
    // A worker sends the bytes, is cut off, and the reason is in the log.
    for (bytes, fds, reason) in cases {
        for kind in KINDS {
            let log = Arc::new(Mutex::new(String::new()));
            let kept = Arc::clone(&log);
            // The subscriber counts only within this call, on this thread.
            with_default(
                Events(Level::WARN, move |event: &Event<'_>| write_to(&kept, event)),
                || {
                    run(async {
                        let dispatcher = Dispatcher::builder().build();
                        let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
                        let id = dispatcher.add_worker(dispatcher_end);
                        raw_send(&worker_end, bytes, &Vec::from_iter((0..fds).map(marked)));
                        until("the worker is gone", || dispatcher.stats().workers.is_empty()).await;
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

/// The panic ends the task of the worker. So the drain has nothing to wait for.
#[test]
fn a_drain_ends_though_a_subscriber_panics() {
    with_default(
        Events(Level::WARN, |_: &Event<'_>| panic!("a log that cannot be written")),
        || {
            run(async {
                let dispatcher = Dispatcher::builder().build();
                let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
                dispatcher.add_worker(dispatcher_end);
                drop(worker_end); // the dispatcher logs a warning
                dispatcher.drain(None).await;
                assert!(dispatcher.stats().workers.is_empty());
            });
        },
    );
}

/// The panic ends the link of the worker. The connection on its way goes to another worker.
#[test]
fn a_connection_is_handed_over_though_a_subscriber_panics_at_its_offer() {
    // The test has a process of its own, because subscribers of other threads influence what is
    // logged.
    alone("log::a_connection_is_handed_over_though_a_subscriber_panics_at_its_offer", async {
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
        until("the worker is gone", || dispatcher.stats().retired.misbehaved == 1).await;
        let mut second = Raw::start(&dispatcher, SocketKind::SeqPacket, 1).await;
        second.offer().await.unwrap();
        second.adopt(1).await;
        assert_eq!(outcome.await.unwrap(), second.id);
    });
}
