//! The messages and descriptors that a server sends when it stops accepting, and those that it
//! keeps, with takers made of the codec.

use std::{fs::File, os::fd::OwnedFd};

use fdwire::takeover::{
    Listeners, Options, Server,
    protocol::{FromTaker, Kind, ToTaker},
};
use futures::{SinkExt, StreamExt};

use crate::{check_serves, common::*, control_path, first, is_locked, offered_to_raw_taker};

/// Rules: G-LOCK, G-RIGHTS, G-STOP.
#[test]
fn locks_of_paths_move_after_ready_except_those_of_declined_listeners() {
    run(async {
        // A taker declines one of three listeners, and is ready.
        let (directory, path) = control_path();
        let names = ["a", "b", "c"];
        let mut listeners = Listeners::new();
        for name in names {
            let unix = directory.path().join(name);
            listeners.bind_path(name, unix, Kind::Stream, 0o600).unwrap();
        }
        let server = Server::bind(&path, listeners, Options::default()).unwrap();
        let (mut taker, _) = offered_to_raw_taker(&path).await;
        assert!(is_locked(&path));
        taker.send(FromTaker::Decline { number: 1 }).await.unwrap();
        taker.send(FromTaker::Ready).await.unwrap();
        // The taker gets the locks of the other two, and that of the control socket.
        let ToTaker::Locks { fds: locks } = taker.next().await.unwrap().unwrap() else { panic!() };
        let ToTaker::Commit { fds: commit, .. } = taker.next().await.unwrap().unwrap() else {
            panic!()
        };
        let [_control, lock] = commit.into_array().unwrap();
        let moved: Vec<_> = locks.iter().chain([&lock]).map(inode_of).collect();
        let expected = ["a.lock", "c.lock", "control.lock"]
            .map(|name| inode_of(&File::open(directory.path().join(name)).unwrap()));
        assert_eq!(moved, expected);

        // The server closes its copies, and removes the path of the declined listener.
        taker.send(FromTaker::Release).await.unwrap();
        assert!(!server.undone().await);
        drop(server);
        assert!(matches!(taker.next().await.unwrap().unwrap(), ToTaker::Drained));
        let exists = names.map(|name| directory.path().join(name).exists());
        assert_eq!(exists, [true, false, true]);
        assert!(path.exists() && is_locked(&path) && is_locked(&directory.path().join("a")));
        drop((locks, lock));
        // A child that another test is starting may have a copy of the lock for a moment.
        while is_locked(&path) {
            tokio::task::yield_now().await;
        }
    });
}

fn inode_of(fd: &impl std::os::fd::AsFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

/// Rules: G-HALF.
#[test]
fn a_ready_that_is_cut_in_half_does_not_count() {
    run(async {
        let (_directory, path) = control_path();
        let server = first(&path);
        let address = crate::address(&server);
        let ready = encoded(b"\x03", 0);
        for length in 1..ready.len() {
            let (taker, _) = offered_to_raw_taker(&path).await;
            let taker = OwnedFd::from(taker.into_parts().socket);
            raw_send(&taker, &ready[..length], &[]);
            drop(taker);
            check_serves(&server, address).await;
        }
    });
}
