//! The rules of `protocol.md` that are kept by the values of both sides.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{
    giver::{Giver, GiverSettings, GiverStep, Undone},
    protocol::{
        AbortReason, Address, Family, FromTaker, Identity, Kind, Offered, Refusal, ToTaker,
        Versions,
    },
    taker::{Failure, Taker, TakerSettings, TakerStep},
};

const SECOND: Duration = Duration::from_secs(1);
const HELLO: FromTaker = FromTaker::Hello { lowest: 1, highest: 1 };

fn new_giver(now: Instant, versions: Versions) -> Giver {
    Giver::new(now, GiverSettings { versions, answer: SECOND, ready: 60 * SECOND })
}

fn new_taker(now: Instant, versions: Versions) -> Taker {
    Taker::new(now, TakerSettings { versions, answer: SECOND, lock: 5 * SECOND })
}

/// A giver that offers its listeners, and has not sent COMPLETE.
fn offering_giver(now: Instant) -> Giver {
    let mut giver = new_giver(now, Versions::OURS);
    giver.on_message(HELLO);
    giver.welcome(now);
    assert_eq!(giver_steps(&mut giver), [GiverStep::Asked, GiverStep::SendOffer { version: 1 }]);
    giver
}

/// A giver that has sent COMPLETE after two listeners.
fn complete_giver(now: Instant) -> Giver {
    let mut giver = offering_giver(now);
    giver.offered(now, 2);
    assert_eq!(giver_steps(&mut giver), [GiverStep::SendComplete]);
    giver
}

/// A giver that has read READY, and has stopped.
fn draining_giver(now: Instant) -> Giver {
    let mut giver = complete_giver(now);
    giver.on_message(FromTaker::Ready);
    assert_eq!(giver_steps(&mut giver), [GiverStep::Stop { declined: [].into() }]);
    giver
}

/// A taker that has sent HELLO.
fn greeting_taker(now: Instant) -> Taker {
    let mut taker = new_taker(now, Versions::OURS);
    assert_eq!(taker_steps(&mut taker), [TakerStep::Send(HELLO)]);
    taker
}

/// A taker that has everything, and whose application is ready.
fn ready_taker(now: Instant) -> Taker {
    let mut taker = greeting_taker(now);
    receive(&mut taker, now, ToTaker::Welcome { version: 1, listeners: 0 });
    receive(&mut taker, now, ToTaker::Complete);
    taker.ready(now);
    assert_eq!(taker_steps(&mut taker), [TakerStep::Offered, TakerStep::Send(FromTaker::Ready)]);
    taker
}

/// A taker that serves, and waits for YOURS.
fn serving_taker(now: Instant) -> Taker {
    let mut taker = ready_taker(now);
    taker.on_ready_written();
    assert_eq!(taker_steps(&mut taker), [TakerStep::Serve]);
    taker
}

/// A taker that has got YOURS.
fn confirmed_taker(now: Instant) -> Taker {
    let mut taker = serving_taker(now);
    receive(&mut taker, now, yours());
    assert_eq!(taker_steps(&mut taker), [TakerStep::Confirmed(Some(Bytes::from("baton")))]);
    taker
}

fn yours() -> ToTaker<u32> {
    ToTaker::Yours { baton: Bytes::from("baton"), fds: [1, 2].into_iter().collect() }
}

fn receive(taker: &mut Taker, now: Instant, message: ToTaker<u32>) {
    taker.on_message(now, &message);
}

fn giver_steps(giver: &mut Giver) -> Vec<GiverStep> {
    std::iter::from_fn(|| giver.next_step()).collect()
}

