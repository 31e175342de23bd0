//! Programs that a worker's application starts, which inherit its standard input.

use std::fs;

use fdwire::handoff::{Dispatcher, WorkerCommand};

use crate::{
    common::{KINDS, run},
    end_to_end::{command, started},
    raw_worker::{connections, served_by, until},
};

/// If a program could read from its worker's link, it would take offers, and the worker would count
/// fewer offers than the dispatcher.
///
/// Rules: W-STDIN.
#[test]
fn a_program_that_reads_standard_input_takes_no_offers_of_its_worker() {
    for kind in KINDS {
        run(async {
            let directory = tempfile::tempdir().unwrap();
            let path = |name: &str| directory.path().join(name);
            let dispatcher = Dispatcher::builder().build();
            let mut worker = command(&path("served"));
            // The program reads until the end of its standard input, and then creates a file.
            let script =
                "exec 2>/dev/null; ls -l /proc/self/fd >$0.fds; cat >$0.read; touch $0.end";
            worker.env("FDWIRE_HELPER", script.replace("$0", path("helper").to_str().unwrap()));
            dispatcher.spawn_worker(WorkerCommand::from(worker).socket_kind(kind)).unwrap();
            started(&dispatcher, 1).await;

            // No connection is lost, so the program has taken no offer.
            let mut clients = Vec::new();
            for (client, connection) in connections(60).await {
                dispatcher.dispatch(connection).await.unwrap();
                clients.push(client);
            }
            for client in clients {
                assert!(!client.answer().await.is_empty(), "a connection was lost on {kind:?}");
            }

            // Standard input of the program is empty, and it has inherited no socket.
            until("the program has read all", || path("helper.end").exists()).await;
            assert_eq!(fs::read(path("helper.read")).unwrap(), b"");
            let fds = fs::read_to_string(path("helper.fds")).unwrap();
            assert!(fds.contains("0 -> /dev/null") && !fds.contains("socket:"), "{fds}");

            dispatcher.drain(None).await;
            assert_eq!(
                (served_by(&path("served")).len(), dispatcher.stats().retired.drained),
                (60, 1)
            );
        });
    }
}
