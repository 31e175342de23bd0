//! The example that routes TLS connections by name, with the ClientHello of a real client.

#[path = "../../../tests/common/programs.rs"]
#[allow(dead_code, reason = "each test binary uses a part")]
mod programs;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpStream},
    process::{Child, ChildStdout, Command, Stdio},
};

use fdwire::handoff::Incoming;
use programs::installed;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Runtime,
};

const ROLE: &str = "a_worker_gets_whole_clients_by_name";

/// A router with a worker each for `one.test` and `two.test`, which is killed when it is dropped.
struct Router {
    child: Child,
    address: String,
    /// Its workers print there, too.
    _output: BufReader<ChildStdout>,
}

impl Router {
    fn start(patience: &str) -> Self {
        let this = std::env::current_exe().unwrap();
        let worker = format!("{} {ROLE} --exact --nocapture", this.display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_sni_router"));
        command.args(["127.0.0.1:0", "--patience", patience]).env("FDWIRE_ROLE", ROLE);
        command.args(["one.test", "Two.test"].map(|name| format!("--route={name}={worker}")));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (mut output, mut line) = (BufReader::new(child.stdout.take().unwrap()), String::new());
        // The workers of the test harness print as well.
        let address = loop {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "the router has ended");
            if let Some(address) = line.trim_end().strip_prefix("listening at ") {
                break address.to_owned();
            }
        };
        Self { child, address, _output: output }
    }

    fn connect(&self) -> TcpStream {
        let client = TcpStream::connect(&self.address).unwrap();
        client.set_nodelay(true).unwrap();
        client
    }

    /// Sends pieces, then the end, and returns the answer.
    fn ask<'a>(&self, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
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
        self.child.wait().unwrap();
    }
}

fn rest(mut client: TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    answer
}

/// The first message of Python's TLS client, which is OpenSSL's. `None`, with the reason printed,
/// if there is none.
fn hello(name: &str) -> Option<Vec<u8>> {
    const SCRIPT: &str = "import ssl, sys\n\
        out = ssl.MemoryBIO()\n\
        client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname=sys.argv[1])\n\
        try: client.do_handshake()\n\
        except ssl.SSLWantReadError: sys.stdout.buffer.write(out.read())\n";
    let output = Command::new(installed("python3")?).args(["-c", SCRIPT, name]).output().unwrap();
    assert!(output.status.success() && output.stdout.starts_with(&[22, 3]), "{output:?}");
    Some(output.stdout)
}

/// The answer of the worker of this name to these bytes.
fn echo(name: &str, bytes: &[u8]) -> Vec<u8> {
    [name.as_bytes(), b":", bytes].concat()
}

#[test]
fn a_worker_gets_whole_clients_by_name() {
    if std::env::var("FDWIRE_ROLE").is_ok_and(|role| role == ROLE) {
        return Runtime::new().unwrap().block_on(async {
            let mut incoming = Incoming::from_stdin().unwrap();
            while let Some(mut connection) = incoming.next().await {
                let name = connection.metadata().clone();
                tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    connection.read_to_end(&mut bytes).await.unwrap();
                    connection
                        .write_all(&echo(str::from_utf8(&name).unwrap(), &bytes))
                        .await
                        .unwrap();
                });
            }
        });
    }
    let (Some(one), Some(two)) = (hello("one.test"), hello("TWO.test")) else { return };
    let router = Router::start("60000");
    assert!(router.ask([&one[..]]) == echo("one.test", &one));
    assert!(router.ask([&two[..]]) == echo("two.test", &two));
    // What follows the first message at once travels along.
    let more = [&one[..], &[7; 20_000]].concat();
    assert!(router.ask([&more[..]]) == echo("one.test", &more));
    // In pieces of one byte, and in records of one byte.
    assert!(router.ask(one.chunks(1)) == echo("one.test", &one));
    let records = Vec::from_iter(one[5..].iter().flat_map(|byte| [22, 3, 1, 0, 1, *byte]));
    assert!(router.ask(records.chunks(1000)) == echo("one.test", &records));
}

/// A fatal alert.
fn alert(description: u8) -> Vec<u8> {
    vec![21, 3, 3, 0, 2, 2, description]
}

#[test]
fn a_client_that_names_no_server_that_there_is_gets_an_alert() {
    let Some(unknown) = hello("three.test") else { return };
    let router = Router::start("60000");
    assert_eq!(router.ask([&unknown[..]]), alert(112));
    let Some(by_address) = hello("127.0.0.1") else { return };
    assert_eq!(router.ask([&by_address[..]]), alert(112));
}

#[test]
fn what_is_no_client_hello_gets_an_answer_that_it_understands() {
    let router = Router::start("60000");
    let answer = router.ask([&b"GET / HTTP/1.1\r\nhost: one.test\r\n\r\n"[..]]);
    assert!(answer.starts_with(b"HTTP/1.1 400 "));
    let answer = router.ask([&b"\x16\x03\x01\x00\x05hello"[..]]);
    assert_eq!((answer.len(), answer[0], answer[5]), (7, 21, 2), "{answer:?}");
    let answer = router.ask([&b"SSH-2.0-OpenSSH_9.2\r\n"[..]]);
    assert_eq!((answer.len(), answer[0], answer[5]), (7, 21, 2), "{answer:?}");
    assert!(router.ask([&b"\x16\x03"[..]]).is_empty(), "a client that leaves");
}

/// A message that says that it has 60,000 bytes, in records.
#[test]
fn a_client_hello_that_is_too_long_is_refused_before_it_is_whole() {
    let router = Router::start("60000");
    let message =
        [&[1, 0, 60_000_u32.to_be_bytes()[2], 60_000_u32.to_be_bytes()[3]][..], &[0; 40_000]]
            .concat();
    let record =
        |payload: &[u8]| [&[22, 3, 1][..], &(payload.len() as u16).to_be_bytes(), payload].concat();
    let records = message.chunks(1000).map(record).collect::<Vec<_>>();
    let answer = router.ask(records.iter().map(|record| &record[..]));
    assert_eq!(answer, alert(22));
}

#[test]
fn a_client_that_is_slow_is_disconnected_however_often_it_sends() {
    let router = Router::start("100");
    let mut silent = router.connect();
    silent.write_all(&[22, 3]).unwrap();
    let mut dripping = router.connect();
    // A record of a thousand bytes of which no more than one comes at a time.
    dripping.write_all(&[22, 3, 1, 3, 0xE8, 1, 0, 3, 0xE0]).unwrap();
    let ended = loop {
        std::thread::sleep(std::time::Duration::from_millis(10));
        if let Err(error) = dripping.write_all(&[0]) {
            break error;
        }
    };
    assert!(matches!(
        ended.kind(),
        std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset
    ));
    assert_eq!(rest(silent), alert(0));
}
