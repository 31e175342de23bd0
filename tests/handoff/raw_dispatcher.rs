//! A dispatcher made of the protocol's codec alone, whose every message is up to the test.

use std::net;

use fdwire::{
    Framed, SendFd, Socket, SocketKind,
    handoff::{
        Address, Incoming, IncomingBuilder, Transport,
        protocol::{DispatcherCodec, FromWorker, NewLink, Offer, RejectReason, ToWorker, VERSION},
    },
};
use futures::{SinkExt, TryStreamExt};
use tokio::net::{TcpListener, TcpStream};

pub(crate) struct RawDispatcher {
    pub(crate) framed: Framed<DispatcherCodec>,
    listener: TcpListener,
    /// The demand that the worker has reported most recently.
    pub(crate) demand: u64,
    /// The number of finished connections that the worker has reported most recently.
    pub(crate) finished: u64,
    /// The number of offers made.
    offered: u64,
    /// The number of offers that were answered.
    answered: u64,
}

/// Makes a dispatcher and a worker that have greeted each other.
pub(crate) async fn pair(kind: SocketKind, worker: IncomingBuilder) -> (RawDispatcher, Incoming) {
    let (a, b) = Socket::pair(kind).unwrap();
    let incoming = worker.build(b);
    (RawDispatcher::greet(a).await, incoming)
}

impl RawDispatcher {
    pub(crate) async fn greet(socket: Socket) -> Self {
        let mut this = Self::before_greeting(socket).await;
        this.send(ToWorker::Welcome { version: VERSION }).await;
        this
    }

    pub(crate) async fn before_greeting(socket: Socket) -> Self {
        Self::before_greeting_with(socket, 1).await
    }

    /// Expects a HELLO of a worker that takes this many descriptors with an offer.
    pub(crate) async fn before_greeting_with(socket: Socket, max_fds: u8) -> Self {
        Self::hello(socket, max_fds, 0).await
    }

    /// Expects a HELLO at the new link of a worker with this many open connections.
    pub(crate) async fn at_new_link(socket: Socket, open: u64) -> Self {
        Self::hello(socket, 1, open).await
    }

    async fn hello(socket: Socket, max_fds: u8, open: u64) -> Self {
        let mut framed = Framed::new(socket, DispatcherCodec::default());
        let hello = framed.try_next().await.unwrap();
        let (lowest, highest, open) = (VERSION, VERSION, Some(open));
        assert_eq!(hello, Some(FromWorker::Hello { lowest, highest, max_fds, open }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { framed, listener, demand: 0, finished: 0, offered: 0, answered: 0 }
    }

    pub(crate) async fn send(&mut self, message: ToWorker<Offer<SendFd>, NewLink<SendFd>>) {
        self.framed.send(message).await.unwrap();
    }

    /// Receives the next message that is not a DEMAND or a LOAD. These are noted. Returns `None` at
    /// the end of the link.
    pub(crate) async fn answer(&mut self) -> Option<FromWorker> {
        loop {
            match self.message().await {
                Some(FromWorker::Demand { .. } | FromWorker::Load { .. }) => {}
                answer => return answer,
            }
        }
    }

    /// Receives the next message, and notes a DEMAND or a LOAD.
    async fn message(&mut self) -> Option<FromWorker> {
        let message = self.framed.try_next().await.unwrap();
        match message {
            Some(FromWorker::Demand { total }) => self.demand = total,
            Some(FromWorker::Load { finished }) => self.finished = finished,
            _ => {}
        }
        message
    }

    /// Receives a DEMAND or a LOAD. Fails if another message comes.
    async fn receive_total(&mut self) {
        let message = self.message().await;
        assert!(
            matches!(message, Some(FromWorker::Demand { .. } | FromWorker::Load { .. })),
            "{message:?}"
        );
    }

    /// Checks that this is the next message, apart from DEMAND and LOAD.
    pub(crate) async fn expect(&mut self, answer: FromWorker) {
        assert_eq!(self.answer().await, Some(answer));
    }

    pub(crate) async fn expect_adopted(&mut self, count: u32) {
        let first = self.take_numbers(count);
        self.expect(FromWorker::Adopted { first, count }).await;
    }

    pub(crate) async fn expect_rejected(&mut self, count: u32, reason: RejectReason) {
        let first = self.take_numbers(count);
        self.expect(FromWorker::Rejected { first, count, reason }).await;
    }

    /// Checks that the worker rejects `total` offers, with one message or several.
    pub(crate) async fn expect_rejected_in_parts(&mut self, total: u32, reason: RejectReason) {
        let end = self.answered + u64::from(total);
        while self.answered < end {
            let answer = self.answer().await;
            let Some(FromWorker::Rejected { first, count, reason: given }) = answer else {
                panic!("{answer:?}")
            };
            assert_eq!((first, given), (self.take_numbers(count), reason));
        }
    }

    /// Counts the next `count` offers as answered. Returns the number of the first.
    fn take_numbers(&mut self, count: u32) -> u64 {
        self.answered += u64::from(count);
        self.answered - u64::from(count)
    }

    /// Gives an offer the next number.
    pub(crate) fn number(
        &mut self,
        offer: Offer<SendFd>,
    ) -> ToWorker<Offer<SendFd>, NewLink<SendFd>> {
        self.offered += 1;
        ToWorker::Offer { number: self.offered - 1, offer }
    }

    /// Receives until the worker has asked for `total` offers in all.
    pub(crate) async fn expect_demand(&mut self, total: u64) {
        while self.demand < total {
            self.receive_total().await;
        }
        assert_eq!(self.demand, total);
    }

    /// Receives until the worker has reported this number of finished connections.
    pub(crate) async fn expect_finished(&mut self, finished: u64) {
        while self.finished < finished {
            self.receive_total().await;
        }
        assert_eq!(self.finished, finished);
    }

    /// Pings the worker and waits for the answer. By then, whatever the worker had to send is in
    /// `demand` and `finished`. Fails if the worker has sent another message before the answer.
    pub(crate) async fn settle(&mut self) {
        self.send(ToWorker::Ping { nonce: 77 }).await;
        self.expect(FromWorker::Pong { nonce: 77 }).await;
    }

    /// Connects a client. Returns it with its accepted connection.
    pub(crate) async fn accept(&mut self) -> (TcpStream, net::TcpStream) {
        let client = TcpStream::connect(self.listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, self.listener.accept());
        (client.unwrap(), accepted.unwrap().0.into_std().unwrap())
    }

    /// Offers a connection, after the worker has asked for at least one. Returns the client and the
    /// dispatcher's own copy.
    pub(crate) async fn offer(&mut self) -> (TcpStream, net::TcpStream) {
        let (client, accepted) = self.accept().await;
        self.send_offer(offer_of(&accepted)).await;
        (client, accepted)
    }

    pub(crate) async fn send_offer(&mut self, offer: Offer<SendFd>) {
        while self.demand == 0 {
            self.receive_total().await;
        }
        let message = self.number(offer);
        self.send(message).await;
    }
}

/// Makes an offer with a copy of the connection.
pub(crate) fn offer_of(connection: &net::TcpStream) -> Offer<SendFd> {
    Offer {
        cookie: rustix::net::sockopt::socket_cookie(connection).unwrap(),
        transport: Transport::Tcp,
        peer: Address::from(connection.peer_addr().unwrap()),
        local: Address::from(connection.local_addr().unwrap()),
        prefix: Default::default(),
        metadata: Default::default(),
        fd: SendFd::assume_socket(connection.try_clone().unwrap()),
        bundle: Vec::new(),
    }
}
