//! A dispatcher is replaced by another one while its workers go on. Both are in this process, so
//! that a test sees each moment. `succession_processes` has the same between processes.

use std::time::Duration;

use fdwire::{
    Frame, Socket, SocketKind,
    handoff::{
        Accepted, Connection, Dispatcher, Incoming, IncomingHandle, Strategy, Succession,
        WorkerState,
        protocol::{FromWorker, ToWorker, VERSION},
    },
};
use futures::SinkExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
};

use crate::{
    common::{KINDS, one_worker, run},
    raw_worker::{Client, Raw, connections, until},
};

/// A worker in this process: the connections that it adopts, and its handle.
struct Worker {
    adopted: UnboundedReceiver<Connection>,
    handle: IncomingHandle,
}

impl Worker {
    fn add(dispatcher: &Dispatcher, kind: SocketKind) -> Self {
        let (dispatcher_end, worker_end) = Socket::pair(kind).unwrap();
        dispatcher.add_worker(dispatcher_end);
        let mut incoming = Incoming::builder().max_fds(2).build(worker_end);
        let handle = incoming.handle();
        let (to_test, adopted) = unbounded_channel();
        tokio::spawn(async move {
            while let Some(connection) = incoming.next().await {
                let _ = to_test.send(connection);
            }
        });
        Self { adopted, handle }
    }

    async fn next(&mut self) -> Connection {
        self.adopted.recv().await.expect("the worker has not ended")
    }
}

async fn ready(dispatcher: &Dispatcher, workers: usize) {
    until("the workers are ready", || {
        let workers_of = dispatcher.stats().workers;
        let is_ready = |state| state == WorkerState::Ready;
        workers_of.iter().filter(|worker| is_ready(worker.state) && worker.credit > 0).count()
            == workers
    })
    .await;
}

/// Replaces a dispatcher by another one in this process.
fn succeed(old: &Dispatcher, new: &Dispatcher) -> Succession {
    let (mut succession, frames) = old.prepare_succession().unwrap();
    new.take_workers(frames, |_| None).unwrap();
    succession.begin();
    succession
}

async fn one() -> (Client, tokio::net::TcpStream) {
    connections(1).await.pop().unwrap()
}

/// Rules: W-MOVE, W-OPEN.
#[test]
fn a_worker_goes_on_with_another_dispatcher_and_keeps_its_connections() {
    for kind in KINDS {
        run(async {
            // A worker of the old dispatcher serves a connection.
            let (old, new) = (Dispatcher::builder().build(), Dispatcher::builder().build());
            let mut worker = Worker::add(&old, kind);
            let (mut before, accepted) = one().await;
            old.dispatch(accepted).await.unwrap();
            let mut serving = worker.next().await;

            // The worker moves to the new one, serves another connection, and still has the first.
            drop(succeed(&old, &new));
            ready(&new, 1).await;
            assert_eq!(new.stats().workers[0].active, 1, "its connection counts at the new one");
            let (_after, accepted) = one().await;
            new.dispatch(accepted).await.unwrap();
            drop(worker.next().await);
            until("one has ended", || new.stats().workers[0].active == 1).await;
            serving.write_all(b"still here").await.unwrap();
            assert_eq!(before.first().await, "still here");

            // The old dispatcher ends. The worker drains only when the new one drains.
            old.drain(None).await;
            assert!(!worker.handle.is_draining());
            drop(serving);
            until("all have ended", || new.stats().workers[0].active == 0).await;
            new.drain(None).await;
            assert_eq!(new.stats().retired.drained, 1, "{:?}", new.stats());
            assert!(worker.handle.is_draining());
        });
    }
}

/// The old dispatcher has no worker, so all its connections wait.
#[test]
fn connections_that_wait_go_to_the_successor_with_all_that_belongs_to_them() {
    run(async {
        // Connections with a prefix, metadata, a key and a bundle wait at the old dispatcher.
        let old = Dispatcher::builder().build();
        let new = Dispatcher::builder().strategy(Strategy::ByKey).build();
        let mut waiting = Vec::new();
        for serial in 0..60u32 {
            let (client, accepted) = one().await;
            let (upstream, _) = std::os::unix::net::UnixStream::pair().unwrap();
            let accepted = Accepted::from(accepted)
                .with_prefix(serial.to_be_bytes().to_vec())
                .metadata(format!("tenant {serial}"))
                .key([(serial % 7) as u8])
                .with_fd(upstream);
            waiting.push((client, old.dispatch(accepted)));
        }
        // The workers of the new one get all of them, with everything, by their keys.
        let mut workers = [(); 3].map(|()| Worker::add(&new, SocketKind::SeqPacket));
        ready(&new, 3).await;
        drop(succeed(&old, &new));
        let mut worker_of_key = [None; 7];
        for _ in 0..waiting.len() {
            let next = workers.iter_mut().map(|worker| Box::pin(worker.next()));
            let (mut connection, number, _) = futures::future::select_all(next).await;
            let mut serial = [0; 4];
            connection.read_exact(&mut serial).await.unwrap();
            let serial = u32::from_be_bytes(serial);
            assert_eq!(connection.metadata(), &format!("tenant {serial}"));
            assert_eq!(connection.bundle_mut().len(), 1);
            let of_key = worker_of_key[serial as usize % 7].get_or_insert(number);
            assert_eq!(*of_key, number, "connections with one key went to two workers");
            connection.write_all(&serial.to_be_bytes()).await.unwrap();
        }
        // Each client gets the answer to its own number.
        for (serial, (mut client, outcome)) in (0u32..).zip(waiting) {
            outcome.await.unwrap();
            let mut answer = [0; 4];
            client.0.read_exact(&mut answer).await.unwrap();
            assert_eq!(u32::from_be_bytes(answer), serial);
        }
        assert_eq!((old.stats().lost, new.stats().lost), (0, 0));
        old.drain(None).await;
        new.drain(None).await;
    });
}