fn taker_steps(taker: &mut Taker) -> Vec<TakerStep> {
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

/// Rules: G-VERSION, G-NO-VERSION.
#[test]
fn the_highest_version_that_both_speak_is_spoken() {
    let now = Instant::now();
    for ((lowest, highest), (its_lowest, its_highest), common) in [
        ((1, 1), (1, 1), Some(1)),
        ((1, 1), (1, 9), Some(1)),
        ((1, 3), (1, 2), Some(2)),
        ((2, 3), (3, 7), Some(3)),
        ((0, 255), (0, 255), Some(255)),
        ((1, 1), (2, 9), None),
        ((2, 3), (1, 1), None),
        ((1, 1), (1, 0), None), // no range at all
    ] {
        let mut giver = new_giver(now, Versions { lowest, highest });
        giver.on_message(FromTaker::Hello { lowest: its_lowest, highest: its_highest });
        giver.welcome(now);
        let expected = match common {
            Some(version) => vec![GiverStep::Asked, GiverStep::SendOffer { version }],
            None => vec![GiverStep::SendRefused(Refusal::Version)],
        };
        assert_eq!(giver_steps(&mut giver), expected);
        assert!(giver.is_serving());
        assert_eq!(giver.is_over(), common.is_none());
    }
}

/// Rules: T-VERSION.
#[test]
fn a_taker_speaks_no_version_that_it_has_not_named() {
    let now = Instant::now();
    for (version, expected) in [(1, None), (2, None), (0, Some(())), (3, Some(()))] {
        let mut taker = new_taker(now, Versions { lowest: 1, highest: 2 });
        taker_steps(&mut taker);
        receive(&mut taker, now, ToTaker::Welcome { version, listeners: 0 });
        let failed = expected.map(|()| TakerStep::Fail(Failure::Misbehaved));
        assert_eq!(taker.next_step(), failed, "version {version}");
    }
}

/// Rules: T-HELLO, T-HELLO-ONCE, T-EARLY, T-NUMBER, G-BREACH.
#[test]
fn a_breach_before_ready_ends_the_takeover_and_the_giver_serves() {
    let now = Instant::now();
    let back = FromTaker::HandBack { baton: Bytes::new() };
    let decline = |number| FromTaker::Decline { number };
    let cases: [(fn(Instant) -> Giver, Vec<FromTaker>); 3] = [
        (
            |now| new_giver(now, Versions::OURS),
            vec![FromTaker::Ready, decline(0), back.clone(), FromTaker::Release],
        ),
        (
            offering_giver,
            vec![
                HELLO,
                FromTaker::Ready,
                decline(0),
                back.clone(),
                FromTaker::Release,
                FromTaker::Status,
            ],
        ),
        (complete_giver, vec![HELLO, decline(2), back, FromTaker::Release, FromTaker::Status]),
    ];
    for (giver, breaches) in cases {
        for breach in breaches {
            let mut giver = giver(now);
            giver.on_message(breach.clone());
            giver.on_message(FromTaker::Ready); // means nothing behind a breach
            giver.on_end();
            assert!(giver.is_serving() && giver.is_over(), "{breach:?}");
            let steps = giver_steps(&mut giver);
            assert!(!steps.iter().any(|step| matches!(step, GiverStep::Stop { .. })), "{steps:?}");
        }
    }
    let mut giver = complete_giver(now);
    giver.on_message(decline(1));
    giver.on_message(FromTaker::Ready);
    assert_eq!(giver_steps(&mut giver), [GiverStep::Stop { declined: [1].into() }]);
}

/// Rules: G-BREACH-LATE.
#[test]
fn a_breach_after_ready_makes_the_takeover_final() {
    let now = Instant::now();
    for breach in [HELLO, FromTaker::Ready, FromTaker::Decline { number: 0 }, FromTaker::Status] {
        let mut giver = draining_giver(now);
        giver.on_message(breach);
        giver.on_end();
        assert_eq!(giver_steps(&mut giver), [GiverStep::GiveUpCopies, GiverStep::SendDrained]);
        assert!(!giver.is_serving() && giver.is_over());
    }
}

/// Rules: T-READY-TIME.
#[test]
fn a_taker_that_is_not_ready_in_time_is_called_off() {
    let now = Instant::now();
    let mut giver = complete_giver(now);
    giver.on_timeout(now + 59 * SECOND);
    assert_eq!(giver.next_step(), None);
    giver.on_timeout(now + 60 * SECOND);
    assert_eq!(giver_steps(&mut giver), [GiverStep::Cut]);
    giver.on_end();
    assert_eq!(giver_steps(&mut giver), [GiverStep::SendAborted(AbortReason::TimedOut)]);
    assert!(giver.is_serving());
}

/// Rules: G-CUT.
#[test]
fn a_giver_reads_to_the_end_before_it_tells_that_it_has_called_off() {
    let now = Instant::now();
    for ready_was_written in [false, true] {
        let mut giver = complete_giver(now);
        giver.abort(AbortReason::Withdrawn);
        assert_eq!(giver_steps(&mut giver), [GiverStep::Cut]);
        assert!(giver.is_serving());
        if ready_was_written {
            giver.on_message(FromTaker::Ready);
        }
        giver.on_end();
        let expected = match ready_was_written {
            true => GiverStep::Stop { declined: [].into() },
            false => GiverStep::SendAborted(AbortReason::Withdrawn),
        };
        assert_eq!(giver_steps(&mut giver), [expected]);
        assert_eq!(giver.is_serving(), !ready_was_written);
        // The end of what can be read is not the taker's end.
        assert_eq!(giver.is_draining(), ready_was_written);
    }
}

/// Rules: G-STOP, G-BATON.
#[test]
fn a_giver_passes_the_baton_on_once_and_after_it_has_stopped() {
    let now = Instant::now();
    let mut giver = complete_giver(now);
    giver.give(Bytes::from("baton"));
    assert_eq!(giver.next_step(), None, "it serves");
    giver.on_message(FromTaker::Ready);
    giver.give(Bytes::from("baton"));
    giver.give(Bytes::from("another"));
    let stop = GiverStep::Stop { declined: [].into() };
    assert_eq!(
        giver_steps(&mut giver),
        [stop, GiverStep::SendYours { baton: Bytes::from("baton") }]
    );
    assert!(!giver.holds_baton());
    giver.on_end();
    assert!(giver.holds_baton(), "it serves again");
}

/// Rules: G-UNDO, G-DRAINED.
#[test]
fn the_end_of_the_taker_undoes_the_takeover_until_it_is_final() {
    let now = Instant::now();
    let mut giver = draining_giver(now);
    giver.on_end();
    assert_eq!(giver_steps(&mut giver), [GiverStep::Resume(Undone::Ended)]);
    assert!(giver.is_serving());

    let finals: [fn(&mut Giver); 2] =
        [|giver| giver.on_message(FromTaker::Release), |giver| giver.drained()];
    for make_final in finals {
        let mut giver = draining_giver(now);
        make_final(&mut giver);
        let steps = giver_steps(&mut giver);
        assert_eq!(steps[steps.len() - 2..], [GiverStep::GiveUpCopies, GiverStep::SendDrained]);
        giver.on_end();
        giver.on_taker_gone();
        assert_eq!(giver.next_step(), None);
        assert!(!giver.is_serving());
    }
}

/// Rules: G-RESUMED.
#[test]
fn a_giver_accepts_before_it_says_so() {
    let now = Instant::now();
    let mut giver = draining_giver(now);
    giver.on_message(FromTaker::HandBack { baton: Bytes::from("baton") });
    let handed_back = GiverStep::Resume(Undone::HandedBack(Bytes::from("baton")));
    assert_eq!(giver_steps(&mut giver), [handed_back, GiverStep::SendResumed]);
}

/// Rules: T-HAND-BACK.
#[test]
fn a_taker_serves_until_the_giver_has_resumed() {
    let now = Instant::now();
    let mut taker = confirmed_taker(now);
    assert!(taker.hand_back(Bytes::from("baton")));
    assert!(taker.is_serving());
    taker_steps(&mut taker);
    receive(&mut taker, now, ToTaker::Resumed);
    assert_eq!(taker_steps(&mut taker), [TakerStep::Stop]);
    assert!(!taker.is_serving());

    // The giver has drained meanwhile: this process goes on, with its baton.
    let mut taker = confirmed_taker(now);
    taker.hand_back(Bytes::from("baton"));
    taker_steps(&mut taker);
    receive(&mut taker, now, ToTaker::Drained);
    assert_eq!(taker_steps(&mut taker), [TakerStep::NotHandedBack(Bytes::from("baton"))]);
    assert!(taker.is_serving());
}

/// Rules: T-ACCEPT, T-STAY.
#[test]
fn a_taker_serves_once_ready_is_written_and_stays_until_the_giver_is_final() {
    let now = Instant::now();
    let mut taker = ready_taker(now);
    assert!(!taker.is_serving());
    taker.on_ready_written();
    assert_eq!(taker_steps(&mut taker), [TakerStep::Serve]);
    assert!(taker.is_serving() && !taker.is_over());
    receive(&mut taker, now, yours());
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
        assert_eq!(taker_steps(&mut taker), [TakerStep::TryLock]);
        taker.on_lock(now, false); // an exiting process closes one thing after another
        assert_eq!(taker.next_step(), None);
        taker.on_lock(now + 5 * SECOND, gets_it);
        let expected = match gets_it {
            true => vec![TakerStep::Serve, TakerStep::Confirmed(None)],
            false => vec![TakerStep::Fail(Failure::AnotherServes)],
        };
        assert_eq!(taker_steps(&mut taker), expected);
        assert_eq!(taker.is_serving(), gets_it);
    }
}

