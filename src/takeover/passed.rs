//! The listener of a process manager that fits a name, a type and an address.

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
use crate::socket::{Passed, passed};

/// Takes the listener that a manager has passed for this name or, if none has the name, at this
/// address. Returns `None` if there is none.
///
/// # Errors
/// [`Error::Mismatch`] if sockets were passed for the name, and none of them is of this type at
/// this address.
pub(super) fn take(name: &str, index: u32, kind: Kind, address: &Address) -> Result<Option<OwnedFd>, Error> {
    let mut mismatch = None;
    let mut unnamed = None;
    for passed in passed() {
        let Some(found) = passed.look_at(|fd| identity_of(name.to_owned(), index, fd.as_fd())) else { continue };
        let is_named = passed.name.as_deref() == Some(name);
        match difference(expected(&found, kind, address), found.clone(), (0, 0)) {
            Ok(()) if is_named => return adopt(&passed, &found).map(Some),
            // Without a name, any port would be any socket.
            Ok(()) if found.address == *address => unnamed = unnamed.or(Some((passed, found))),
            Err(difference) if is_named => mismatch = mismatch.or(Some((found, difference))),
            _ => {}
        }
    }
    match (mismatch, unnamed) {
        (Some((found, mismatch)), _) => Err(Error::Mismatch { identity: Box::new(found), mismatch }),
        (None, Some((passed, found))) => adopt(&passed, &found).map(Some),
        (None, None) => Ok(None),
    }
}

fn adopt(passed: &Passed, found: &Identity) -> Result<OwnedFd, Error> {
    let fd = passed.take()?;
    debug!(number = passed.number, listener = %found, "adopted a listener of the process manager");
    Ok(fd)
}

/// Closes what a manager has passed and came from the running server as well. Otherwise programs
/// that this process starts would have copies.
pub(super) fn close_copies(taken: &BTreeSet<u64>) {
    for passed in passed() {
        let cookie = passed.look_at(|fd| cookie_of(fd.as_fd()));
        if cookie.is_some_and(|cookie| taken.contains(&cookie))
            && let Err(error) = passed.take()
        {
            warn!(number = passed.number, %error, "a listener of the process manager stays open for child processes");
        }
    }
}

/// Returns the identity that a socket would have if it were of this type at this address. Port 0 is
/// any port.
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
