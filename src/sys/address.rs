//! The address of a sender, as the kernel writes it.

use std::{
    ffi::OsStr,
    mem::offset_of,
    os::{
        linux::net::SocketAddrExt,
        unix::{ffi::OsStrExt, net::SocketAddr},
    },
};

use nix::libc;

/// A buffer for the address of a sender. It is larger than `sockaddr_un`, because the kernel may
/// append a zero byte.
#[derive(Debug)]
pub(super) struct Name {
    pub(super) bytes: [u8; 128],
    /// The number of bytes that the kernel has written.
    pub(super) length: usize,
}

impl Name {
    pub(super) fn new() -> Self {
        Self { bytes: [0; 128], length: 0 }
    }

    /// Returns the address. `None` if the socket has no name, or a path of 108 bytes, which the
    /// standard library does not represent.
    pub(super) fn to_addr(&self) -> Option<SocketAddr> {
        match self.bytes.get(offset_of!(libc::sockaddr_un, sun_path)..self.length)? {
            [] => None,
            [0, name @ ..] => SocketAddr::from_abstract_name(name).ok(),
            path => {
                let path = path.split(|&byte| byte == 0).next()?;
                SocketAddr::from_pathname(OsStr::from_bytes(path)).ok()
            }
        }
    }
}