#[test]
fn workers_and_connections_keep_their_groups_at_the_successor() {
    run(async {
        let (old, new) = (Dispatcher::builder().build(), Dispatcher::builder().build());
        let mut images = Worker::add(&old.in_group("images"), SocketKind::SeqPacket);
        ready(&old, 1).await;
        // A connection for a group without workers waits, and one for the other group comes later.
        let (_client, accepted) = one().await;
        let waiting = old.in_group("api").dispatch(accepted);
        drop(succeed(&old, &new));
        ready(&new, 1).await;
        let (_other, accepted) = one().await;
        let outcome = old.dispatch(Accepted::from(accepted).group("images"));
        drop(images.next().await);
        outcome.await.unwrap();
        until("both have moved", || new.stats().dispatched == 2).await;
        let mut api = Worker::add(&new.in_group("api"), SocketKind::SeqPacket);
        drop(api.next().await);
        waiting.await.unwrap();
        assert_eq!(new.stats().workers.len(), 2);
    });
}

/// The worker sends its HELLO only after its dispatcher has been replaced.
#[test]
fn a_worker_that_has_not_sent_its_hello_moves_too() {
    run(async {
        let (old, new) = (Dispatcher::builder().build(), Dispatcher::builder().build());
        let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
        old.add_worker(dispatcher_end);
        drop(succeed(&old, &new));
        let mut incoming = Incoming::new(worker_end);
        let (_client, accepted) = one().await;
        let outcome = new.dispatch(accepted);
        drop(incoming.next().await.unwrap());
        outcome.await.unwrap();
        old.drain(None).await;
        assert!(!incoming.handle().is_draining());
    });
}

/// Rules: W-MOVED.
#[test]
fn connections_that_a_worker_has_not_adopted_when_it_moves_are_served_once() {
    run(async {
        // A worker adopts one connection, and 19 offers wait in it.
        let (old, new) = (Dispatcher::builder().build(), Dispatcher::builder().build());
        let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
        old.add_worker(dispatcher_end);
        let mut incoming = Incoming::new(worker_end);
        let mut clients = Vec::new();
        let mut outcomes = Vec::new();
        for (client, accepted) in connections(20).await {
            outcomes.push(old.dispatch(accepted));
            clients.push(client);
        }
        let mut served = vec![incoming.next().await.unwrap()];
        until("all are offered", || old.stats().workers[0].unanswered == 19).await;
        // The worker moves. The new dispatcher gets these connections, and offers them to it.
        drop(succeed(&old, &new));
        until("the connections have moved on", || new.stats().dispatched == 19).await;
        while served.len() < 20 {
            served.push(incoming.next().await.unwrap());
        }
        for outcome in outcomes {
            outcome.await.unwrap();
        }
        // Each connection was served once.
        let serials = async {
            let mut serials = Vec::new();
            for connection in &mut served {
                let mut serial = [0; 4];
                connection.read_exact(&mut serial).await.unwrap();
                serials.push(u32::from_be_bytes(serial));
            }
            serials.sort();
            serials
        };
        assert_eq!(serials.await, Vec::from_iter(0..20));
        until("the new dispatcher counts all", || new.stats().workers[0].active == 20).await;
    });
}

/// The new dispatcher dies with its runtime.
///
/// Rules: W-STAY, W-END-MOVED.
#[test]
fn workers_come_back_when_the_successor_dies() {
    for kind in KINDS {
        run(async {
            // A worker has a connection.
            let old = Dispatcher::builder().build();
            let mut worker = Worker::add(&old, kind);
            let (_before, accepted) = one().await;
            old.dispatch(accepted).await.unwrap();
            let serving = worker.next().await;
            for round in 0..3 {
                // The worker moves to a new dispatcher, which dies.
                let runtime = one_worker();
                let new = {
                    let _context = runtime.enter();
                    Dispatcher::builder().build()
                };
                let mut succession = succeed(&old, &new);
                ready(&new, 1).await;
                runtime.shutdown_background();
                if round > 0 {
                    // The worker notices within this time, and waits for the old dispatcher.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    assert!(!worker.handle.is_draining());
                }
                // The old one takes the worker back, and it serves.
                succession.undo();
                ready(&old, 1).await;
                assert_eq!(old.stats().workers[0].active, 1);
                let (_client, accepted) = one().await;
                old.dispatch(accepted).await.unwrap();
                drop(worker.next().await);
            }
            drop(serving);
            old.drain(None).await;
            assert_eq!(old.stats().lost + old.stats().given_back, 0);
        });
    }
}

