//! Checks every state of a takeover with a model checker: each order of messages, crashes, timeouts
//! and calls of the application. The model runs the shipped `Giver` and `Taker`.

mod world;

use std::time::{Duration, Instant};

use bytes::Bytes;
use stateright::{Checker, Model, Property};

use self::world::{Sent, World};
use super::{
    giver::{Giver, GiverSettings},
    protocol::{AbortReason, FromTaker, Versions},
    steps::{Failure, TakerStep},
    taker::{Taker, TakerSettings},
};

/// An event of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    /// The giver takes its next step.
    GiverStep,
    /// The taker takes its next step.
    TakerStep,
    /// The taker writes half of READY.
    WriteHalf,
    /// The giver reads a message, or the end.
    GiverReads,
    /// The taker reads a message, or the end.
    TakerReads,
    /// The taker has no room for the descriptors of COMMIT: the message is lost, and it can read
    /// nothing more.
    TakerLosesCommit,
    KillGiver,
    KillTaker,
    /// The kernel releases the lock of a dead giver. Its socket was closed before.
    FreeLockOfDead,
    GiverTimesOut,
    TakerTimesOut,
    // Calls of the applications.
    Ready,
    PutDownBaton,
    Drained,
    HandBack,
    Release,
    Withdraw,
}

struct Takeover {
    start: Instant,
}

const ACTIONS: [Action; 17] = [
    Action::GiverStep,
    Action::TakerStep,
    Action::WriteHalf,
    Action::GiverReads,
    Action::TakerReads,
    Action::TakerLosesCommit,
    Action::KillGiver,
    Action::KillTaker,
    Action::FreeLockOfDead,
    Action::GiverTimesOut,
    Action::TakerTimesOut,
    Action::Ready,
    Action::PutDownBaton,
    Action::Drained,
    Action::HandBack,
    Action::Release,
    Action::Withdraw,
];

impl Takeover {
    /// Returns true if nothing more happens unless a process dies or an application makes a call.
    fn is_settled(&self, world: &World) -> bool {
        use Action::*;
        let optional = [
            TakerLosesCommit,
            KillGiver,
            KillTaker,
            PutDownBaton,
            Drained,
            HandBack,
            Release,
            Withdraw,
        ];
        ACTIONS
            .into_iter()
            .filter(|action| !optional.contains(action))
            .all(|action| self.next_state(world, action).is_none_or(|next| next == *world))
    }
}

const HOUR: Duration = Duration::from_secs(3600);

