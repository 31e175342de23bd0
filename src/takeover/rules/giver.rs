//! The rules that bind a giver.

use std::time::Instant;

use bytes::Bytes;

use super::{HELLO, SECOND};
use crate::takeover::{
    giver::{Giver, GiverSettings},
    protocol::{AbortReason, FromTaker, Refusal, Versions},
    steps::{GiverStep, Undone},
};

fn new_giver(now: Instant, versions: Versions) -> Giver {
    Giver::new(now, GiverSettings { versions, answer: SECOND, ready: 60 * SECOND })
}

/// A giver that offers its listeners, and has not sent COMPLETE.
fn offering_giver(now: Instant) -> Giver {
    let mut giver = new_giver(now, Versions::OURS);
    giver.on_message(HELLO);
    giver.welcome(now);
    assert_eq!(steps(&mut giver), [GiverStep::Decide, GiverStep::SendOffer { version: 1 }]);
    giver
}

/// A giver that has sent COMPLETE after two listeners.
fn complete_giver(now: Instant) -> Giver {
    let mut giver = offering_giver(now);
    giver.offered(now, 2);
    assert_eq!(steps(&mut giver), [GiverStep::SendComplete]);
    giver
}

/// A giver that has read READY, and has stopped.
fn draining_giver(now: Instant) -> Giver {
    let mut giver = complete_giver(now);
    giver.on_message(FromTaker::Ready);
    assert_eq!(steps(&mut giver), [GiverStep::Stop { declined: [].into() }]);
    giver
}

fn steps(giver: &mut Giver) -> Vec<GiverStep> {
    std::iter::from_fn(|| giver.next_step()).collect()
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
        ((1, 1), (1, 0), None), // an empty range
    ] {
        let mut giver = new_giver(now, Versions { lowest, highest });
        giver.on_message(FromTaker::Hello { lowest: its_lowest, highest: its_highest });
        giver.welcome(now);
        let expected = match common {
            Some(version) => vec![GiverStep::Decide, GiverStep::SendOffer { version }],
            None => vec![GiverStep::SendRefused(Refusal::Version)],
        };
        assert_eq!(steps(&mut giver), expected);
        assert!(giver.is_serving());
        assert_eq!(giver.is_over(), common.is_none());
    }
}

/// Rules: T-HELLO, T-HELLO-ONCE, T-EARLY, T-NUMBER, G-BREACH.
#[test]
fn a_breach_before_ready_ends_the_takeover_and_the_giver_serves() {
    let now = Instant::now();
    let back = FromTaker::HandBack { baton: Bytes::new() };
    let decline = |number| FromTaker::Decline { number };
    // Givers at three moments, each with the messages that are a breach then.
    type Start = fn(Instant) -> Giver;
    let cases: [(Start, Vec<FromTaker>); 3] = [
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
            giver.on_message(FromTaker::Ready); // does not count after a breach
            giver.on_end();
            assert!(giver.is_serving() && giver.is_over(), "{breach:?}");
            let steps = steps(&mut giver);
            assert!(!steps.iter().any(|step| matches!(step, GiverStep::Stop { .. })), "{steps:?}");
        }
    }

    // A number that exists is no breach.
    let mut giver = complete_giver(now);
    giver.on_message(decline(1));
    giver.on_message(FromTaker::Ready);
    assert_eq!(steps(&mut giver), [GiverStep::Stop { declined: [1].into() }]);
}

/// Rules: G-BREACH-LATE.
#[test]
fn a_breach_after_ready_makes_the_takeover_final() {
    let now = Instant::now();
    for breach in [HELLO, FromTaker::Ready, FromTaker::Decline { number: 0 }, FromTaker::Status] {
        let mut giver = draining_giver(now);
        giver.on_message(breach);
        giver.on_end();
        assert_eq!(steps(&mut giver), [GiverStep::GiveUpCopies, GiverStep::SendDrained]);
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
    assert_eq!(steps(&mut giver), [GiverStep::Cut]);
    giver.on_end();
    assert_eq!(steps(&mut giver), [GiverStep::SendAborted(AbortReason::TimedOut)]);
    assert!(giver.is_serving());
}

/// Rules: G-CUT.
#[test]
fn a_giver_that_calls_off_reads_to_the_end_before_it_sends_aborted() {
    let now = Instant::now();
    for ready_was_written in [false, true] {
        let mut giver = complete_giver(now);
        giver.abort(AbortReason::Withdrawn);
        assert_eq!(steps(&mut giver), [GiverStep::Cut]);
        assert!(giver.is_serving());
        if ready_was_written {
            giver.on_message(FromTaker::Ready);
        }
        giver.on_end();
        let expected = match ready_was_written {
            true => GiverStep::Stop { declined: [].into() },
            false => GiverStep::SendAborted(AbortReason::Withdrawn),
        };
        assert_eq!(steps(&mut giver), [expected]);
        assert_eq!(giver.is_serving(), !ready_was_written);
        // After a cut, the end of the data is not the taker's end.
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
    assert_eq!(steps(&mut giver), [stop, GiverStep::SendCommit { baton: Bytes::from("baton") }]);
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
    assert_eq!(steps(&mut giver), [GiverStep::Resume(Undone::Ended)]);
    assert!(giver.is_serving());

    let finals: [fn(&mut Giver); 2] =
        [|giver| giver.on_message(FromTaker::Release), |giver| giver.drained()];
    for make_final in finals {
        let mut giver = draining_giver(now);
        make_final(&mut giver);
        let steps = steps(&mut giver);
        assert_eq!(steps[steps.len() - 2..], [GiverStep::GiveUpCopies, GiverStep::SendDrained]);
        giver.on_end();
        giver.on_taker_gone();
        assert_eq!(giver.next_step(), None);
        assert!(!giver.is_serving());
    }
}

/// Rules: G-RESUMED.
#[test]
fn a_giver_accepts_before_it_sends_resumed() {
    let now = Instant::now();
    let mut giver = draining_giver(now);
    giver.on_message(FromTaker::HandBack { baton: Bytes::from("baton") });
    let handed_back = GiverStep::Resume(Undone::HandedBack(Bytes::from("baton")));
    assert_eq!(steps(&mut giver), [handed_back, GiverStep::SendResumed]);
}
