use std::fmt;

use crate::fields::Fields;

/// The kind of a connection's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Transport {
    /// A TCP connection.
    Tcp,
    /// A Unix socket of kind STREAM.
    UnixStream,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::UnixStream => "Unix STREAM",
        })
    }
}

impl Transport {
    pub(super) fn put(self, dst: &mut Vec<u8>) {
        dst.push(match self {
            Self::Tcp => 1,
            Self::UnixStream => 2,
        });
    }

    pub(super) fn read(fields: &mut Fields<'_>) -> Option<Self> {
        match fields.u8()? {
            1 => Some(Self::Tcp),
            2 => Some(Self::UnixStream),
            _ => None,
        }
    }
}
