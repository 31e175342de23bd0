use proptest::prelude::*;

use super::{demand::COUNT_AFTER, *};

#[derive(Debug, Clone)]
enum Event {
    Offer,
    Unusable,
    Ask(usize),
    Finish,
    Recall(u64),
    Ping,
    /// The next timer goes off.
    Timeout,
    /// The application opens or closes files, so this many descriptors are free now.
    Free(u64),
    Drain,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::Offer),
        1 => Just(Event::Unusable),
        6 => (1usize..4).prop_map(Event::Ask),
        4 => Just(Event::Finish),
        2 => (0u64..40).prop_map(Event::Recall),
        2 => Just(Event::Ping),
        2 => Just(Event::Timeout),
        2 => prop_oneof![Just(0), 0u64..8, Just(u64::MAX)].prop_map(Event::Free),
        1 => Just(Event::Drain),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Adopted,
    Rejected(RejectReason),
}

/// A dispatcher's view of the messages.
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
    /// Reads all messages of the worker, after this many offers.
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
    /// In any order of events, each offer is answered with what became of it, in the order of the
    /// offers. There are never more offers at a time than the limits allow.
    ///
    /// Rules: W-FIRST, W-COUNT, W-LOAD, W-GOODBYE.
    #[test]
    fn answers_are_what_happened(
        events in proptest::collection::vec(event(), 0..200),
        window in 1u64..6,
        max_connections in 1u64..8,
    ) {
        let mut book = Book::new(window, max_connections, 1);
        book.on_message(ToWorker::Welcome { version: VERSION }).unwrap();
        let mut dispatcher = Dispatcher::default();
        let mut fates = Vec::new(); // of each offer, by its number
        let (mut adopted, mut finished) = (0, 0);
        let (mut now, mut free) = (Instant::now(), u64::MAX);
        for event in events {
            let before = fates.len();
            match event {
                Event::Offer | Event::Unusable if fates.len() as u64 == dispatcher.demand => {
                    // After a refusal, an offer might still be on its way.
                    let offer = ToWorker::Offer { number: before as u64, offer: Ok(before) };
                    prop_assert!(dispatcher.refused || book.on_message(offer).is_err());
                }
                Event::Offer => {
                    let offer = ToWorker::Offer { number: before as u64, offer: Ok(before) };
                    let unwanted = book.on_message(offer).unwrap();
                    prop_assert_eq!(!unwanted.is_empty(), dispatcher.draining);
                    fates.push(unwanted.first().map(|_| Fate::Rejected(RejectReason::Draining)));
                }
                Event::Unusable => {
                    let offer = Err(RejectReason::Unusable);
                    let offer = ToWorker::Offer { number: before as u64, offer };
                    book.on_message(offer).unwrap();
                    fates.push(Some(Fate::Rejected(RejectReason::Unusable)));
                }
                Event::Ask(max) => {
                    book.adopt(max);
                    let early = book.take_adopted::<Vec<_>>(max);
                    prop_assert!(early.is_empty(), "the adoption was not sent yet");
                    dispatcher.read(&mut book, fates.len() as u64);
                    for number in book.take_adopted::<Vec<_>>(max) {
                        prop_assert!(fates[number].replace(Fate::Adopted).is_none());
                        adopted += 1;
                    }
                }
                Event::Finish if finished < adopted => {
                    finished += 1;
                    book.finish(now);
                }
                Event::Finish => {}
                Event::Recall(first) => {
                    for number in book.on_message(ToWorker::Recall { before: first }).unwrap() {
                        prop_assert!((number as u64) < first);
                        prop_assert!(fates[number].replace(Fate::Rejected(RejectReason::Recalled)).is_none());
                    }
                    let left = fates.iter().position(Option::is_none);
                    prop_assert!(left.is_none_or(|number| number as u64 >= first));
                }
                Event::Ping => drop(book.on_message(ToWorker::Ping { nonce: 7 }).unwrap()),
                Event::Timeout => {
                    now = book.next_timeout().unwrap_or(now);
                    book.on_timeout(now);
                }
                Event::Free(fds) => free = fds,
                Event::Drain => {
                    for number in book.drain() {
                        prop_assert!(fates[number].replace(Fate::Rejected(RejectReason::Draining)).is_none());
                    }
                }
            }
            book.ask(now, || free);
            book.leave();
            dispatcher.read(&mut book, fates.len() as u64);

            // A report and a lack of descriptors each have a timeout, so neither needs an event.
            let due_within = |limit| book.next_timeout().is_some_and(|at| at <= now + limit);
            prop_assert!(finished == dispatcher.finished || due_within(REPORT_AFTER));
            prop_assert!(book.room() == 0 || due_within(COUNT_AFTER));

            // The first offers up to some number are answered. An answer waits only for those
            // before it.
            let due = fates.iter().take_while(|fate| fate.is_some()).count();
            prop_assert_eq!(dispatcher.answers.len(), due);
            let mut answers = dispatcher.answers.iter().zip(&fates);
            prop_assert!(answers.all(|(answer, fate)| Some(*answer) == *fate));
            let unanswered = dispatcher.demand - due as u64;
            prop_assert!(unanswered <= window);
            prop_assert!(unanswered + adopted - finished <= max_connections.max(adopted));
            let over = dispatcher.draining && due == fates.len() && finished == adopted;
            prop_assert_eq!(dispatcher.left, over);
            if dispatcher.left {
                prop_assert_eq!(dispatcher.finished, finished);
                break;
            }
        }
    }
}

