//! Random takeovers: bytes are cut anywhere, descriptors are numbers, and the test moves the clock.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use proptest::{collection::vec, prelude::*};

use super::{
    giver::{Giver, GiverSettings},
    protocol::{
        AbortReason, Address, Family, FromTaker, GiverCodec, Identity, Kind, Offered, Refusal,
        TakerCodec, ToTaker, Versions,
    },
    steps::{GiverStep, TakerStep},
    taker::{Taker, TakerSettings},
};
use crate::{
    Error,
    codec::{Decoder, Encoder, FdQueue, by_hand::encoded},
};

const SECOND: Duration = Duration::from_secs(1);

/// One direction of the connection.
#[derive(Default)]
struct Pipe {
    /// Bytes that were accepted for sending.
    unsent: BytesMut,
    /// Bytes that were written and not read.
    bytes: BytesMut,
    fds: FdQueue<u32>,
    /// True once the writer has closed its end.
    ended: bool,
    /// True once the reader has closed its end, or has shut down its receiving direction.
    refused: bool,
}

impl Pipe {
    fn send<I: std::fmt::Debug>(&mut self, codec: impl Encoder<I, u32, Error = Error>, message: I) {
        let (bytes, fds) = encoded(codec, message);
        self.unsent.extend_from_slice(&bytes);
        self.fds.extend(fds);
    }

    /// Writes at most this many bytes. Returns false if nothing can be written from now on.
    fn write(&mut self, most: usize) -> bool {
        let count = most.min(self.unsent.len());
        if count > 0 && self.refused {
            self.unsent.clear();
            return false;
        }
        self.bytes.extend_from_slice(&self.unsent.split_to(count));
        true
    }

    fn close_writer(&mut self) {
        self.unsent.clear();
        self.ended = true;
    }
}

/// Both processes and their connection.
struct Processes {
    now: Instant,
    giver: Option<Giver>,
    taker: Option<Taker>,
    to_giver: Pipe,
    to_taker: Pipe,
    giver_accepts: bool,
    taker_accepts: bool,
    /// The numbers of the listeners that the taker has received.
    received: Vec<u32>,
    giver_has_lock: bool,
    /// True while the taker's READY is not written in full.
    ready_unsent: bool,
}

#[derive(Debug, Clone)]
enum Op {
    GiverRuns,
    TakerRuns,
    GiverWrites(usize),
    TakerWrites(usize),
    Time(u64),
    KillGiver,
    KillTaker,
    Ready,
    Withdraw,
    HandBack,
    Drained,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        8 => Just(Op::GiverRuns),
        8 => Just(Op::TakerRuns),
        6 => (1..400usize).prop_map(Op::GiverWrites),
        6 => (1..30usize).prop_map(Op::TakerWrites),
        2 => (1..4000u64).prop_map(Op::Time),
        1 => Just(Op::KillGiver),
        1 => Just(Op::KillTaker),
        4 => Just(Op::Ready),
        1 => Just(Op::Withdraw),
        1 => Just(Op::HandBack),
        1 => Just(Op::Drained),
    ];
    vec(op, 1..80)
}

fn listener(number: u32) -> Offered<u32> {
    let identity = Identity {
        name: format!("listener {number}"),
        index: 0,
        family: Family::Unix,
        kind: Kind::Stream,
        protocol: 0,
        address: Address::Unnamed,
        device: None,
        v6_only: None,
    };
    Offered { identity, cookie: number.into(), path_id: None, fd: number }
}

impl Processes {
    fn new() -> Self {
        let now = Instant::now();
        let limits =
            GiverSettings { versions: Versions::OURS, answer: 5 * SECOND, ready: 10 * SECOND };
        Self {
            now,
            giver: Some(Giver::new(now, limits)),
            taker: Some(Taker::new(
                now,
                TakerSettings { versions: Versions::OURS, answer: 5 * SECOND, lock: 2 * SECOND },
            )),
            to_giver: Pipe::default(),
            to_taker: Pipe::default(),
            giver_accepts: true,
            taker_accepts: false,
            received: Vec::new(),
            giver_has_lock: true,
            ready_unsent: false,
        }
    }

