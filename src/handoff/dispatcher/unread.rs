//! The messages that are left in the socket of a link which has ended.

use std::os::fd::{AsFd, OwnedFd};

use bytes::BytesMut;

use super::protocol::FromWorker;
use crate::{
    Socket,
    codec::{Decoder, FdQueue},
    handoff::protocol::TolerantCodec,
    sys,
};

/// The number of errors of `recvmsg` in a row after which reading is given up.
const MOST_FAILURES: usize = 100;

/// Returns the messages that are left in a socket after its stream has failed or ended. An empty
/// packet looks like the end, and messages may follow an error of `recvmsg`. In both cases a worker
/// may have sent a whole ADOPTED after it. Returns false with the messages if there are more, which
/// cannot be read.
pub(super) fn rest_of(socket: &Socket) -> (Vec<FromWorker>, bool) {
    let (mut bytes, mut fds) = (BytesMut::new(), FdQueue::<OwnedFd>::new());
    let (mut codec, mut messages, mut failures) = (TolerantCodec::default(), Vec::new(), 0);
    while sys::unread(socket.as_fd()).is_ok_and(|bytes| bytes > 0) {
        if failures == MOST_FAILURES {
            return (messages, false);
        }
        bytes.reserve(64 << 10);
        match sys::recvmsg(socket.as_fd(), &mut bytes, usize::MAX, &mut fds) {
            Ok(_) => failures = 0, // no bytes are an empty packet: more is unread
            Err(_) => failures += 1,
        }
        while let Ok(Some(message)) = codec.decode(&mut bytes, &mut fds) {
            messages.extend(message.ok());
        }
    }
    (messages, true)
}
