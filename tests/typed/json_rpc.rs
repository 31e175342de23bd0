//! JSON-RPC with descriptors, against `jsonrpc-fdpass`, the crate of the authors of the format.

use std::{num::NonZeroUsize, os::fd::OwnedFd};

use fdwire::{Fds, Framed, Limits, SocketKind, typed::JsonRpc};
use futures::{SinkExt, TryStreamExt};
use jsonrpc_fdpass::{JsonRpcMessage, JsonRpcNotification, MessageWithFds, UnixSocketTransport};
use serde_json::{Value, json};

use crate::common::{counted, mark_of, marked};

fn fds(marks: impl IntoIterator<Item = u32>) -> Fds {
    marks.into_iter().map(marked).collect()
}

fn notification(number: u32) -> Value {
    json!({ "jsonrpc": "2.0", "method": "store", "params": { "number": number, "text": "}{" } })
}

/// Messages go both ways, with numbers of descriptors that take one call or several.
#[test]
fn the_json_rpc_crate_receives_and_sends_descriptors_with_their_messages() {
    const COUNTS: [u32; 6] = [0, 1, 2, 253, 254, 700];
    counted(async |kind| {
        if kind != SocketKind::Stream {
            return; // the specification requires a stream
        }
        let (a, b) = tokio::net::UnixStream::pair().unwrap();
        let codec = JsonRpc::<Value>::new(Limits::default().max_fds_per_frame(1000));
        let mut ours = Framed::new(a.try_into().unwrap(), codec);
        let (mut sender, mut receiver) = UnixSocketTransport::new(b).split();
        sender.set_max_fds_per_sendmsg(NonZeroUsize::new(100).unwrap());

        // The other crate sends each message back with its descriptors.
        let echo = async {
            for count in COUNTS {
                let MessageWithFds { message, file_descriptors } =
                    receiver.receive().await.unwrap();
                let JsonRpcMessage::Notification(JsonRpcNotification { params, .. }) = message
                else {
                    panic!("not what was sent")
                };
                let params = params.unwrap();
                assert_eq!((&params["number"], &params["text"]), (&json!(count), &json!("}{")));
                assert_eq!(file_descriptors.len(), count as usize);
                sender.set_pretty(count % 2 == 0);
                sender.notify_with_fds("stored", params, file_descriptors).await.unwrap();
            }
        };

        // This end sends all messages, and then receives them.
        let send_and_receive = async {
            for count in COUNTS {
                ours.send((notification(count), fds(0..count))).await.unwrap();
            }
            for count in COUNTS {
                let (message, fds): (Value, Fds<OwnedFd>) = ours.try_next().await.unwrap().unwrap();
                assert_eq!(
                    (&message["method"], &message["params"]["number"]),
                    (&json!("stored"), &json!(count))
                );
                assert!(fds.iter().map(mark_of).eq(0..count));
            }
        };
        tokio::join!(echo, send_and_receive);
    });
}
