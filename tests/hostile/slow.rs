//! Sockets whose last `close` takes as long as their peer likes.

use std::{
    future::Future,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::mpsc::{self, RecvTimeoutError},
};

use nix::{
    libc,
    sys::socket::{setsockopt, sockopt},
};
use tokio::sync::oneshot;

use crate::PATIENCE;

/// Makes the server's end of a TCP connection whose last `close` takes an hour, or until the client
/// reads: `SO_LINGER` is set, and not all of its bytes can be sent.
pub(crate) fn slow_to_close() -> (OwnedFd, Client) {
    let (server, client) = full_connection();
    linger(&server);
    (server, client)
}

/// Makes the server's end of a TCP connection with bytes that it can't send until the client reads.
pub(crate) fn full_connection() -> (OwnedFd, Client) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut server = listener.accept().unwrap().0;
    // Small buffers are full soon, even with many connections at the same time. Even smaller ones
    // are read slowly.
    setsockopt(&client, sockopt::RcvBuf, &65536).unwrap();
    setsockopt(&server, sockopt::SndBuf, &65536).unwrap();
    server.set_nonblocking(true).unwrap();
    let mut sent = 0;
    loop {
        match server.write(&[7; 4096]) {
            Ok(bytes) => sent += bytes,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                return (server.into(), Client { stream: client, sent });
            }
        }
    }
}

/// Makes the last `close` wait for the client, which any holder of the socket can do.
pub(crate) fn linger(socket: &impl std::os::fd::AsFd) {
    setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 3600 }).unwrap();
}

/// The client of such a connection.
pub(crate) struct Client {
    stream: TcpStream,
    sent: usize,
}

impl Client {
    /// Reads up to the end, which comes when the last copy of the server's end is closed.
    ///
    /// # Errors
    /// Fails if the server's end is not closed, or if bytes are missing.
    pub(crate) fn read_to_end(mut self) -> Result<(), String> {
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut received, mut buffer) = (0, [0; 65536]);
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) if received == self.sent => return Ok(()),
                Ok(0) => return Err(format!("{received} of {} bytes arrived", self.sent)),
                Ok(bytes) => received += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Err("a slow socket is never closed".to_owned());
                }
                Err(error) => {
                    return Err(format!("{received} of {} bytes arrived: {error}", self.sent));
                }
            }
        }
    }
}

/// A thread that keeps the clients of slow sockets from reading until the operation under test has
/// returned. So an operation that waits for one of them can't return by itself. After [`PATIENCE`]
/// the clients read nevertheless, and the test fails.
pub(crate) struct Watchdog {
    returned: mpsc::Sender<()>,
    report: oneshot::Receiver<Result<(), String>>,
}

impl Watchdog {
    /// Starts the thread.
    pub(crate) fn start(clients: Vec<Client>) -> Self {
        let (returned, has_returned) = mpsc::channel();
        let (outcome_of_clients, report) = oneshot::channel();
        std::thread::spawn(move || {
            let hangs = has_returned.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
            let mut outcome = clients.into_iter().try_for_each(Client::read_to_end);
            if hangs {
                outcome = Err("the operation waits for a close".to_owned());
                if has_returned.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    eprintln!("the operation does not return, although every client has read");
                    std::process::abort();
                }
            }
            let _ = outcome_of_clients.send(outcome);
        });
        Self { returned, report }
    }

    /// Reports that the operation has returned. Lets the clients read, and fails unless each sees
    /// the end of its connection after all bytes.
    pub(crate) async fn returned(self) {
        let _ = self.returned.send(());
        self.report.await.unwrap().unwrap();
    }
}

/// Runs an operation that must not wait for the slow sockets of these clients, and checks that the
/// sockets are closed nevertheless, with nothing lost.
pub(crate) async fn without_waiting<T>(
    clients: impl IntoIterator<Item = Client>,
    operation: impl Future<Output = T>,
) -> T {
    let watchdog = Watchdog::start(clients.into_iter().collect());
    let output = operation.await;
    watchdog.returned().await;
    output
}
