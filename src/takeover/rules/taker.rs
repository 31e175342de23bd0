//! The rules that bind a taker.

use std::time::Instant;

use bytes::Bytes;

use super::{HELLO, SECOND};
use crate::takeover::{
    protocol::{
        AbortReason, Address, Family, FromTaker, Identity, Kind, Offered, ToTaker, Versions,
    },
    steps::{Failure, TakerStep},
    taker::{Taker, TakerSettings},
};

fn new_taker(now: Instant, versions: Versions) -> Taker {
    Taker::new(now, TakerSettings { versions, answer: SECOND, lock: 5 * SECOND })
}

/// A taker that has sent HELLO.
fn greeting_taker(now: Instant) -> Taker {
    let mut taker = new_taker(now, Versions::OURS);
    assert_eq!(steps(&mut taker), [TakerStep::Send(HELLO)]);
    taker
}

/// A taker that has the whole offer, and whose application is ready.
fn ready_taker(now: Instant) -> Taker {
    let mut taker = greeting_taker(now);
    receive(&mut taker, now, ToTaker::Welcome { version: 1, listeners: 0 });
    receive(&mut taker, now, ToTaker::Complete);
    taker.ready(now);
    assert_eq!(steps(&mut taker), [TakerStep::Offered, TakerStep::Send(FromTaker::Ready)]);
    taker
}

/// A taker that serves, and waits for COMMIT.
fn serving_taker(now: Instant) -> Taker {
    let mut taker = ready_taker(now);
    taker.on_ready_written();
    assert_eq!(steps(&mut taker), [TakerStep::Serve]);
    taker
}

/// A taker that has received COMMIT.
fn confirmed_taker(now: Instant) -> Taker {
    let mut taker = serving_taker(now);
    receive(&mut taker, now, commit());
    assert_eq!(steps(&mut taker), [TakerStep::Confirmed(Some(Bytes::from("baton")))]);
    taker
}

fn commit() -> ToTaker<u32> {
    ToTaker::Commit { baton: Bytes::from("baton"), fds: [1, 2].into_iter().collect() }
}

fn receive(taker: &mut Taker, now: Instant, message: ToTaker<u32>) {
    taker.on_message(now, &message);
}

fn steps(taker: &mut Taker) -> Vec<TakerStep> {
    std::iter::from_fn(|| taker.next_step()).collect()
}

fn listener(number: u32) -> Offered<u32> {
    let identity = Identity {
        name: "http".to_owned(),
        index: number,
        family: Family::Ipv4,
        kind: Kind::Stream,
        protocol: 6,
        address: Address::Ip(([127, 0, 0, 1], 80).into()),
        device: None,
        v6_only: None,
    };
    Offered { identity, cookie: number.into(), path_id: None, fd: number }
}

/// Rules: T-VERSION.
#[test]
fn a_taker_speaks_no_version_that_it_has_not_named() {
    let now = Instant::now();
    for (version, expected) in [(1, None), (2, None), (0, Some(())), (3, Some(()))] {
        let mut taker = new_taker(now, Versions { lowest: 1, highest: 2 });
        steps(&mut taker);
        receive(&mut taker, now, ToTaker::Welcome { version, listeners: 0 });
        let failed = expected.map(|()| TakerStep::Fail(Failure::Misbehaved));
        assert_eq!(taker.next_step(), failed, "version {version}");
    }
}

/// Rules: T-HAND-BACK.
#[test]
fn a_taker_serves_until_the_giver_has_resumed() {
    let now = Instant::now();
    let mut taker = confirmed_taker(now);
    assert!(taker.hand_back(Bytes::from("baton")));
    assert!(taker.is_serving());
    steps(&mut taker);
    receive(&mut taker, now, ToTaker::Resumed);
    assert_eq!(steps(&mut taker), [TakerStep::Stop]);
    assert!(!taker.is_serving());

    // The giver has drained meanwhile: this process goes on, with its baton.
    let mut taker = confirmed_taker(now);
    taker.hand_back(Bytes::from("baton"));
    steps(&mut taker);
    receive(&mut taker, now, ToTaker::Drained);
    assert_eq!(steps(&mut taker), [TakerStep::NotHandedBack(Bytes::from("baton"))]);
    assert!(taker.is_serving());
}

/// Rules: T-ACCEPT, T-STAY.
#[test]
fn a_taker_serves_once_ready_is_written_and_stays_until_the_giver_is_final() {
    let now = Instant::now();
    let mut taker = ready_taker(now);
    assert!(!taker.is_serving());
    taker.on_ready_written();
    assert_eq!(steps(&mut taker), [TakerStep::Serve]);
    assert!(taker.is_serving() && !taker.is_over());
    receive(&mut taker, now, commit());
    assert!(!taker.is_over());
    receive(&mut taker, now, ToTaker::Drained);
    assert!(taker.is_over());
}

