use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Event {
    Offer,
    Unfit,
    Ask(usize),
    Finish,
    Recall(u64),
    Ping,
    Report,
    Drain,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::Offer),
        1 => Just(Event::Unfit),
        6 => (1usize..4).prop_map(Event::Ask),
        4 => Just(Event::Finish),
        2 => (0u64..40).prop_map(Event::Recall),
        2 => Just(Event::Ping),
        1 => Just(Event::Report),
        1 => Just(Event::Drain),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Adopted,
    Rejected(RejectReason),
}

/// What a dispatcher makes of the messages.
#[derive(Debug, Default)]
struct Dispatcher {
    answers: Vec<Fate>,
    demand: u64,
    refused: bool,
    finished: u64,
    draining: bool,
    left: bool,
}

impl Dispatcher {
    /// After so many offers.
    fn read(&mut self, messages: &mut Vec<FromWorker>, offered: u64) {
        for message in messages.drain(..) {
            assert!(!self.left, "{message:?} follows a goodbye");
            match message {
                FromWorker::Adopted { count } => {
                    assert!(!self.draining);
                    self.answers.extend((0..count).map(|_| Fate::Adopted));
                }
                FromWorker::Rejected { count, reason } => {
                    self.answers.extend((0..count).map(|_| Fate::Rejected(reason)));
                    if matches!(reason, RejectReason::Full | RejectReason::Recalled) {
                        self.demand = offered;
                        self.refused = true;
                    }
                }
                FromWorker::Demand { total } => {
                    assert!(total > self.demand);
                    self.demand = total;
                    self.refused = false;
                }
                FromWorker::Load { finished } => {
                    assert!(finished > self.finished);
                    self.finished = finished;
                }
                FromWorker::Pong { .. } => {}
                FromWorker::Draining => self.draining = true,
                FromWorker::Goodbye => self.left = true,
                other => panic!("{other:?}"),
            }
        }
    }
}

proptest! {
    /// Whatever happens: each offer is answered as it ended here, in the order of the offers, and there are never more of
    /// them at a time than the limits allow.
    #[test]
    fn answers_are_what_happened(
        events in proptest::collection::vec(event(), 0..200),
        window in 1u64..6,
        max_connections in 1u64..8,
    ) {
        let mut book = Book::new(window, max_connections);
        let mut dispatcher = Dispatcher::default();
        let mut fates = Vec::new(); // of each offer, by its number
        let (mut adopted, mut finished) = (0, 0);
        for event in events {
            let before = fates.len();
            match event {
                Event::Offer | Event::Unfit if fates.len() as u64 == dispatcher.demand => {
                    // After a refusal one might still be on its way.
                    prop_assert!(dispatcher.refused || book.offered(Ok(before)).is_err());
                }
                Event::Offer => {
                    let unwanted = book.offered(Ok(before)).unwrap();
                    prop_assert_eq!(unwanted.is_some(), dispatcher.draining);
                    fates.push(unwanted.map(|_| Fate::Rejected(RejectReason::Draining)));
                }
                Event::Unfit => {
                    book.offered(Err((before, RejectReason::Unusable))).unwrap();
                    fates.push(Some(Fate::Rejected(RejectReason::Unusable)));
                }
                Event::Ask(max) => {
                    for number in book.adopt(max) {
                        prop_assert!(fates[number].replace(Fate::Adopted).is_none());
                        adopted += 1;
                    }
                }
                Event::Finish if finished < adopted => {
                    finished += 1;
                    book.finish();
                }
                Event::Finish => {}
                Event::Recall(first) => {
                    for number in book.recall(first) {
                        prop_assert!((number as u64) < first);
                        prop_assert!(fates[number].replace(Fate::Rejected(RejectReason::Recalled)).is_none());
                    }
                    let left = fates.iter().position(Option::is_none);
                    prop_assert!(left.is_none_or(|number| number as u64 >= first));
                }
                Event::Ping => book.pinged(7),
                Event::Report => book.report(),
                Event::Drain => {
                    for number in book.drain() {
                        prop_assert!(fates[number].replace(Fate::Rejected(RejectReason::Draining)).is_none());
                    }
                }
            }
            let room = book.room();
            book.ask(room);
            book.leave();
            dispatcher.read(&mut book.messages, fates.len() as u64);

            // Answered is a beginning of the offers, and what is decided is not kept back for longer than it has to.
            let due = fates.iter().take_while(|fate| fate.is_some()).count();
            prop_assert_eq!(dispatcher.answers.len(), due);
            prop_assert!(dispatcher.answers.iter().zip(&fates).all(|(answer, fate)| Some(*answer) == *fate));
            let unanswered = dispatcher.demand - due as u64;
            prop_assert!(unanswered <= window && unanswered + adopted - finished <= max_connections.max(adopted));
            let over = dispatcher.draining && due == fates.len() && finished == adopted;
            prop_assert_eq!(dispatcher.left, over);
            if dispatcher.left {
                prop_assert_eq!(dispatcher.finished, finished);
                break;
            }
        }
    }
}

