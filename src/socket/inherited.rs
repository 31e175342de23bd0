//! Taking a socket with which this process was started.

use std::{
    io::{Error, ErrorKind, Result},
    os::fd::OwnedFd,
};

use nix::libc;

use super::{Listener, Socket};
use crate::sys;

impl Socket {
    /// Takes the socket that this process got as standard input. A parent passes it with
    /// `Command::stdin(OwnedFd::from(socket))`.
    ///
    /// Descriptor 0 becomes `/dev/null`. So a program that this process starts later reads the end
    /// of file instead of the messages of the connection, and dropping the socket ends the
    /// connection. Call this before the process starts other programs, and before anything reads
    /// from [`std::io::stdin`]. Otherwise bytes in the buffer of `stdin` are missing on the socket,
    /// and a thread that already waits in a read gets the next bytes. If standard output is the
    /// same socket, as with inetd, it stays open there.
    ///
    /// Without `/dev/null`, as in some containers, descriptor 0 becomes a pipe that has ended.
    ///
    /// # Errors
    /// `ResourceBusy` if it was taken before, `InvalidInput` if standard input is not a connected
    /// Unix socket of either kind, `EMFILE` if there are no two free descriptors, and the errors of
    /// registering it with tokio. Then standard input keeps its socket.
    pub fn from_stdin() -> Result<Self> {
        take_stdin()
    }

    /// Takes a connected socket that this process has inherited, by its number. The parent
    /// passes the number on, for example in `NODE_CHANNEL_FD`. The
    /// [guide](crate::guide#a-socket-that-the-process-was-started-with) has examples.
    ///
    /// The socket gets another number, close-on-exec. The inherited number becomes `/dev/null`,
    /// also close-on-exec, and stays in use until the process ends. So programs that this process
    /// starts later have no copy of the socket.
    ///
    /// # What is checked
    /// A descriptor belongs to the code that opened it, and a function can't find out which code
    /// that was. So a number is taken only if
    ///
    /// - it was not taken before,
    /// - it is above 2: for standard input see [`from_stdin`](Self::from_stdin),
    /// - it is not close-on-exec. Std, tokio and this crate set close-on-exec on everything that
    ///   they open, and a parent clears it on what it passes to a child.
    ///
    /// A risk remains: other code of this process may have opened or inherited a Unix socket
    /// without close-on-exec. If you pass its number, that code finds `/dev/null` under it. The
    /// number is never closed, so it can't become the number of another file.
    ///
    /// If a library sets close-on-exec on inherited descriptors, as `sd_listen_fds` of libsystemd
    /// does, that library owns them. Then convert the descriptor that the library returns, with
    /// `TryFrom<OwnedFd>`.
    ///
    /// # Errors
    /// `ResourceBusy` if the number was taken before, `InvalidInput` with a reason if it fails
    /// another check or is not a connected Unix socket of either kind, `EMFILE` if there are no two
    /// free descriptors, and the errors of registering it with tokio. Then the inherited descriptor
    /// keeps its socket, and can be taken later.
    pub fn from_inherited(number: i32) -> Result<Self> {
        take_numbered(number)
    }
}

impl Listener {
    /// Takes the listening socket that this process got as standard input, as inetd (`wait`) and
    /// `s6-ipcserver-socketbinder` pass it.
    ///
    /// Descriptor 0 becomes `/dev/null`, as described for [`Socket::from_stdin`]. As after every
    /// conversion, the listener is made non-blocking for every holder, and the path, if it has one,
    /// stays as it is on drop.
    ///
    /// # Errors
    /// The errors of [`Socket::from_stdin`], with a listening socket in place of a connected one.
    pub fn from_stdin() -> Result<Self> {
        take_stdin()
    }

    /// Takes a listening socket that this process has inherited, by its number. The parent
    /// passes the number on, for example in `LISTEN_FDS`. The
    /// [guide](crate::guide#a-socket-that-the-process-was-started-with) has an example.
    ///
    /// The checks, and what happens to the number, are described for [`Socket::from_inherited`]. As
    /// after every conversion, the listener is made non-blocking for every holder, and the path, if
    /// it has one, stays as it is on drop.
    ///
    /// # Errors
    /// The errors of [`Socket::from_inherited`], with a listening socket in place of a connected
    /// one.
    pub fn from_inherited(number: i32) -> Result<Self> {
        take_numbered(number)
    }
}

/// Takes the open file of standard input, as `Socket::from_stdin` describes.
pub(crate) fn take_stdin<T: TryFrom<OwnedFd, Error = Error>>() -> Result<T> {
    take(libc::STDIN_FILENO, "standard input")
}

/// Takes the open file of a number, as `Socket::from_inherited` describes.
pub(crate) fn take_numbered<T: TryFrom<OwnedFd, Error = Error>>(number: i32) -> Result<T> {
    let name = format!("descriptor {number}");
    if (libc::STDIN_FILENO..=libc::STDERR_FILENO).contains(&number) {
        let reason =
            format!("{name}: it is a standard stream; for standard input use `from_stdin`");
        return Err(Error::new(ErrorKind::InvalidInput, reason));
    }
    take(number, &name)
}

fn take<T: TryFrom<OwnedFd, Error = Error>>(number: i32, name: &str) -> Result<T> {
    sys::take_inherited(number, T::try_from).map_err(|error| match error.raw_os_error() {
        Some(_) => error, // EMFILE has no `ErrorKind`, so keep its number
        None => Error::new(error.kind(), format!("{name}: {error}")),
    })
}
