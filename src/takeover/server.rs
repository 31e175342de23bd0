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
    shared::{Baton, Command, PredecessorCommand, Shared, Status},
};
use crate::{Frame, Listener, Socket, SocketKind, socket::PathGuard};

/// The greatest number of connections to the control socket at a time. Others wait in the queue of
/// the kernel.
const MAX_CONNECTIONS: usize = 16;

/// The generation of the first process at a path.
pub(super) const FIRST_GENERATION: u32 = 1;

/// The time until the next attempt to accept if no descriptor is left.
const BACK_OFF: Duration = Duration::from_millis(20);

/// A server that a new process can take over from.
///
/// A server offers its listeners at a path, and accepts from them through [`Gated`] listeners. The
/// first process [binds](Self::bind) it. Each further process gets it from
/// [`request`](super::request()) and [`Pending::ready`](super::Pending::ready).
///
/// When a server is dropped, it closes its listeners. If the process before it still drains, that
/// process accepts again.
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
    /// The task that accepts takeovers, and the one for the predecessor. Aborted when dropped.
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
        // The lock comes first, because it proves that no other process serves at the path.
        let guard = PathGuard::take(path.as_ref())?;
        let path = guard.path().to_owned();
        let control = Control::bind(guard, options.mode)?;
        passed::close_copies(&listeners.cookies());
        let shared = Shared::new(options, path, FIRST_GENERATION, listeners, Some(control), false);
        Ok(Self::start(Arc::new(shared), None::<Ready<()>>))
    }

    /// Starts the tasks of a server.
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

    /// Adds a listener, which is offered in all later takeovers. Returns its index among the
    /// listeners with its name.
    ///
    /// To make a `SO_REUSEPORT` group larger, call listen(2) on the new socket only now that this
    /// process serves. From that moment the kernel assigns clients to it.
    ///
    /// # Errors
    /// [`Error::Refused`] while another process is taking over, or has taken over. Otherwise the
    /// errors of [`Listeners::add`].
    pub fn add(&self, name: impl Into<String>, listener: impl Into<OwnedFd>) -> Result<u32, Error> {
        self.shared.add_listener(name.into(), listener.into())
    }

    /// Returns a UDP socket that receives while this process serves. Call this once for each
    /// socket: two values for one socket take each other's datagrams.
    ///
    /// # Errors
    /// [`Error::NoSuchListener`], [`Error::WrongKind`], and [`Error::Io`] if there is no descriptor
    /// left.
    pub fn datagrams(&self, name: &str, index: u32) -> Result<Datagrams, Error> {
        Datagrams::new(Arc::clone(&self.shared), name, index)
    }

    /// Returns the number of this process among all that have requested a takeover. The first
    /// process has 1. No other process that serves or drains has the same number.
    pub fn generation(&self) -> u32 {
        self.shared.generation
    }

    /// Returns a copy of a listener's descriptor, for example to set options or to use a Unix
    /// datagram socket.
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

    /// Returns the identities of the listeners. The list is empty once another process has taken
    /// over for good.
    pub fn identities(&self) -> Vec<Identity> {
        self.shared.with_listeners(|listeners| listeners.identities().cloned().collect())
    }

    /// Returns the listeners that the new process has [declined](super::Pending::decline). Nobody
    /// accepts from them.
    pub fn declined(&self) -> Vec<Identity> {
        self.shared.declined()
    }

    /// Returns the phase of this process.
    pub fn phase(&self) -> Phase {
        self.shared.phase()
    }

    /// Waits until another process has taken over. After that, finish the open connections, and
    /// call [`drained`](Self::drained). [`finish`](Self::finish) does all of it.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn replaced(&self) {
        self.wait(|status| status.phase != Phase::Serving).await;
    }

    /// Waits until a takeover is undone and this process accepts again. Returns false if this
    /// process can't serve again.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn undone(&self) -> bool {
        self.wait(|status| status.phase != Phase::Draining).await.phase == Phase::Serving
    }

    /// Makes the takeover final. Call this after the connections of this process have ended.
    ///
    /// Returns true if this process may exit. Returns false if it serves, because no process has
    /// replaced it or the takeover was undone.
    ///
    /// # Cancel safety
    /// The takeover becomes final even if this is dropped.
    pub async fn drained(&self) -> bool {
        if self.phase() == Phase::Draining && self.shared.command(Command::Drained) {
            self.undone().await;
        }
        self.phase() == Phase::Replaced
    }

    /// Calls off the current takeover, unless the new process has already written that it is ready.
    pub fn withdraw(&self) {
        self.shared.command(Command::Withdraw);
    }

    /// Hands the listeners back to the server that this process has replaced, if that server still
    /// drains. This process serves until that server has answered.
    ///
    /// # Errors
    /// The baton, if that server can't serve again. Then this process goes on serving.
    pub async fn hand_back(&self, baton: Bytes) -> Result<(), Bytes> {
        self.confirmed().await;
        let (answer, answered) = oneshot::channel();
        if !self
            .shared
            .command_predecessor(PredecessorCommand::HandBack { baton: baton.clone(), answer })
        {
            return Err(baton);
        }
        answered.await.unwrap_or(Err(baton))
    }

    /// Waits until the predecessor has passed everything on, and returns its baton. The baton is
    /// `None` if this process is the first, or if the predecessor died before it put the baton
    /// down.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn confirmed(&self) -> Option<Bytes> {
        match self.wait(|status| status.baton != Baton::Awaited).await.baton {
            Baton::Held(baton) => baton,
            Baton::Awaited => None,
        }
    }

    /// Returns true if the takeover by this process can't be undone, because no predecessor can
    /// serve again.
    pub fn is_final(&self) -> bool {
        !self.shared.status.borrow().has_predecessor
    }

    /// Lists the processes that were replaced and still finish their connections, the oldest first.
    pub fn generations(&self) -> Vec<Generation> {
        self.shared.with_generations(Generations::list)
    }

    /// Returns the id of the process that has replaced this one. `None` if no process has, or if it
    /// is in another PID namespace.
    pub fn successor(&self) -> Option<u32> {
        self.shared.status.borrow().successor
    }

    /// Passes the baton on. A server [with a baton](Options::with_baton) has to call this once it
    /// was [replaced](Self::replaced) and no longer uses the baton.
    pub fn put_down_baton(&self, baton: Bytes) {
        self.shared.command(Command::PutDown(baton));
    }

    /// Sends state along with each takeover. The closure is called when a takeover begins, and the
    /// new process gets the frames from [`Pending::take_state`](super::Pending::take_state).
    pub fn send_state(&self, state: impl Fn() -> Vec<Frame> + Send + Sync + 'static) {
        self.shared.set_state_source(Arc::new(state));
    }

    /// Waits until the status satisfies a condition.
    pub(super) async fn wait(&self, is_it: impl FnMut(&Status) -> bool) -> Status {
        self.shared.wait(is_it).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The tasks close their connections. If the predecessor still drains, it accepts again.
        self.tasks.iter().for_each(JoinHandle::abort);
        self.shared.give_up();
    }
}

