//! The JSON formats with integers as descriptors, and with bytes and descriptors that are cut
//! anywhere.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{tests::Arrived, *};
use crate::{codec::DryRun, frame::Fds};

#[derive(Debug, Serialize, serde::Deserialize)]
#[serde(tag = "method", content = "parameters")]
enum Call {
    #[serde(rename = "org.example.Mount", rename_all = "camelCase")]
    Mount { name: String, file_descriptor: Passed<u32>, mount_fds: Vec<Passed<u32>> },
    #[serde(rename = "org.example.Ping")]
    Ping,
}

/// An enum whose variants serde tries one after the other.
#[derive(Debug, serde::Deserialize)]
#[serde(untagged)]
enum Tried {
    #[expect(dead_code, reason = "only tried")]
    Named {
        fd: Passed<u32>,
        name: String,
    },
    Numbered {
        fd: Passed<u32>,
        number: u32,
    },
}

const MOUNT: &str = concat!(
    r#"{"method":"org.example.Mount","parameters":"#,
    r#"{"name":"a\u0000b","fileDescriptor":1,"mountFds":[0,2]}}"#,
);

/// Decodes everything that has arrived.
fn all<C, M>(codec: &mut C, arrived: &mut Arrived) -> Result<Vec<M>, TypedError>
where
    C: Decoder<u32, Item = M, Error = TypedError>,
{
    let mut messages = Vec::new();
    while let Some(message) = codec.decode_eof(&mut arrived.src, &mut arrived.fds)? {
        messages.push(message);
    }
    Ok(messages)
}

fn varlink(text: &str, numbers: &[u32]) -> Result<Vec<String>, TypedError> {
    let mut arrived = Arrived::new(text.replace('~', "\0").as_bytes(), numbers.iter().copied());
    let calls = all(&mut Varlink::<Call>::default(), &mut arrived);
    let outcome = calls.map(|calls| calls.iter().map(|call| format!("{call:?}")).collect());
    assert_eq!(arrived.end(), numbers, "each is closed, once");
    outcome
}

#[test]
fn a_varlink_message_has_the_descriptors_that_it_names() {
    let mount = |file, [a, b]: [u32; 2]| {
        let fds = format!("file_descriptor: Passed({file}), mount_fds: [Passed({a}), Passed({b})]");
        format!("Mount {{ name: \"a\\0b\", {fds} }}")
    };
    let both = varlink(
        &format!("{MOUNT}~{{\"method\":\"org.example.Ping\"}}~{MOUNT}~"),
        &[5, 6, 7, 8, 9, 10],
    );
    assert_eq!(both.unwrap(), [mount(6, [5, 7]), "Ping".to_owned(), mount(9, [8, 10])]);
}

#[test]
fn each_fault_of_a_varlink_message_has_its_error() {
    let fault = |text: &str, numbers: &[u32]| varlink(text, numbers).unwrap_err();
    let mount = |fds: &str| {
        format!("{{\"method\":\"org.example.Mount\",\"parameters\":{{\"name\":\"\",{fds}}}}}~")
    };
    let one = |index: u32| mount(&format!("\"fileDescriptor\":{index},\"mountFds\":[]"));
    assert!(matches!(fault(&one(0), &[]), TypedError::Fd(FdError::Missing { index: 0, count: 0 })));
    assert!(matches!(
        fault(&one(3), &[5, 6]),
        TypedError::Fd(FdError::Missing { index: 3, count: 2 })
    ));
    assert!(matches!(fault(&one(1), &[5, 6]), TypedError::Fd(FdError::Unclaimed { count: 1 })));
    assert!(matches!(
        fault(&one(0), &[5, 6]),
        TypedError::Connection(Error::UnclaimedFds { fds: 1 })
    ));
    assert!(matches!(fault(&one(0), &[900]), TypedError::Fd(FdError::Mismatch { index: 0, .. })));
    let doubled = mount("\"fileDescriptor\":0,\"mountFds\":[0]");
    assert!(matches!(fault(&doubled, &[5]), TypedError::Fd(FdError::Doubled { index: 0 })));
    assert!(matches!(fault("{\"method\":\"no\"}~", &[5]), TypedError::Format(_)));
    assert!(matches!(fault("{}{}~", &[]), TypedError::Format(_)));
    assert!(matches!(
        fault("{\"method\":", &[]),
        TypedError::Connection(Error::UnexpectedEnd { bytes: 10 })
    ));
}

#[test]
fn a_variant_that_does_not_fit_gives_its_descriptors_to_the_next() {
    let mut arrived = Arrived::new(b"{\"fd\":0,\"number\":3}\0", [5]);
    let tried = all(&mut Varlink::<Tried>::default(), &mut arrived).unwrap();
    let [Tried::Numbered { fd, number: 3 }] = <[Tried; 1]>::try_from(tried).unwrap() else {
        panic!("not what was sent")
    };
    assert_eq!(fd.into_inner(), 5);
}

