//! A server that can be replaced.

use std::{
    future::{Future, Ready},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::oneshot,
    task::{JoinHandle, JoinSet},
    time::sleep,
};
use tracing::warn;

use super::{
    Accepts, Datagrams, Error, Gated, Generation, Listeners, Options, Phase,
    control::Control,
    generations::Generations,
    give::give,
    passed,
    protocol::Identity,
    shared::{Baton, Command, Shared, Status, UpCommand},
};
use crate::{Frame, Listener, Socket, SocketKind, socket::PathGuard};

/// Most connections to the control socket at a time. Others wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 16;

/// The number of the first process at a path.
pub(super) const FIRST_GENERATION: u32 = 1;

/// The time to wait if no descriptor is left.
const BACK_OFF: Duration = Duration::from_millis(20);

/// A server that a new process can take over from.
///
/// It offers its listeners at a path, and accepts from them through [`Gated`] listeners. The first
/// process [binds](Self::bind) it; each further one gets it from [`request`](super::request()) and
/// [`Pending::ready`](super::Pending::ready).
///
/// Dropped, it closes its listeners. If it has a predecessor that still drains, that one accepts
/// again.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::net::TcpListener;
///
/// use fdwire::takeover::{self, Listeners, Options, Phase, Server};
/// use tokio::net::TcpStream;
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("app.takeover");
/// // The running server.
/// let mut listeners = Listeners::new();
/// listeners.add("http", TcpListener::bind("127.0.0.1:0")?)?;
/// let old = Server::bind(&path, listeners, Options::default())?;
///
/// // The new process.
/// let new = takeover::request(&path, Options::default()).await?.ready().await?;
/// let http = new.gated::<tokio::net::TcpListener>("http", 0)?;
/// # use fdwire::takeover::protocol::Address;
/// # let Address::Ip(address) = http.identity().address else { unreachable!() };
/// let (client, served) = tokio::join!(TcpStream::connect(address), http.accept());
/// # client?; served?;
///
/// // The running server drains, and leaves.
/// old.replaced().await;
/// assert!(old.drained().await);
/// assert_eq!((old.phase(), new.phase()), (Phase::Replaced, Phase::Serving));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Server {
    pub(super) shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

impl Server {
    /// Offers listeners at a path, which gets the [mode](Options::mode) 0600.
    ///
    /// # Errors
    /// [`Error::Io`] with `AddrInUse` if a live process has the path: take over from it, with
    /// [`request`](super::request()).
    ///
    /// # Panics
    /// Outside of a tokio runtime, or if its I/O driver or its timer is not enabled.
    pub fn bind(
        path: impl AsRef<Path>,
        listeners: Listeners,
        options: Options,
    ) -> Result<Self, Error> {
        // The lock first: it proves that no other process serves at the path.
        let guard = PathGuard::take(path.as_ref())?;
        let path = guard.path().to_owned();
        let control = Control::bind(guard, options.mode)?;
        passed::close_copies(&listeners.cookies());
        let shared = Shared::new(options, path, FIRST_GENERATION, listeners, Some(control), false);
        Ok(Self::start(Arc::new(shared), None::<Ready<()>>))
    }

    pub(super) fn start(
        shared: Arc<Shared>,
        predecessor: Option<impl Future<Output = ()> + Send + 'static>,
    ) -> Self {
        let mut tasks = vec![tokio::spawn(accept_takers(Arc::clone(&shared)))];
        tasks.extend(predecessor.map(tokio::spawn));
        Self { shared, tasks }
    }

    /// Returns a listener that accepts while this process serves: `L` is
    /// [`TcpListener`](tokio::net::TcpListener), [`UnixListener`](tokio::net::UnixListener) or
    /// [`Listener`].
    ///
    /// # Errors
    /// [`Error::NoSuchListener`] and [`Error::WrongKind`].
    pub fn gated<L: Accepts>(&self, name: &str, index: u32) -> Result<Gated<L>, Error> {
        Gated::new(Arc::clone(&self.shared), name, index)
    }

