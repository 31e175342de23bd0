//! A property test of the replacement of a dispatcher by another one. Two shipped pools and the
//! shipped books of their workers are connected by queues in memory, and either dispatcher may die
//! at any moment.

mod link;
mod world;

use proptest::{collection::vec, prelude::*};
use world::World;

const OLD: usize = 0;
const NEW: usize = 1;
const WORKERS: usize = 2;

/// One step of the simulation. A `usize` is a number of a worker, a relay, or a dispatcher.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The dispatcher that serves accepts a connection.
    Accept,
    /// The application of a worker asks for a connection.
    Ask(usize),
    /// A connection of a worker ends.
    Finish(usize),
    /// A message arrives at the worker's end of a link of this age.
    Down(usize, usize),
    /// A message arrives at the dispatcher's end of a link of this age.
    Up(usize, usize),
    /// A message arrives at the dispatcher that takes connections over this relay.
    RelayDown(usize),
    /// A message arrives at the dispatcher that sends connections over this relay.
    RelayUp(usize),
    /// The new dispatcher replaces the old one.
    Begin,
    /// The replacement is undone.
    Undo,
    /// A dispatcher dies.
    Crash(usize),
}

/// The steps, by how often they are taken.
fn step() -> impl Strategy<Value = Step> {
    let link = || (0..WORKERS, 0..3_usize);
    prop_oneof![
        8 => Just(Step::Accept),
        10 => (0..WORKERS).prop_map(Step::Ask),
        3 => (0..WORKERS).prop_map(Step::Finish),
        20 => link().prop_map(|(worker, age)| Step::Down(worker, age)),
        20 => link().prop_map(|(worker, age)| Step::Up(worker, age)),
        8 => (0..2_usize).prop_map(Step::RelayDown),
        8 => (0..2_usize).prop_map(Step::RelayUp),
        1 => Just(Step::Begin),
        1 => Just(Step::Undo),
        1 => (0..2_usize).prop_map(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Each connection is given to at most one application. A connection is lost only if the
    /// dispatcher that had it dies. The worker's numbers are right at every link.
    ///
    /// Rules: D-MOVE-OFFERS, W-MOVED, W-OPEN, W-LOAD.
    #[test]
    fn the_promise_is_kept_while_a_dispatcher_is_replaced(steps in vec(step(), 0..400)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
            prop_assert!(world.adopted.values().all(|count| *count == 1), "given twice");
        }
        world.settle();
        prop_assert!(world.adopted.values().all(|count| *count == 1), "given twice");
        let may_serve = world.server().is_some();
        for connection in 0..world.dispatched {
            let may_be_lost = world.may_be_lost.contains(&connection) || !may_serve;
            prop_assert!(
                may_be_lost || world.adopted.contains_key(&connection),
                "connection {} is lost: {:?}", connection, world
            );
        }
        // All connections have ended, and the dispatcher that serves has read that.
        for side in world.sides.iter().filter(|side| side.lives && !side.pool.is_succeeded()) {
            let active = side.pool.workers().map(|worker| worker.active).sum::<u64>();
            let relayed = world.relays.len();
            prop_assert!(active == 0 || !may_serve, "{} active, {} relays", active, relayed);
        }
    }
}