#[test]
fn a_message_without_an_end_is_refused_at_the_limit() {
    let limits = Limits::default().max_payload_bytes(10);
    let text =
        |length: usize| Arrived::new(&[b"{\"a\":\"", &vec![b'x'; length - 6][..]].concat(), []);
    for (length, is_refused) in [(10, false), (11, true)] {
        let (mut varlink, mut rpc) = (text(length), text(length));
        let varlink =
            Varlink::<Value>::new(limits).decode(&mut varlink.src, &mut varlink.fds).map(drop);
        let rpc = JsonRpc::<Value>::new(limits).decode(&mut rpc.src, &mut rpc.fds).map(drop);
        for outcome in [varlink, rpc] {
            let is_too_long = matches!(
                outcome,
                Err(TypedError::Connection(Error::FrameTooLong { bytes: 11, limit: 10 }))
            );
            assert_eq!(is_too_long, is_refused);
        }
    }
}

fn json_rpc(text: &str, numbers: &[u32]) -> Result<Vec<(Value, Vec<u32>)>, TypedError> {
    let mut arrived = Arrived::new(text.as_bytes(), numbers.iter().copied());
    let messages = all(&mut JsonRpc::<Value>::default(), &mut arrived)?;
    Ok(messages.into_iter().map(|(message, fds)| (message, fds.to_vec())).collect())
}

/// Some receivers assign descriptors to the message in which a read ends.
#[test]
fn a_varlink_message_with_descriptors_shares_its_call_with_no_other() {
    let mut run = DryRun::<crate::send_fd::SendFd>::stream();
    let mut codec = Varlink::<Vec<Passed<OwnedFd>>>::default();
    for count in [0, 0, 1, 0, 0, 2, 1] {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap()).into();
        run.encode(&mut codec, Vec::from_iter((0..count).map(|_| null()))).unwrap();
    }
    let calls: Vec<_> = run.map(|call| (call.bytes, call.fds.len())).collect();
    let expected = [("[]~[]~", 0), ("[0]~", 1), ("[]~[]~", 0), ("[0,1]~", 2), ("[0]~", 1)];
    assert_eq!(calls, expected.map(|(text, fds)| (text.replace('~', "\0").into(), fds)));
}

#[test]
fn json_rpc_messages_need_nothing_between_them() {
    let text = "\n{\"a\":\"}{\\\\\\\"}\",\"fds\":2}{\"b\":{\"c\":{}}} \t{\"fds\":1}\r\n";
    let expected = [
        (json!({ "a": "}{\\\"}", "fds": 2 }), vec![5, 6]),
        (json!({ "b": { "c": {} } }), vec![]),
        (json!({ "fds": 1 }), vec![7]),
    ];
    assert_eq!(json_rpc(text, &[5, 6, 7]).unwrap(), expected);
}

#[test]
fn each_fault_of_a_json_rpc_message_has_its_error() {
    let fault = |text: &str, numbers: &[u32]| json_rpc(text, numbers).unwrap_err();
    assert!(matches!(fault("[]", &[]), TypedError::Connection(Error::Invalid(_))));
    assert!(matches!(fault("{x}", &[]), TypedError::Format(_)));
    assert!(matches!(fault("{\"fds\":-1}", &[]), TypedError::Format(_)));
    assert!(matches!(fault("{\"fds\":1,\"fds\":0}", &[]), TypedError::Format(_)));
    assert!(matches!(
        fault("{\"a\"", &[]),
        TypedError::Connection(Error::UnexpectedEnd { bytes: 4 })
    ));
    let missing = |error| {
        matches!(error, TypedError::Connection(Error::MissingFds { expected: 2, received: 1 }))
    };
    assert!(
        missing(fault("{\"fds\":2}  ", &[5])),
        "the connection ends before the descriptors come"
    );
    assert!(missing(fault("{\"fds\":2} {", &[5])), "the next message begins before they come");
    assert!(matches!(fault("{}", &[5]), TypedError::Connection(Error::UnclaimedFds { fds: 1 })));
    let many = TypedError::from(Error::TooManyFds { fds: 1000, limit: 253 }).to_string();
    assert_eq!(fault("{\"fds\":1000}", &[]).to_string(), many);
}

#[test]
fn descriptors_may_come_with_spaces_behind_their_message() {
    let mut arrived = Arrived::new(b"{\"fds\":3}", [5]);
    let mut codec = JsonRpc::<Value>::default();
    assert!(arrived.decode(&mut codec).unwrap().is_none());
    arrived.src.extend_from_slice(b" ");
    arrived.fds.extend([6]);
    assert!(arrived.decode(&mut codec).unwrap().is_none());
    assert_eq!(arrived.src.len(), 9, "a space whose descriptors were received is not kept");
    arrived.src.extend_from_slice(b" {\"fds\":0}");
    arrived.fds.extend([7]);
    let (_, fds) = arrived.decode(&mut codec).unwrap().unwrap();
    assert_eq!(fds.to_vec(), [5, 6, 7]);
    assert!(arrived.decode(&mut codec).unwrap().is_some());
}

