//! The front: accepts connections, and has workers serve them.

use std::{
    env,
    future::pending,
    io::{Error, Result},
    iter,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    pin::pin,
    time::Duration,
};

use fdwire::handoff::{Dispatcher, WorkerCommand};
use tokio::{
    net::TcpListener,
    process::Command,
    select,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{Arguments, demo, journal::Journal, kill::Killer, report::Report, watch::Watch};

/// The time that the workers have to finish their connections. Then they are killed.
const STOP_LIMIT: Duration = Duration::from_secs(5);

pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    let mut signals = Signals::new()?;
    let default_port = if arguments.demo.is_some() { 0 } else { 8080 };
    let address = arguments.listen.unwrap_or((Ipv4Addr::LOCALHOST, default_port).into());
    if arguments.demo.is_some() && address.is_ipv6() {
        return Err(Error::other(
            "--demo needs an IPv4 address to listen on: its clients come from all over 127.0.0.0/8",
        ));
    }
    let listener = listen(address).await?;
    let address = listener.local_addr()?;
    let journal = arguments.demo.map(|_| Journal::new()).transpose()?;

    let mut builder = Dispatcher::builder();
    if arguments.kill_every.is_some() {
        // By default a connection is given up when three workers have died while they had it,
        // because it may be the cause. Here the cause is known: the demo kills the workers.
        builder = builder.max_offers(u32::MAX);
    }
    let dispatcher = builder.build();
    let own = env::current_exe()?; // its path: the workers may be replaced by a later version
    let workers = || workers(&arguments, &own, journal.as_ref());
    for worker in workers() {
        dispatcher.spawn_worker(worker)?;
    }
    println!("listening on {address}, try: curl http://{address}/");

    let mut killer = Killer::new(arguments.kill_every.map(Duration::from_millis));
    let clients = async {
        match arguments.demo {
            Some(requests) => demo::run(requests, address).await,
            None => pending().await,
        }
    };
    let mut watch = Watch::new(address);
    let watching = async {
        match arguments.watch {
            true => watch.run(&dispatcher).await,
            false => pending().await,
        }
    };
    let mut serving = pin!(dispatcher.serve(listener)); // until the dispatcher has drained
    let outcome = select! {
        served = &mut serving => served.map(|()| None),
        demo = clients => Ok(Some(demo)),
        () = killer.run(&dispatcher) => Ok(None), // never ends
        () = replace_workers(&mut signals.replace, &dispatcher, workers) => Ok(None), // never ends
        watched = watching => watched.map(|()| None), // never ends
        () = stop(&mut signals.interrupt, &mut signals.terminate) => Ok(None),
    };
    println!("stopping");
    let restarts = dispatcher.stats().workers.iter().map(|worker| worker.restarts).sum();
    dispatcher.drain(Some(STOP_LIMIT)).await;
    let stats = dispatcher.stats();

    if let (Some(demo), Some(journal)) = (outcome?, journal) {
        Report::new(demo, &journal.read()?, killer.killed(), &stats, restarts).print()?;
    }
    match stats.retired.overdue {
        0 => Ok(()),
        workers => Err(Error::other(format!(
            "workers that did not stop in time and were killed: {workers}"
        ))),
    }
}

/// Returns the commands that start the workers.
fn workers<'a>(
    arguments: &'a Arguments,
    own: &'a Path,
    journal: Option<&'a Journal>,
) -> impl Iterator<Item = WorkerCommand> {
    let programs = iter::repeat_n(own, arguments.workers.into());
    let programs = programs.chain(arguments.also.iter().map(PathBuf::as_path));
    (1..).zip(programs).map(move |(number, program)| {
        let mut command = Command::new(program);
        command.args(["--worker", &u16::to_string(&number)]);
        if let Some(journal) = journal {
            command.arg("--journal").arg(journal.path());
        }
        let worker =
            WorkerCommand::from(command).socket_kind(arguments.socket.into()).restart(true);
        match arguments.kill_every {
            // By default the wait for a worker that never lives for long grows up to 10 s.
            Some(_) => worker.longest_wait(Duration::ZERO),
            None => worker,
        }
    })
}

/// Replaces the workers each time that the signal comes.
async fn replace_workers<W: Iterator<Item = WorkerCommand>>(
    signal: &mut Signal,
    dispatcher: &Dispatcher,
    workers: impl Fn() -> W,
) {
    while signal.recv().await.is_some() {
        match dispatcher.replace_workers(workers(), Some(STOP_LIMIT)).await {
            Ok(replaced) => println!("replaced {} workers", replaced.old.len()),
            Err(error) => eprintln!("accept_handoff: the workers are not replaced: {error}"),
        }
    }
    pending().await
}

async fn stop(interrupt: &mut Signal, terminate: &mut Signal) {
    select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

/// The signals that end the front, and the one that replaces the workers. Ctrl-C also reaches the
/// workers, which ignore it and let the front stop them.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    replace: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            replace: signal(SignalKind::user_defined2())?,
        })
    }
}
