//! The spans that follow a connection through two processes.

use std::{
    fs::{self, File},
    path::Path,
    process::Stdio,
    sync::Mutex,
};

use fdwire::{
    Socket, SocketKind,
    handoff::{Accepted, Dispatcher, Incoming},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::Command,
};
use tracing::{
    Event, Instrument, Metadata, Subscriber, info, span,
    subscriber::{set_default, set_global_default},
};
use tracing_subscriber::{EnvFilter, fmt::format::FmtSpan};

use crate::{
    common::{installed, run},
    descriptors::alone,
    raw_worker::{connections, until},
};

/// Returns a subscriber that writes a line to a file for each event in a span, and when a span
/// begins or ends.
fn subscriber(log: &Path) -> impl Subscriber + Send + Sync {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new("fdwire::connection=debug,dispatcher=info"))
        .with_span_events(FmtSpan::NEW | FmtSpan::CLOSE)
        .with_ansi(false)
        .with_writer(Mutex::new(File::create(log).unwrap()))
        .finish()
}

/// Returns the lines of a log about this span, each with the fields of the span and the event.
fn lines_of(log: &Path, span: &str) -> Vec<(String, String)> {
    let text = fs::read_to_string(log).unwrap();
    let lines = text.lines().filter_map(|line| {
        let (_, rest) = line.split_once(&format!(" {span}{{"))?;
        let (fields, event) = rest.split_once("}: ")?;
        Some((fields.to_owned(), event.to_owned()))
    });
    lines.collect()
}

/// Returns the value of a field of a span.
fn field<'a>(fields: &'a str, name: &str) -> &'a str {
    let value = fields.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_else(|| panic!("no {name} in {fields}"))
}

const TWO_PROCESSES: &str = "spans::a_connection_has_spans_of_one_number_in_two_processes";

/// Is the worker's process. The application logs an event in the span of each connection, and keeps
/// the connection until its client has gone.
async fn serve() {
    let mut incoming = Incoming::from_stdin().unwrap();
    let handle = incoming.handle();
    while let Some(mut connection) = incoming.next().await {
        let span = connection.span().clone();
        let serving = async move {
            info!("the application serves it");
            connection.write_all(b"hello").await.unwrap();
            while connection.read(&mut [0]).await.is_ok_and(|bytes| bytes > 0) {}
        };
        tokio::spawn(serving.instrument(span));
    }
    handle.ended().await;
}

