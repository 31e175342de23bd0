//! The named listeners of a server.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map},
    fmt, io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::SockType,
};

use super::{
    Error,
    inspect::{cookie_of, identity_of},
    passed,
    protocol::{Address, Identity, Kind},
};
use crate::socket::PathGuard;

/// The listeners of a server, each with a name and an index: TCP, UDP, and Unix sockets of each
/// kind.
///
/// The sockets of one name are numbered from 0 in the order in which they are added: a
/// `SO_REUSEPORT` group is one name with several indices.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::net::{TcpListener, UdpSocket};
///
/// use fdwire::takeover::Listeners;
///
/// let mut listeners = Listeners::new();
/// listeners.add("http", TcpListener::bind("127.0.0.1:0")?)?;
/// listeners.add("dns", UdpSocket::bind("127.0.0.1:0")?)?;
/// let names: Vec<_> = listeners.identities().map(|identity| identity.name.as_str()).collect();
/// assert_eq!(names, ["http", "dns"]);
/// # Ok(()) }
/// ```
#[derive(Default)]
pub struct Listeners {
    pub(super) entries: Vec<Entry>,
    /// For each name, the position of each of its sockets in `entries`, by the socket's index. The
    /// indices have gaps if sockets were declined.
    places: HashMap<String, BTreeMap<u32, u32>>,
}

/// One listener.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) identity: Identity,
    /// The number that all copies of the socket share (`SO_COOKIE`).
    pub(super) cookie: u64,
    pub(super) fd: Arc<OwnedFd>,
    /// The lock of a Unix path, and the right to remove the path.
    pub(super) guard: Option<PathGuard>,
}

