//! Clients that connect all the time.

use std::{
    io::{self, Read},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

const CLIENTS: usize = 4;

/// The time of a measurement under load.
pub(crate) const WINDOW: Duration = Duration::from_millis(400);

/// Clients that connect again as soon as they are answered.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    accepted: Arc<Mutex<Vec<Instant>>>,
    clients: Vec<JoinHandle<io::Result<()>>>,
}

impl Load {
    pub(crate) fn start(address: SocketAddr) -> Self {
        let (stop, accepted) =
            (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<Instant>>>::default());
        let client = |_| {
            let (stop, accepted) = (Arc::clone(&stop), Arc::clone(&accepted));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    TcpStream::connect(address)?.read_exact(&mut [0; 5])?;
                    accepted.lock().unwrap().push(Instant::now());
                }
                Ok(())
            })
        };
        let clients = (0..CLIENTS).map(client).collect();
        Self { stop, accepted, clients }
    }

    /// Returns the times at which connections were answered, and forgets them.
    pub(crate) fn take(&self) -> Vec<Instant> {
        std::mem::take(&mut *self.accepted.lock().unwrap())
    }

    /// Ends the clients.
    ///
    /// # Errors
    /// The first failed connection of a client.
    pub(crate) fn stop(self) -> io::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.clients
            .into_iter()
            .try_for_each(|client| client.join().expect("a client does not panic"))
    }
}

/// Returns the longest time between two connections.
pub(crate) fn longest_gap(accepted: &[Instant]) -> Duration {
    let gaps = accepted.windows(2).map(|pair| pair[1].saturating_duration_since(pair[0]));
    gaps.max().unwrap_or_default()
}