    fn apply(&mut self, op: Op, listeners: u32) {
        match op {
            Op::GiverRuns => self.giver_runs(listeners),
            Op::TakerRuns => self.taker_runs(),
            Op::GiverWrites(most) => drop(self.to_taker.write(most)),
            Op::TakerWrites(most) => self.taker_writes(most),
            Op::Time(millis) => self.now += Duration::from_millis(millis),
            Op::KillGiver => {
                self.giver = None;
                self.giver_accepts = false;
                self.giver_has_lock = false;
                self.to_taker.close_writer();
                self.to_giver.refused = true;
            }
            Op::KillTaker => {
                self.taker = None;
                self.taker_accepts = false;
                self.to_giver.close_writer();
                self.to_taker.refused = true;
            }
            Op::Ready => {
                if let Some(taker) = &mut self.taker {
                    taker.ready(self.now);
                }
            }
            Op::Withdraw => {
                if let Some(giver) = &mut self.giver {
                    giver.abort(AbortReason::Withdrawn);
                }
            }
            Op::HandBack => {
                if let Some(taker) = &mut self.taker {
                    taker.hand_back(Bytes::from_static(b"baton"));
                }
            }
            Op::Drained => {
                let all_was_read = self.to_giver.bytes.is_empty() && !self.to_giver.ended;
                if let Some(giver) = &mut self.giver
                    && all_was_read
                {
                    giver.drained();
                }
            }
        }
    }

    fn taker_writes(&mut self, most: usize) {
        let Some(taker) = &mut self.taker else { return };
        if !self.to_giver.write(most) {
            self.ready_unsent = false;
            taker.on_send_failed(self.now);
        } else if self.ready_unsent && self.to_giver.unsent.is_empty() {
            self.ready_unsent = false;
            taker.on_ready_written();
        }
    }

    /// Lets the giver read everything, apply its timeout, and take its steps.
    fn giver_runs(&mut self, listeners: u32) {
        let Some(giver) = &mut self.giver else { return };
        // Read.
        loop {
            match GiverCodec::default()
                .decode(&mut self.to_giver.bytes, &mut FdQueue::<u32>::new())
                .unwrap()
            {
                Some(message) => giver.on_message(message),
                None if self.to_giver.ended => break giver.on_taker_gone(),
                None if self.to_giver.refused => break giver.on_end(),
                None => break giver.on_timeout(self.now),
            }
        }

        // Take the steps.
        while let Some(step) = giver.next_step() {
            let out = &mut self.to_taker;
            let codec = GiverCodec::default();
            match step {
                GiverStep::Decide => giver.welcome(self.now),
                GiverStep::SendOffer { version } => {
                    out.send(codec, ToTaker::Welcome { version, listeners });
                    for number in 0..listeners {
                        out.send(codec, ToTaker::Listeners(vec![listener(number)]));
                    }
                    let fds = [listeners].into_iter().collect();
                    out.send(codec, ToTaker::Generations { replaced_for: vec![0], fds });
                    giver.offered(self.now, listeners);
                }
                GiverStep::SendStatus => unreachable!("nobody requests the status"),
                GiverStep::SendRefused(reason) => out.send(codec, ToTaker::Refused { reason }),
                GiverStep::SendComplete => out.send(codec, ToTaker::Complete),
                // The giver reads the messages from before the cut when it runs next.
                GiverStep::Cut => self.to_giver.refused = true,
                GiverStep::SendAborted(reason) => out.send(codec, ToTaker::Aborted { reason }),
                GiverStep::Stop { .. } => {
                    self.giver_accepts = false;
                    giver.give(Bytes::from_static(b"baton"));
                }
                GiverStep::SendCommit { baton } => {
                    out.send(codec, ToTaker::Commit { baton, fds: Default::default() })
                }
                GiverStep::Resume(_) => self.giver_accepts = true,
                GiverStep::SendResumed => out.send(codec, ToTaker::Resumed),
                GiverStep::GiveUpCopies => self.giver_has_lock = false,
                GiverStep::SendDrained => out.send(codec, ToTaker::Drained),
            }
        }

        // Close the socket at the end.
        if giver.is_over() && self.to_taker.unsent.is_empty() {
            self.to_taker.ended = true;
            self.to_giver.refused = true;
        }
    }

    /// Lets the taker do the same.
    fn taker_runs(&mut self) {
        let Some(taker) = &mut self.taker else { return };
        // Read.
        loop {
            match TakerCodec::default()
                .decode(&mut self.to_taker.bytes, &mut self.to_taker.fds)
                .unwrap()
            {
                Some(message) => {
                    taker.on_message(self.now, &message);
                    if let ToTaker::Listeners(listeners) = message {
                        self.received.extend(listeners.iter().map(|listener| listener.fd));
                    }
                }
                None if self.to_taker.ended => break taker.on_end(self.now),
                None => break,
            }
        }

        // Take the steps.
        taker.on_timeout(self.now);
        while let Some(step) = taker.next_step() {
            match step {
                TakerStep::Send(message) => {
                    self.ready_unsent |= message == FromTaker::Ready;
                    self.to_giver.send(TakerCodec::default(), message);
                }
                TakerStep::Offered | TakerStep::NotHandedBack(_) => {}
                TakerStep::TryLock => taker.on_lock(self.now, !self.giver_has_lock),
                TakerStep::Serve => self.taker_accepts = true,
                TakerStep::Confirmed(baton) => assert!(baton.is_none_or(|baton| baton == "baton")),
                TakerStep::Stop => self.taker_accepts = false,
                TakerStep::Fail(_) => {
                    self.to_giver.close_writer();
                    self.to_taker.refused = true;
                }
            }
        }
    }

