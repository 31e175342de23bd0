//! Each complete message that a worker has sent before it is cut off counts, whatever else the
//! worker has sent.

use fdwire::{
    SocketKind,
    handoff::{Dispatcher, protocol::RejectReason},
};

use crate::{
    both,
    common::{encoded, marked, raw_send},
    raw_worker::{Raw, adopted, connections, until},
};

/// Has a worker with one unanswered offer send these packets with their descriptors. Checks that
/// the worker counts as having adopted the connection.
async fn adopts_with(kind: SocketKind, name: &str, packets: &[(Vec<u8>, u32)]) {
    let dispatcher = Dispatcher::builder().build();
    let mut worker = Raw::start(&dispatcher, kind, 1).await;
    let (_client, accepted) = connections(1).await.pop().unwrap();
    let outcome = dispatcher.dispatch(accepted);
    let copy = worker.offer().await.unwrap();
    for (bytes, fds) in packets {
        raw_send(worker.framed.socket(), bytes, &Vec::from_iter((0..*fds).map(marked)));
    }
    until("the worker was cut off", || dispatcher.stats().workers.is_empty()).await;
    let other = Raw::start(&dispatcher, kind, 1).await;
    assert_eq!(outcome.await.unwrap(), worker.id, "{kind:?} {name}");
    assert_eq!(
        (dispatcher.stats().adopted, dispatcher.stats().offered_again),
        (1, 0),
        "{kind:?} {name}"
    );
    drop((copy, other));
}

/// Rules: D-LAST-WORDS, D-ADOPTED, P-EMPTY.
#[test]
fn an_adoption_counts_whatever_breach_comes_before_or_after_it() {
    both(async |kind| {
        let (unknown, garbage) = (encoded(&[0x3F], 0), b"GET / HTTP/1.1\r\n\r\n".to_vec());
        let pong = encoded(&[6, 0, 0, 0, 0, 0, 0, 0, 99], 0);
        let with_fd = |fds| (encoded(&[5, 0, 0, 0, 0, 0, 0, 0, 0], fds as u16), fds);
        let adopted = || (adopted(0, 1), 0);
        adopts_with(kind, "unknown message before", &[(unknown.clone(), 0), adopted()]).await;
        adopts_with(kind, "unknown message after", &[adopted(), (unknown, 0)]).await;
        adopts_with(kind, "two wrong pongs before", &[(pong.clone(), 0), (pong, 0), adopted()])
            .await;
        adopts_with(kind, "goodbye before", &[(encoded(&[8], 0), 0), adopted()]).await;
        adopts_with(kind, "garbage after", &[adopted(), (garbage, 0)]).await;
        adopts_with(kind, "a message with a descriptor before", &[with_fd(1), adopted()]).await;
        adopts_with(kind, "a message with descriptors after", &[adopted(), with_fd(1)]).await;
        let both = [adopted().0, with_fd(1).0].concat();
        adopts_with(kind, "one with a descriptor in the same send", &[(both, 1)]).await;
        if kind == SocketKind::SeqPacket {
            adopts_with(kind, "an empty packet before", &[(Vec::new(), 0), adopted()]).await;
        }
    });
}

/// The dispatcher skips a REJECTED that it cannot decode. The number in the ADOPTED after it shows
/// which offer the worker has adopted.
///
/// Rules: D-LAST-WORDS.
#[test]
fn an_adoption_is_not_counted_for_another_connection() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 2).await;
        let mut outcomes = Vec::from_iter(
            connections(2).await.into_iter().map(|(_, accepted)| dispatcher.dispatch(accepted)),
        );
        let copies = worker.offers(2).await;
        // A REJECTED without its reason.
        let rejected = encoded(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 0);
        raw_send(worker.framed.socket(), &[rejected, adopted(1, 1)].concat(), &[]);
        worker.ended().await;
        let mut other = Raw::start(&dispatcher, kind, 2).await;
        let _offer = other.offer().await.unwrap();
        other.adopt(1).await;
        assert_eq!(outcomes.remove(0).await.unwrap(), other.id);
        assert_eq!(outcomes.remove(0).await.unwrap(), worker.id);
        drop(copies);
    });
}

/// The worker answers its second offer first. That happens if another process has read the first
/// one from its socket.
///
/// Rules: W-FIRST.
#[test]
fn an_answer_that_skips_an_offer_ends_the_link() {
    both(async |kind| {
        let dispatcher = Dispatcher::builder().build();
        let mut worker = Raw::start(&dispatcher, kind, 2).await;
        let outcomes = Vec::from_iter(
            connections(2).await.into_iter().map(|(_, accepted)| dispatcher.dispatch(accepted)),
        );
        let copies = worker.offers(2).await;
        worker.take_numbers(1);
        worker.reject(1, RejectReason::Full).await;
        worker.ended().await;
        assert_eq!(dispatcher.stats().retired.misbehaved, 1);
        let mut other = Raw::start(&dispatcher, kind, 2).await;
        other.offers(2).await;
        other.adopt(2).await;
        for outcome in outcomes {
            assert_eq!(outcome.await.unwrap(), other.id);
        }
        drop(copies);
    });
}