/// A dispatcher that keeps to the protocol, connected by queues on which messages take their time.
#[derive(Debug, Default)]
struct Distant {
    /// Messages that the worker has sent and that have not arrived yet.
    in_transit: VecDeque<FromWorker>,
    /// Messages that the dispatcher has sent and that have not arrived yet.
    sent: VecDeque<ToWorker<(), Infallible>>,
    demand: u64,
    offered: u64,
    answered: u64,
    pinged: bool,
}

#[derive(Debug, Clone, Copy)]
enum DistantStep {
    /// The dispatcher reads a message.
    Read,
    Offer,
    Ping,
    /// The worker reads a message. If `full` is true, the worker has no room for an offer.
    Get {
        full: bool,
    },
    Ask,
    /// The dispatcher recalls everything that it has offered. The worker reads that at once.
    Recall,
    Finish,
}

fn distant_step() -> impl Strategy<Value = DistantStep> {
    prop_oneof![
        6 => Just(DistantStep::Read),
        5 => Just(DistantStep::Offer),
        2 => Just(DistantStep::Ping),
        6 => proptest::bool::weighted(0.3).prop_map(|full| DistantStep::Get { full }),
        3 => Just(DistantStep::Ask),
        1 => Just(DistantStep::Recall),
        2 => Just(DistantStep::Finish),
    ]
}

proptest! {
    /// Messages take their time. An honest dispatcher never makes an offer too many, and an honest
    /// worker never sends a demand that is too low. After a recall, the worker does not ask for
    /// offers before its application asks for a connection.
    ///
    /// Rules: W-DEMAND.
    #[test]
    fn an_honest_peer_is_never_taken_for_a_liar(
        steps in proptest::collection::vec(distant_step(), 0..400),
        window in 1u64..6,
    ) {
        let mut book = Book::new(window, u64::MAX, 1);
        book.on_message(ToWorker::Welcome { version: VERSION }).unwrap();
        let mut dispatcher = Distant::default();
        let (mut adopted, mut finished, mut recalled) = (0, 0, false);
        let now = Instant::now();
        for step in steps {
            match step {
                DistantStep::Read => match dispatcher.in_transit.pop_front() {
                    Some(FromWorker::Demand { total }) => {
                        prop_assert!(total >= dispatcher.demand);
                        dispatcher.demand = total;
                    }
                    Some(FromWorker::Adopted { count, .. }) => {
                        dispatcher.answered += u64::from(count);
                    }
                    Some(FromWorker::Rejected { count, reason, .. }) => {
                        dispatcher.answered += u64::from(count);
                        if matches!(reason, RejectReason::Full | RejectReason::Recalled) {
                            dispatcher.demand = dispatcher.offered;
                        }
                    }
                    Some(FromWorker::Pong { .. }) => dispatcher.pinged = false,
                    _ => {}
                },
                DistantStep::Offer if dispatcher.offered < dispatcher.demand => {
                    let number = dispatcher.offered;
                    dispatcher.sent.push_back(ToWorker::Offer { number, offer: () });
                    dispatcher.offered += 1;
                }
                DistantStep::Ping if !dispatcher.pinged => {
                    dispatcher.pinged = true;
                    dispatcher.sent.push_back(ToWorker::Ping { nonce: 0 });
                }
                DistantStep::Offer | DistantStep::Ping => {}
                DistantStep::Get { full } => {
                    let offer = if full { Err(RejectReason::Full) } else { Ok(()) };
                    if let Some(message) = dispatcher.sent.pop_front() {
                        book.on_message(message.map(|()| offer)).unwrap();
                    }
                }
                DistantStep::Ask => {
                    recalled = false;
                    book.adopt(1);
                    while let Some(message) = book.next_message() {
                        book.on_sent(1);
                        dispatcher.in_transit.push_back(message);
                    }
                    adopted += book.take_adopted::<Vec<_>>(1).len();
                }
                DistantStep::Recall => {
                    let recall = ToWorker::Recall { before: u64::MAX };
                    recalled |= !book.on_message(recall).unwrap().is_empty();
                }
                DistantStep::Finish if finished < adopted => {
                    finished += 1;
                    book.finish(now);
                }
                DistantStep::Finish => {}
            }

            // After each step the worker asks for as many offers as it may.
            prop_assert!(!recalled || book.room() == 0);
            book.ask(now, || u64::MAX);
            while let Some(message) = book.next_message() {
                book.on_sent(1);
                dispatcher.in_transit.push_back(message);
            }
            prop_assert!(dispatcher.answered <= dispatcher.offered);
        }
    }
}

