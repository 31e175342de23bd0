//! The router's process.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_sni_router");

/// The names that have a worker.
pub(crate) const NAMES: [&str; 2] = ["one.test", "two.test"];

/// A name whose worker is a program that never answers.
pub(crate) const DEAD: &str = "dead.test";

/// The time that the router holds a client, in milliseconds. No test lasts as long.
pub(crate) const LONG: &str = "600000";

/// A router with a worker for each of [`NAMES`]. It is killed when this is dropped.
pub(crate) struct Router {
    child: Child,
    pub(crate) address: SocketAddr,
    /// Certificates and keys.
    directory: TempDir,
}

impl Router {
    /// Starts a router that holds clients for this number of milliseconds.
    pub(crate) fn start(patience: &str) -> Self {
        Self::start_with(["--patience", patience])
    }

    pub(crate) fn start_with(options: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("127.0.0.1:0").args(options).arg(format!("--route={DEAD}=sleep 1000"));
        for name in NAMES {
            let CertifiedKey { cert, signing_key } =
                generate_simple_self_signed([name.to_owned()]).unwrap();
            let [pem, key] =
                [name.to_owned(), format!("{name}.key")].map(|file| directory.path().join(file));
            fs::write(&pem, cert.pem()).unwrap();
            fs::write(&key, signing_key.serialize_pem()).unwrap();
            let worker = format!("{PROGRAM} --worker {} {}", pem.display(), key.display());
            command.arg(format!("--route={}={worker}", name.to_uppercase()));
        }

        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").expect("the router listens");
        Self { address: address.parse().unwrap(), child, directory }
    }

    /// Returns the path of the certificate of a name.
    pub(crate) fn certificate(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Returns the number of sockets that the router has.
    pub(crate) fn sockets(&self) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let links = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
    }

    /// Waits until the router has this number of sockets, or fewer.
    pub(crate) fn wait_for_sockets(&self, most: usize) {
        while self.sockets() > most {
            sleep(Duration::from_millis(1));
        }
    }

    /// Kills the router alone. Its workers serve the connections that they have.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let client = TcpStream::connect(self.address).unwrap();
        client.set_nodelay(true).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client
    }

    /// Sends pieces, ends the sending direction, and returns the answer.
    pub(crate) fn request<'a>(&self, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
        let mut client = self.connect();
        for piece in pieces {
            client.write_all(piece).unwrap();
        }
        client.shutdown(Shutdown::Write).unwrap();
        rest(client)
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads to the end of the connection.
pub(crate) fn rest(mut client: TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    answer
}
