//! The front: accepts connections, gives each to the worker with the fewest unanswered ones, and keeps a copy until
//! that worker has adopted it.

use std::{
    collections::VecDeque,
    env,
    fmt::Display,
    io::{Error, Result},
    net::Shutdown,
    os::fd::OwnedFd,
    pin::pin,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use fdwire::{Frame, FrameCodec, Framed, ReadHalf, Socket, SocketKind, WriteHalf};
use futures::{
    SinkExt, StreamExt,
    future::{join_all, ready, try_join_all},
    stream::{self, BoxStream, SelectAll},
};
use tokio::{
    net::TcpListener,
    process::{Child, Command},
    select,
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

/// Connections given to a worker that it has not answered for, at most. Below the number of descriptors that a write half
/// queues (506 by default), so that `feed` never waits.
pub(crate) const WINDOW: usize = 64;

/// How long to wait for a descriptor to come free.
const BACK_OFF: Duration = Duration::from_millis(50);

/// How long the workers may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(5);

pub(crate) struct Front {
    acceptor: JoinHandle<()>,
    accepted: mpsc::Receiver<Connection>,
    /// Connections that no worker has: just accepted, or left over from a worker that ended.
    waiting: VecDeque<Connection>,
    workers: Vec<Worker>,
    answers: SelectAll<Answers>,
    /// Waits for each worker process. Dropped, it kills those that still run.
    children: JoinSet<(u32, Result<ExitStatus>)>,
}

struct Connection {
    peer: String,
    socket: OwnedFd,
    /// What is sent. Made right after the accept: if connections without a copy held all descriptors, none could go on.
    copy: Option<OwnedFd>,
}

struct Worker {
    pid: u32,
    write: WriteHalf<FrameCodec>,
    /// Our copies of the connections given and not adopted. Workers answer in the order in which they got them.
    unanswered: VecDeque<Connection>,
    given: u64,
    failed: bool,
}

/// What a worker answers, and `None` at the end.
type Answer = Option<std::result::Result<Frame, fdwire::Error>>;
type Answers = BoxStream<'static, (u32, Answer)>;

impl Front {
    /// Starts the workers, then accepts.
    pub(crate) async fn start(listener: TcpListener, kind: SocketKind, workers: u16) -> Result<Self> {
        let started = try_join_all((0..workers).map(|_| Worker::start(kind))).await?;
        let (accepting, accepted) = mpsc::channel(WINDOW);
        let mut front = Self {
            acceptor: tokio::spawn(accept(listener, accepting)),
            accepted,
            waiting: VecDeque::new(),
            workers: Vec::new(),
            answers: SelectAll::new(),
            children: JoinSet::new(),
        };
        for (worker, read, mut child) in started {
            let pid = worker.pid;
            println!("worker {pid} is ready");
            let answers = read.map(Some).chain(stream::once(ready(None))).map(move |answer| (pid, answer));
            front.answers.push(answers.boxed());
            front.children.spawn(async move { (pid, child.wait().await) });
            front.workers.push(worker);
        }
        Ok(front)
    }

    pub(crate) fn worker_pids(&self) -> Vec<u32> {
        self.workers.iter().map(|worker| worker.pid).collect()
    }

    /// Gives connections to workers until `until` is ready, or no worker is left.
    pub(crate) async fn run<T>(&mut self, until: impl Future<Output = T>) -> Result<T> {
        let mut until = pin!(until);
        while !self.workers.is_empty() {
            self.give_out().await;
            let unsent = self.workers.iter().any(Worker::has_unsent);
            select! {
                outcome = &mut until => return Ok(outcome),
                Some(connection) = self.accepted.recv(), if self.waiting.is_empty() => {
                    self.waiting.push_back(connection);
                    self.take_accepted(); // whatever came together is sent together
                }
                // Flushing can be dropped at any time and taken up again.
                _ = join_all(self.workers.iter_mut().filter(|worker| worker.has_unsent()).map(Worker::flush)), if unsent => {}
                Some((pid, answer)) = self.answers.next() => self.answered(pid, answer),
                Some(exit) = self.children.join_next() => report_exit(exit),
                () = sleep(BACK_OFF), if !self.waiting.is_empty() => {}
            }
        }
        Err(Error::other("no worker is left"))
    }

    fn take_accepted(&mut self) {
        while let Ok(connection) = self.accepted.try_recv() {
            self.waiting.push_back(connection);
        }
    }

    /// Gives waiting connections to workers, as far as these have room.
    async fn give_out(&mut self) {
        for _ in 0..self.waiting.len() {
            let with_room = self.workers.iter_mut().filter(|worker| worker.has_room());
            // The second number has idle workers take turns.
            let Some(worker) = with_room.min_by_key(|worker| (worker.unanswered.len(), worker.given)) else { return };
            let Some(mut connection) = self.waiting.pop_front() else { return };
            match connection.take_copy() {
                Ok(copy) => worker.give(connection, copy).await,
                Err(_) => self.waiting.push_back(connection), // `run` tries again when descriptors may have come free
            }
        }
    }

    fn answered(&mut self, pid: u32, answer: Answer) {
        let index =
            self.workers.iter().position(|worker| worker.pid == pid).expect("a worker stays until its answers end");
        let worker = &mut self.workers[index];
        match answer {
            Some(Ok(frame)) => worker.adopted(&frame),
            Some(Err(error)) => worker.fail(error),
            // Only now every answer has been read, also those that the worker wrote before it was killed: what is left was
            // served by nobody.
            None => {
                let mut left = self.workers.remove(index).unanswered;
                if !left.is_empty() {
                    println!("worker {pid} is gone, connections that it had not taken go to others: {}", left.len());
                }
                left.append(&mut self.waiting);
                self.waiting = left;
            }
        }
    }

    /// Accepts no more, and ends the workers: they see the end of their socket, finish what they serve, and exit.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.acceptor.abort();
        let _ = (&mut self.acceptor).await; // the listening socket is closed now
        self.take_accepted();
        self.give_out().await;
        let finish = async {
            join_all(self.workers.iter_mut().map(Worker::close)).await;
            while let Some((pid, answer)) = self.answers.next().await {
                self.answered(pid, answer);
            }
            while let Some(exit) = self.children.join_next().await {
                report_exit(exit);
            }
        };
        let finished = timeout(STOP_LIMIT, finish).await;
        if !self.waiting.is_empty() {
            eprintln!("connections that found no worker: {}", self.waiting.len());
        }
        if finished.is_err() {
            self.children.shutdown().await; // drops the `Child` of each, which kills it
            return Err(Error::other("workers did not stop in time and were killed"));
        }
        Ok(())
    }
}

impl Connection {
    fn take_copy(&mut self) -> Result<OwnedFd> {
        match self.copy.take() {
            Some(copy) => Ok(copy),
            None => self.socket.try_clone(), // the first one went to a worker that ended
        }
    }
}

impl Worker {
    /// Starts this program again, with one end of a pair as its standard input: nothing else is open in the new process,
    /// since every other descriptor here is close-on-exec.
    async fn start(kind: SocketKind) -> Result<(Self, ReadHalf<FrameCodec>, Child)> {
        let (ours, theirs) = Socket::pair(kind)?;
        // The command goes with this statement, and our copy of the worker's end with it: as long as it were open, the
        // worker's death would not end the socket.
        let child = Command::new(env::current_exe()?)
            .arg("--worker")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Error::new(error.kind(), format!("cannot start a worker: {error}")))?;
        let (mut read, write) = Framed::new(ours, FrameCodec::default()).into_split();
        match (child.id(), read.next().await.transpose()?) {
            (Some(pid), Some(_ready)) => {
                Ok((Self { pid, write, unanswered: VecDeque::new(), given: 0, failed: false }, read, child))
            }
            _ => Err(Error::other("a worker ended before it was ready")),
        }
    }

    fn has_room(&self) -> bool {
        !self.failed && self.unanswered.len() < WINDOW
    }

    fn has_unsent(&self) -> bool {
        !self.failed && self.write.unsent().0 > 0
    }

    /// Queues a copy for sending. Whether it is refused or lost on its way, the connection is still here.
    async fn give(&mut self, connection: Connection, copy: OwnedFd) {
        let frame = Frame::new(connection.peer.clone()).with_fd(copy);
        self.unanswered.push_back(connection);
        self.given += 1;
        if let Err(refused) = self.write.feed(frame).await {
            self.fail(refused.error);
        }
    }

    async fn flush(&mut self) {
        if let Err(error) = self.write.flush().await {
            self.fail(error);
        }
    }

    async fn close(&mut self) {
        if let Err(error) = self.write.close().await {
            self.fail(error);
        }
    }

    fn adopted(&mut self, answer: &Frame) {
        let count = std::str::from_utf8(&answer.payload).ok().and_then(|count| count.parse::<usize>().ok());
        match count {
            // While we hold a copy, the worker's close would send no FIN.
            Some(count) if count <= self.unanswered.len() => drop(self.unanswered.drain(..count)),
            _ => self.fail("answers for more connections than it got"),
        }
    }

    /// Ends both directions. From here on the worker's answers fail, so it adopts nothing more; those that it wrote before
    /// stay readable, and then comes the end.
    fn fail(&mut self, reason: impl Display) {
        if !std::mem::replace(&mut self.failed, true) {
            eprintln!("worker {}: {reason}", self.pid);
            let _ = self.write.socket().shutdown(Shutdown::Both); // an error says that there is nothing left to end
        }
    }
}

