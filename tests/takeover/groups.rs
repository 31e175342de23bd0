//! `SO_REUSEPORT` groups that change their size, under load.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use fdwire::takeover::{self, Error, Gated, Listeners, Options, Server, protocol::Address};
use rustix::net::sockopt::set_socket_reuseport;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::{common::*, control_path, process::Process, request};

const ROLE: &str = "groups::a_group_grows_and_shrinks_under_load_and_resets_no_client";

/// Makes the sockets of a group with this number of members.
pub(crate) fn group(size: usize) -> Vec<OwnedFd> {
    let first = socket(0);
    let port = std::net::TcpListener::from(first.try_clone().unwrap()).local_addr().unwrap().port();
    let rest = (1..size).map(|_| socket(port));
    [first].into_iter().chain(rest).collect()
}

fn socket(port: u16) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
    let fd = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    set_socket_reuseport(&fd, true).unwrap();
    bind(&fd, &SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
    listen(&fd, 1000).unwrap();
    fd
}

/// Is a server process with some workers, each of which accepts from its part of the group.
async fn serve(to_parent: OwnedFd) {
    // Bind a group with one socket for each worker, or take the group of the running server.
    let mut parent = UnixStream::from(to_parent);
    let mut report = |report: &str| parent.write_all(format!("{report}\n").as_bytes()).unwrap();
    let path = PathBuf::from(std::env::var_os("FDWIRE_PATH").unwrap());
    let workers: usize = std::env::var("FDWIRE_WORKERS").unwrap().parse().unwrap();
    let bind = || {
        let mut listeners = Listeners::new();
        for fd in group(workers) {
            listeners.add("http", fd)?;
        }
        Ok(listeners)
    };
    let pending = takeover::bind_or_take(&path, Options::default(), bind).await.unwrap();
    let Address::Ip(address) = pending.identities().next().unwrap().address else { unreachable!() };
    let server = pending.ready().await.unwrap();
    server.confirmed().await;
    // Each worker needs one socket at least.
    while server.identities().len() < workers {
        server.add("http", socket(address.port())).unwrap();
    }
    let sockets = server.identities().len();
    report(&format!("{address} {sockets}"));

    // Each worker accepts from its sockets.
    let open = Arc::new(AtomicUsize::new(0));
    for worker in 0..workers {
        for index in (worker..sockets).step_by(workers) {
            let http = server.gated::<TcpListener>("http", index as u32).unwrap();
            tokio::spawn(answer(http, Arc::clone(&open)));
        }
    }
    // After a takeover, the process leaves when no connection is open.
    server.replaced().await;
    while open.load(Ordering::SeqCst) > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(server.drained().await);
    report("left");
}

/// Answers each connection once.
async fn answer(http: Gated<TcpListener>, open: Arc<AtomicUsize>) {
    while let Ok((mut connection, _)) = http.accept().await {
        open.fetch_add(1, Ordering::SeqCst);
        let open = Arc::clone(&open);
        tokio::spawn(async move {
            let (read, mut write) = connection.split();
            let _ = tokio::io::BufReader::new(read).read_line(&mut String::new()).await;
            let _ = write.write_all(b"answer\n").await;
            open.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

fn start(path: &Path, workers: usize) -> Process {
    let mut command = Command::new("/proc/self/exe");
    command.env("FDWIRE_PATH", path).env("FDWIRE_WORKERS", workers.to_string());
    Process::start_role(command, ROLE)
}

/// Sends a request and reads the answer.
fn exchange(address: SocketAddr) -> std::io::Result<()> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(Duration::from_secs(30)))?;
    connection.write_all(b"who\n")?;
    match BufReader::new(connection).read_line(&mut String::new())? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

#[test]
fn a_group_grows_and_shrinks_under_load_and_resets_no_client() {
    if let Some(socket) = role_socket(ROLE) {
        return one_thread().block_on(serve(socket));
    }
    // A process has eight workers, and six clients send requests.
    let (_directory, path) = control_path();
    let mut process = start(&path, 8);
    let first = process.report();
    let (address, sockets) = first.split_once(' ').unwrap();
    assert_eq!(sockets, "8");
    let address: SocketAddr = address.parse().unwrap();
    let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..6)
        .map(|_| {
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            thread::spawn(move || {
                let mut failures = Vec::new();
                while !stop.load(Ordering::SeqCst) {
                    match exchange(address) {
                        Ok(()) => drop(answers.fetch_add(1, Ordering::SeqCst)),
                        Err(error) => failures.push(error.to_string()),
                    }
                }
                failures
            })
        })
        .collect();
    // Processes with other numbers of workers replace each other. The group never loses sockets.
    for workers in [2, 8, 2, 16, 3, 16] {
        let before = answers.load(Ordering::SeqCst);
        let mut next = start(&path, workers);
        let report = next.report();
        let sockets: usize = report.split_once(' ').unwrap().1.parse().unwrap();
        assert!(sockets >= workers.max(8), "{report}");
        assert_eq!(process.report(), "left");
        assert!(process.child.wait().unwrap().success());
        process = next;
        while answers.load(Ordering::SeqCst) < before + 300 {
            thread::yield_now(); // so many answers come from all sockets
        }
    }
    // No request has failed.
    stop.store(true, Ordering::SeqCst);
    let failures: Vec<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
    println!("{} answers, {} failures", answers.load(Ordering::SeqCst), failures.len());
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn a_part_of_a_group_can_not_be_declined() {
    run(async {
        // A group has three members. A takeover that declines one of them fails.
        let (_directory, path) = control_path();
        let mut listeners = Listeners::new();
        for fd in group(3) {
            listeners.add("http", fd).unwrap();
        }
        listeners.add("other", std::net::TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        let old = Server::bind(&path, listeners, Options::default()).unwrap();
        let mut pending = request(&path).await;
        pending.decline("http", 1).unwrap();
        let refused = pending.ready().await.unwrap_err();
        assert!(matches!(refused, Error::SplitGroup { .. }), "{refused}");
        assert!(
            refused.to_string().starts_with("listener \"http\" 1 (TCP 127.0.0.1:"),
            "{refused}"
        );
        // Nothing has changed, and the whole group can be declined.
        let mut pending = loop {
            match takeover::request(&path, Options::default()).await {
                Ok(pending) => break pending,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        for index in 0..3 {
            pending.decline("http", index).unwrap();
        }
        let new = pending.ready().await.unwrap();
        old.replaced().await;
        assert_eq!((old.declined().len(), new.identities().len()), (3, 1));
    });
}

#[test]
fn a_listener_that_is_added_moves_and_none_is_added_while_another_process_takes_over() {
    run(async {
        let (_directory, path) = control_path();
        let old = crate::first(&path);
        let listener = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(old.add("http", listener()).unwrap(), 1);
        assert_eq!(old.add("admin", listener()).unwrap(), 0);
        let mut pending = request(&path).await;
        assert!(matches!(old.add("late", listener()), Err(Error::Refused(_))));
        assert_eq!(pending.identities().count(), 3);
        pending.decline("admin", 0).unwrap();
        let new = pending.ready().await.unwrap();
        old.replaced().await;
        assert!(matches!(old.add("late", listener()), Err(Error::Refused(_))));
        new.add("late", listener()).unwrap();
        assert_eq!(old.declined()[0].name, "admin");
        let names: Vec<_> = new.identities().into_iter().map(|identity| identity.name).collect();
        assert_eq!(names, ["http", "http", "late"]);
    });
}
