//! The promise, with everything that can happen at random.

use std::time::{Duration, Instant};

use proptest::{collection::vec, prelude::*, sample::select};

use super::world::{Fate, Step, World};
use crate::handoff::{
    dispatcher::{Strategy as Choice, builder::Config},
    protocol::{FromWorker, RejectReason},
};

const PEERS: usize = 3;

fn config() -> Config {
    Config {
        ping_interval: Duration::from_millis(100),
        hang_timeout: Duration::from_millis(500),
        recall_after: Duration::from_millis(100),
        fence_window: Duration::from_secs(1),
        max_in_flight: 16,
        ..Config::default()
    }
}

fn reason() -> impl Strategy<Value = RejectReason> {
    select(&[RejectReason::Full, RejectReason::Unusable, RejectReason::Draining, RejectReason::Other(9)][..])
}

fn lie() -> impl Strategy<Value = FromWorker> {
    let numbers = || (0..5u64, 0..4u32);
    prop_oneof![
        numbers().prop_map(|(first, count)| FromWorker::Adopted { first, count }),
        (numbers(), reason()).prop_map(|((first, count), reason)| FromWorker::Rejected { first, count, reason }),
        (0..9u64).prop_map(|total| FromWorker::Demand { total }),
        (0..3u64).prop_map(|finished| FromWorker::Load { finished }),
        (0..3u64).prop_map(|nonce| FromWorker::Pong { nonce }),
        Just(FromWorker::Draining),
        Just(FromWorker::Goodbye),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    // More peers than there are at first: restarted ones come behind.
    let peer = || 0..2 * PEERS;
    prop_oneof![
        4 => Just(Step::Dispatch),
        3 => Just(Step::Reserve),
        2 => Just(Step::DispatchReserved),
        1 => Just(Step::GiveUp),
        12 => peer().prop_map(Step::Take),
        12 => peer().prop_map(Step::Send),
        12 => peer().prop_map(|peer| Step::Get(peer, None)),
        2 => (peer(), reason()).prop_map(|(peer, reason)| Step::Get(peer, Some(reason))),
        10 => peer().prop_map(Step::Ask),
        4 => peer().prop_map(Step::Finish),
        16 => peer().prop_map(Step::Answer),
        12 => peer().prop_map(Step::Read),
        4 => peer().prop_map(Step::Timeout),
        1 => peer().prop_map(Step::Crash),
        1 => peer().prop_map(Step::Hang),
        1 => peer().prop_map(Step::Cut),
        1 => peer().prop_map(Step::Steal),
        1 => peer().prop_map(Step::Drain),
        1 => (peer(), lie()).prop_map(|(peer, lie)| Step::Lie(peer, lie)),
        3 => peer().prop_map(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Workers die, hang, stall, refuse and lie, and sockets fail. Each connection is given to at most one application, none is lost,
    /// and none waits while a willing worker has room.
    #[test]
    fn the_promise_is_kept_whatever_happens(
        steps in vec((step(), 0..40u64), 0..600),
        window in 1..5u64,
        max_offers in 1..4u32,
        strategy in select(&[Choice::LeastLoaded, Choice::RoundRobin, Choice::ByKey][..]),
    ) {
        let mut world = World::new(Config { max_offers, strategy, ..config() }, PEERS, window, Instant::now());
        for (step, millis) in steps {
            if world.fates.len() == 60 && matches!(step, Step::Dispatch | Step::DispatchReserved) {
                continue;
            }
            if step.peer().is_none_or(|peer| peer < world.peers.len()) {
                world.now += Duration::from_millis(millis);
                world.step(step);
                if let Err(broken) = world.check() {
                    return Err(TestCaseError::fail(broken));
                }
            }
        }
        world.settle();
        prop_assert_eq!(world.check(), Ok(()));
        for (serial, fate) in world.fates.iter().enumerate() {
            let Fate::Adopted(link) = *fate else {
                prop_assert_eq!(*fate, Fate::Failed, "connection {} was left over", serial);
                continue;
            };
            let adopter = world.peers.iter().find(|peer| peer.link() == link).unwrap();
            let got_it = adopter.given.contains(&(serial as u8));
            prop_assert!(got_it || adopter.lies || adopter.hangs || !adopter.lives, "connection {} was lost", serial);
        }
    }
}
