//! The end of a replaced server's connections: spread over some time, and limited by a deadline.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::{
    Phase, Server,
    connections::Counts,
    shared::{Shared, Status},
};

/// The outcome of a [`Server::finish`]: this process may exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finished {
    /// Number of connections that were still open at the deadline, or when a successor asked this
    /// process to leave. They were cut, or are cut when the process exits.
    pub unfinished: usize,
}

impl fmt::Display for Finished {
    /// Writes for example `3 connections are cut`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unfinished {
            0 => f.write_str("all connections have ended"),
            1 => f.write_str("1 connection is cut"),
            cut => write!(f, "{cut} connections are cut"),
        }
    }
}

/// A connection that a server has accepted. Drop this value when the connection has ended.
///
/// After the server was [replaced](Server::replaced), [`ending`](Self::ending) and
/// [`deadline`](Self::deadline) return when the connection has to end.
#[derive(Debug)]
pub struct OpenConnection {
    shared: Arc<Shared>,
    /// The number of this connection among all. It determines the moment at which
    /// [`ending`](Self::ending) returns.
    number: u64,
    /// True once [`deadline`](Self::deadline) has returned.
    is_cut: AtomicBool,
}

impl Server {
    /// Registers a connection that this process has accepted. [`finish`](Self::finish) waits for
    /// it.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::time::Duration;
    ///
    /// use fdwire::takeover::{self, Listeners, Options, Server};
    /// use tokio::{io::AsyncReadExt, net::TcpListener};
    ///
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("app.takeover");
    /// # let mut listeners = Listeners::new();
    /// # listeners.bind_tcp("http", "127.0.0.1:0".parse()?)?;
    /// # let [spread, deadline] = [10, 20].map(Duration::from_millis);
    /// # let options = Options::default().drain(spread, deadline);
    /// let server = Server::bind(&path, listeners, options)?;
    /// let http = server.gated::<TcpListener>("http", 0)?;
    /// # use fdwire::takeover::protocol::Address;
    /// # let Address::Ip(address) = http.identity().address else { unreachable!() };
    /// # let client = tokio::net::TcpStream::connect(address).await?;
    /// let (mut stream, _) = http.accept().await?;
    /// let connection = server.open_connection();
    /// tokio::spawn(async move {
    ///     tokio::select! {
    ///         _ = stream.read_u8() => {} // serve the client
    ///         () = connection.ending() => {} // the server was replaced: end it
    ///     }
    /// });
    ///
    /// # let new = takeover::request(&path, Options::default()).await?.ready().await?;
    /// let finished = server.finish().await; // once it was replaced
    /// assert_eq!(finished.unfinished, 0);
    /// # Ok(()) }
    /// ```
    pub fn open_connection(&self) -> OpenConnection {
        let shared = Arc::clone(&self.shared);
        let number = shared.connections.opened.fetch_add(1, Ordering::Relaxed);
        shared.connections.counts.send_modify(|counts| counts.open += 1);
        OpenConnection { shared, number, is_cut: AtomicBool::new(false) }
    }

    /// Returns the number of [connections](Self::open_connection) that are open.
    pub fn open_connections(&self) -> usize {
        self.shared.connections.counts.borrow().open
    }

    /// Waits until another process has taken over for good and this one may exit. That is so when
    ///
    /// - its [connections](Self::open_connection) have ended,
    /// - or their [deadline](super::Options::drain) is over,
    /// - or a successor has asked it to leave because there are [too
    ///   many](super::Options::max_old_generations) old processes.
    ///
    /// As long as the takeover can be undone, this process stays for the whole spread of its drain.
    /// If the takeover is undone, this method waits for the next one.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub async fn finish(&self) -> Finished {
        loop {
            // Each takeover counts the connections that it cuts anew.
            let status = self.shared.wait(|status| status.phase != Phase::Serving).await;
            self.shared.connections.counts.send_modify(|counts| counts.cut = 0);
            tokio::select! {
                biased;
                // The takeover is undone: wait for the next one.
                _ = self.shared.wait(|status| status.phase == Phase::Serving) => continue,
                () = self.shared.connections_ended(&status) => {}
                () = self.shared.deadline() => {}
            }
            // A connection whose deadline is over counts as cut even if it has ended by now.
            let Counts { open, cut } = *self.shared.connections.counts.borrow();
            let unfinished = open + cut;
            // The takeover becomes final here, unless it is undone at this moment.
            if self.phase() == Phase::Replaced || self.drained().await {
                match unfinished {
                    0 => info!("takeover: all connections have ended; this process may exit"),
                    _ => warn!(unfinished, "takeover: connections are cut; this process may exit"),
                }
                return Finished { unfinished };
            }
        }
    }
}

impl OpenConnection {
    /// Returns true if another process serves. Then the next answer on this connection should be
    /// the last one: send `Connection: close` in HTTP/1.1.
    pub fn is_replaced(&self) -> bool {
        self.shared.phase() != Phase::Serving
    }

