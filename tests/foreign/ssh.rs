//! A real `ssh` that gets its connection to a real `sshd` from the example `ssh_proxy`.

use std::{
    fs::Permissions,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
};

use tokio::net::TcpStream;

use crate::{
    Daemon,
    common::{example, run},
    installed, skipped,
};

/// The address of sshd in the test of this file.
const ADDRESS: &str = "127.0.0.5";

fn generate_key(program: &Path, path: &Path) -> String {
    let mut command = Command::new(program);
    let made = command
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"])
        .arg(path)
        .status()
        .unwrap();
    assert!(made.success());
    std::fs::read_to_string(path.with_extension("pub")).unwrap()
}

/// Makes keys and a configuration in `directory`, and starts a server. Returns its port when it
/// listens. Each test has a loopback address of its own, so no other process gets the port before
/// sshd binds it.
pub(crate) async fn start_sshd(
    program: &Path,
    keygen: &Path,
    directory: &Path,
    address: &str,
) -> (Daemon, u16) {
    std::fs::set_permissions(directory, Permissions::from_mode(0o700)).unwrap();
    // sshd confines its unprivileged child to this directory. Usually a unit file makes it at boot.
    std::fs::create_dir_all("/run/sshd").unwrap();

    // The keys of the server and of the client.
    let path = |name: &str| directory.join(name);
    let host_key = generate_key(keygen, &path("host_key"));
    std::fs::write(path("authorized_keys"), generate_key(keygen, &path("key"))).unwrap();

    // The configuration.
    let port = TcpListener::bind((address, 0)).unwrap().local_addr().unwrap().port();
    std::fs::write(path("known_hosts"), format!("[{address}]:{port} {host_key}")).unwrap();
    let config = format!(
        "ListenAddress {address}:{port}\nHostKey {0}/host_key\n\
         AuthorizedKeysFile {0}/authorized_keys\n\
         PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n\
         KbdInteractiveAuthentication no\n",
        directory.display()
    );
    std::fs::write(path("sshd_config"), config).unwrap();

    // The server.
    let mut command = Command::new(program);
    command
        .args(["-D", "-e", "-f"])
        .arg(path("sshd_config"))
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut daemon = Daemon::start(&mut command, directory);
    daemon.ready(async || TcpStream::connect((address, port)).await).await;
    (daemon, port)
}

/// Returns the options of a client that logs in to that server and uses no other configuration of
/// this machine.
pub(crate) fn options(directory: &Path, port: u16) -> Vec<String> {
    let path = |name: &str| directory.join(name).display().to_string();
    let mut options =
        ["-F", "none", "-i", &path("key"), "-p", &port.to_string()].map(str::to_owned).to_vec();
    for option in [
        &format!("UserKnownHostsFile={}", path("known_hosts")),
        "GlobalKnownHostsFile=none",
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "BatchMode=yes",
        "LogLevel=ERROR",
    ] {
        options.extend(["-o".to_owned(), option.to_owned()]);
    }
    options
}

/// Runs `echo hello` on the server through a proxy command.
async fn ssh(program: &Path, directory: &Path, port: u16, proxy: &str) -> Output {
    let mut command = tokio::process::Command::new(program);
    command.kill_on_drop(true).stdin(Stdio::null()).args(options(directory, port));
    command.args(["-o", "ProxyUseFdpass=yes", "-o", &format!("ProxyCommand={proxy}")]);
    command.args([ADDRESS, "echo", "hello"]).output().await.unwrap()
}

#[test]
fn ssh_uses_the_connection_that_the_example_proxy_passes() {
    let (Some(sshd), Some(client), Some(keygen)) =
        (installed("sshd"), installed("ssh"), installed("ssh-keygen"))
    else {
        return;
    };
    if !nix::unistd::geteuid().is_root() {
        return skipped("needs root to log in through sshd");
    }
    let example = example("ssh_proxy");
    let proxy = example.get_program().to_str().unwrap();
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let (_daemon, port) = start_sshd(&sshd, &keygen, directory.path(), ADDRESS).await;
        let output = ssh(&client, directory.path(), port, &format!("'{proxy}' %h %p")).await;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        assert_eq!(output.stdout, b"hello\n", "{errors}");

        let output = ssh(&client, directory.path(), port, &format!("'{proxy}' %h 1")).await;
        assert!(!output.status.success());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            errors.contains(&format!("ssh_proxy: {ADDRESS} port 1: Connection refused")),
            "{errors}"
        );
    });
}

#[test]
fn the_proxy_names_the_missing_option_if_ssh_does_not_take_a_descriptor() {
    let output = example("ssh_proxy").args(["127.0.0.1", "1"]).output().unwrap();
    assert!(!output.status.success());
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("set ProxyUseFdpass=yes"), "{errors}");
}
