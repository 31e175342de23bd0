//! The router: accepts, finds the group of workers for each client, and hands the client over.

use std::{collections::HashSet, io, sync::Arc, time::Duration};

use fdwire::handoff::{Accepted, Dispatcher, WorkerCommand};
use rustls::AlertDescription;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    process::Command,
    select,
    time::{Instant, timeout, timeout_at},
};

use crate::{
    clients::Clients,
    hello::{Hello, NoHello, alert, read_hello, refuse},
};

/// Hands the connections of TLS clients to workers, by the name that a client asks for. The workers
/// of a name are a group of one dispatcher.
pub(crate) struct Router {
    dispatcher: Dispatcher,
    names: HashSet<String>,
    clients: Clients,
    /// The time until a client is handed over. All of it: a byte now and then does not extend it.
    patience: Duration,
}

/// Why a client is not handed over.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    NoHello(#[from] NoHello),
    #[error("no complete ClientHello within {0:?}")]
    Slow(Duration),
    #[error("there are no workers for the name {0:?}")]
    UnknownName(String),
    #[error("no worker for the name {0:?} takes connections")]
    NoWorker(String),
    #[error("it has been held longest, and others need its place")]
    LetGo,
}

impl Refusal {
    fn answer(&self) -> Vec<u8> {
        match self {
            Self::NoHello(error) => error.answer(),
            Self::UnknownName(_) => alert(AlertDescription::UnrecognisedName),
            Self::NoWorker(_) => alert(AlertDescription::InternalError),
            Self::Slow(_) | Self::LetGo => alert(AlertDescription::UserCanceled),
        }
    }
}

/// How long a client that was refused may take to end the connection.
const TIME_TO_LEAVE: Duration = Duration::from_secs(1);

impl Router {
    /// Returns a router that holds `max_clients` clients at a time, each for at most `patience`.
    pub(crate) fn new(max_clients: usize, patience: Duration) -> Self {
        // The router has limits of its own, which let the oldest client go. Those of the dispatcher
        // are higher, and stay unused.
        let dispatcher = Dispatcher::builder()
            .max_preparing(2 * max_clients)
            .prepare_timeout(patience + 2 * TIME_TO_LEAVE)
            .build();
        Self { dispatcher, names: HashSet::new(), clients: Clients::new(max_clients), patience }
    }

    /// Starts a worker for a name.
    ///
    /// # Errors
    /// They have the name of the program.
    pub(crate) fn add_worker(&mut self, name: &str, command: Command) -> io::Result<()> {
        let name = name.to_ascii_lowercase();
        let worker = WorkerCommand::from(command).restart(true);
        self.dispatcher.in_group(&*name).spawn_worker(worker)?;
        self.names.insert(name);
        Ok(())
    }

    /// Accepts clients and hands them over, until [`drain`](Self::drain).
    pub(crate) async fn serve(self: Arc<Self>, listener: TcpListener) -> io::Result<()> {
        let dispatcher = self.dispatcher.clone();
        let prepare = move |client| {
            let router = Arc::clone(&self);
            async move { router.prepare(client).await }
        };
        dispatcher.serve_with(listener, prepare).await
    }

    /// Tells the workers to finish what they have, and waits until they have ended.
    pub(crate) async fn drain(&self, within: Duration) {
        self.dispatcher.drain(Some(within)).await;
    }

    /// Prepares a client for the group of its name, or tells it why not.
    async fn prepare(&self, mut client: TcpStream) -> Option<Accepted> {
        let mut held = self.clients.hold();
        let found = select! {
            found = self.find_group(&mut client) => found,
            () = held.let_go() => Err(Refusal::LetGo),
        };
        let refusal = match found {
            Ok(Hello { server_name, bytes }) => {
                let accepted = Accepted::from(client).with_prefix(bytes);
                return Some(accepted.metadata(server_name.clone()).group(server_name));
            }
            Err(refusal) => refusal,
        };

        tracing::debug!(peer = ?client.peer_addr().ok(), "a client is refused: {refusal}");
        let answer = refusal.answer();
        if let Refusal::LetGo = refusal {
            // Nothing was sent before, so this does not wait for the client.
            let _ = client.write_all(&answer).await;
        } else {
            select! {
                _ = timeout(TIME_TO_LEAVE, refuse(client, &answer)) => {}
                () = held.let_go() => {}
            }
        }
        None
    }

    /// Reads the ClientHello, and waits until a worker of that name has room.
    async fn find_group(&self, client: &mut TcpStream) -> Result<Hello, Refusal> {
        let deadline = Instant::now() + self.patience;
        let hello = timeout_at(deadline, read_hello(client)).await;
        let hello = hello.map_err(|_| Refusal::Slow(self.patience))??;
        let name = &hello.server_name;
        if !self.names.contains(name) {
            return Err(Refusal::UnknownName(name.clone()));
        }
        // The dispatcher would wait as well, but without a deadline and without an answer. It takes
        // the place that is given up here.
        match timeout_at(deadline, self.dispatcher.in_group(&**name).reserve()).await {
            Ok(_place) => Ok(hello),
            Err(_) => Err(Refusal::NoWorker(name.clone())),
        }
    }
}
