//! The amount that waits to be sent.

use std::fmt;

/// The amount that a connection has accepted and not sent.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fdwire::{Frame, FrameCodec, Framed, Socket, SocketKind};
/// use futures::SinkExt;
///
/// let (a, _b) = Socket::pair(SocketKind::Stream)?;
/// let mut framed = Framed::new(a, FrameCodec::default());
/// framed.feed(Frame::new("waits until it is flushed")).await?;
/// assert_eq!((framed.unsent().bytes, framed.unsent().fds), (8 + 25, 0));
/// framed.flush().await?;
/// assert!(framed.unsent().is_empty());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unsent {
    /// The number of bytes, headers included.
    pub bytes: usize,
    /// The number of descriptors.
    pub fds: usize,
}

impl fmt::Display for Unsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes and {} descriptors", self.bytes, self.fds)
    }
}

impl Unsent {
    /// Returns true if everything was sent.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}
