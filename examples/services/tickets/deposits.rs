//! The files that wait for their calls, and how they are deposited: by typed messages over a Unix
//! socket, with a policy for the descriptors, which takes read-only regular files only.

use std::{
    collections::HashMap,
    error::Error,
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use fdwire::{
    Framed, Listener, Socket, SocketKind, blocking, close_in_background,
    fd_policy::{FdMismatch, FdPolicy},
    typed::{Passable, Passed, Typed, TypedError},
};
use futures::{SinkExt, TryStreamExt};
use serde::{Deserialize, Serialize};

/// The files that wait for their call.
pub(crate) struct Tickets {
    waiting: Mutex<HashMap<String, Waiting>>,
    lifetime: Duration,
}

struct Waiting {
    file: File,
    /// The uid of the client that has deposited the file.
    uid: u32,
    until: Instant,
}

impl Tickets {
    /// No files yet. Each waits for this time.
    pub(crate) fn new(lifetime: Duration) -> Self {
        Self { waiting: Mutex::default(), lifetime }
    }

    /// The number of files of one uid that may wait at a time. Each takes a descriptor here.
    const MAX_FILES: usize = 64;

    /// Takes the file of a ticket, which is used up then.
    pub(crate) fn redeem(&self, ticket: &str) -> Option<File> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(ticket)?;
        if waiting.until < Instant::now() {
            close_in_background([waiting.file]);
            return None;
        }
        Some(waiting.file)
    }

    /// Closes the files whose tickets have expired.
    pub(crate) fn expire(&self) {
        let now = Instant::now();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let over: Vec<_> = waiting.extract_if(|_, waiting| waiting.until < now).collect();
        drop(waiting);
        close_in_background(over.into_iter().map(|(_, waiting)| waiting.file));
    }

    fn issue(&self, file: File, uid: u32) -> Answer {
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| format!("cannot get random bytes: {error}"))?;
        let ticket: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.values().filter(|other| other.uid == uid).count() >= Self::MAX_FILES {
            drop(waiting);
            close_in_background([file]);
            return Err(format!("{} files of uid {uid} wait already", Self::MAX_FILES));
        }
        waiting
            .insert(ticket.clone(), Waiting { file, uid, until: Instant::now() + self.lifetime });
        Ok(ticket)
    }
}

/// Deposits a file and returns the ticket.
pub(crate) fn deposit(path: &Path, file: &Path) -> Result<String, Box<dyn Error>> {
    let input = File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let socket = blocking::Socket::connect(path, SocketKind::SeqPacket)
        .map_err(|error| format!("cannot connect to {}: {error}", path.display()))?;
    let mut service = blocking::Framed::with_codecs(
        socket,
        Typed::<Answer>::default(),
        Typed::<Deposit>::default(),
    );
    service.set_read_timeout(Some(Duration::from_secs(10)));
    let failed = |error: TypedError| format!("the service at {}: {error}", path.display());
    service.send(Deposit(Input(input).into())).map_err(|refused| failed(refused.error))?;
    let refused = || format!("the service at {} has refused {}", path.display(), file.display());
    Ok(service.next().ok_or_else(refused)?.map_err(failed)??)
}

pub(crate) async fn take_deposits(
    side: Listener,
    tickets: &Arc<Tickets>,
) -> Result<(), Box<dyn Error>> {
    loop {
        let (socket, tickets) = (side.accept().await?, Arc::clone(tickets));
        tokio::spawn(async move {
            if let Err(error) = take_deposits_of(socket, &tickets).await {
                eprintln!("deposit refused: {error}");
            }
        });
    }
}

async fn take_deposits_of(socket: Socket, tickets: &Tickets) -> Result<(), TypedError> {
    let uid = socket.peer_cred().map_err(fdwire::Error::from)?.uid;
    let mut client =
        Framed::with_codecs(socket, Typed::<Deposit>::default(), Typed::<Answer>::default());
    while let Some(Deposit(file)) = client.try_next().await? {
        client.send(tickets.issue(file.into_inner().0, uid)).await?;
    }
    Ok(())
}

/// A file that may be deposited.
struct Input(File);

impl Passable for Input {
    type Fd = OwnedFd;

    fn check(fd: &OwnedFd) -> Result<(), FdMismatch> {
        FdPolicy::regular_file().read_only().check(fd)
    }

    fn from_fd(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    fn into_fd(self) -> OwnedFd {
        self.0.into()
    }
}

/// A message of a client.
#[derive(Serialize, Deserialize)]
struct Deposit(Passed<Input>);

/// The answer: a ticket, or the reason why there is none.
type Answer = Result<String, String>;
