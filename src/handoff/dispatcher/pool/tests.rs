//! Tests of the pool. The first one checks the promise while random events happen.

use std::time::{Duration, Instant};

use proptest::{collection::vec, prelude::*, sample::select};

use super::{
    Admission, Event, Needs, Pool, ProcessInfo, ProcessState,
    world::{Fate, Step, World},
};
use crate::handoff::{
    dispatcher::{Group, RetireCause, Strategy as Choice, WorkerId, builder::Config},
    protocol::{FromWorker, RejectReason, ToWorker, VERSION},
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
    select(
        &[
            RejectReason::Full,
            RejectReason::Unusable,
            RejectReason::Draining,
            RejectReason::Other(9),
        ][..],
    )
}

fn lie() -> impl Strategy<Value = FromWorker> {
    let numbers = || (0..5u64, 0..4u32);
    prop_oneof![
        numbers().prop_map(|(first, count)| FromWorker::Adopted { first, count }),
        (numbers(), reason()).prop_map(|((first, count), reason)| FromWorker::Rejected {
            first,
            count,
            reason
        }),
        (0..9u64).prop_map(|total| FromWorker::Demand { total }),
        (0..3u64).prop_map(|finished| FromWorker::Load { finished }),
        (0..3u64).prop_map(|nonce| FromWorker::Pong { nonce }),
        Just(FromWorker::Draining),
        Just(FromWorker::Goodbye),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    // There are more peers than at first, because restarted ones are added behind them.
    let peer = || 0..2 * PEERS;
    prop_oneof![
        4 => Just(Step::Dispatch),
        3 => Just(Step::Reserve),
        1 => Just(Step::WaitForAny),
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
        1 => peer().prop_map(Step::Remove),
        // The promise does not hold for what a lying worker gets, so only the first one lies.
        1 => lie().prop_map(|lie| Step::Lie(0, lie)),
        3 => peer().prop_map(Step::Restart),
        1 => (1..3usize).prop_map(Step::Replace),
        1 => Just(Step::Abandon),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Workers die, hang, stall, refuse and lie, and sockets fail. Each connection is given to at
    /// most one application, none is lost, and none waits while a willing worker has room.
    ///
    /// Rules: D-ADOPTED, D-NUMBER, D-DEMAND, D-REFUSAL.
    #[test]
    fn the_promise_is_kept_whatever_happens(
        steps in vec((step(), 0..40u64), 0..600),
        window in 1..5u64,
        max_offers in 1..4u32,
        groups in 1..3u64,
        strategy in select(&[Choice::LeastLoaded, Choice::RoundRobin, Choice::ByKey][..]),
    ) {
        let mut world = World::new(
            Config { max_offers, strategy, ..config() },
            (PEERS, groups),
            window,
            Instant::now(),
        );

        // Any steps, with the check after each.
        for (step, millis) in steps {
            if world.fates.len() == 60 && matches!(step, Step::Dispatch | Step::DispatchReserved) {
                continue;
            }
            if step.peer().is_none_or(|peer| peer < world.peers.len()) {
                world.now += Duration::from_millis(millis);
                // A worker from which nothing arrives is fenced after a few timeouts in a row.
                let times = if matches!(step, Step::Timeout(_)) { 1 + millis % 8 } else { 1 };
                for _ in 0..times {
                    world.step(step);
                }
                if let Err(broken) = world.check() {
                    return Err(TestCaseError::fail(broken));
                }
            }
        }

        // At the end each connection is decided, and its adopter has got it.
        world.settle();
        prop_assert_eq!(world.check(), Ok(()));
        for (serial, fate) in world.fates.iter().enumerate() {
            let Fate::Adopted(process) = *fate else {
                prop_assert_eq!(*fate, Fate::GivenUp, "connection {} was left over", serial);
                continue;
            };
            let adopter = world.peers.iter().find(|peer| peer.process == process).unwrap();
            let got_it = adopter.given.contains(&(serial as u8));
            prop_assert!(
                got_it || adopter.lies || adopter.hangs || !adopter.lives,
                "connection {} was lost",
                serial
            );
        }
    }
}

/// Adds a worker that has sent HELLO and a DEMAND without limit.
fn add_worker(pool: &mut Pool<u8>, now: Instant) -> WorkerId {
    add_process(pool, true, now)
}

fn add_process(pool: &mut Pool<u8>, is_child: bool, now: Instant) -> WorkerId {
    let id = pool.add_worker(Group::default(), None);
    pool.connect(id, ProcessInfo { id: id.0, pid: None, is_child }, now, now);
    let hello = FromWorker::Hello { lowest: VERSION, highest: VERSION, max_fds: 1, open: None };
    pool.on_message(id, hello, 0, now).unwrap();
    pool.on_message(id, FromWorker::Demand { total: 1000 }, 0, now).unwrap();
    id
}

fn dispatch(pool: &mut Pool<u8>, connection: u8, fds: usize, admission: Admission, now: Instant) {
    pool.dispatch(connection, Needs { group: Group::default(), key: 0, fds }, admission, now);
}

/// Sends all messages for a worker. Returns the number of offers.
fn send_all(pool: &mut Pool<u8>, id: WorkerId, now: Instant) -> u32 {
    let mut offers = 0;
    while let Some(message) = pool.next_message(id, now) {
        offers += u32::from(matches!(message, ToWorker::Offer { .. }));
    }
    offers
}

/// The kernel limits the descriptors in flight of a whole uid, and those sent to a worker that does
/// not receive stay in flight. That is also true of fenced workers that live on.
#[test]
fn workers_that_do_not_receive_leave_places_to_the_others() {
    const CONNECTIONS: u8 = 100;
    let now = Instant::now();
    let mut pool = Pool::new(config());
    (0..CONNECTIONS)
        .for_each(|connection| dispatch(&mut pool, connection, 1, Admission::None, now));

    // Workers that do not receive, of which every other one is retired.
    let (mut stuck, mut in_flight) = (0, 0);
    for _ in 0..8 {
        let id = add_worker(&mut pool, now);
        let offers = send_all(&mut pool, id, now);
        in_flight += offers;
        stuck += 1;
        assert!(offers > 0, "after {stuck} stuck workers");
        if stuck % 2 == 0 {
            pool.retire(
                id,
                &RetireCause::Hung,
                0,
                ProcessState::Lives { has_received: false },
                now,
            );
        }
    }
    assert!(in_flight <= 16 + stuck, "{in_flight}");

    // A healthy worker gets all that is left.
    let healthy = add_worker(&mut pool, now);
    let mut first = 0;
    while pool.waiting() > 0 {
        let count = send_all(&mut pool, healthy, now);
        assert!(count > 0);
        pool.on_message(healthy, FromWorker::Adopted { first, count }, 0, now).unwrap();
        first += u64::from(count);
    }
    assert!(pool.take_events().iter().all(|event| !matches!(event, Event::GivenUp { .. })));
}

/// Otherwise the memory of a connection would grow with each process that connects and dies.
#[test]
fn a_connection_remembers_no_workers_that_have_left_for_good() {
    let now = Instant::now();
    let mut pool = Pool::new(Config { max_offers: u32::MAX, ..config() });
    dispatch(&mut pool, 0, 1, Admission::None, now);
    for round in 0..100 {
        let id = add_worker(&mut pool, now);
        assert_eq!(send_all(&mut pool, id, now), 1);
        if round % 2 == 0 {
            let full = FromWorker::Rejected { first: 0, count: 1, reason: RejectReason::Full };
            pool.on_message(id, full, 0, now).unwrap();
        }
        pool.retire(id, &RetireCause::Ended, 0, ProcessState::Ended(None), now);
        pool.forget(id, now);
        let pending = pool.groups.get(&Group::default()).unwrap().queue.iter().next().unwrap();
        assert!(pending.failed_with.len() + pending.refused_by.len() <= 2);
        assert_eq!(pending.offers, round + 1);
    }
}

/// The permit of the bundle was for a slot at any worker, and no worker with room takes bundles.
#[test]
fn a_bundle_that_has_to_wait_leaves_its_place_to_the_next_waiter() {
    let now = Instant::now();
    let mut pool = Pool::new(config());
    let id = add_worker(&mut pool, now);
    pool.on_message(id, FromWorker::Demand { total: 1000 }, 0, now).unwrap();
    let mut permits = 0;
    while pool.try_reserve(&Group::default()) {
        permits += 1;
    }
    assert!(permits > 0);
    let ticket = pool.wait_for_slot(Some(&Group::default()), now);
    dispatch(&mut pool, 0, 2, Admission::Reserved(Group::default()), now);
    assert!(pool.take_events().contains(&Event::Granted { ticket, group: Some(Group::default()) }));
}

#[test]
fn only_offers_that_were_sent_count_as_repeated() {
    let now = Instant::now();
    let mut pool = Pool::new(config());
    (0..2).for_each(|connection| dispatch(&mut pool, connection, 1, Admission::None, now));
    for (unsent, repeated) in [(2, 0), (0, 0), (2, 0), (1, 1)] {
        let id = add_worker(&mut pool, now);
        assert_eq!(send_all(&mut pool, id, now), 2);
        pool.retire(id, &RetireCause::Drained, unsent, ProcessState::Ended(None), now);
        assert_eq!(pool.totals.offered_again, repeated);
    }
}

/// The adoption is written before the fence, and read after it.
#[test]
fn an_adoption_that_was_not_read_before_the_fence_counts() {
    let mut world = World::new(config(), (1, 1), 1, Instant::now());
    for step in [Step::Answer(0), Step::Read(0), Step::Take(0), Step::Send(0), Step::Get(0, None)] {
        assert!(world.step(step), "{step:?}");
    }
    for step in
        [Step::Ask(0), Step::Answer(0), Step::Read(0), Step::Dispatch, Step::Take(0), Step::Send(0)]
    {
        assert!(world.step(step), "{step:?}");
    }
    for step in [Step::Get(0, None), Step::Ask(0), Step::Answer(0)] {
        assert!(world.step(step), "{step:?}");
    }
    while !world.peers[0].is_retired {
        assert!(world.step(Step::Timeout(0)));
    }
    assert_eq!((world.check(), &world.peers[0].given[..]), (Ok(()), &[0][..]));
    assert_eq!(world.fates, [Fate::Adopted(world.peers[0].process)]);
}

/// A lost answer would otherwise shift the next one to another connection.
///
/// Rules: W-FIRST, W-COUNT.
#[test]
fn an_answer_out_of_place_answers_nothing() {
    let now = Instant::now();
    for answer in [
        FromWorker::Adopted { first: 1, count: 1 },
        FromWorker::Rejected { first: 1, count: 1, reason: RejectReason::Full },
        FromWorker::Adopted { first: 0, count: 3 },
    ] {
        let mut pool = Pool::new(config());
        (0..2).for_each(|connection| dispatch(&mut pool, connection, 1, Admission::None, now));
        let id = add_worker(&mut pool, now);
        assert_eq!(send_all(&mut pool, id, now), 2);
        let refused = pool.on_message(id, answer, 0, now);
        assert!(matches!(refused, Err(RetireCause::Misbehaved(_))), "{answer:?}: {refused:?}");
        assert_eq!((pool.unanswered(id), pool.totals.adopted), (2, 0), "{answer:?}");
    }
}

/// Workers that have connected by themselves can hang on purpose.
#[test]
fn hung_workers_that_have_connected_do_not_put_off_the_fence_of_one_that_was_started() {
    let mut now = Instant::now();
    let mut pool =
        Pool::new(Config { max_fences: 2, fence_window: Duration::from_secs(3600), ..config() });
    let peers = [(); 4].map(|()| add_process(&mut pool, false, now));
    let child = add_process(&mut pool, true, now);
    let mut hung = Vec::new();
    for _ in 0..100 {
        now += Duration::from_millis(100);
        for id in
            peers.into_iter().chain([child]).filter(|id| !hung.contains(id)).collect::<Vec<_>>()
        {
            if let Err(cause) = pool.on_timeout(id, true, now) {
                assert_eq!(cause, RetireCause::Hung);
                pool.retire(id, &cause, 0, ProcessState::Ended(None), now);
                hung.push(id);
            }
        }
    }
    assert_eq!(hung, [peers[0], peers[1], child]);
}

#[test]
fn what_is_planned_for_a_worker_that_falls_silent_goes_to_another_at_once() {
    let mut now = Instant::now();
    let mut pool = Pool::new(config());
    let silent = add_worker(&mut pool, now);
    assert_eq!(send_all(&mut pool, silent, now), 0);
    (0..2).for_each(|connection| dispatch(&mut pool, connection, 1, Admission::None, now));
    let other = add_worker(&mut pool, now);
    assert_eq!(send_all(&mut pool, other, now), 0);
    for _ in 0..2 {
        now = pool.next_timeout(silent).unwrap();
        pool.on_timeout(silent, true, now).unwrap();
    }
    assert_eq!((send_all(&mut pool, silent, now), send_all(&mut pool, other, now)), (0, 2));
}

/// A worker that has received everything has no descriptors in flight.
#[test]
fn only_descriptors_that_were_not_received_count_as_in_flight() {
    let now = Instant::now();
    for (has_received, in_flight) in [(true, 0), (false, 2)] {
        let mut pool = Pool::new(config());
        (0..2).for_each(|connection| dispatch(&mut pool, connection, 1, Admission::None, now));
        let id = add_worker(&mut pool, now);
        assert_eq!(send_all(&mut pool, id, now), 2);
        assert_eq!(pool.in_flight(), 2);
        pool.retire(id, &RetireCause::Hung, 0, ProcessState::Lives { has_received }, now);
        assert_eq!(pool.in_flight(), in_flight);
        pool.on_process_end(id.0, None);
        assert_eq!(pool.in_flight(), 0);
    }
}