impl Model for Takeover {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let limits = GiverSettings { versions: Versions::OURS, answer: HOUR, ready: HOUR };
        vec![World {
            giver: Some(Giver::new(self.start, limits)),
            taker: Some(Taker::new(
                self.start,
                TakerSettings { versions: Versions::OURS, answer: HOUR, lock: HOUR },
            )),
            giver_accepts: true,
            taker_accepts: false,
            giver_has_lock: true,
            taker_has_lock: false,
            to_giver: Vec::new(),
            to_taker: Vec::new(),
            half_written: false,
            cut: false,
            giver_closed: false,
            taker_closed: false,
            killed: false,
            gave_up: None,
            offered: false,
            lost_commit: false,
        }]
    }

    fn actions(&self, _: &World, actions: &mut Vec<Action>) {
        actions.extend(ACTIONS);
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let now = self.start;
        let mut world = before.clone();
        match action {
            Action::GiverStep => world.giver_step(now)?,
            Action::TakerStep => world.taker_step(now)?,
            Action::WriteHalf => {
                let next = world.taker.as_mut()?.next_step()?;
                if world.half_written || world.cut || next != TakerStep::Send(FromTaker::Ready) {
                    return None;
                }
                world = before.clone();
                world.half_written = true;
            }
            Action::GiverReads => {
                let giver = world.giver.as_mut().filter(|_| !world.giver_closed)?;
                if !world.to_giver.is_empty() {
                    giver.on_message(world.to_giver.remove(0));
                } else if world.taker_closed {
                    giver.on_taker_gone();
                } else if world.cut {
                    giver.on_end();
                } else {
                    return None;
                }
            }
            Action::TakerReads => {
                let is_open = !world.taker_closed && !world.lost_commit;
                let taker = world.taker.as_mut().filter(|_| is_open)?;
                if !world.to_taker.is_empty() {
                    taker.on_message(now, &world.to_taker.remove(0).message());
                } else if world.giver_closed {
                    taker.on_end(now);
                } else {
                    return None;
                }
            }
            Action::TakerLosesCommit => {
                let taker = world.taker.as_mut().filter(|_| !world.taker_closed)?;
                if world.to_taker.first() != Some(&Sent::Commit) {
                    return None;
                }
                taker.on_violation(now);
                world.to_taker.clear();
                world.lost_commit = true;
            }
            Action::KillGiver => {
                world.giver.take()?;
                world.giver_closed = true;
                world.giver_accepts = false;
                world.killed = true;
            }
            Action::KillTaker => {
                world.taker.take()?;
                world.taker_closed = true;
                world.taker_accepts = false;
                world.taker_has_lock = false;
                world.half_written = false;
                world.to_taker.clear();
                world.killed = true;
            }
            Action::FreeLockOfDead if world.giver.is_none() => world.giver_has_lock = false,
            Action::FreeLockOfDead => return None,
            Action::GiverTimesOut => {
                let giver = world.giver.as_mut()?;
                giver.on_timeout(giver.next_timeout()?);
            }
            Action::TakerTimesOut => {
                let taker = world.taker.as_mut()?;
                taker.on_timeout(taker.next_timeout()?);
            }
            Action::Ready => world.taker.as_mut()?.ready(now),
            Action::PutDownBaton => world.giver.as_mut()?.give(Bytes::new()),
            Action::Drained => {
                // The shipped task reads everything that is readable before it calls `drained`.
                if !world.to_giver.is_empty() || world.taker_closed {
                    return None;
                }
                world.giver.as_mut()?.drained();
            }
            Action::HandBack => drop(world.taker.as_mut()?.hand_back(Bytes::new())),
            Action::Release => world.taker.as_mut()?.release(),
            Action::Withdraw => world.giver.as_mut()?.abort(AbortReason::Withdrawn),
        }
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(
                "both accept only while one of them is about to stop",
                |_, world: &World| {
                    !(world.giver_accepts && world.taker_accepts) || world.is_at_the_cut()
                },
            ),
            Property::always(
                "without a crash, at least one accepts at any moment",
                |_, world: &World| {
                    // A taker that has written READY accepts in its next step, without any wait.
                    let taker_accepts = world.taker.as_ref().is_some_and(Taker::is_serving);
                    world.killed || world.giver_accepts || world.taker_accepts || taker_accepts
                },
            ),
            Property::always(
                "when everything has settled, exactly one accepts, if one lives",
                |model: &Self, world: &World| {
                    let accepting = u8::from(world.giver_accepts) + u8::from(world.taker_accepts);
                    let expected = u8::from(world.giver_may_serve() || world.taker_may_serve());
                    accepting == expected || !model.is_settled(world)
                },
            ),
            Property::always("at most one holds the baton", |_, world: &World| {
                let giver = world.giver.as_ref().is_some_and(Giver::holds_baton);
                !(giver && world.taker.as_ref().is_some_and(Taker::holds_baton))
            }),
            Property::always(
                "when everything has settled, a process that accepts has the lock",
                |model: &Self, world: &World| {
                    let accepts = world.giver_accepts || world.taker_accepts;
                    !accepts
                        || world.giver_has_lock
                        || world.taker_has_lock
                        || !model.is_settled(world)
                },
            ),
            Property::always(
                "after the offer, a taker gives up only for these reasons",
                |_, world: &World| {
                    let reasons = [Failure::TimedOut, Failure::AnotherServes];
                    let is_good = |failure| {
                        matches!(failure, Failure::Aborted(_)) || reasons.contains(&failure)
                    };
                    world.gave_up.is_none_or(is_good)
                },
            ),
            Property::sometimes("a taker replaces the giver", |_, world: &World| {
                world.taker_accepts
                    && world
                        .giver
                        .as_ref()
                        .is_some_and(|giver| giver.is_over() && !giver.is_serving())
            }),
            Property::sometimes("a takeover is undone", |_, world: &World| {
                world.giver_accepts
                    && world.giver.as_ref().is_some_and(Giver::is_over)
                    && world.to_taker.contains(&Sent::Resumed)
            }),
            Property::sometimes("a taker serves by the lock alone", |_, world: &World| {
                world.giver.is_none()
                    && world.taker_accepts
                    && world.to_giver.is_empty()
                    && world.taker_has_lock
            }),
        ]
    }
}

#[test]
fn after_any_crash_or_timeout_exactly_one_of_the_two_serves() {
    let model = Takeover { start: Instant::now() };
    let checked = model.checker().spawn_bfs().join();
    checked.assert_properties();
    println!("takeover: {} states", checked.unique_state_count());
    assert!(checked.unique_state_count() > 1000, "the model explores too little");
}
