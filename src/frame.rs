//! Frames and the descriptors they carry.

use std::{ops::Deref, os::fd::OwnedFd};

use bytes::Bytes;
use smallvec::SmallVec;

/// A message: bytes and the open file descriptors that travel with them.
///
/// `F` is the type of a descriptor, [`OwnedFd`] wherever a socket is involved. Tests of protocol logic can run on plain
/// integers instead.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// use fdwire::Frame;
///
/// let file = std::fs::File::open("/dev/null")?;
/// let frame = Frame::new("log file").with_fd(file);
/// assert_eq!(frame.payload, "log file");
/// assert_eq!(frame.fds.len(), 1);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame<F = OwnedFd> {
    /// The bytes. Of a frame that was received, a slice of the read buffer (256 KiB), which lives as long as any slice of it:
    /// copy what is small and kept for long.
    pub payload: Bytes,
    /// The descriptors, in the order in which they were attached.
    pub fds: Fds<F>,
}

impl Frame {
    /// A frame without descriptors.
    pub fn new(payload: impl Into<Bytes>) -> Self {
        Self { payload: payload.into(), fds: Fds::new() }
    }
}

impl<F> Frame<F> {
    /// Attaches one more descriptor: a `File`, a `TcpStream` of std, an `OwnedFd`, or anything else that becomes one.
    ///
    /// A descriptor that is registered with an event loop must be taken out of it first. `into_std` does that for
    /// tokio's sockets; one that stays registered keeps firing as long as any process holds it (epoll(7), "Questions
    /// and answers" 6).
    #[must_use]
    pub fn with_fd(mut self, fd: impl Into<F>) -> Self {
        self.fds.push(fd.into());
        self
    }

    /// Attaches more descriptors, in their order.
    #[must_use]
    pub fn with_fds(mut self, fds: impl IntoIterator<Item = F>) -> Self {
        self.fds.extend(fds);
        self
    }
}

/// The descriptors of a frame, in order; lends them as a slice. None or one take no allocation. Closed on drop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fds<F = OwnedFd>(SmallVec<[F; 1]>);

impl<F> Fds<F> {
    /// No descriptors.
    pub fn new() -> Self {
        Self(SmallVec::new())
    }

    /// Adds a descriptor at the end.
    pub fn push(&mut self, fd: F) {
        self.0.push(fd);
    }

    /// Takes the last descriptor.
    pub fn pop(&mut self) -> Option<F> {
        self.0.pop()
    }

    /// Takes the descriptors as an array, if there are exactly `N` of them.
    ///
    /// # Errors
    /// Gives the descriptors back if their number is not `N`.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # let frame = fdwire::Frame::new("").with_fd(std::fs::File::open("/dev/null")?);
    /// match frame.fds.into_array() {
    ///     Ok([fd]) => drop(std::fs::File::from(fd)),
    ///     Err(fds) => eprintln!("one descriptor expected, {} came", fds.len()),
    /// }
    /// # Ok(()) }
    /// ```
    pub fn into_array<const N: usize>(self) -> Result<[F; N], Self> {
        if self.0.len() != N {
            return Err(self);
        }
        let mut fds = self.0.into_iter();
        Ok(std::array::from_fn(|_| fds.next().expect("length was checked")))
    }
}

impl<F> Deref for Fds<F> {
    type Target = [F];

    fn deref(&self) -> &[F] {
        &self.0
    }
}

impl<F> Default for Fds<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F> Extend<F> for Fds<F> {
    fn extend<I: IntoIterator<Item = F>>(&mut self, fds: I) {
        self.0.extend(fds);
    }
}

impl<F> From<Vec<F>> for Fds<F> {
    fn from(fds: Vec<F>) -> Self {
        Self(fds.into())
    }
}

impl<F> FromIterator<F> for Fds<F> {
    fn from_iter<I: IntoIterator<Item = F>>(fds: I) -> Self {
        Self(fds.into_iter().collect())
    }
}

impl<'a, F> IntoIterator for &'a Fds<F> {
    type Item = &'a F;
    type IntoIter = std::slice::Iter<'a, F>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<F> IntoIterator for Fds<F> {
    type Item = F;
    type IntoIter = FdsIntoIter<F>;

    fn into_iter(self) -> FdsIntoIter<F> {
        FdsIntoIter(self.0.into_iter())
    }
}

/// Gives the descriptors of an [`Fds`] away in order. Those not taken are closed on drop.
#[derive(Debug)]
pub struct FdsIntoIter<F>(smallvec::IntoIter<[F; 1]>);

impl<F> Iterator for FdsIntoIter<F> {
    type Item = F;

    fn next(&mut self) -> Option<F> {
        self.0.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl<F> ExactSizeIterator for FdsIntoIter<F> {}
