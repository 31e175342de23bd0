//! SIGKILL for a worker at random, again and again.

use std::{
    collections::{HashMap, HashSet},
    future::pending,
    time::Duration,
};

use fdwire::handoff::{Dispatcher, WorkerId};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::{MissedTickBehavior, interval};

pub(crate) struct Killer {
    every: Option<Duration>,
    killed: HashSet<u32>,
    /// The number of connections that each worker had adopted when it was killed last.
    adopted: HashMap<WorkerId, u64>,
}

impl Killer {
    pub(crate) fn new(every: Option<Duration>) -> Self {
        Self { every, killed: HashSet::new(), adopted: HashMap::new() }
    }

    /// Kills workers until this future is dropped.
    pub(crate) async fn run(&mut self, dispatcher: &Dispatcher) {
        let Some(every) = self.every else { return pending().await };
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await; // the first one comes at once
        loop {
            ticks.tick().await;
            self.kill_one(dispatcher);
        }
    }

    /// Returns a random worker that has adopted a connection since it was killed last. Killing
    /// others would show nothing, and the dispatcher would wait longer each time before it starts
    /// them again.
    fn kill_one(&mut self, dispatcher: &Dispatcher) {
        let mut victims = dispatcher.stats().workers;
        victims.retain(|worker| {
            worker.adopted > self.adopted.get(&worker.id).copied().unwrap_or(0)
                && worker.pid.is_some_and(|pid| !self.killed.contains(&pid))
        });
        let Some(victim) = fastrand::choice(&victims) else { return };
        if let Some(pid) = victim.pid
            && kill(Pid::from_raw(pid as i32), Signal::SIGKILL).is_ok()
        {
            self.killed.insert(pid);
            self.adopted.insert(victim.id, victim.adopted);
        }
    }

    /// Returns the processes that were killed.
    pub(crate) fn killed(&self) -> &HashSet<u32> {
        &self.killed
    }
}