/// Returns the book of a worker that has got WELCOME and whose application asks for a connection.
fn asking<T>(window: u64, max_connections: u64, max_fds: u8) -> Book<T> {
    let mut book = Book::new(window, max_connections, max_fds);
    book.on_message(ToWorker::Welcome { version: VERSION }).unwrap();
    book.adopt(1);
    book
}

fn offer<T>(book: &mut Book<T>, offer: T) -> Result<Vec<T>, Error> {
    book.on_message(ToWorker::Offer { number: book.offered, offer: Ok(offer) })
}

/// An offer is missing if another process has read it from the socket. All later answers would be
/// taken for those of other offers.
///
/// Rules: W-BREACH, D-NUMBER.
#[test]
fn a_missing_offer_is_noticed() {
    let mut book = asking(9, 9, 1);
    book.ask(Instant::now(), || u64::MAX);
    offer(&mut book, 0).unwrap();
    assert!(book.on_message(ToWorker::Offer { number: 2, offer: Ok(2) }).is_err());
}

#[test]
fn a_window_without_limit_asks_for_what_is_possible() {
    let mut book = asking::<()>(u64::MAX, u64::MAX, 1);
    book.ask(Instant::now(), || u64::MAX);
    assert_eq!(book.demand, MAX_UNANSWERED);
    assert!(!book.has_made_room());
}

/// The task is woken at the end of the connection, and does not wait until the report is due.
#[test]
fn a_connection_whose_end_makes_room_is_noticed() {
    let now = Instant::now();
    let mut book = asking(1, 1, 1);
    book.ask(now, || u64::MAX);
    offer(&mut book, ()).unwrap();
    book.adopt(1);
    assert_eq!(book.room(), 0);
    assert!(book.finish(now));
    assert_eq!(book.room(), 1);
}

#[test]
fn no_more_is_asked_for_than_half_of_the_free_descriptors_and_the_rest_when_there_are_more() {
    let now = Instant::now();
    let mut book = asking::<()>(20, u64::MAX, 1);
    book.ask(now, || 9);
    assert_eq!((book.demand, book.next_timeout()), (5, Some(now + COUNT_AFTER)));
    book.ask(now, || 6); // five of these descriptors are promised
    assert_eq!((book.demand, book.next_timeout()), (6, Some(now + COUNT_AFTER)));

    let later = now + COUNT_AFTER;
    book.on_timeout(later);
    book.ask(later, || u64::MAX);
    assert_eq!((book.demand, book.next_timeout()), (20, None));
}

#[test]
fn descriptors_are_asked_for_whole_bundles() {
    let mut book = asking::<()>(20, u64::MAX, 3);
    book.ask(Instant::now(), || 21);
    assert_eq!(book.demand, 3);
}

#[test]
fn an_offer_for_which_there_was_no_room_has_the_free_descriptors_counted_again() {
    let now = Instant::now();
    let mut book = asking::<()>(4, u64::MAX, 1);
    book.ask(now, || 100);
    book.on_message(ToWorker::Offer { number: 0, offer: Err(RejectReason::Full) }).unwrap();
    book.adopt(1);
    book.ask(now, || 3);
    assert_eq!(book.demand, 4, "all free descriptors are promised");
}

/// The task is woken once for a report of several ends, and then waits until the report is due.
#[test]
fn connections_that_end_are_reported_together() {
    let now = Instant::now();
    let mut book = asking(64, u64::MAX, 1);
    book.ask(now, || u64::MAX);
    for _ in 0..3 {
        offer(&mut book, ()).unwrap();
    }
    book.adopt(3);
    while book.next_message().is_some() {}
    assert!(book.finish(now));
    assert!(!book.finish(now) && !book.finish(now));
    assert_eq!(book.next_timeout(), Some(now + REPORT_AFTER));
    book.on_timeout(now + REPORT_AFTER);
    assert_eq!(book.next_message(), Some(FromWorker::Load { finished: 3 }));
    assert_eq!((book.next_message(), book.next_timeout()), (None, None));
}