/// A giver that has no descriptor left calls a takeover off before it has sent anything.
#[test]
fn a_takeover_may_be_called_off_instead_of_a_welcome() {
    let now = Instant::now();
    let mut taker = greeting_taker(now);
    receive(&mut taker, now, ToTaker::Aborted { reason: AbortReason::Failed });
    assert_eq!(taker_steps(&mut taker), [TakerStep::Fail(Failure::Aborted(AbortReason::Failed))]);
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
        assert_eq!(taker_steps(&mut taker), [expected]);
    }
}

/// Rules: T-BREACH.
#[test]
fn a_taker_that_serves_goes_on_after_a_breach_of_the_giver() {
    let now = Instant::now();
    for breach in [ToTaker::Complete, ToTaker::Resumed, yours()] {
        let mut taker = confirmed_taker(now);
        receive(&mut taker, now, breach);
        assert_eq!(taker_steps(&mut taker), [TakerStep::Send(FromTaker::Release)]);
        assert!(taker.is_serving() && taker.is_over());
    }
}

/// Rules: T-LOST.
#[test]
fn a_taker_that_has_lost_yours_takes_the_path_when_the_giver_has_given_it_up() {
    let now = Instant::now();
    let mut taker = serving_taker(now);
    taker.on_violation(now);
    assert_eq!(taker_steps(&mut taker), [TakerStep::Send(FromTaker::Release), TakerStep::TryLock]);
    // It never gives up, and asks seldom after a while.
    for (time, wait) in [(now, SECOND / 100), (now + 5 * SECOND, SECOND)] {
        taker.on_lock(time, false);
        assert!(taker.is_serving() && !taker.is_over());
        assert_eq!(taker.next_timeout(), Some(time + wait));
        taker.on_timeout(time + wait);
        assert_eq!(taker_steps(&mut taker), [TakerStep::TryLock]);
    }
    taker.on_lock(now, true);
    assert_eq!(taker_steps(&mut taker), [TakerStep::Confirmed(None)]);
    assert!(taker.is_serving() && taker.is_over());

    // A YOURS that has crossed RELEASE has the lock.
    let mut taker = serving_taker(now);
    taker.on_violation(now);
    taker_steps(&mut taker);
    receive(&mut taker, now, yours());
    assert_eq!(taker_steps(&mut taker), [TakerStep::Confirmed(Some(Bytes::from("baton")))]);
    receive(&mut taker, now, ToTaker::Drained);
    assert!(taker.is_serving() && taker.is_over());
}