/// Accepts as long as there is room: when all workers are full, connections wait in the kernel's backlog.
async fn accept(listener: TcpListener, accepted: mpsc::Sender<Connection>) {
    while let Ok(place) = accepted.reserve().await {
        let (stream, peer) = persist("accept a connection", || listener.accept()).await;
        // Out of tokio's epoll set before it is sent: there it would go on firing as long as a worker holds it.
        let socket = match stream.into_std() {
            Ok(stream) => OwnedFd::from(stream),
            Err(error) => {
                eprintln!("lost the connection of {peer}: {error}");
                continue;
            }
        };
        let copy = persist("copy a connection", || ready(socket.try_clone())).await;
        place.send(Connection { peer: peer.to_string(), socket, copy: Some(copy) });
    }
}

/// Tries until it succeeds. It fails mostly for want of a descriptor (`EMFILE`), and one comes free with the next answer of
/// a worker. Meanwhile clients wait in the backlog; an accept right away would only fail again.
async fn persist<T, F: Future<Output = Result<T>>>(what: &str, mut attempt: impl FnMut() -> F) -> T {
    let mut said = false;
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) if !std::mem::replace(&mut said, true) => eprintln!("cannot {what} yet: {error}"),
            Err(_) => {}
        }
        sleep(BACK_OFF).await;
    }
}

fn report_exit(exit: std::result::Result<(u32, Result<ExitStatus>), tokio::task::JoinError>) {
    match exit {
        Ok((pid, Ok(status))) => println!("worker {pid} ended: {status}"),
        Ok((pid, Err(error))) => eprintln!("worker {pid}: {error}"),
        Err(error) => eprintln!("{error}"),
    }
}