impl Listeners {
    /// Returns an empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a listening socket or a bound datagram socket, for example a listener of std. The
    /// socket becomes non-blocking.
    ///
    /// The path of a Unix socket stays as it is when the server ends. If the last process that
    /// serves is to remove it, use [`bind_path`](Self::bind_path).
    ///
    /// Convert a listener of tokio with `into_std` first, which removes it from the event loop.
    ///
    /// # Errors
    /// [`Error::Io`] with `InvalidInput` if it is not a socket of IP or Unix, or does not listen.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        listener: impl Into<OwnedFd>,
    ) -> Result<(), Error> {
        self.add_guarded(name.into(), listener.into(), None)
    }

    /// Adds the listener that a process manager has passed for this name, of this type and at this
    /// address. Returns false if there is none. Then the application has to bind the listener.
    ///
    /// These managers are recognized by their environment variables:
    ///
    /// - **systemd**, sockets of a `.socket` unit (`LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES`,
    ///   see sd_listen_fds(3)). `FileDescriptorName=` is the name.
    /// - **einhorn** (`EINHORN_MASTER_PID`, `EINHORN_FD_COUNT`, `EINHORN_FD_0` and so on, or the
    ///   older `EINHORN_FDS`), without names.
    /// - **Server::Starter**, also known as `start_server` (`SERVER_STARTER_PORT`), without names.
    ///
    /// A socket with this name has to be of this type and at this address. Port 0 accepts any port.
    /// If no socket has the name, a socket at exactly this address is taken, whatever its name is.
    /// Sockets that are not adopted stay as they are, for example those of systemd's descriptor
    /// store.
    ///
    /// [`Server::bind`](super::Server::bind) and [`bind_or_take`](super::bind_or_take) replace the
    /// inherited number by `/dev/null`, so that programs which this process starts later have no
    /// copy of the socket. Until then, dropping this value changes nothing.
    ///
    /// The manager keeps its own copy. It owns the path of a Unix socket, so the path stays as it
    /// is when the server ends.
    ///
    /// A number that is close-on-exec does not count as passed. `sd_listen_fds` of libsystemd sets
    /// that flag: if you call it, [`add`](Self::add) the sockets that it returns.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::net::{SocketAddr, TcpListener};
    ///
    /// use fdwire::takeover::{Listeners, protocol::Kind};
    ///
    /// // `bind_tcp` does the same. Do it by hand to set options of the socket.
    /// let mut listeners = Listeners::new();
    /// let address: SocketAddr = "127.0.0.1:0".parse()?;
    /// if !listeners.adopt("http", Kind::Stream, &address.into())? {
    ///     listeners.add("http", TcpListener::bind(address)?)?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::Mismatch`] if all sockets that were passed for the name are of another type, or at
    /// another address. [`Error::Io`] with `EMFILE` if there is no descriptor left.
    pub fn adopt(
        &mut self,
        name: impl Into<String>,
        kind: Kind,
        address: &Address,
    ) -> Result<bool, Error> {
        let name = name.into();
        let passed = passed::copy((&name, self.next_index(&name)), kind, address, &self.cookies())?;
        passed.map_or(Ok(false), |fd| self.add(name, fd).map(|()| true))
    }

    /// [Adopts](Self::adopt) the TCP listener that a process manager has passed, or binds one.
    ///
    /// # Errors
    /// The errors of [`adopt`](Self::adopt), and [`Error::Bind`].
    pub fn bind_tcp(&mut self, name: impl Into<String>, address: SocketAddr) -> Result<(), Error> {
        self.adopt_or_bind(name.into(), Kind::Stream, address.into(), || {
            Ok((TcpListener::bind(address)?.into(), None))
        })
    }

    /// [Adopts](Self::adopt) the UDP socket that a process manager has passed, or binds one.
    ///
    /// # Errors
    /// The errors of [`adopt`](Self::adopt), and [`Error::Bind`].
    pub fn bind_udp(&mut self, name: impl Into<String>, address: SocketAddr) -> Result<(), Error> {
        self.adopt_or_bind(name.into(), Kind::Datagram, address.into(), || {
            Ok((UdpSocket::bind(address)?.into(), None))
        })
    }

    /// [Adopts](Self::adopt) the Unix socket that a process manager has passed, or binds one to a
    /// path with this mode. Clients need write permission to connect.
    ///
    /// The process that owns a path holds the lock of a file beside it (`<path>.lock`). The lock
    /// moves to the process that takes over, together with the right to remove both files. The last
    /// process removes them.
    ///
    /// # Errors
    /// The errors of [`adopt`](Self::adopt), and [`Error::Bind`] with the errors of
    /// [`Listener::bind_with_mode`](crate::Listener::bind_with_mode).
    pub fn bind_path(
        &mut self,
        name: impl Into<String>,
        path: impl AsRef<Path>,
        kind: Kind,
        mode: u32,
    ) -> Result<(), Error> {
        let path = path.as_ref();
        self.adopt_or_bind(name.into(), kind, Address::Path(path.to_owned()), || {
            bind_to_path(path, kind, mode).map(|(fd, guard)| (fd, Some(guard)))
        })
    }

    /// Returns the identities of the listeners, in their order.
    pub fn identities(&self) -> impl Iterator<Item = &Identity> {
        self.entries.iter().map(|entry| &entry.identity)
    }

    /// Returns the number of listeners.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns true if there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adopts the listener that a process manager has passed, or adds the one that `bind` returns.
    fn adopt_or_bind(
        &mut self,
        name: String,
        kind: Kind,
        address: Address,
        bind: impl FnOnce() -> io::Result<(OwnedFd, Option<PathGuard>)>,
    ) -> Result<(), Error> {
        if self.adopt(name.clone(), kind, &address)? {
            return Ok(());
        }
        match bind() {
            Ok((fd, guard)) => self.add_guarded(name, fd, guard),
            Err(source) => Err(Error::Bind { name, address, source }),
        }
    }

    /// Adds a listener with the next index of its name.
    fn add_guarded(
        &mut self,
        name: String,
        fd: OwnedFd,
        guard: Option<PathGuard>,
    ) -> Result<(), Error> {
        let index = self.next_index(&name);
        let identity = identity_of(name, index, fd.as_fd())?;
        let cookie = cookie_of(fd.as_fd())?;
        set_nonblocking(&fd)?;
        self.insert(Entry { identity, cookie, fd: Arc::new(fd), guard })
    }

    /// Returns the [cookies](Entry::cookie) of all listeners.
    pub(super) fn cookies(&self) -> BTreeSet<u64> {
        self.entries.iter().map(|entry| entry.cookie).collect()
    }

    /// Returns the index of the next socket of a name: one more than the highest.
    fn next_index(&self, name: &str) -> u32 {
        let last = self.places.get(name).and_then(|places| places.keys().next_back());
        last.map_or(0, |last| last + 1)
    }

    /// Adds a listener whose identity already has its index.
    pub(super) fn insert(&mut self, entry: Entry) -> Result<(), Error> {
        let Identity { name, index, .. } = &entry.identity;
        match self.places.entry(name.clone()).or_default().entry(*index) {
            btree_map::Entry::Occupied(_) => {
                return Err(Error::Duplicate { name: name.clone(), index: *index });
            }
            btree_map::Entry::Vacant(place) => place.insert(self.entries.len() as u32),
        };
        self.entries.push(entry);
        Ok(())
    }

    /// Keeps only the listeners whose positions satisfy a condition. Indices stay as they are.
    pub(super) fn retain(&mut self, is_kept: impl Fn(u32) -> bool) {
        let entries = std::mem::take(self).entries;
        for (_, entry) in (0..).zip(entries).filter(|(number, _)| is_kept(*number)) {
            let place = self.entries.len() as u32;
            let Identity { name, index, .. } = &entry.identity;
            self.places.entry(name.clone()).or_default().insert(*index, place);
            self.entries.push(entry);
        }
    }

    /// Returns a listener by its name and index.
    pub(super) fn find(&self, name: &str, index: u32) -> Result<&Entry, Error> {
        let found = self.position(name, index).and_then(|number| self.entries.get(number as usize));
        found.ok_or_else(|| Error::NoSuchListener { name: name.to_owned(), index })
    }

    /// Returns the position of a listener among all.
    pub(super) fn position(&self, name: &str, index: u32) -> Option<u32> {
        self.places.get(name)?.get(&index).copied()
    }
}

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.identities().map(ToString::to_string)).finish()
    }
}