/// A dispatcher at the other end of queues, which keeps to the protocol.
#[derive(Debug, Default)]
struct Distant {
    said: VecDeque<FromWorker>,
    sent: VecDeque<Sent>,
    demand: u64,
    offered: u64,
    answered: u64,
    pinged: bool,
}

#[derive(Debug, Clone, Copy)]
enum Sent {
    Offer,
    Ping,
}

#[derive(Debug, Clone, Copy)]
enum Distantly {
    /// The dispatcher reads a message.
    Read,
    Offer,
    Ping,
    /// The worker gets a message; it has no room for an offer, if so.
    Get {
        full: bool,
    },
    Ask,
    /// The dispatcher recalls what it has offered, which the worker gets at once.
    Recall,
    Finish,
}

fn distantly() -> impl Strategy<Value = Distantly> {
    prop_oneof![
        6 => Just(Distantly::Read),
        5 => Just(Distantly::Offer),
        2 => Just(Distantly::Ping),
        6 => proptest::bool::weighted(0.3).prop_map(|full| Distantly::Get { full }),
        3 => Just(Distantly::Ask),
        1 => Just(Distantly::Recall),
        2 => Just(Distantly::Finish),
    ]
}

proptest! {
    /// Messages take their time. No offer that the dispatcher may make is one too many for the worker, no demand is too low for the
    /// dispatcher, and who was recalled does not ask before its application does.
    #[test]
    fn an_honest_peer_is_never_taken_for_a_liar(
        steps in proptest::collection::vec(distantly(), 0..400),
        window in 1u64..6,
    ) {
        let mut book = Book::new(window, u64::MAX);
        let mut dispatcher = Distant::default();
        let (mut adopted, mut finished, mut recalled) = (0, 0, false);
        for step in steps {
            match step {
                Distantly::Read => match dispatcher.said.pop_front() {
                    Some(FromWorker::Demand { total }) => {
                        prop_assert!(total >= dispatcher.demand);
                        dispatcher.demand = total;
                    }
                    Some(FromWorker::Adopted { count }) => dispatcher.answered += u64::from(count),
                    Some(FromWorker::Rejected { count, reason }) => {
                        dispatcher.answered += u64::from(count);
                        if matches!(reason, RejectReason::Full | RejectReason::Recalled) {
                            dispatcher.demand = dispatcher.offered;
                        }
                    }
                    Some(FromWorker::Pong { .. }) => dispatcher.pinged = false,
                    _ => {}
                },
                Distantly::Offer if dispatcher.offered < dispatcher.demand => {
                    dispatcher.offered += 1;
                    dispatcher.sent.push_back(Sent::Offer);
                }
                Distantly::Ping if !dispatcher.pinged => {
                    dispatcher.pinged = true;
                    dispatcher.sent.push_back(Sent::Ping);
                }
                Distantly::Offer | Distantly::Ping => {}
                Distantly::Get { full } => match dispatcher.sent.pop_front() {
                    Some(Sent::Offer) if full => drop(book.offered(Err(((), RejectReason::Full))).unwrap()),
                    Some(Sent::Offer) => drop(book.offered(Ok(())).unwrap()),
                    Some(Sent::Ping) => book.pinged(0),
                    None => {}
                },
                Distantly::Ask => {
                    recalled = false;
                    adopted += book.adopt(1).len();
                }
                Distantly::Recall => recalled |= !book.recall(u64::MAX).is_empty(),
                Distantly::Finish if finished < adopted => {
                    finished += 1;
                    book.finish();
                }
                Distantly::Finish => {}
            }
            let room = book.room();
            prop_assert!(!recalled || room == 0);
            book.ask(room);
            dispatcher.said.extend(book.messages.drain(..));
            prop_assert!(dispatcher.answered <= dispatcher.offered);
        }
    }
}
