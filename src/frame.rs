//! A frame and the descriptors that it carries.

use std::{fmt, mem::ManuallyDrop, ops::Deref, os::fd::OwnedFd, slice, sync::Arc};

use bytes::Bytes;
use smallvec::SmallVec;

/// A message: bytes and the open file descriptors that travel with them.
///
/// `F` is the type of a descriptor. Received frames have [`OwnedFd`]. Frames to be sent may also
/// have [`SendFd`](crate::SendFd) or `Arc<OwnedFd>`, and tests of protocol logic can run on plain
/// integers.
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
    /// The bytes. In a received frame they are a slice of a read buffer, which stays in memory as
    /// long as any slice of it. So copy a small payload that you keep for long. A read buffer
    /// usually has 256 KiB, at most 512 KiB, and the connections of one thread may share it.
    ///
    /// A frame that is too long for such a buffer is received into a large one, which holds no
    /// small frames. The large buffer may be longer than the frame, if a longer frame has used it
    /// before.
    pub payload: Bytes,
    /// The descriptors, in the order in which they were attached.
    pub fds: Fds<F>,
}

impl Frame {
    /// Returns a frame without descriptors.
    pub fn new(payload: impl Into<Bytes>) -> Self {
        Self { payload: payload.into(), fds: Fds::none() }
    }
}

impl<F> Frame<F> {
    /// Returns a frame with descriptors of any type.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # let file = std::fs::File::open("/dev/null")?;
    /// use fdwire::{Frame, SendFd};
    ///
    /// let frame = Frame::from_parts("log file", [SendFd::assume_file(file)]);
    /// # assert_eq!(frame.fds.len(), 1);
    /// # Ok(()) }
    /// ```
    pub fn from_parts(payload: impl Into<Bytes>, fds: impl IntoIterator<Item = F>) -> Self {
        Self { payload: payload.into(), fds: fds.into_iter().collect() }
    }

    /// Attaches one more descriptor: a `File`, a `TcpStream` of std, an `OwnedFd`, or anything else
    /// that becomes one.
    ///
    /// A descriptor that is registered with an event loop must be taken out of it first. `into_std`
    /// does that for tokio's sockets. A descriptor that stays registered keeps waking the event
    /// loop as long as any process holds a copy (epoll(7), "Questions and answers" 6).
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

/// The descriptors of a frame, in order. It dereferences to a slice. One descriptor does not take
/// an allocation.
///
/// If descriptors came from a peer and are still in this list when it is dropped, they are closed
/// [in the background](crate::close_in_background), because the peer decides how long that takes.
/// The same is true of descriptors that you add to the list. Descriptors that you have taken out
/// are closed like any other.
pub struct Fds<F = OwnedFd> {
    /// The descriptors. `None` if there are none, as in most messages. Then `drop` only checks this
    /// field. It is `ManuallyDrop` because the compiler's own drop of an `Option` would be a
    /// function call for each message.
    list: ManuallyDrop<Option<FdList<F>>>,
}

/// A way to close descriptors that came from a peer and were not taken out.
pub(crate) trait FdCloser<F>: Send + Sync {
    fn close(self: Arc<Self>, fds: SmallVec<[F; 1]>);
}

impl Fds {
    /// Returns no descriptors, for a message that has none. [`Fds::default`] does the same for
    /// descriptors of any type, if the compiler can infer it.
    pub const fn none() -> Self {
        Self { list: ManuallyDrop::new(None) }
    }
}

impl<F> Fds<F> {
    /// Returns descriptors that `closer` closes unless they are taken out.
    #[inline]
    pub(crate) fn from_peer(
        mut fds: SmallVec<[F; 1]>,
        closer: Option<Arc<dyn FdCloser<F>>>,
    ) -> Self {
        let fds = match fds.len() {
            0 | 1 => fds.pop().map(List::One),
            _ => Some(List::Many(Box::new(fds.into_vec()))),
        };
        Self { list: ManuallyDrop::new(fds.map(|fds| FdList { fds, closer })) }
    }

    /// Takes all descriptors out.
    fn take(&mut self) -> FdsIntoIter<F> {
        let (fds, closer) = match self.list.take() {
            None => (SmallVec::new(), None),
            Some(FdList { fds, closer }) => (fds.into(), closer),
        };
        FdsIntoIter { fds: fds.into_iter(), closer }
    }

    /// Yields each descriptor in an `Fds` of its own, with the same closer.
    #[cfg(feature = "serde")]
    pub(crate) fn split(mut self) -> impl Iterator<Item = Self> {
        let mut fds = self.take();
        let closer = fds.closer.clone();
        std::iter::from_fn(move || {
            Some(Self::from_peer(SmallVec::from_buf([fds.next()?]), closer.clone()))
        })
    }

