//! Putting the halves of a connection together again.

use std::{fmt, io, sync::Arc};

use super::{Framed, ReadHalf, WriteHalf};

impl<D, E> Framed<D, E> {
    /// Puts two halves together again.
    ///
    /// # Errors
    /// [`ReuniteError`] with both halves, if they belong to different sockets.
    #[expect(
        clippy::result_large_err,
        reason = "both halves together are as large as the connection"
    )]
    pub fn reunite(read: ReadHalf<D>, mut write: WriteHalf<E>) -> Result<Self, ReuniteError<D, E>> {
        if !Arc::ptr_eq(read.shared_socket(), write.shared_socket()) {
            return Err(ReuniteError { read, write });
        }
        write.shut_down_on_drop(false);
        Ok(Self { read, write })
    }
}

/// The error of [`Framed::reunite`] for halves of different sockets. It contains both halves.
pub struct ReuniteError<D, E = D> {
    /// The receiving half.
    pub read: ReadHalf<D>,
    /// The sending half.
    pub write: WriteHalf<E>,
}

impl<D, E> fmt::Debug for ReuniteError<D, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReuniteError").finish_non_exhaustive()
    }
}

impl<D, E> fmt::Display for ReuniteError<D, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("halves of different sockets cannot be put together")
    }
}

impl<D, E> std::error::Error for ReuniteError<D, E> {}

impl<D, E> From<ReuniteError<D, E>> for io::Error {
    fn from(error: ReuniteError<D, E>) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error.to_string())
    }
}
