//! The tasks that wait for the ends of processes, and report them to the pool.

use std::{future::pending, sync::Arc};

use tokio::{select, time::sleep};
use tracing::warn;

use super::{
    Shared,
    pool::ProcessId,
    process::{Peer, Process},
    started::Started,
};

/// Reports the end of a process to the pool: always of one that was started, and of others if
/// `must_report_end`. A process that is this dispatcher's own (`is_ours`) is killed if it does not
/// end in time.
pub(super) fn watch(process: Process, shared: &Arc<Shared>, is_ours: bool, must_report_end: bool) {
    match process {
        Process::Started { id, process, .. } if is_ours => {
            drop(tokio::spawn(reap(Arc::clone(shared), id, process)))
        }
        Process::Started { id, process, .. } => {
            drop(tokio::spawn(attend(Arc::clone(shared), id, process)))
        }
        Process::Peer(peer) if must_report_end => watch_peer(peer, shared),
        Process::Peer(_) | Process::Unknown(_) => {}
    }
}

fn watch_peer(peer: Arc<Peer>, shared: &Arc<Shared>) {
    let (id, was_watched) = (peer.id(), peer.set_watched());
    if !was_watched {
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            peer.ended().await;
            shared.process_ended(id, None);
        });
    } else if peer.has_ended() {
        // The task that watches it may have reported the end before this link was retired.
        shared.process_ended(id, None);
    }
}

/// Waits for the end of a process that is not this dispatcher's: another one goes on with it, or it
/// has sent nothing to this one. The process is this dispatcher's again if the replacement is
/// undone.
async fn attend(shared: Arc<Shared>, id: ProcessId, mut process: Started) {
    process.release();
    let has_moved = shared.with_pool(|pool| pool.is_succeeded());
    select! {
        status = process.ended() => return shared.process_ended(id, status),
        () = shared.until(|pool| !pool.is_succeeded()), if has_moved => {}
    }
    process.take_back();
    reap(shared, id, process).await;
}

/// Waits until a process that has left ends. It is killed at the end of a drain, or when its time
/// to exit is over.
async fn reap(shared: Arc<Shared>, id: ProcessId, mut process: Started) {
    let mut kill_all = shared.kill.subscribe();
    let is_overdue = async {
        sleep(shared.config.exit_timeout).await;
        if !shared.config.kill_hung {
            pending::<()>().await;
        }
    };
    let pid = process.pid();
    let status = select! {
        status = process.ended() => Some(status),
        _ = kill_all.wait_for(|kill| *kill) => None,
        () = is_overdue => {
            warn!(pid, "killing a process that has not ended in time after its worker has left");
            None
        }
    };
    let status = match status {
        Some(status) => status,
        None => {
            process.kill();
            process.ended().await
        }
    };
    shared.process_ended(id, status);
}
