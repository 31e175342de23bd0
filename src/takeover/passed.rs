//! Finds the listener that a process manager has passed for a name, a type and an address.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, OwnedFd},
};

use tracing::{debug, warn};

use super::{
    Error,
    inspect::{cookie_of, difference, identity_of},
    protocol::{Address, Family, Identity, Kind},
};
use crate::socket::passed;

/// Copies the listener that a manager has passed for this name or, if none has the name, at this
/// address. `adopted` has the cookies of sockets that can't be copied again. Returns `None` if
/// there is no other socket.
///
/// The inherited number keeps its socket until [`close_copies`]. So if something else fails, the
/// socket can be adopted again.
///
/// # Errors
/// [`Error::Mismatch`] if sockets were passed for the name, and none of them is of this type at
/// this address.
pub(super) fn copy(
    (name, index): (&str, u32),
    kind: Kind,
    address: &Address,
    adopted: &BTreeSet<u64>,
) -> Result<Option<OwnedFd>, Error> {
    let mut mismatch = None;
    let mut unnamed = None;
    for passed in passed() {
        let look = |fd: OwnedFd| {
            Ok((identity_of(name.to_owned(), index, fd.as_fd())?, cookie_of(fd.as_fd())?, fd))
        };
        let Some((found, cookie, fd)) = passed.look_at(look) else { continue };
        // Each socket of a `SO_REUSEPORT` group is adopted once.
        if adopted.contains(&cookie) {
            continue;
        }
        let is_named = passed.name.as_deref() == Some(name);
        match difference(expected(&found, kind, address), found.clone(), (0, 0)) {
            Ok(()) if is_named => return Ok(Some(fd)),
            // Without a name, the port has to be equal too: port 0 would fit any socket.
            Ok(()) if found.address == *address => unnamed = unnamed.or(Some(fd)),
            Err(difference) if is_named => mismatch = mismatch.or(Some((found, difference))),
            _ => {}
        }
    }
    match mismatch {
        Some((found, mismatch)) => Err(Error::Mismatch { identity: Box::new(found), mismatch }),
        None => Ok(unnamed),
    }
}

/// Closes the inherited numbers of those sockets that this process also has under other numbers,
/// because it has adopted them or got them from the running server. Otherwise programs that this
/// process starts would inherit copies. `ours` has the cookies of the sockets.
pub(super) fn close_copies(ours: &BTreeSet<u64>) {
    for passed in passed() {
        let cookie = passed.look_at(|fd| cookie_of(fd.as_fd()));
        if !cookie.is_some_and(|cookie| ours.contains(&cookie)) {
            continue;
        }
        match passed.take() {
            Ok(_) => debug!(
                number = passed.number,
                "a listener of the process manager was moved to another descriptor"
            ),
            Err(error) => {
                warn!(
                    number = passed.number,
                    %error,
                    "a listener of the process manager can't be closed; child processes inherit it"
                );
            }
        }
    }
}

/// Returns the identity of a socket, changed to this type and this address. If the port is 0, the
/// port of the socket stays.
fn expected(found: &Identity, kind: Kind, address: &Address) -> Identity {
    let family = match address {
        Address::Ip(address) if address.is_ipv4() => Family::Ipv4,
        Address::Ip(_) => Family::Ipv6,
        _ => Family::Unix,
    };
    let mut address = address.clone();
    if let (Address::Ip(expected), Address::Ip(found)) = (&mut address, &found.address)
        && expected.port() == 0
    {
        expected.set_port(found.port());
    }
    Identity { family, kind, address, ..found.clone() }
}