#[test]
fn more_descriptors_than_one_call_takes_go_with_spaces() {
    let limits = Limits::default().max_fds_per_frame(600);
    let mut run = DryRun::<u32>::stream();
    let message = (json!({ "id": 1 }), Fds::from_iter(0..600u32));
    run.encode(&mut JsonRpc::new(limits), message).unwrap();
    run.encode(&mut JsonRpc::new(limits), (json!({}), Fds::<u32>::default())).unwrap();
    let calls: Vec<_> = run.map(|call| (call.bytes, call.fds.len())).collect();
    assert_eq!(
        calls,
        [(r#"{"id":1,"fds":600}"#.into(), 253), (" ".into(), 253), (" {}".into(), 94)],
    );
}

/// Messages that arrive in pieces. The descriptors of each come with the piece that has its first
/// byte.
struct Pieces {
    bytes: Vec<u8>,
    fds: Vec<(usize, Vec<u32>)>,
    at: usize,
}

impl Pieces {
    fn of(messages: impl Iterator<Item = (Vec<u8>, Vec<u32>)>) -> Self {
        let mut pieces = Self { bytes: Vec::new(), fds: Vec::new(), at: 0 };
        for (bytes, fds) in messages {
            pieces.fds.push((pieces.bytes.len(), fds));
            pieces.bytes.extend(bytes);
        }
        pieces
    }

    /// Receives everything, and returns the descriptors of each message.
    fn receive<C: Decoder<u32, Error = TypedError>>(
        mut self,
        mut codec: C,
        sizes: &[usize],
        fds_of: impl Fn(C::Item) -> Vec<u32>,
    ) -> Vec<Vec<u32>> {
        let (mut arrived, mut messages) = (Arrived::new(b"", []), Vec::new());
        for size in sizes.iter().cycle() {
            let end = self.bytes.len().min(self.at + size);
            arrived.src.extend_from_slice(&self.bytes[self.at..end]);
            while self.fds.first().is_some_and(|(start, _)| *start < end) {
                arrived.fds.extend(self.fds.remove(0).1);
            }
            while let Some(message) = codec.decode(&mut arrived.src, &mut arrived.fds).unwrap() {
                messages.push(fds_of(message));
            }
            self.at = end;
            if end == self.bytes.len() {
                break;
            }
        }
        assert!(arrived.src.is_empty() && arrived.end().is_empty());
        messages
    }
}

proptest! {
    #[test]
    fn messages_survive_any_cuts(
        counts in prop::collection::vec(0..4u32, 1..6),
        sizes in prop::collection::vec(1..30usize, 1..20),
    ) {
        let mut next = 0;
        let expected = Vec::from_iter(counts.iter().map(|count| {
            next += count;
            Vec::from_iter(next - count..next)
        }));
        let varlink = expected.iter().map(|own| {
            let indices = Vec::from_iter(0..own.len());
            ([serde_json::to_vec(&indices).unwrap(), vec![0]].concat(), own.clone())
        });
        let pieces = Pieces::of(varlink);
        let fds_of = |fds: Vec<Passed<u32>>| fds.into_iter().map(Passed::into_inner).collect();
        let received = pieces.receive(Varlink::<Vec<Passed<u32>>>::default(), &sizes, fds_of);
        prop_assert_eq!(received, expected.clone());

        let rpc = expected.iter().map(|own| {
            let message = json!({ "text": "}\"{", "fds": own.len() });
            (serde_json::to_vec_pretty(&message).unwrap(), own.clone())
        });
        let pieces = Pieces::of(rpc);
        let fds_of = |(_, fds): (Value, Fds<u32>)| fds.into_iter().collect();
        prop_assert_eq!(pieces.receive(JsonRpc::<Value>::default(), &sizes, fds_of), expected);
    }

    /// A mutated message may be an error or a message. Each of its descriptors is closed once.
    #[test]
    fn a_mutated_json_message_loses_no_descriptor(mask in 1..=255u8) {
        let rpc = "{\"fds\":2,\"a\":[\"{\"]}{\"fds\":4}".to_owned();
        for text in [format!("{MOUNT}\0{MOUNT}\0"), rpc] {
            for position in 0..text.len() {
                let mut bytes = text.clone().into_bytes();
                bytes[position] ^= mask;
                let mut arrived = Arrived::new(&bytes, 1..=6);
                drop(all(&mut Varlink::<Call>::default(), &mut arrived));
                prop_assert_eq!(arrived.end(), [1, 2, 3, 4, 5, 6]);
                let mut arrived = Arrived::new(&bytes, 1..=6);
                drop(all(&mut JsonRpc::<Value>::default(), &mut arrived));
                prop_assert_eq!(arrived.end(), [1, 2, 3, 4, 5, 6]);
            }
        }
    }
}
