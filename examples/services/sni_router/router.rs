//! The router: accepts, finds the workers for each client, and hands it over.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use fdwire::handoff::{Accepted, Dispatcher, Permit, WorkerCommand};
use rustls::AlertDescription;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    process::Command,
    select,
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    clients::Clients,
    hello::{Hello, NoHello, alert, read_hello, refuse},
};

/// Hands the connections of TLS clients to workers, by the name that a client asks for.
pub(crate) struct Router {
    workers: HashMap<String, Dispatcher>,
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
        Self { workers: HashMap::new(), clients: Clients::new(max_clients), patience }
    }

    /// Starts a worker for a name.
    ///
    /// # Errors
    /// They have the name of the program.
    pub(crate) fn add_worker(&mut self, name: &str, command: Command) -> io::Result<()> {
        let worker = WorkerCommand::from(command).restart(true);
        let name = name.to_ascii_lowercase();
        let dispatcher = self.workers.entry(name).or_insert_with(|| Dispatcher::builder().build());
        dispatcher.spawn_worker(worker).map(drop)
    }

    /// Accepts clients and hands them over.
    pub(crate) async fn serve(self: Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((client, address)) => {
                    let router = Arc::clone(&self);
                    tokio::spawn(async move {
                        if let Err(refusal) = router.route(client).await {
                            tracing::debug!("{address} is refused: {refusal}");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!("cannot accept connections for a while: {error}");
                    sleep(Duration::from_millis(100)).await; // usually descriptors are scarce
                }
            }
        }
    }

    /// Tells the workers to finish what they have, and waits until they have ended.
    pub(crate) async fn drain(&self, within: Duration) {
        for dispatcher in self.workers.values() {
            dispatcher.drain(Some(within)).await;
        }
    }

    /// Hands a client over, or answers why not.
    async fn route(&self, mut client: TcpStream) -> Result<(), Refusal> {
        let mut held = self.clients.hold();
        let found = select! {
            found = self.find_worker(&mut client) => found,
            () = held.let_go() => {
                let refusal = Refusal::LetGo;
                // Nothing was sent before, so this does not wait for the client.
                let _ = client.write_all(&refusal.answer()).await;
                return Err(refusal);
            }
        };
        match found {
            Ok((Hello { server_name, bytes }, permit)) => {
                let accepted = Accepted::from(client).read_bytes(bytes).metadata(server_name);
                drop(permit.dispatch(accepted)); // the outcome is the dispatcher's business
                Ok(())
            }
            Err(refusal) => {
                let answer = refusal.answer();
                select! {
                    _ = timeout(TIME_TO_LEAVE, refuse(client, &answer)) => {}
                    () = held.let_go() => {}
                }
                Err(refusal)
            }
        }
    }

    /// Reads the ClientHello, and waits for a place at a worker of that name.
    async fn find_worker(&self, client: &mut TcpStream) -> Result<(Hello, Permit), Refusal> {
        let deadline = Instant::now() + self.patience;
        let hello = timeout_at(deadline, read_hello(client)).await;
        let hello = hello.map_err(|_| Refusal::Slow(self.patience))??;
        let name = &hello.server_name;
        let Some(dispatcher) = self.workers.get(name) else {
            return Err(Refusal::UnknownName(name.clone()));
        };
        match timeout_at(deadline, dispatcher.reserve()).await {
            Ok(Some(permit)) => Ok((hello, permit)),
            Ok(None) | Err(_) => Err(Refusal::NoWorker(name.clone())),
        }
    }
}
