use std::{
    io,
    os::{fd::OwnedFd, unix},
};

use super::{Accepted, Address, Transport};

/// A source for [`Dispatcher::serve`](super::Dispatcher::serve): a listener of tokio or std, of TCP
/// or Unix sockets.
pub trait IntoListener: sealed::Sealed {
    /// A connection of this listener, registered with tokio: `TcpStream` or `UnixStream`.
    type Stream: Into<Accepted> + Send + 'static;

    /// Takes it out of its event loop.
    #[doc(hidden)]
    fn into_listener(self) -> io::Result<(OwnedFd, Transport, Address)>;

    /// Makes a stream of an accepted connection.
    #[doc(hidden)]
    fn stream(connection: OwnedFd) -> io::Result<Self::Stream>;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! into_listener {
    ($($listener:ty, $into_std:expr, $transport:ident, $stream:ty, $std_stream:ty;)*) => {$(
        impl sealed::Sealed for $listener {}
        impl IntoListener for $listener {
            type Stream = $stream;

            fn into_listener(self) -> io::Result<(OwnedFd, Transport, Address)> {
                let listener = $into_std(self)?;
                listener.set_nonblocking(true)?;
                let local = listener.local_addr()?.into();
                Ok((listener.into(), Transport::$transport, local))
            }

            fn stream(connection: OwnedFd) -> io::Result<$stream> {
                let stream = <$std_stream>::from(connection);
                stream.set_nonblocking(true)?;
                <$stream>::from_std(stream)
            }
        }
    )*};
}

into_listener! {
    tokio::net::TcpListener, tokio::net::TcpListener::into_std, Tcp,
        tokio::net::TcpStream, std::net::TcpStream;
    tokio::net::UnixListener, tokio::net::UnixListener::into_std, UnixStream,
        tokio::net::UnixStream, unix::net::UnixStream;
    std::net::TcpListener, io::Result::Ok, Tcp,
        tokio::net::TcpStream, std::net::TcpStream;
    unix::net::UnixListener, io::Result::Ok, UnixStream,
        tokio::net::UnixStream, unix::net::UnixStream;
}