    /// Adds a listener, which is offered to processes that take over from then on. Returns its
    /// index among those with its name.
    ///
    /// To make a `SO_REUSEPORT` group larger, let a new socket listen only now that this process
    /// serves: clients are in its queue from that moment.
    ///
    /// # Errors
    /// [`Error::Refused`] while another process is taking over, or has taken over. Otherwise those
    /// of [`Listeners::add`].
    pub fn add(&self, name: impl Into<String>, listener: impl Into<OwnedFd>) -> Result<u32, Error> {
        self.shared.add_listener(name.into(), listener.into())
    }

    /// Returns a UDP socket that receives while this process serves. Ask for it once: two of them
    /// take each other's datagrams.
    ///
    /// # Errors
    /// [`Error::NoSuchListener`], [`Error::WrongKind`], and [`Error::Io`] if there is no descriptor
    /// left.
    pub fn datagrams(&self, name: &str, index: u32) -> Result<Datagrams, Error> {
        Datagrams::new(Arc::clone(&self.shared), name, index)
    }

    /// Returns the number of this process among all that have asked for a takeover: 1 for the first
    /// one. No other process that serves or drains has the same.
    pub fn generation(&self) -> u32 {
        self.shared.generation
    }

    /// Returns a copy of a listener's descriptor: for options, and for Unix datagram sockets.
    ///
    /// Code that receives datagrams from it has to stop when this process is
    /// [replaced](Self::replaced), because two readers of one socket take each other's datagrams.
    /// For UDP, [`datagrams`](Self::datagrams) takes care of that.
    ///
    /// # Errors
    /// [`Error::NoSuchListener`], and [`Error::Io`] if there is no descriptor left.
    pub fn socket(&self, name: &str, index: u32) -> Result<OwnedFd, Error> {
        self.shared.with_listeners(|listeners| {
            Ok(listeners.find(name, index)?.fd.as_fd().try_clone_to_owned()?)
        })
    }

    /// Returns the identities of the listeners. Empty once another process has taken over for
    /// good.
    pub fn identities(&self) -> Vec<Identity> {
        self.shared.with_listeners(|listeners| listeners.identities().cloned().collect())
    }

    /// Returns the listeners that the new process had no use for. Nobody accepts from them.
    pub fn declined(&self) -> Vec<Identity> {
        self.shared.declined()
    }

    /// Returns the phase that this process is in.
    pub fn phase(&self) -> Phase {
        self.shared.phase()
    }

    /// Waits until another process has taken over. Then finish the open connections, and call
    /// [`drained`](Self::drained).
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn replaced(&self) {
        self.wait(|status| status.phase != Phase::Serving).await;
    }

