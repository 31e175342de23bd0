//! Many generations of a server. Each is a process that still has a connection to finish.

use std::{
    io::Write,
    net::{SocketAddr, TcpStream},
    path::Path,
    time::Duration,
};

use fdwire::takeover::{self, Listeners, Options, ServerStatus};
use tokio::{io::AsyncReadExt, process::Child};

use crate::{
    common::*, control_path, is_role, path_and_address, process::free_address, server_command,
};

const ROLE: &str = "generations::ten_restarts_leave_few_old_processes_which_are_listed";

/// Is a server process, which sends each client its process id and keeps the connection until it
/// has to cut it.
async fn serve() {
    let number = |name| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let (path, address) = path_and_address();
    let bind = || {
        let mut listeners = Listeners::new();
        listeners.bind_tcp("http", address)?;
        Ok(listeners)
    };
    let deadline = Duration::from_millis(number("FDWIRE_DEADLINE"));
    let options =
        Options::default().drain(Duration::from_millis(1), deadline).max_old_generations(3);
    let server = takeover::bind_or_take(&path, options, bind).await.unwrap().ready().await.unwrap();
    let http = server.gated::<tokio::net::TcpListener>("http", 0).unwrap();
    let serving = async {
        loop {
            let Ok((stream, _)) = http.accept().await else { std::future::pending().await };
            let connection = server.open_connection();
            tokio::spawn(async move {
                let stream = stream.into_std().unwrap();
                write!(&stream, "{}", std::process::id()).unwrap();
                connection.deadline().await;
            });
        }
    };
    let finished = tokio::select! {
        finished = server.finish() => finished,
        () = serving => unreachable!(),
    };
    std::process::exit(PASSED + finished.unfinished as i32);
}

async fn start(path: &Path, address: SocketAddr, deadline: Duration) -> Child {
    let mut command = server_command(ROLE, path, address);
    command.env("FDWIRE_DEADLINE", deadline.as_millis().to_string());
    takeover::launch(&mut command, path, &Options::default(), Duration::from_secs(30))
        .await
        .unwrap()
}

async fn status(path: &Path) -> ServerStatus {
    takeover::status(path, &Options::default()).await.unwrap()
}

/// Connects a client whose connection stays open.
async fn client(address: SocketAddr) -> tokio::net::TcpStream {
    let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
    client.read_u8().await.unwrap();
    client
}

/// Rules: G-LEAVE, G-LEASH.
#[test]
fn ten_restarts_leave_few_old_processes_which_are_listed() {
    if is_role(ROLE) {
        return run(serve());
    }
    run(async {
        // Ten processes are replaced, each with one client.
        let (_directory, path) = control_path();
        let address = free_address();
        let hour = Duration::from_secs(3600);
        let mut processes = vec![start(&path, address, hour).await];
        let mut clients = Vec::new();
        for _ in 0..10 {
            clients.push(client(address).await);
            processes.push(start(&path, address, hour).await);
        }
        // The seven oldest are asked to leave, and cut the connections of their clients.
        for (process, mut client) in processes.drain(..7).zip(clients.drain(..7)) {
            let mut process = process;
            assert_eq!(
                process.wait().await.unwrap().code(),
                Some(PASSED + 1),
                "one connection was left"
            );
            while client.read_u8().await.is_ok() {}
        }
        // The status lists the other three, the oldest first.
        let ServerStatus { pid, generations, .. } = status(&path).await;
        assert_eq!(Some(pid), processes.last().unwrap().id());
        let listed: Vec<_> = generations.iter().map(|old| old.pid).collect();
        assert_eq!(listed, processes[..3].iter().map(Child::id).collect::<Vec<_>>());
        assert!(
            generations.is_sorted_by_key(|old| std::cmp::Reverse(old.replaced_for)),
            "{generations:?}"
        );
        assert!(TcpStream::connect(address).is_ok());
    });
}

#[test]
fn an_old_process_does_not_grow_older_than_the_deadline() {
    run(async {
        let (_directory, path) = control_path();
        let address = free_address();
        let deadline = Duration::from_millis(200);
        let mut first = start(&path, address, deadline).await;
        let mut client = client(address).await;
        let _second = start(&path, address, deadline).await;
        assert_eq!(first.wait().await.unwrap().code(), Some(PASSED + 1));
        while client.read_u8().await.is_ok() {}
        while !status(&path).await.generations.is_empty() {
            tokio::task::yield_now().await;
        }
    });
}

/// The old process is killed with SIGKILL, so it cannot send that it has left.
#[test]
fn an_old_process_that_is_killed_is_not_listed() {
    run(async {
        let (_directory, path) = control_path();
        let address = free_address();
        let hour = Duration::from_secs(3600);
        let mut first = start(&path, address, hour).await;
        let _first_client = client(address).await;
        let second = start(&path, address, hour).await;
        let _second_client = client(address).await;
        let _third = start(&path, address, hour).await;
        assert_eq!(status(&path).await.generations.len(), 2);
        first.kill().await.unwrap();
        let left = status(&path).await.generations;
        assert_eq!(left.iter().map(|old| old.pid).collect::<Vec<_>>(), [second.id()]);
    });
}