    /// Runs both processes until nothing more happens.
    fn settle(&mut self, listeners: u32) {
        for _ in 0..40 {
            let both = [
                Op::GiverWrites(usize::MAX),
                Op::TakerWrites(usize::MAX),
                Op::GiverRuns,
                Op::TakerRuns,
            ];
            both.into_iter().for_each(|op| self.apply(op, listeners));
            // An application that has the whole offer becomes ready sooner or later.
            self.apply(Op::Ready, listeners);
            self.apply(Op::Time(500), listeners);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn exactly_one_process_serves_after_any_crash_cut_or_timeout(
        ops in ops(),
        listeners in 0..5u32,
    ) {
        let mut processes = Processes::new();
        for op in ops {
            processes.apply(op, listeners);
        }
        processes.settle(listeners);
        let Processes { giver, taker, giver_accepts, taker_accepts, received, .. } = &processes;
        let stands_by = |giver: &Giver| !giver.is_over() || giver.is_serving();
        let giver_may_serve = giver.as_ref().is_some_and(stands_by);
        let taker_may_serve = taker.as_ref().is_some_and(Taker::has_everything);
        let accepting = u8::from(*giver_accepts) + u8::from(*taker_accepts);
        prop_assert_eq!(accepting, u8::from(giver_may_serve || taker_may_serve));
        if *taker_accepts {
            let all: Vec<_> = (0..listeners).collect();
            prop_assert_eq!(received, &all, "it serves without some listeners");
        }
    }

    /// Around the cut, both processes accept for a moment. Unless one dies, there is no moment at
    /// which neither does.
    #[test]
    fn without_a_crash_somebody_accepts_at_any_moment(ops in ops(), listeners in 0..5u32) {
        let mut processes = Processes::new();
        for op in ops {
            if !matches!(op, Op::KillGiver | Op::KillTaker) {
                processes.apply(op, listeners);
                // A taker that has written READY accepts in its next step, without any wait.
                let taker_serves = processes.taker.as_ref().is_some_and(Taker::is_serving);
                prop_assert!(processes.giver_accepts || taker_serves);
            }
        }
    }

    /// For any messages, only a READY in its place makes a server stop.
    #[test]
    fn nothing_but_ready_after_complete_stops_the_giver(
        messages in vec(any_message(), 0..12),
        busy: bool,
    ) {
        let now = Instant::now();
        let settings =
            GiverSettings { versions: Versions::OURS, answer: SECOND, ready: SECOND };
        let mut giver = Giver::new(now, settings);
        let (mut complete, mut violated, mut ready) = (false, false, false);
        for message in messages {
            let in_place = match &message {
                FromTaker::Ready => complete,
                FromTaker::Decline { number } => complete && *number < 2,
                FromTaker::Hello { .. } => !complete,
                _ => ready,
            };
            violated |= !in_place;
            ready |= message == FromTaker::Ready && complete && !violated;
            giver.on_message(message);
            while let Some(step) = giver.next_step() {
                match step {
                    GiverStep::Decide if busy => giver.refuse(Refusal::Busy),
                    GiverStep::Decide => giver.welcome(now),
                    GiverStep::SendOffer { .. } => giver.offered(now, 2),
                    GiverStep::SendComplete => complete = true,
                    GiverStep::Stop { .. } => prop_assert!(ready && !busy),
                    _ => {}
                }
            }
            prop_assert!(giver.is_serving() || ready);
        }
    }
}

fn any_message() -> impl Strategy<Value = FromTaker> {
    prop_oneof![
        3 => (0..3u8, 0..3u8).prop_map(|(lowest, highest)| FromTaker::Hello { lowest, highest }),
        1 => (0..3u32).prop_map(|number| FromTaker::Decline { number }),
        3 => Just(FromTaker::Ready),
        1 => Just(FromTaker::HandBack { baton: Bytes::new() }),
        1 => Just(FromTaker::Release),
    ]
}