/// Binds a Unix socket to a path that no live process owns, and listens unless it is a datagram
/// socket.
fn bind_to_path(path: &Path, kind: Kind, mode: u32) -> io::Result<(OwnedFd, PathGuard)> {
    // The lock comes before the socket, because a stale path may only be removed under the lock.
    let mut guard = PathGuard::take(path)?;
    let kind = match kind {
        Kind::Stream => SockType::Stream,
        Kind::Datagram => SockType::Datagram,
        Kind::SeqPacket => SockType::SeqPacket,
    };
    Ok((guard.bind_new(kind, mode)?, guard))
}

/// Sets `O_NONBLOCK`. The flag belongs to the open file, so it changes for all processes that share
/// the socket.
fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_one_name_are_numbered_and_an_index_is_there_once() {
        let mut listeners = Listeners::new();
        for _ in 0..3 {
            listeners.add("http", TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        }
        let indices: Vec<_> = listeners.identities().map(|identity| identity.index).collect();
        assert_eq!(indices, [0, 1, 2]);
        let mut others = Listeners::new();
        others.add("http", TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        let first = others.entries.remove(0);
        assert!(matches!(listeners.insert(first), Err(Error::Duplicate { index: 0, .. })));
        assert!(matches!(listeners.find("http", 3), Err(Error::NoSuchListener { index: 3, .. })));
    }

    #[test]
    fn a_listener_that_is_not_kept_leaves_a_gap() {
        let mut listeners = Listeners::new();
        let add = |listeners: &mut Listeners| {
            listeners.add("http", TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        };
        (0..4).for_each(|_| add(&mut listeners));
        listeners.retain(|number| number != 1);
        add(&mut listeners);
        let indices: Vec<_> = listeners.identities().map(|identity| identity.index).collect();
        assert_eq!(indices, [0, 2, 3, 4]);
        for (place, index) in (0..).zip(indices) {
            assert_eq!(listeners.position("http", index), Some(place));
            assert_eq!(listeners.find("http", index).unwrap().identity.index, index);
        }
        assert!(matches!(listeners.find("http", 1), Err(Error::NoSuchListener { index: 1, .. })));
    }

    #[test]
    fn a_path_has_its_mode_and_is_removed_with_its_lock_at_the_end() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        for kind in [Kind::Stream, Kind::Datagram, Kind::SeqPacket] {
            let path = directory.path().join(kind.to_string());
            let mut listeners = Listeners::new();
            listeners.bind_path("x", &path, kind, 0o640).unwrap();
            assert_eq!(listeners.identities().next().unwrap().kind, kind);
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
            let second = Listeners::new().bind_path("y", &path, kind, 0o600).unwrap_err();
            assert!(second.to_string().contains(path.to_str().unwrap()), "{second}");
            assert_eq!(io::Error::from(second).kind(), io::ErrorKind::AddrInUse);
            drop(listeners);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