#[test]
fn a_connection_has_spans_of_one_number_in_two_processes() {
    if let Some(log) = std::env::var_os("FDWIRE_LOG") {
        set_global_default(subscriber(Path::new(&log))).unwrap();
        return run(serve());
    }
    alone(TWO_PROCESSES, async {
        // A dispatcher starts a worker, and prepares each connection. Both processes have a log.
        let directory = tempfile::tempdir().unwrap();
        let (ours, theirs) = (directory.path().join("front"), directory.path().join("worker"));
        set_global_default(subscriber(&ours)).unwrap();
        let dispatcher = Dispatcher::builder().build();
        let mut command = Command::new("/proc/self/exe");
        command.args([TWO_PROCESSES, "--exact", "--nocapture"]).env("FDWIRE_LOG", &theirs);
        let id = dispatcher.spawn_worker({
            command.stdout(Stdio::null()).kill_on_drop(true);
            command
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn({
            let dispatcher = dispatcher.clone();
            let prepare = async |stream: TcpStream| {
                info!("the application prepares it");
                Some(Accepted::from(stream))
            };
            async move { dispatcher.serve_with(listener, prepare).await }
        });
        // Three clients are served, and all ends.
        let mut clients = Vec::new();
        for _ in 0..3 {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.read_exact(&mut [0; 5]).await.unwrap();
            clients.push(client);
        }
        let known_to_ss = known_to_ss();
        let peers = Vec::from_iter(clients.iter().map(|it| it.local_addr().unwrap().to_string()));
        drop(clients);
        dispatcher.drain(None).await;
        serving.await.unwrap().unwrap();

        // The logs have three spans of each connection, with the same number.
        let (dispatched, served) = (lines_of(&ours, "dispatch"), lines_of(&theirs, "serve"));
        let prepared = lines_of(&ours, "prepare");
        let is_end = |event: &str| event.starts_with("fdwire::connection: close");
        assert_eq!((dispatched.len(), served.len(), prepared.len()), (6, 9, 9));
        for peer in &peers {
            let of_peer = |lines: &[(String, String)]| {
                let lines = lines.iter().filter(|(fields, _)| field(fields, "peer") == peer);
                Vec::from_iter(lines.cloned())
            };
            // The dispatcher has a span from the accept to the adoption.
            let [(begin, begins), (end, ends)] = &of_peer(&dispatched)[..] else {
                panic!("{dispatched:?}")
            };
            let number = field(begin, "connection");
            assert_eq!(begins, "fdwire::connection: new");
            assert!(is_end(ends) && !begin.contains("outcome"), "{ends}");
            assert_eq!(field(end, "outcome"), "\"adopted\"");
            assert_eq!(field(end, "worker"), id.as_ref().unwrap().to_string());
            assert_eq!(field(end, "local"), address.to_string());
            // The worker has a span from the adoption to the end, with the application's event.
            let [(begin, begins), (_, event), (end, ends)] = &of_peer(&served)[..] else {
                panic!("{served:?}")
            };
            assert_eq!(begins, "fdwire::connection: new");
            assert_eq!(event, "dispatcher::spans: the application serves it");
            assert!(is_end(ends), "{ends}");
            assert_eq!((field(begin, "connection"), field(end, "connection")), (number, number));
            // Before these, the dispatcher has a span of the preparation.
            let number_is = |(fields, _): &&(String, String)| field(fields, "connection") == number;
            let prepared = Vec::from_iter(prepared.iter().filter(number_is));
            let [_, (_, event), (_, ends)] = &prepared[..] else { panic!("{prepared:?}") };
            assert_eq!(event, "dispatcher::spans: the application prepares it");
            assert!(is_end(ends), "{ends}");
            if let Some(known) = &known_to_ss {
                assert!(known.contains(&format!("sk:{number} ")), "{number} is not in {known}");
            }
        }
    });
}

/// Returns the lines that `ss -e` prints about connections, if it is installed.
fn known_to_ss() -> Option<String> {
    let ss = installed("ss")?;
    let output = std::process::Command::new(ss).args(["-tnHe"]).output().unwrap();
    Some(String::from_utf8(output.stdout).unwrap().replace('\n', " \n"))
}

#[test]
fn a_span_has_the_outcome_of_a_connection_that_no_worker_adopts() {
    const NAME: &str = "spans::a_span_has_the_outcome_of_a_connection_that_no_worker_adopts";
    alone(NAME, async {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        set_global_default(subscriber(&log)).unwrap();
        let dispatcher = Dispatcher::builder().build();
        let mut accepted = connections(2).await.into_iter().map(|(client, it)| {
            let peer = it.peer_addr().unwrap().to_string();
            (client, peer, dispatcher.dispatch(it))
        });
        let (_client, awaited_peer, awaited) = accepted.next().unwrap();
        let (_client, dropped_peer, dropped) = accepted.next().unwrap();
        drop(dropped);
        dispatcher.drain(None).await;
        awaited.await.unwrap_err();
        let mut outcomes = lines_of(&log, "dispatch");
        outcomes.retain(|(fields, _)| fields.contains("outcome"));
        let outcome_of = |peer: &str| {
            let (fields, _) = outcomes.iter().find(|(fields, _)| field(fields, "peer") == peer)?;
            assert!(!fields.contains("worker"), "{fields}");
            fields.split_once("outcome=").map(|(_, outcome)| outcome.to_owned())
        };
        assert_eq!(outcome_of(&awaited_peer).as_deref(), Some("\"given back\""));
        assert_eq!(outcome_of(&dropped_peer).as_deref(), Some("\"closed\""));
    });
}

/// A subscriber that panics when a span of a connection begins ("new"), gets a field ("record"), or
/// ends ("close").
struct Panics(&'static str);

impl Panics {
    fn at(&self, point: &str) {
        assert_ne!(self.0, point, "a subscriber that panics");
    }
}

impl Subscriber for Panics {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "fdwire::connection"
    }
    fn event(&self, _: &Event<'_>) {}
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        self.at("new");
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {
        self.at("record");
    }
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
    fn try_close(&self, _: span::Id) -> bool {
        self.at("close");
        true
    }
}

#[test]
fn a_subscriber_that_panics_in_a_span_harms_no_connection() {
    const NAME: &str = "spans::a_subscriber_that_panics_in_a_span_harms_no_connection";
    alone(NAME, async {
        for point in ["new", "record", "close"] {
            let _guard = set_default(Panics(point));
            let dispatcher = Dispatcher::builder().build();
            let (dispatcher_end, worker_end) = Socket::pair(SocketKind::SeqPacket).unwrap();
            let worker = dispatcher.add_worker(dispatcher_end);
            let mut incoming = Incoming::new(worker_end);
            for (client, accepted) in connections(3).await {
                let adopted = dispatcher.dispatch(accepted);
                let mut connection = incoming.next().await.unwrap();
                connection.write_all(b"hello").await.unwrap();
                drop(connection);
                assert_eq!((adopted.await.unwrap(), &*client.answer().await), (worker, "hello"));
            }
            drop(incoming);
            until("the worker has drained", || dispatcher.stats().retired.drained == 1).await;
        }
    });
}