    /// Waits until a takeover is undone, and this process accepts again. Returns false if that
    /// can't happen any longer.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn undone(&self) -> bool {
        self.wait(|status| status.phase != Phase::Draining).await.phase == Phase::Serving
    }

    /// Makes the takeover final, after this process has finished its connections. Returns true if
    /// it may leave, and false if it serves, because nothing has replaced it or the takeover was
    /// undone.
    ///
    /// # Cancel safety
    /// The takeover becomes final even if this is dropped.
    pub async fn drained(&self) -> bool {
        if self.phase() == Phase::Draining && self.shared.command(Command::Drained) {
            self.undone().await;
        }
        self.phase() == Phase::Replaced
    }

    /// Calls off the takeover that is under way, unless the new process is ready already.
    pub fn withdraw(&self) {
        self.shared.command(Command::Withdraw);
    }

    /// Gives the listeners back to the server that this process has replaced, as long as that one
    /// drains. This process serves until the answer.
    ///
    /// # Errors
    /// Gives the baton back if that server can't serve again. This process goes on then.
    pub async fn hand_back(&self, baton: Bytes) -> Result<(), Bytes> {
        self.confirmed().await;
        let (answer, answered) = oneshot::channel();
        if !self.shared.command_predecessor(UpCommand::HandBack { baton: baton.clone(), answer }) {
            return Err(baton);
        }
        answered.await.unwrap_or(Err(baton))
    }

    /// Waits until everything is this process's, and returns the baton of its predecessor: `None`
    /// if this process was the first, or its predecessor died before it could put it down.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn confirmed(&self) -> Option<Bytes> {
        match self.wait(|status| status.baton != Baton::Coming).await.baton {
            Baton::Here(baton) => baton,
            Baton::Coming => None,
        }
    }

    /// Returns true if no predecessor of this process can serve again.
    pub fn is_final(&self) -> bool {
        !self.shared.status.borrow().has_predecessor
    }

    /// Lists the processes that were replaced and still finish their connections, the oldest first.
    pub fn generations(&self) -> Vec<Generation> {
        self.shared.with_generations(Generations::list)
    }

    /// Returns the process id of the one that has replaced this one. `None` if none has, or if it
    /// is in another PID namespace.
    pub fn successor(&self) -> Option<u32> {
        self.shared.status.borrow().successor
    }

    /// Passes the baton on after this process was [replaced](Self::replaced). For a server
    /// [with a baton](Options::with_baton), which no longer uses it.
    pub fn put_down_baton(&self, baton: Bytes) {
        self.shared.command(Command::PutDown(baton));
    }

    /// Sends state along with each takeover: the closure is called when one begins, and the new
    /// process finds the frames in [`Pending::take_state`](super::Pending::take_state).
    pub fn send_state(&self, state: impl Fn() -> Vec<Frame> + Send + Sync + 'static) {
        self.shared.set_application(Arc::new(state));
    }

    pub(super) async fn wait(&self, is_it: impl FnMut(&Status) -> bool) -> Status {
        self.shared.wait(is_it).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The end of their connections undoes what a predecessor may still undo.
        self.tasks.iter().for_each(JoinHandle::abort);
        self.shared.give_up();
    }
}

/// Accepts processes that want to take over, while this process serves.
async fn accept_takers(shared: Arc<Shared>) {
    let mut takers = JoinSet::new();
    loop {
        let status = shared.wait(|status| {
            status.phase == Phase::Serving && status.has_control || status.phase == Phase::Replaced
        });
        if status.await.phase == Phase::Replaced {
            break;
        }
        // A new copy of the socket each time: it leaves the event loop when the phase changes.
        match listener(&shared) {
            Ok(listener) => {
                tokio::select! {
                    _ = shared.wait(|status| status.phase != Phase::Serving) => {}
                    () = accept_from(&shared, &listener, &mut takers) => {}
                }
            }
            Err(error) => {
                warn!(%error, "takeover: no new process can connect for the moment");
                sleep(BACK_OFF).await;
            }
        }
    }
    // The last messages may still be on their way.
    while takers.join_next().await.is_some() {}
}

fn listener(shared: &Shared) -> std::io::Result<Listener> {
    let listener = Listener::unguarded(shared.control_copy()?, SocketKind::SeqPacket)?;
    // A kernel before Linux 6.16 refuses; descriptors are received and closed then.
    let _ = listener.set_pass_fds(false);
    Ok(listener.allow_uids(shared.options.uids.iter().copied()))
}

async fn accept_from(shared: &Arc<Shared>, listener: &Listener, takers: &mut JoinSet<()>) {
    loop {
        tokio::select! {
            accepted = listener.accept(), if takers.len() < MAX_CONNECTIONS => match accepted {
                Ok(socket) => spawn(takers, shared, socket),
                Err(error) => {
                    warn!(%error, "takeover: a new process can't be accepted for the moment");
                    sleep(BACK_OFF).await;
                }
            },
            Some(_) = takers.join_next() => {}
        }
    }
}

fn spawn(takers: &mut JoinSet<()>, shared: &Arc<Shared>, socket: Socket) {
    takers.spawn(give(Arc::clone(shared), socket));
}
