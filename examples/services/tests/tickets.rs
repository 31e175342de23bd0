//! Clients of the service `tickets`, with tonic.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tonic::{Code, Request, Response, codegen::http::uri::PathAndQuery, transport::Endpoint};
use tonic_prost::ProstCodec;

const PROGRAM: &str = env!("CARGO_BIN_EXE_tickets");

/// The service, which is killed when it is dropped.
struct Service {
    child: Child,
    directory: TempDir,
    address: String,
}

impl Service {
    fn start(lifetime: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("serve").arg("--path").arg(directory.path().join("socket"));
        command.args(["--rpc", "127.0.0.1:0", "--lifetime", lifetime]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("serving at http://").unwrap().to_owned();
        Self { child, directory, address }
    }

    fn client(&self, action: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg(action).arg("--path").arg(self.directory.path().join("socket"));
        command
    }

    fn file(&self, text: &str) -> PathBuf {
        let path = self.directory.path().join("file");
        fs::write(&path, text).unwrap();
        path
    }

    fn deposit(&self, text: &str) -> String {
        let output = self.client("deposit").arg(self.file(text)).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Makes a call with this ticket. Returns the number of lines of the file that was deposited.
    fn call(&self, ticket: &str) -> Result<u64, Code> {
        let (address, text) = (format!("http://{}", self.address), ticket.to_owned());
        let call = async {
            let service = Endpoint::from_shared(address).unwrap().connect().await.unwrap();
            let mut client = tonic::client::Grpc::new(service);
            client.ready().await.unwrap();
            let path = PathAndQuery::from_static("/tickets.Counter/Count");
            let codec = ProstCodec::<String, u64>::default();
            let counted = client.unary(Request::new(text), path, codec).await;
            counted.map(Response::into_inner).map_err(|status| status.code())
        };
        Runtime::new().unwrap().block_on(call)
    }

    /// Returns the number of deposited files that the service has open.
    fn open_files(&self) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let own = self.directory.path().join("file");
        fds.filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|path| path == own))
            .count()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

#[test]
fn a_service_counts_the_lines_of_a_file_that_a_client_has_deposited() {
    let service = Service::start("60000");
    let file = service.file("one\ntwo\nthree\n");
    let output =
        service.client("count").args(["--rpc", &service.address]).arg(&file).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}: 3 lines\n", file.display()));
}

#[test]
fn a_ticket_is_good_for_one_call() {
    let service = Service::start("60000");
    let (first, second) = (service.deposit("one\n"), service.deposit("one\ntwo\n"));
    assert!(first != second && first.len() == 32);
    assert_eq!(service.call(&second), Ok(2));
    assert_eq!(service.call(&second), Err(Code::NotFound));
    assert_eq!(service.call("0123456789abcdef0123456789abcdef"), Err(Code::NotFound));
    assert_eq!(service.call(&first), Ok(2), "the same file was deposited twice");
    assert_eq!(service.open_files(), 0);
}

#[test]
fn a_ticket_expires_and_its_file_is_closed() {
    let service = Service::start("1");
    let ticket = service.deposit("one\n");
    while service.open_files() > 0 {
        std::thread::yield_now();
    }
    assert_eq!(service.call(&ticket), Err(Code::NotFound));
}

#[test]
fn a_uid_deposits_no_more_files_than_its_limit() {
    let service = Service::start("60000");
    let tickets = Vec::from_iter((0..64).map(|_| service.deposit("one\n")));
    let output = service.client("deposit").arg(service.file("one\n")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        format!("error: 64 files of uid {} wait already\n", nix::unistd::geteuid())
    );
    assert_eq!(service.call(&tickets[0]), Ok(1));
    service.deposit("there is room again\n");
}

#[test]
fn a_file_that_is_not_regular_is_refused() {
    let service = Service::start("60000");
    let output = service.client("deposit").arg("/dev/null").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let socket = service.directory.path().join("socket");
    let refused = format!("error: the service at {} has refused /dev/null\n", socket.display());
    assert_eq!(String::from_utf8_lossy(&output.stderr), refused);
}

#[test]
fn errors_name_the_file_or_the_address() {
    let service = Service::start("60000");
    let failed = |command: &mut Command| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let missing = failed(service.client("deposit").arg("/nowhere/file"));
    assert_eq!(missing, "error: /nowhere/file: No such file or directory (os error 2)\n");
    let nobody =
        failed(Command::new(PROGRAM).args(["deposit", "--path", "/nowhere/socket", "/dev/null"]));
    assert!(nobody.starts_with("error: cannot connect to /nowhere/socket: "), "{nobody}");
    let mut taken = Command::new(PROGRAM);
    taken
        .args(["serve", "--path"])
        .arg(service.directory.path().join("other"))
        .args(["--rpc", &service.address]);
    let taken = failed(&mut taken);
    assert!(
        taken.starts_with(&format!(
            "error: cannot listen on {}: Address already in use",
            service.address
        )),
        "{taken}"
    );
}