    /// Waits until this connection has to end, even if its client is silent: send GOAWAY in HTTP/2.
    ///
    /// After the server is replaced, this returns for each connection at another moment, and the
    /// moments are evenly spread. None is in the first tenth of the
    /// [spread](super::Options::drain): until then, active clients leave by themselves with the
    /// [last answer](Self::is_replaced).
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped. A later call returns at once if the moment has passed.
    pub async fn ending(&self) {
        self.shared.replaced_since(moment(self.number, self.shared.options.drain.spread)).await;
    }

    /// Waits until the connection has to be closed, even if a request is not finished: the
    /// [deadline](super::Options::drain) of the drain.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped. A later call returns at once if the deadline has passed.
    pub async fn deadline(&self) {
        self.shared.deadline().await;
        self.is_cut.store(true, Ordering::Relaxed);
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        // Both numbers change in one step, so that `finish` never misses a connection.
        let is_cut = self.is_cut.load(Ordering::Relaxed);
        self.shared.connections.counts.send_modify(|counts| {
            counts.open -= 1;
            counts.cut += usize::from(is_cut);
        });
    }
}

impl Shared {
    /// Waits until this process was replaced for this time, or has to leave. If the takeover is
    /// undone, this waits for the next one.
    async fn replaced_since(&self, duration: Duration) {
        loop {
            let Status { replaced_at: Some(replaced_at), must_leave: false, .. } =
                self.wait(|status| status.replaced_at.is_some() || status.must_leave).await
            else {
                return;
            };
            tokio::select! {
                biased;
                () = self.must_leave() => return,
                _ = self.wait(|status| status.phase == Phase::Serving) => {}
                () = sleep_for(duration, replaced_at) => return,
            }
        }
    }

    /// Waits until a successor asks this process to leave.
    async fn must_leave(&self) {
        self.wait(|status| status.must_leave).await;
    }

    /// Waits until the deadline of the drain is over.
    async fn deadline(&self) {
        self.replaced_since(self.options.drain.deadline).await;
    }

    /// Waits until no connection is open, but at least for the spread if a takeover can be undone.
    async fn connections_ended(&self, status: &Status) {
        if status.phase == Phase::Draining {
            tokio::select! {
                () = self.replaced_since(self.options.drain.spread) => {}
                _ = self.wait(|status| status.phase == Phase::Replaced) => {}
            }
        }
        let mut counts = self.connections.counts.subscribe();
        counts.wait_for(|counts| counts.open == 0).await.expect("this value has the sender");
    }
}

/// Waits until this time has passed since a moment. Never returns if the end is beyond the range of
/// [`Instant`].
async fn sleep_for(duration: Duration, since: Instant) {
    match since.checked_add(duration) {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Returns the time from the replacement of a server until the connection with this number has to
/// end: between a tenth of the spread and the whole spread.
///
/// The fractions of multiples of the golden ratio are spread evenly over the unit interval, for any
/// set of consecutive numbers. So each connection gets its moment without knowledge of the others.
/// For example, with a spread of 10 s the connections 1, 2, 3 and 4 end after 6.6 s, 3.1 s, 8.7 s
/// and 5.2 s.
fn moment(number: u64, spread: Duration) -> Duration {
    const GOLDEN_RATIO: u64 = 0x9E37_79B9_7F4A_7C15; // the fraction, in units of 2^-64
    let fraction = number.wrapping_mul(GOLDEN_RATIO) as f64 / 2f64.powi(64);
    Duration::try_from_secs_f64(spread.as_secs_f64() * (0.1 + 0.9 * fraction)).unwrap_or(spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the largest number of connections that end within one second. `numbers` are those of
    /// the connections that are still open, for example every third one, because it is idle.
    fn most_within_a_second(numbers: impl Iterator<Item = u64>) -> usize {
        let mut moments: Vec<_> =
            numbers.map(|number| moment(number, Duration::from_secs(10))).collect();
        moments.sort_unstable();
        let first = moments[0];
        assert!(
            first >= Duration::from_secs(1) && moments.last().unwrap() <= &Duration::from_secs(10)
        );
        let within = |from: Duration| {
            moments.iter().filter(|it| (from..from + Duration::from_secs(1)).contains(it)).count()
        };
        moments.iter().step_by(100).map(|&from| within(from)).max().unwrap()
    }

    #[test]
    fn the_outcome_reads_as_a_phrase() {
        let phrase = |unfinished| Finished { unfinished }.to_string();
        assert_eq!(phrase(0), "all connections have ended");
        assert_eq!(phrase(1), "1 connection is cut");
        assert_eq!(phrase(3), "3 connections are cut");
    }

    #[test]
    fn a_drain_without_an_end_is_no_overflow() {
        for number in [0, 1, 2, u64::MAX] {
            assert!(moment(number, Duration::MAX) > Duration::from_secs(u64::MAX / 100));
        }
        let mut sleep = std::pin::pin!(sleep_for(Duration::MAX, Instant::now()));
        assert!(futures::FutureExt::now_or_never(&mut sleep).is_none());
    }

    #[test]
    fn ten_thousand_connections_end_evenly_over_the_spread() {
        // 1,111 in each of nine seconds would be perfect.
        for step in [1, 2, 3, 5, 8, 10, 16, 21] {
            let most = most_within_a_second((0..10_000).map(|number| 12_345 + number * step));
            assert!(most < 1_200, "{most} of 10,000 connections end within a second");
        }
    }
}