    #[inline(never)] // so that `drop` is short
    fn drop_list(&mut self) {
        drop(self.take());
    }

    /// Adds a descriptor at the end.
    pub fn push(&mut self, fd: F) {
        if let Some(FdList { fds: List::Many(fds), .. }) = &mut *self.list {
            return fds.push(fd);
        }
        let mut before = self.take();
        let closer = before.closer.take();
        *self = Self::from_peer(before.by_ref().chain([fd]).collect(), closer);
    }

    /// Takes the last descriptor.
    pub fn pop(&mut self) -> Option<F> {
        if let Some(FdList { fds: List::Many(fds), .. }) = &mut *self.list {
            return fds.pop();
        }
        self.take().next()
    }

    /// Takes the descriptors as an array, if there are exactly `N` of them.
    ///
    /// # Errors
    /// The descriptors, if their number is not `N`.
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
    pub fn into_array<const N: usize>(mut self) -> Result<[F; N], Self> {
        if self.len() != N {
            return Err(self);
        }
        let mut fds = self.take();
        Ok(std::array::from_fn(|_| fds.next().expect("length was checked")))
    }
}

impl<F> Deref for Fds<F> {
    type Target = [F];

    fn deref(&self) -> &[F] {
        self.list.as_ref().map_or(&[], |list| list.fds.as_slice())
    }
}

impl<F> Default for Fds<F> {
    fn default() -> Self {
        Self { list: ManuallyDrop::new(None) }
    }
}

impl<F> Extend<F> for Fds<F> {
    fn extend<I: IntoIterator<Item = F>>(&mut self, fds: I) {
        fds.into_iter().for_each(|fd| self.push(fd));
    }
}

impl<F> From<Vec<F>> for Fds<F> {
    fn from(fds: Vec<F>) -> Self {
        Self::from_peer(fds.into(), None)
    }
}

impl<F> FromIterator<F> for Fds<F> {
    fn from_iter<I: IntoIterator<Item = F>>(fds: I) -> Self {
        Self::from_peer(fds.into_iter().collect(), None)
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

    fn into_iter(mut self) -> FdsIntoIter<F> {
        self.take()
    }
}

/// Yields the descriptors of an [`Fds`] in order. The descriptors that are left when it is dropped
/// are closed in the way that `Fds` describes.
pub struct FdsIntoIter<F> {
    fds: smallvec::IntoIter<[F; 1]>,
    closer: Option<Arc<dyn FdCloser<F>>>,
}

impl<F> Iterator for FdsIntoIter<F> {
    type Item = F;

    fn next(&mut self) -> Option<F> {
        self.fds.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.fds.size_hint()
    }
}

impl<F> ExactSizeIterator for FdsIntoIter<F> {}

impl<F> Drop for FdsIntoIter<F> {
    fn drop(&mut self) {
        if let Some(closer) = self.closer.take()
            && self.fds.len() > 0
        {
            closer.close(self.fds.by_ref().collect());
        }
    }
}

impl<F: fmt::Debug> fmt::Debug for FdsIntoIter<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fds.fmt(f)
    }
}

impl<F> Drop for Fds<F> {
    #[inline]
    fn drop(&mut self) {
        if self.list.is_some() {
            self.drop_list();
        }
    }
}

impl<F: fmt::Debug> fmt::Debug for Fds<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fds").field(&&**self).finish()
    }
}

impl<F: Clone> Clone for Fds<F> {
    fn clone(&self) -> Self {
        let closer = self.list.as_ref().and_then(|list| list.closer.clone());
        Self::from_peer(self.iter().cloned().collect(), closer)
    }
}

impl<F: PartialEq> PartialEq for Fds<F> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<F: Eq> Eq for Fds<F> {}

struct FdList<F> {
    fds: List<F>,
    /// Closes the descriptors that are not taken out. `None` if they did not come from a peer.
    closer: Option<Arc<dyn FdCloser<F>>>,
}

/// A list of one descriptor or of any number. It takes few bytes, because a message is moved
/// several times.
#[repr(usize)] // in whole words, which take fewer instructions to move
enum List<F> {
    One(F),
    #[expect(clippy::box_collection, reason = "a `Vec` in place would make each message larger")]
    Many(Box<Vec<F>>),
}

impl<F> List<F> {
    fn as_slice(&self) -> &[F] {
        match self {
            Self::One(fd) => slice::from_ref(fd),
            Self::Many(fds) => fds,
        }
    }
}

impl<F> From<List<F>> for SmallVec<[F; 1]> {
    fn from(list: List<F>) -> Self {
        match list {
            List::One(fd) => Self::from_buf([fd]),
            List::Many(fds) => Self::from_vec(*fds),
        }
    }
}
