//! HTTP clients that show how connections spread over the workers.

use std::{
    collections::BTreeMap,
    io::{Error, Result},
    net::SocketAddr,
    time::{Duration, Instant},
};

use comfy_table::{CellAlignment, Table, presets};
use futures::{StreamExt, stream};
use hdrhistogram::Histogram;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

const AT_A_TIME: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Report {
    /// Microseconds of the answered requests, by the worker's process id.
    workers: BTreeMap<u32, Histogram<u64>>,
    failures: Vec<String>,
    elapsed: Duration,
}

/// Sends requests, each on a connection of its own.
pub(crate) async fn run(requests: u32, address: SocketAddr, worker_pids: Vec<u32>) -> Report {
    let mut workers = BTreeMap::from_iter(worker_pids.into_iter().map(|pid| (pid, histogram())));
    let mut failures = Vec::new();
    let begin = Instant::now();
    let mut outcomes = stream::iter(0..requests).map(|_| request(address)).buffer_unordered(AT_A_TIME);
    while let Some(outcome) = outcomes.next().await {
        match outcome {
            Ok((pid, latency)) => {
                workers.entry(pid).or_insert_with(histogram).saturating_record(latency.as_micros() as u64);
            }
            Err(error) => failures.push(error.to_string()),
        }
    }
    Report { workers, failures, elapsed: begin.elapsed() }
}

/// Of microseconds up to the longest that is waited, with three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(PATIENCE.as_micros() as u64, 3).expect("the bounds are valid")
}

/// The worker that answered, and how long it took from the connect to the last byte of the answer.
async fn request(address: SocketAddr) -> std::result::Result<(u32, Duration), Box<dyn std::error::Error>> {
    let exchange = async {
        let begin = Instant::now();
        let (mut sender, connection) = http1::handshake(TokioIo::new(TcpStream::connect(address).await?)).await?;
        let request = Request::get("/")
            .header(header::HOST, address.to_string())
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())?;
        let answer = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            Ok((status, body, begin.elapsed()))
        };
        // The connection is done when the worker has closed it.
        let ((status, body, latency), ()) = tokio::try_join!(answer, connection)?;
        if status != 200 {
            return Err(format!("status {status}").into());
        }
        let body = std::str::from_utf8(&body)?;
        let pid = body.split(' ').nth(1).ok_or("the answer names no worker")?;
        Ok((pid.parse()?, latency))
    };
    timeout(PATIENCE, exchange).await?
}

impl Report {
    /// # Errors
    /// If any request failed.
    pub(crate) fn print(&self) -> Result<()> {
        let mut all = histogram();
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
            "worker",
            "connections",
            "failures",
            "p50 ms",
            "p99 ms",
        ]);
        for (pid, latencies) in &self.workers {
            all += latencies;
            table.add_row(row(pid.to_string(), latencies, String::new()));
        }
        table.add_row(row("all".to_owned(), &all, self.failures.len().to_string()));
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("{table}");

        let (requests, seconds) = (all.len() + self.failures.len() as u64, self.elapsed.as_secs_f64());
        println!("{requests} requests in {seconds:.2} s, {:.0} requests/s", requests as f64 / seconds);
        match &self.failures[..] {
            [] => Ok(()),
            [first, ..] => Err(Error::other(format!("{} requests failed, the first: {first}", self.failures.len()))),
        }
    }
}

fn row(worker: String, latencies: &Histogram<u64>, failures: String) -> [String; 5] {
    let milliseconds = |quantile| format!("{:.2}", latencies.value_at_quantile(quantile) as f64 / 1000.0);
    [worker, latencies.len().to_string(), failures, milliseconds(0.5), milliseconds(0.99)]
}
