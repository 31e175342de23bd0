//! TLS clients that are served by a worker of the name in their hello.

use std::process::Command;

use crate::{
    client::{Client, VERSIONS, block_on, hello},
    programs::installed,
    router::{LONG, NAMES, Router},
};

/// Checks that a worker of this name has answered over this version.
fn check(answer: &str, name: &str, version: &str) {
    assert!(answer.starts_with(&format!("{name}: worker ")), "{answer}");
    assert!(answer.trim_end().ends_with(version), "{answer}");
}

#[test]
fn curl_is_served_by_name_over_both_versions_of_http_and_of_tls() {
    let Some(curl) = installed("curl") else { return };
    let router = Router::start(LONG);
    let (port, ip) = (router.address.port(), router.address.ip());
    let request = |options: &[&str], name: &str| {
        let mut command = Command::new(&curl);
        command.args(["--silent", "--show-error"]);
        command.arg("--cacert").arg(router.certificate(&name.to_ascii_lowercase()));
        command.args(["--resolve", &format!("{name}:{port}:{ip}")]).args(options);
        let output = command.arg(format!("https://{name}:{port}/")).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for name in NAMES {
        check(&request(&["--http1.1"], name), name, "HTTP/1.1");
        check(&request(&["--http2"], name), name, "HTTP/2.0");
        check(&request(&["--http2", "--tls-max", "1.2"], name), name, "HTTP/2.0");
    }
    check(&request(&["--no-alpn"], "ONE.test"), "one.test", "HTTP/1.1");
}

#[test]
fn openssl_receives_the_certificate_of_the_name() {
    let Some(openssl) = installed("openssl") else { return };
    let router = Router::start(LONG);
    for name in NAMES {
        let mut command = Command::new(&openssl);
        command.args(["s_client", "-connect", &router.address.to_string(), "-servername", name]);
        command.args(["-verify_return_error", "-verify_hostname", name, "-alpn", "h2", "-CAfile"]);
        let output = command.arg(router.certificate(name)).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && stdout.contains("ALPN protocol: h2"), "{output:?}");
    }
}

#[test]
fn python_is_served_by_name() {
    const SCRIPT: &str = "import socket, ssl, sys\n\
        host, port, trusted = sys.argv[1:]\n\
        context = ssl.create_default_context(cafile=trusted)\n\
        with socket.create_connection((host, port)) as tcp:\n\
        \x20   with context.wrap_socket(tcp, server_hostname='two.test') as tls:\n\
        \x20       tls.sendall(b'GET / HTTP/1.0\\r\\nhost: two.test\\r\\n\\r\\n')\n\
        \x20       print(tls.makefile().read())\n";
    let Some(python) = installed("python3") else { return };
    let router = Router::start(LONG);
    let (ip, port) = (router.address.ip().to_string(), router.address.port().to_string());
    let mut command = Command::new(python);
    let output =
        command.args(["-c", SCRIPT, &ip, &port]).arg(router.certificate("two.test")).output();
    let output = output.unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    check(stdout.trim_end().lines().last().unwrap_or_default(), "two.test", "HTTP/1.0");
}

#[test]
fn a_client_is_served_however_its_hello_is_cut_into_pieces_and_records() {
    let router = Router::start(LONG);
    block_on(async {
        for version in VERSIONS {
            for record_bytes in [None, Some(27), Some(100)] {
                for name in NAMES {
                    let mut client =
                        Client::connect(&router, name, version, record_bytes).await.unwrap();
                    check(&client.get().await.unwrap(), name, version.name());
                }
            }
        }
    });
}

#[test]
fn connections_go_on_when_the_router_has_been_killed() {
    let mut router = Router::start(LONG);
    block_on(async {
        let mut clients = Vec::new();
        for version in VERSIONS {
            let mut client = Client::connect(&router, "one.test", version, None).await.unwrap();
            check(&client.get().await.unwrap(), "one.test", version.name());
            clients.push((client, version));
        }
        router.kill();
        for (client, version) in &mut clients {
            for _ in 0..3 {
                check(&client.get().await.unwrap(), "one.test", version.name());
            }
        }
    });
}

/// Values without a meaning, which browsers put into lists so that servers stay tolerant (GREASE,
/// RFC 8701), among them an encrypted ClientHello that nobody can decrypt.
#[test]
fn a_hello_with_grease_goes_to_the_worker_of_its_public_name() {
    let router = Router::start(LONG);
    let hello = with_grease(&hello(&router, "one.test"));
    let answer = router.request([&hello[..]]);
    const HANDSHAKE: u8 = 22;
    const SERVER_HELLO: u8 = 2;
    assert_eq!((answer[0], answer[5]), (HANDSHAKE, SERVER_HELLO), "{answer:?}");
}

/// Adds a cipher suite and two extensions to a ClientHello in one record.
fn with_grease(hello: &[u8]) -> Vec<u8> {
    let u16_at = |at: usize| usize::from(u16::from_be_bytes([hello[at], hello[at + 1]]));
    let long = |bytes: usize| u16::try_from(bytes).unwrap().to_be_bytes();
    // Record 5, message 4, version 2, random 32, then the session id.
    let suites = 44 + usize::from(hello[43]);
    let compression = suites + 2 + u16_at(suites);
    let extensions = compression + 1 + usize::from(hello[compression]);

    // Type of an outer hello, cipher suite, configuration, encapsulated key, payload.
    let ech = [&[0, 0, 1, 0, 1, 77][..], &long(32), &[7; 32], &long(144), &[9; 144]].concat();
    let added = [&[0x0A, 0x0A, 0, 0, 0xFE, 0x0D][..], &long(ech.len()), &ech].concat();
    let body = [
        &hello[9..suites],
        &long(u16_at(suites) + 2),
        &[0x1A, 0x1A],
        &hello[suites + 2..extensions],
        &long(u16_at(extensions) + added.len()),
        &added,
        &hello[extensions + 2..],
    ]
    .concat();
    let message = [&[1, 0][..], &long(body.len()), &body].concat();
    [&[22, 3, 1][..], &long(message.len()), &message].concat()
}

#[test]
fn a_client_that_sends_only_a_hello_reaches_a_worker_and_is_ended() {
    let router = Router::start(LONG);
    let answer = router.request([&hello(&router, "two.test")[..]]);
    assert_eq!((answer[0], answer[5]), (22, 2), "{answer:?}");
}