#[test]
fn a_successor_that_gives_everything_back_keeps_nothing() {
    run(async {
        // The new dispatcher has taken the worker.
        let (old, new) = (Dispatcher::builder().build(), Dispatcher::builder().build());
        let mut worker = Worker::add(&old, SocketKind::SeqPacket);
        ready(&old, 1).await;
        let (mut succession, frames) = old.prepare_succession().unwrap();
        let mut taken = new.take_workers(frames, |_| None).unwrap();
        assert_eq!(taken.workers().len(), 1);
        succession.begin();
        ready(&new, 1).await;

        // The new one gives everything back. A connection of its own is served at the old one.
        taken.give_back();
        let (client, accepted) = one().await;
        let outcome = new.dispatch(accepted);
        succession.undo();
        ready(&old, 1).await;
        let mut connection = worker.next().await;
        connection.write_all(b"back again").await.unwrap();
        drop(connection);
        outcome.await.unwrap();
        assert_eq!(client.answer().await, "back again");
        // The drain of the new dispatcher does not concern the worker.
        new.drain(None).await;
        assert!(!worker.handle.is_draining(), "the new dispatcher has sent a DRAIN");
        let (_client, accepted) = one().await;
        old.dispatch(accepted).await.unwrap();
        drop(worker.next().await);
        old.drain(None).await;
    });
}

/// Rules: D-MOVE.
#[test]
fn a_worker_that_does_not_know_how_to_move_drains() {
    run(async {
        let (old, new) = (Dispatcher::builder().build(), Dispatcher::builder().build());
        let mut raw = Raw::start(&old, SocketKind::SeqPacket, 10).await;
        let (mut succession, frames) = old.prepare_succession().unwrap();
        assert_eq!(frames.len(), 1, "the links for connections");
        assert_eq!(new.take_workers(frames, |_| None).unwrap().workers(), []);
        succession.begin();
        raw.leave().await;
        until("the worker has left", || old.stats().retired.drained == 1).await;
    });
}

/// Between the MOVE and its HELLO at the new link, the worker gets no offer.
///
/// Rules: D-MOVE-OFFERS.
#[test]
fn a_worker_that_moves_gets_no_further_offer_at_its_old_link() {
    run(async {
        // A worker that can move has asked for offers.
        let (old, new) = (Dispatcher::builder().build(), Dispatcher::builder().build());
        let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let id = old.add_worker(dispatcher_end);
        let mut framed =
            fdwire::Framed::new(worker_end, fdwire::handoff::protocol::WorkerCodec::default());
        let hello =
            FromWorker::Hello { lowest: VERSION, highest: VERSION, max_fds: 1, open: Some(0) };
        framed.send(hello).await.unwrap();
        framed.send(FromWorker::Demand { total: 100 }).await.unwrap();
        ready(&old, 1).await;
        // The worker gets a MOVE. A connection that comes later goes to the new dispatcher.
        drop(succeed(&old, &new));
        let (_client, accepted) = one().await;
        let outcome = old.dispatch(accepted);
        let mut raw = Raw::after_greeting(id, framed);
        let link = loop {
            match raw.step().await.unwrap() {
                ToWorker::Move(link) => break link,
                ToWorker::Offer { .. } => panic!("an offer at the old link"),
                _ => {}
            }
        };
        until("the connection waits at the new dispatcher", || new.stats().waiting == 1).await;
        // The worker greets at the new link, and gets the connection there.
        let socket = Socket::try_from(link.socket).unwrap();
        let mut next =
            fdwire::Framed::new(socket, fdwire::handoff::protocol::WorkerCodec::default());
        let hello =
            FromWorker::Hello { lowest: VERSION, highest: VERSION, max_fds: 1, open: Some(3) };
        next.send(hello).await.unwrap();
        next.send(FromWorker::Demand { total: 1 }).await.unwrap();
        next.send(FromWorker::Load { finished: 3 }).await.unwrap();
        let mut next = Raw::after_greeting(id, next);
        let _offer = next.offer().await.unwrap();
        next.adopt(1).await;
        outcome.await.unwrap();
        until("the new dispatcher counts the connection", || new.stats().workers[0].active == 1)
            .await;
    });
}

#[test]
fn foreign_frames_are_refused_and_no_worker_is_taken() {
    run(async {
        let (old, new) = (Dispatcher::builder().build(), Dispatcher::builder().build());
        let _worker = Worker::add(&old, SocketKind::SeqPacket);
        ready(&old, 1).await;
        let (_succession, mut frames) = old.prepare_succession().unwrap();
        assert_eq!(frames.len(), 2);
        frames.push(Frame::new("state of the application"));
        assert!(new.take_workers(frames, |_| None).is_err());
        assert!(new.stats().workers.is_empty());
        ready(&old, 1).await; // nothing has changed for the old dispatcher
    });
}