/// Rules: T-LOCK.
#[test]
fn without_ready_only_the_lock_makes_a_taker_serve() {
    let now = Instant::now();
    for gets_it in [true, false] {
        let mut taker = ready_taker(now);
        taker.on_send_failed(now);
        assert!(!taker.is_serving() && taker.next_step().is_none());
        taker.on_end(now);
        assert_eq!(steps(&mut taker), [TakerStep::TryLock]);
        taker.on_lock(now, false); // the kernel has not released the lock of the dead giver yet
        assert_eq!(taker.next_step(), None);
        taker.on_lock(now + 5 * SECOND, gets_it);
        let expected = match gets_it {
            true => vec![TakerStep::Serve, TakerStep::Confirmed(None)],
            false => vec![TakerStep::Fail(Failure::AnotherServes)],
        };
        assert_eq!(steps(&mut taker), expected);
        assert_eq!(taker.is_serving(), gets_it);
    }
}

/// This happens if a giver has no descriptor left before it has sent anything.
#[test]
fn a_takeover_may_be_called_off_instead_of_a_welcome() {
    let now = Instant::now();
    let mut taker = greeting_taker(now);
    receive(&mut taker, now, ToTaker::Aborted { reason: AbortReason::Failed });
    assert_eq!(steps(&mut taker), [TakerStep::Fail(Failure::Aborted(AbortReason::Failed))]);
}

/// Rules: G-COUNT, G-COMPLETE.
#[test]
fn a_taker_refuses_an_offer_with_listeners_too_few_or_too_many_or_too_late() {
    let now = Instant::now();
    let state = || ToTaker::State { bytes: Bytes::new(), fds: Default::default() };
    let welcome = |listeners| ToTaker::Welcome { version: 1, listeners };
    let some =
        |numbers: &[u32]| ToTaker::Listeners(numbers.iter().copied().map(listener).collect());
    for (messages, is_good) in [
        (vec![welcome(0), ToTaker::Complete], true),
        (vec![welcome(3), some(&[0, 1]), state(), some(&[2]), ToTaker::Complete], true),
        (vec![welcome(1), ToTaker::Complete], false),
        (vec![welcome(1), some(&[0, 1])], false),
        (vec![welcome(0), some(&[0])], false),
        (vec![some(&[0])], false),
        (vec![welcome(1), some(&[0]), ToTaker::Complete, state()], false),
        (vec![welcome(1), some(&[0]), ToTaker::Complete, ToTaker::Complete], false),
    ] {
        let mut taker = greeting_taker(now);
        messages.into_iter().for_each(|message| receive(&mut taker, now, message));
        let expected =
            if is_good { TakerStep::Offered } else { TakerStep::Fail(Failure::Misbehaved) };
        assert_eq!(steps(&mut taker), [expected]);
    }
}

/// Rules: T-BREACH.
#[test]
fn a_taker_that_serves_goes_on_after_a_breach_of_the_giver() {
    let now = Instant::now();
    for breach in [ToTaker::Complete, ToTaker::Resumed, commit()] {
        let mut taker = confirmed_taker(now);
        receive(&mut taker, now, breach);
        assert_eq!(steps(&mut taker), [TakerStep::Send(FromTaker::Release)]);
        assert!(taker.is_serving() && taker.is_over());
    }
}

/// Rules: T-LOST.
#[test]
fn a_taker_that_has_lost_commit_takes_the_path_when_the_giver_has_given_it_up() {
    let now = Instant::now();
    let mut taker = serving_taker(now);
    taker.on_violation(now);
    assert_eq!(steps(&mut taker), [TakerStep::Send(FromTaker::Release), TakerStep::TryLock]);
    // It never gives up, and tries less often after a while.
    for (time, wait) in [(now, SECOND / 100), (now + 5 * SECOND, SECOND)] {
        taker.on_lock(time, false);
        assert!(taker.is_serving() && !taker.is_over());
        assert_eq!(taker.next_timeout(), Some(time + wait));
        taker.on_timeout(time + wait);
        assert_eq!(steps(&mut taker), [TakerStep::TryLock]);
    }
    taker.on_lock(now, true);
    assert_eq!(steps(&mut taker), [TakerStep::Confirmed(None)]);
    assert!(taker.is_serving() && taker.is_over());

    // The giver wrote COMMIT before it read RELEASE: the lock comes with it.
    let mut taker = serving_taker(now);
    taker.on_violation(now);
    steps(&mut taker);
    receive(&mut taker, now, commit());
    assert_eq!(steps(&mut taker), [TakerStep::Confirmed(Some(Bytes::from("baton")))]);
    receive(&mut taker, now, ToTaker::Drained);
    assert!(taker.is_serving() && taker.is_over());
}
