//! The simulation: two dispatchers, their workers, and the steps that they take.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use super::{
    NEW, OLD, Step, WORKERS,
    link::{Link, Side, later},
};
use crate::handoff::{
    dispatcher::{
        Group, WorkerId,
        builder::Config,
        pool::{Admission, Event, Needs, Pool, ProcessInfo},
    },
    incoming::book::Book,
    protocol::MAX_UNANSWERED,
};

/// A worker with all links that it has had. The last link is the current one.
#[derive(Debug)]
struct Worker {
    links: Vec<Link>,
    /// The dispatchers' ends of the links to which the worker has not moved yet.
    coming: VecDeque<(usize, WorkerId)>,
    given: usize,
    finished: usize,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) sides: [Side; 2],
    workers: Vec<Worker>,
    /// The links between the dispatchers, each with the connections that arrived over it and that
    /// no worker has adopted yet.
    pub(super) relays: Vec<(Link, BTreeSet<u8>)>,
    pub(super) dispatched: u8,
    /// How many times applications have received each connection.
    pub(super) adopted: BTreeMap<u8, u32>,
    /// Connections that a dispatcher had when it died.
    pub(super) may_be_lost: BTreeSet<u8>,
    now: Instant,
    has_begun: bool,
    is_undone: bool,
}

impl World {
    pub(super) fn new() -> Self {
        let config = Config { hello_timeout: Duration::from_secs(3600), ..Config::default() };
        let side = || Side { pool: Pool::new(config), lives: true, has: BTreeSet::new() };
        let mut world = Self {
            sides: [side(), side()],
            workers: Vec::new(),
            relays: Vec::new(),
            dispatched: 0,
            adopted: BTreeMap::new(),
            may_be_lost: BTreeSet::new(),
            now: Instant::now(),
            has_begun: false,
            is_undone: false,
        };
        (0..WORKERS).for_each(|_| world.start_worker(OLD));
        world
    }

    fn start_worker(&mut self, side: usize) {
        let process = self.workers.len() as u64;
        let id = self.connect(side, process);
        let links = vec![Link::new(side, id, Book::new(3, u64::MAX, 1))];
        self.workers.push(Worker { links, coming: VecDeque::new(), given: 0, finished: 0 });
    }

    fn connect(&mut self, side: usize, process: u64) -> WorkerId {
        let pool = &mut self.sides[side].pool;
        let id = pool.add_worker(Group::default(), None);
        let process = ProcessInfo { id: process, pid: None, is_child: true };
        pool.connect(id, process, later(self.now), self.now);
        id
    }

    /// Returns the dispatcher that accepts. Both may accept until one notices the other.
    pub(super) fn server(&mut self) -> Option<&mut Side> {
        let new_serves = self.has_begun && !self.is_undone;
        let side = if new_serves { NEW } else { OLD };
        Some(&mut self.sides[side]).filter(|side| side.lives)
    }

    pub(super) fn step(&mut self, step: Step) -> bool {
        let did = match step {
            Step::Accept => self.accept(),
            Step::Ask(worker) => self.ask(worker),
            Step::Finish(worker) => self.finish(worker),
            Step::Down(worker, age) => self.down(worker, age),
            Step::Up(worker, age) => self.up(worker, age),
            Step::RelayDown(relay) => self.relay_down(relay),
            Step::RelayUp(relay) => self.relay_up(relay),
            Step::Begin => self.begin(),
            Step::Undo => self.undo(),
            Step::Crash(side) => self.crash(side),
        };
        self.act_on_events();
        did
    }

    fn accept(&mut self) -> bool {
        let (connection, now) = (self.dispatched, self.now);
        let Some(side) = self.server().filter(|_| connection < 100) else { return false };
        side.has.insert(connection);
        side.pool.dispatch(connection, needs(), Admission::UntilClosed, now);
        self.dispatched += 1;
        true
    }

    fn ask(&mut self, worker: usize) -> bool {
        let current = self.workers[worker].links.last_mut().expect("it has one");
        if !current.has_ended {
            current.book.adopt(1);
        }
        self.answer(worker)
    }

    fn finish(&mut self, worker: usize) -> bool {
        let Worker { links, given, finished, .. } = &mut self.workers[worker];
        let may = finished < given;
        if may {
            *finished += 1;
            links.last_mut().expect("it has one").book.finish(self.now);
            self.answer(worker);
        }
        may
    }

    /// Sends the messages of all links, as the channel of a worker does after each step. Returns
    /// true if it did something.
    fn answer(&mut self, worker: usize) -> bool {
        let Worker { links, given, .. } = &mut self.workers[worker];
        let messages =
            |links: &[Link]| links.iter().map(|link| link.from_worker.len()).sum::<usize>();
        let before = messages(links) + *given;
        for connection in links.iter_mut().flat_map(|link| link.answer(self.now)) {
            *given += 1;
            *self.adopted.entry(connection).or_default() += 1;
        }
        messages(links) + *given > before
    }

    /// Returns the index of a worker's link of this age. The current link has age 0.
    fn index(&self, worker: usize, age: usize) -> Option<usize> {
        self.workers.get(worker)?.links.len().checked_sub(1 + age)
    }

    fn down(&mut self, worker: usize, age: usize) -> bool {
        let Some(index) = self.index(worker, age) else { return false };
        let link = &mut self.workers[worker].links[index];
        if link.has_ended {
            return false;
        }
        link.send(&mut self.sides, self.now);
        if link.to_worker.is_empty() && link.is_closed {
            link.has_ended = true;
            let undone = link.book.end(false).undone;
            if age > 0 {
                let current = self.workers[worker].links.last_mut().expect("it has one");
                (0..undone).for_each(|_| _ = current.book.finish(self.now));
            }
        } else if link.to_worker.is_empty() {
            return false;
        } else if link.receive() {
            self.moves(worker);
        }
        self.answer(worker);
        true
    }