/// Accepts connections of processes that request a takeover, while this process serves.
async fn accept_takers(shared: Arc<Shared>) {
    let mut takers = JoinSet::new();
    loop {
        let status = shared.wait(|status| {
            status.phase == Phase::Serving && status.has_control || status.phase == Phase::Replaced
        });
        if status.await.phase == Phase::Replaced {
            break;
        }
        // While another process serves, the socket must not be in the event loop of this one. So
        // each phase has a copy of its own.
        match listener(&shared) {
            Ok(listener) => {
                tokio::select! {
                    _ = shared.wait(|status| status.phase != Phase::Serving) => {}
                    () = accept_from(&shared, &listener, &mut takers) => {}
                }
            }
            Err(error) => {
                warn!(%error, "takeover: can't listen for new processes; trying again");
                sleep(BACK_OFF).await;
            }
        }
    }
    // The tasks of old connections may still have to send their last messages.
    while takers.join_next().await.is_some() {}
}

/// Returns a listener for a copy of the control socket.
fn listener(shared: &Shared) -> std::io::Result<Listener> {
    let listener = Listener::unguarded(shared.control_copy()?, SocketKind::SeqPacket)?;
    // Linux before 6.16 can't refuse descriptors. Then they are received, and closed.
    let _ = listener.set_pass_fds(false);
    Ok(listener.allow_uids(shared.options.uids.iter().copied()))
}

/// Accepts connections without end, and starts a task for each.
async fn accept_from(shared: &Arc<Shared>, listener: &Listener, takers: &mut JoinSet<()>) {
    loop {
        tokio::select! {
            accepted = listener.accept(), if takers.len() < MAX_CONNECTIONS => match accepted {
                Ok(socket) => spawn(takers, shared, socket),
                Err(error) => {
                    warn!(%error, "takeover: can't accept a new process; trying again");
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
