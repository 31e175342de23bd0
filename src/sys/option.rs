//! Socket options: those that nix does not have, and one that takes a value of libc.

use std::os::fd::BorrowedFd;

use nix::{
    getsockopt_impl, libc, setsockopt_impl, sockopt_impl,
    sys::socket::{setsockopt, sockopt},
};

// These are missing from libc 0.2 too. The numbers are those of asm-generic/socket.h. The
// architectures with other numbers (alpha, mips, parisc, sparc) are not supported.
const SO_PASSPIDFD: libc::c_int = 76;
const SO_PASSRIGHTS: libc::c_int = 83;

sockopt_impl!(
    /// A number that every copy of a socket has, and no other socket while the system runs.
    Cookie, GetOnly, libc::SOL_SOCKET, libc::SO_COOKIE, u64
);
sockopt_impl!(
    /// The address family of a socket.
    Domain, GetOnly, libc::SOL_SOCKET, libc::SO_DOMAIN, i32
);
sockopt_impl!(
    /// The protocol of a socket.
    Protocol, GetOnly, libc::SOL_SOCKET, libc::SO_PROTOCOL, i32
);
sockopt_impl!(
    /// True if each message comes with a pidfd of its sender. Linux 6.5.
    PassPidfd, Both, libc::SOL_SOCKET, SO_PASSPIDFD, bool
);
sockopt_impl!(
    /// True if the socket takes descriptors from its peer. Accepted sockets inherit it. Linux 6.16.
    PassRights, Both, libc::SOL_SOCKET, SO_PASSRIGHTS, bool
);

/// Switches off `SO_LINGER`. Fails silently on sockets that do not have it.
pub(crate) fn switch_off_linger(socket: BorrowedFd<'_>) {
    let _ = setsockopt(&socket, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
}
