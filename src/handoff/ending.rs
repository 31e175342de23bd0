//! The end of a client's connection.

use std::os::fd::{AsFd, AsRawFd};

use nix::{
    libc,
    sys::socket::{Shutdown, getsockopt, setsockopt, shutdown, sockopt},
};

/// Ends a connection for its client and for every process that has a copy of the socket, so that
/// the client sees the end at once. The close that follows does not block.
pub(super) fn end_connection(socket: &impl AsFd) {
    if shutdown(socket.as_fd().as_raw_fd(), Shutdown::Both).is_err() {
        return; // it has ended already, in both directions
    }
    // With a time to linger, the last `close` would block for it, even if the socket is
    // non-blocking.
    if getsockopt(socket, sockopt::Linger)
        .is_ok_and(|linger| linger.l_onoff != 0 && linger.l_linger > 0)
    {
        let _ = setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
    }
}