    /// Moves a worker to its next link.
    fn moves(&mut self, worker: usize) {
        let Worker { links, coming, .. } = &mut self.workers[worker];
        let (side, id) = coming.pop_front().expect("there is a link for each MOVE");
        let (book, _unwanted) = links.last_mut().expect("it has one").book.move_on();
        let is_closed = !self.sides[side].lives;
        links.push(Link { is_closed, ..Link::new(side, id, book) });
    }

    fn up(&mut self, worker: usize, age: usize) -> bool {
        let Some(index) = self.index(worker, age) else { return false };
        self.workers[worker].links[index].read(&mut self.sides, self.now)
    }

    /// Sends connections from a dispatcher to the other one, which takes all of them.
    fn relay_down(&mut self, relay: usize) -> bool {
        let Some((link, waiting)) = self.relays.get_mut(relay) else { return false };
        let other = 1 - link.side;
        if link.has_ended || !self.sides[other].lives {
            return false;
        }
        link.send(&mut self.sides, self.now);
        let is_news = !link.to_worker.is_empty();
        if !is_news && link.is_closed {
            link.has_ended = true;
            link.book.end(false);
            return true;
        }
        link.receive();
        link.book.adopt(usize::MAX);
        for connection in link.answer(self.now) {
            waiting.insert(connection);
            let side = &mut self.sides[other];
            side.has.insert(connection);
            side.pool.dispatch(connection, needs(), Admission::UntilClosed, self.now);
        }
        is_news
    }

    fn relay_up(&mut self, relay: usize) -> bool {
        let Some((link, _)) = self.relays.get_mut(relay) else { return false };
        link.read(&mut self.sides, self.now)
    }

    fn relay(&mut self, from: usize, links: &[(WorkerId, u64)]) {
        let process = 100 + from as u64;
        let id = self.connect(from, process);
        let mut book = Book::new(MAX_UNANSWERED, MAX_UNANSWERED, 16);
        book.adopt(1);
        self.relays.push((Link::new(from, id, book), BTreeSet::new()));
        self.sides[from].pool.succeed(id, links, self.now);
    }

    fn begin(&mut self) -> bool {
        if self.has_begun || !self.sides.iter().all(|side| side.lives) {
            return false;
        }
        self.has_begun = true;
        let mut links = Vec::new();
        for worker in self.sides[OLD].pool.movable() {
            let process = worker.process.id;
            let id = self.connect(NEW, process);
            self.sides[NEW].pool.take_worker(id);
            self.workers[process as usize].coming.push_back((NEW, id));
            links.push((worker.id, process));
        }
        self.relay(OLD, &links);
        true
    }

    /// Undoes the replacement, because the new dispatcher has died or gives everything back.
    fn undo(&mut self) -> bool {
        if !self.has_begun || self.is_undone || !self.sides[OLD].lives {
            return false;
        }
        self.is_undone = true;
        if self.sides[NEW].lives {
            self.relay(NEW, &[]);
        }
        let moved = self.sides[OLD].pool.moved();
        for worker in &mut self.workers {
            let first = &mut worker.links[0];
            if first.moves == 0 {
                worker.coming.clear(); // no MOVE to these links was sent
            }
            if moved.contains(&first.id) && first.side == OLD {
                first.returns_after = Some(first.moves);
                worker.coming.push_back((OLD, first.id));
            }
        }
        self.sides[OLD].pool.take_back(&moved, self.now);
        true
    }

    fn crash(&mut self, side: usize) -> bool {
        if !std::mem::take(&mut self.sides[side].lives) {
            return false;
        }
        self.may_be_lost.append(&mut self.sides[side].has);
        let links = self.workers.iter_mut().flat_map(|worker| &mut worker.links);
        links.filter(|link| link.side == side).for_each(|link| link.is_closed = true);
        for (relay, _) in &mut self.relays {
            // Everything that it has sent to the other dispatcher, or read from it, stays.
            relay.is_closed |= relay.side == side;
            relay.has_ended |= relay.side != side;
        }
        true
    }

    fn act_on_events(&mut self) {
        for number in [OLD, NEW] {
            for event in self.sides[number].pool.take_events() {
                match event {
                    Event::Adopted { connection, .. } => {
                        self.sides[number].has.remove(&connection);
                        for (relay, waiting) in &mut self.relays {
                            if relay.side != number && waiting.remove(&connection) {
                                relay.book.finish(self.now);
                            }
                        }
                    }
                    Event::GivenUp { connection, .. } => panic!("{connection} is given up"),
                    _ => {}
                }
            }
        }
    }

    /// Lets all messages arrive and all connections end, with a dispatcher that serves.
    pub(super) fn settle(&mut self) {
        if !self.sides[NEW].lives {
            self.undo();
        }
        if self.server().is_none() {
            return;
        }
        // If a dispatcher has died, some workers may have left because of that.
        let side = if self.has_begun && !self.is_undone { NEW } else { OLD };
        self.start_worker(side);
        loop {
            let mut is_news = false;
            for worker in 0..self.workers.len() {
                let links = self.workers[worker].links.len();
                for age in 0..links {
                    is_news |=
                        self.step(Step::Down(worker, age)) | self.step(Step::Up(worker, age));
                }
                is_news |= self.step(Step::Ask(worker)) | self.step(Step::Finish(worker));
            }
            for relay in 0..self.relays.len() {
                is_news |= self.step(Step::RelayDown(relay)) | self.step(Step::RelayUp(relay));
            }
            if !is_news {
                return;
            }
        }
    }
}

/// Any worker can get any connection.
fn needs() -> Needs {
    Needs { group: Group::default(), key: 0, fds: 1 }
}
