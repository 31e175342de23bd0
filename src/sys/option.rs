//! Socket options that nix does not have.

use nix::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};

// Missing from libc 0.2 too. Architectures with the generic numbers of asm-generic/socket.h; the
// others (alpha, mips, parisc, sparc) are not among those this crate is built for.
const SO_PASSPIDFD: libc::c_int = 76;
const SO_PASSRIGHTS: libc::c_int = 83;

sockopt_impl!(
    /// A number that is the same for every copy of a socket, and of no other socket as long as the
    /// system runs.
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
    /// Whether each message brings a pidfd of its sender along. Linux 6.5.
    PassPidfd, Both, libc::SOL_SOCKET, SO_PASSPIDFD, bool
);
sockopt_impl!(
    /// Whether the socket takes descriptors from its peer. Accepted sockets inherit it. Linux 6.16.
    PassRights, Both, libc::SOL_SOCKET, SO_PASSRIGHTS, bool
);
