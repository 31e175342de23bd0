//! systemd passes listeners by number (`LISTEN_FDS`).

use std::{
    io,
    process::{Command, Stdio},
};

use fdwire::{Frame, FrameCodec, Framed, Listener, Socket, SocketKind};
use futures::{SinkExt, TryStreamExt};

use crate::{
    Daemon,
    common::{KINDS, PASSED, descriptors_of_a_child, run, run_and_pass},
    installed,
};

/// The function of the guide.
fn systemd_listeners() -> io::Result<Vec<Listener>> {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(Vec::new()); // nobody has passed any, or they were for another process
    }
    (3..).take(number("LISTEN_FDS").unwrap_or(0) as usize).map(Listener::from_inherited).collect()
}

#[test]
fn a_service_takes_its_listeners_from_socket_activation() {
    const TEST: &str = "systemd::a_service_takes_its_listeners_from_socket_activation";
    if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == TEST) {
        return run_and_pass(async {
            // The service takes its listeners, and sends on each the name of its path.
            let listeners = systemd_listeners().unwrap();
            assert!(!descriptors_of_a_child().contains("socket:"));
            for listener in &listeners {
                let (connection, path) =
                    (listener.accept().await.unwrap(), listener.local_addr().unwrap());
                let name =
                    path.as_pathname().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
                Framed::new(connection, FrameCodec::default())
                    .send(Frame::new(name))
                    .await
                    .unwrap();
            }
            assert!(systemd_listeners().is_err(), "each can be taken once");
        });
    }
    let Some(program) = installed("systemd-socket-activate") else { return };
    for kind in KINDS {
        run(async {
            // systemd starts the service with two listeners.
            let directory = tempfile::tempdir().unwrap();
            let paths = ["first", "second"].map(|name| directory.path().join(name));
            let mut command = Command::new(&program);
            if kind == SocketKind::SeqPacket {
                command.arg("--seqpacket");
            }
            command.args([
                format!("--listen={}", paths[0].display()),
                format!("--listen={}", paths[1].display()),
            ]);
            command
                .arg(format!("--setenv=FDWIRE_ROLE={TEST}"))
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            command.arg(std::env::current_exe().unwrap()).args([TEST, "--exact", "--nocapture"]);
            let mut service = Daemon::start(&mut command, directory.path());

            // A client of each path gets the name of that path.
            for path in &paths {
                let socket = service.ready(async || Socket::connect(path, kind).await).await;
                let frame =
                    Framed::new(socket, FrameCodec::default()).try_next().await.unwrap().unwrap();
                assert_eq!(frame.payload, path.file_name().unwrap().to_str().unwrap());
            }
            assert_eq!(service.ended().await.code(), Some(PASSED));
        });
    }
}
