//! The measurement: all contenders of a row take turns, round after round.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use tokio::runtime::Runtime;

use crate::{
    contenders::Side,
    ends::End,
    processes::{self, Control, Helper, cpu_time, socket_pair},
    results::{Measured, RowResult},
    rows::{Contender, Row},
};

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Effort {
    /// Everything once, with so few messages that times mean nothing.
    Test,
    /// This many rounds, in which each contender works for about this time.
    Rounds(usize, Duration),
}

/// Measures some contenders of a row.
pub(crate) fn measure(row: &Row, contenders: &[&Contender], effort: Effort) -> RowResult {
    // Start all contenders, and find out how many messages each sample needs.
    processes::take_place(row.threads);
    let mut sessions =
        contenders.iter().map(|contender| Session::start(row, contender)).collect::<Vec<_>>();
    let counts = sessions
        .iter_mut()
        .map(|session| session.calibrate(row.quantum, effort))
        .collect::<Vec<_>>();

    // In each round, every contender works once.
    let mut results =
        contenders.iter().map(|contender| Measured::new(contender)).collect::<Vec<_>>();
    let rounds = if let Effort::Rounds(rounds, _) = effort { rounds } else { 1 };
    for _ in 0..rounds {
        for ((session, result), count) in sessions.iter_mut().zip(&mut results).zip(&counts) {
            let sample = session.sample(*count);
            let per_message = |time: Duration| time.as_nanos() as f64 / *count as f64;
            result.ns.push(per_message(sample.elapsed));
            result.cpu_ns.push(per_message(sample.cpu));
        }
    }
    RowResult {
        id: row.id.to_owned(),
        title: row.title.to_owned(),
        unit: row.unit.to_owned(),
        contenders: results,
    }
}

struct Sample {
    elapsed: Duration,
    /// CPU time of the processes of both ends.
    cpu: Duration,
}

/// Both ends of a contender, connected for all its samples.
struct Session {
    near: Box<dyn End>,
    far: Helper,
    runtime: Runtime,
}

impl Session {
    fn start(row: &Row, contender: &Contender) -> Self {
        let (near, far) = socket_pair(contender.kind, row.is_bulk());
        let far = Helper::far_end(row, &contender.name, far);
        let runtime = processes::runtime(row.threads);
        let near =
            runtime.block_on(async { (contender.near)(near, row.setup(contender, Side::Near)) });
        Self { near, far, runtime }
    }

    fn sample(&mut self, count: usize) -> Sample {
        let Self { near, far, runtime } = self;
        far.control.send(count as u64);
        far.control.receive().expect("the far end is there"); // it is ready
        let cpu_time = |near: &dyn End| cpu_time() + near.cpu_time_of_others();
        let (cpu_before, start) = (cpu_time(near.as_ref()), Instant::now());
        let far_cpu = runtime.block_on(async {
            near.run(count).await;
            far.control.receive_in_runtime().await // it has everything
        });
        let (elapsed, cpu) = (start.elapsed(), cpu_time(near.as_ref()) - cpu_before);
        Sample { elapsed, cpu: cpu + Duration::from_nanos(far_cpu) }
    }

    /// Returns the number of messages that make a sample of about the wanted time. Warms up at the
    /// same time.
    fn calibrate(&mut self, quantum: usize, effort: Effort) -> usize {
        let Effort::Rounds(_, time) = effort else { return 2 * quantum };
        let mut count = quantum;
        loop {
            let elapsed = self.sample(count).elapsed.max(Duration::from_micros(1));
            // Grow by a factor of 8 at most, because the first samples are slower than later ones.
            let factor = time.as_secs_f64() / elapsed.as_secs_f64();
            let next = (count as f64 * factor.min(8.0) / quantum as f64).ceil() as usize * quantum;
            if factor < 2.0 {
                return next.max(quantum);
            }
            count = next;
        }
    }
}

/// Runs the process of a far end. It does its part each time it receives a number of messages.
pub(crate) fn run_far_end(row: &Row, contender: &Contender) {
    let socket: OwnedFd =
        std::io::stdin().as_fd().try_clone_to_owned().expect("a descriptor is free");
    let mut control = Control::from_stdout();
    let runtime = processes::runtime(row.threads);
    runtime.block_on(async {
        let mut end = (contender.far)(socket, row.setup(contender, Side::Far));
        while let Some(count) = control.receive() {
            let before = cpu_time();
            control.send(0); // it is ready
            end.run(usize::try_from(count).expect("it came from a usize")).await;
            control.send((cpu_time() - before).as_nanos() as u64);
        }
    });
}
