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
    fn read(&mut self, book: &mut Book<usize>, offered: u64) {
        while let Some(message) = book.next_message() {
            book.on_sent(1);
            assert!(!self.left, "{message:?} follows a goodbye");
            match message {
                FromWorker::Hello { .. } => {}
                FromWorker::Adopted { first, count } => {
                    assert!(!self.draining && first == self.answers.len() as u64);
                    self.answers.extend((0..count).map(|_| Fate::Adopted));
                }
                FromWorker::Rejected { first, count, reason } => {
                    assert_eq!(first, self.answers.len() as u64);
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
            }
        }
    }
}

proptest! {
    /// Whatever happens: each offer is answered as it ended here, in the order of the offers, and there are never more of
    /// them at a time than the limits allow.
    ///
    /// Rules: W-FIRST, W-COUNT, W-LOAD, W-GOODBYE.
    #[test]
    fn answers_are_what_happened(
        events in proptest::collection::vec(event(), 0..200),
        window in 1u64..6,
        max_connections in 1u64..8,
    ) {
        let mut book = Book::new(window, max_connections, 1);
        book.on_message(ToWorker::Welcome { version: VERSION }, None).unwrap();
        let mut dispatcher = Dispatcher::default();
        let mut fates = Vec::new(); // of each offer, by its number
        let (mut adopted, mut finished) = (0, 0);
        for event in events {
            let before = fates.len();
            match event {
                Event::Offer | Event::Unfit if fates.len() as u64 == dispatcher.demand => {
                    // After a refusal one might still be on its way.
                    let offer = ToWorker::Offer { number: before as u64, offer: before };
                    prop_assert!(dispatcher.refused || book.on_message(offer, None).is_err());
                }
                Event::Offer => {
                    let unwanted = book.on_message(ToWorker::Offer { number: before as u64, offer: before }, None).unwrap();
                    prop_assert_eq!(!unwanted.is_empty(), dispatcher.draining);
                    fates.push(unwanted.first().map(|_| Fate::Rejected(RejectReason::Draining)));
                }
                Event::Unfit => {
                    let offer = ToWorker::Offer { number: before as u64, offer: before };
                    book.on_message(offer, Some(RejectReason::Unusable)).unwrap();
                    fates.push(Some(Fate::Rejected(RejectReason::Unusable)));
                }
                Event::Ask(max) => {
                    book.adopt(max);
                    prop_assert!(book.take_adopted::<Vec<_>>(max).is_empty(), "the dispatcher was not told");
                    dispatcher.read(&mut book, fates.len() as u64);
                    for number in book.take_adopted::<Vec<_>>(max) {
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
                    for number in book.on_message(ToWorker::Recall { before: first }, None).unwrap() {
                        prop_assert!((number as u64) < first);
                        prop_assert!(fates[number].replace(Fate::Rejected(RejectReason::Recalled)).is_none());
                    }
                    let left = fates.iter().position(Option::is_none);
                    prop_assert!(left.is_none_or(|number| number as u64 >= first));
                }
                Event::Ping => drop(book.on_message(ToWorker::Ping { nonce: 7 }, None).unwrap()),
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
            dispatcher.read(&mut book, fates.len() as u64);

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
    sent: VecDeque<ToWorker<()>>,
    demand: u64,
    offered: u64,
    answered: u64,
    pinged: bool,
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
    ///
    /// Rules: W-DEMAND.
    #[test]
    fn an_honest_peer_is_never_taken_for_a_liar(
        steps in proptest::collection::vec(distantly(), 0..400),
        window in 1u64..6,
    ) {
        let mut book = Book::new(window, u64::MAX, 1);
        book.on_message(ToWorker::Welcome { version: VERSION }, None).unwrap();
        let mut dispatcher = Distant::default();
        let (mut adopted, mut finished, mut recalled) = (0, 0, false);
        for step in steps {
            match step {
                Distantly::Read => match dispatcher.said.pop_front() {
                    Some(FromWorker::Demand { total }) => {
                        prop_assert!(total >= dispatcher.demand);
                        dispatcher.demand = total;
                    }
                    Some(FromWorker::Adopted { count, .. }) => dispatcher.answered += u64::from(count),
                    Some(FromWorker::Rejected { count, reason, .. }) => {
                        dispatcher.answered += u64::from(count);
                        if matches!(reason, RejectReason::Full | RejectReason::Recalled) {
                            dispatcher.demand = dispatcher.offered;
                        }
                    }
                    Some(FromWorker::Pong { .. }) => dispatcher.pinged = false,
                    _ => {}
                },
                Distantly::Offer if dispatcher.offered < dispatcher.demand => {
                    let number = dispatcher.offered;
                    dispatcher.sent.push_back(ToWorker::Offer { number, offer: () });
                    dispatcher.offered += 1;
                }
                Distantly::Ping if !dispatcher.pinged => {
                    dispatcher.pinged = true;
                    dispatcher.sent.push_back(ToWorker::Ping { nonce: 0 });
                }
                Distantly::Offer | Distantly::Ping => {}
                Distantly::Get { full } => {
                    let message = dispatcher.sent.pop_front();
                    message.into_iter().for_each(|message| drop(book.on_message(message, full.then_some(RejectReason::Full)).unwrap()));
                }
                Distantly::Ask => {
                    recalled = false;
                    book.adopt(1);
                    while let Some(message) = book.next_message() {
                        book.on_sent(1);
                        dispatcher.said.push_back(message);
                    }
                    adopted += book.take_adopted::<Vec<_>>(1).len();
                }
                Distantly::Recall => recalled |= !book.on_message(ToWorker::Recall { before: u64::MAX }, None).unwrap().is_empty(),
                Distantly::Finish if finished < adopted => {
                    finished += 1;
                    book.finish();
                }
                Distantly::Finish => {}
            }
            let room = book.room();
            prop_assert!(!recalled || room == 0);
            book.ask(room);
            while let Some(message) = book.next_message() {
                book.on_sent(1);
                dispatcher.said.push_back(message);
            }
            prop_assert!(dispatcher.answered <= dispatcher.offered);
        }
    }
}

/// Something else has read from the socket: the answers would be about other offers than the dispatcher takes them for.
///
/// Rules: W-BREACH, D-NUMBER.
#[test]
fn a_missing_offer_is_noticed() {
    let mut book = Book::new(9, 9, 1);
    book.on_message(ToWorker::Welcome { version: VERSION }, None).unwrap();
    book.ask(9);
    book.on_message(ToWorker::Offer { number: 0, offer: 0 }, None).unwrap();
    assert!(book.on_message(ToWorker::Offer { number: 2, offer: 2 }, None).is_err());
}

#[test]
fn a_window_without_limit_asks_for_what_is_possible() {
    let mut book = Book::<()>::new(u64::MAX, u64::MAX, 1);
    book.on_message(ToWorker::Welcome { version: VERSION }, None).unwrap();
    book.adopt(1);
    assert_eq!(book.room(), MAX_UNANSWERED);
    assert!(!book.is_full());
}

/// Then the task is woken by its end, and does not wait for the time of a report.
#[test]
fn a_connection_whose_end_makes_room_is_noticed() {
    let mut book = Book::new(1, 1, 1);
    book.on_message(ToWorker::Welcome { version: VERSION }, None).unwrap();
    book.adopt(1);
    book.ask(book.room());
    book.on_message(ToWorker::Offer { number: 0, offer: () }, None).unwrap();
    book.adopt(1);
    assert_eq!(book.room(), 0);
    assert!(book.is_full());
    book.finish();
    assert_eq!(book.room(), 1);
}
