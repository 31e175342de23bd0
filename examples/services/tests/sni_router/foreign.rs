//! Clients without a worker: each gets an answer that it understands, and its connection is ended.

use std::{
    io::{ErrorKind, Write},
    process::Command,
    thread::sleep,
    time::Duration,
};

use rustls::AlertDescription;

use crate::{
    client::{Client, Http, block_on, hello},
    router::{DEAD, LONG, PROGRAM, Router, rest},
};

/// Returns a record with a fatal alert.
pub(crate) fn alert(description: AlertDescription) -> Vec<u8> {
    vec![21, 3, 3, 0, 2, 2, description.into()]
}

#[test]
fn a_name_without_workers_and_a_missing_name_are_unrecognized() {
    let router = Router::start(LONG);
    for name in ["three.test", "127.0.0.1"] {
        let answer = router.request([&hello(&router, name)[..]]);
        assert_eq!(answer, alert(AlertDescription::UnrecognisedName), "{name}");
    }
    let connected = block_on(Client::connect(&router, "three.test", Http::Two, None));
    let error = connected.err().expect("nobody serves that name");
    assert!(error.to_string().contains("UnrecognisedName"), "{error}");
}

#[test]
fn other_protocols_get_an_answer() {
    let router = Router::start(LONG);
    for http in ["GET / HTTP/1.1\r\nhost: one.test\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let answer = router.request([http.as_bytes()]);
        assert!(answer.starts_with(b"HTTP/1.1 400 "), "{answer:?}");
    }
    let decode_error = alert(AlertDescription::DecodeError);
    for foreign in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"EHLO one.test\r\n", b"\x80\x2E\x01\x03\x01"]
    {
        assert_eq!(router.request([foreign]), decode_error, "{foreign:?}");
    }
}

#[test]
fn a_broken_hello_gets_an_alert() {
    let router = Router::start(LONG);
    let decode_error = alert(AlertDescription::DecodeError);
    let hello = hello(&router, "one.test");
    // The hello ends early, at several places.
    for length in [1, 5, 6, 9, 50, hello.len() - 1] {
        assert_eq!(router.request([&hello[..length]]), decode_error, "{length} bytes");
    }
    assert!(router.request([]).is_empty(), "a client that sends nothing gets an answer");

    // Another message, and one whose lengths contradict each other.
    for broken in
        [&b"\x16\x03\x01\x00\x04\x02\x00\x00\x00"[..], b"\x16\x03\x01\x00\x05\x01\0\0\x01\0"]
    {
        let answer = router.request([broken]);
        assert_eq!((answer.len(), &answer[..6]), (7, &[21, 3, 3, 0, 2, 2][..]), "{answer:?}");
    }
}

/// A hello that announces 60,000 bytes, in records that all arrive.
#[test]
fn a_hello_that_is_too_long_is_refused_before_it_is_complete() {
    let router = Router::start(LONG);
    let [.., high, low] = 60_000_u32.to_be_bytes();
    let message = [&[1, 0, high, low][..], &[0; 40_000]].concat();
    for record_bytes in [1, 1000, 16_000] {
        let record = |payload: &[u8]| {
            [&[22, 3, 1][..], &(payload.len() as u16).to_be_bytes(), payload].concat()
        };
        let records = message.chunks(record_bytes).flat_map(record).collect::<Vec<_>>();
        let answer = router.request([&records[..]]);
        assert_eq!(answer, alert(AlertDescription::DecodeError), "records of {record_bytes} bytes");
    }
}

#[test]
fn a_slow_client_is_disconnected_however_often_it_sends() {
    let router = Router::start("100");
    let mut silent = router.connect();
    silent.write_all(&[22, 3]).unwrap();
    let mut dripping = router.connect();
    // A record of 1,000 bytes, sent one byte at a time.
    dripping.write_all(&[22, 3, 1, 3, 0xE8, 1, 0, 3, 0xE0]).unwrap();
    let ended = loop {
        sleep(Duration::from_millis(10));
        if let Err(error) = dripping.write_all(&[0]) {
            break error.kind();
        }
    };
    assert!(matches!(ended, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{ended}");
    assert_eq!(rest(silent), alert(AlertDescription::UserCanceled));
}

#[test]
fn a_client_whose_name_has_no_working_worker_learns_that_after_the_time_limit() {
    // Long enough that the hello arrives in time on a busy machine.
    let router = Router::start("2000");
    let answer = router.request([&hello(&router, DEAD)[..]]);
    assert_eq!(answer, alert(AlertDescription::InternalError));
}

#[test]
fn errors_name_the_file_the_program_or_the_address() {
    let router = Router::start(LONG);
    let fails_with = |arguments: &[&str], expected: &str| {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(expected), "{arguments:?}: {stderr}");
    };
    let taken = router.address.to_string();
    fails_with(&[&taken, "--demo"], &format!("cannot listen on {taken}: "));
    fails_with(&["127.0.0.1:0", "--route", "one.test=/no/worker"], "/no/worker: No such file");
    fails_with(&["127.0.0.1:0", "--route", "one.test"], "no `=`");
    fails_with(&["--worker", "/no/certificate", "/no/key"], "/no/certificate: ");
    let certificate = router.certificate("one.test");
    fails_with(&["--worker", certificate.to_str().unwrap(), "/no/key"], "/no/key: ");
}
