//! The descriptor store: `FDSTORE`, `FDNAME` and `FDSTOREREMOVE` of sd_notify(3).

use std::{
    io::{Error, ErrorKind, Result},
    os::fd::{BorrowedFd, OwnedFd},
};

use super::Notifier;
use crate::{limits::SCM_MAX_FD, socket::passed};

/// The longest name of a stored descriptor (sd_notify(3), `FDNAME=`).
const MAX_NAME_BYTES: usize = 255;

impl Notifier {
    /// Stores copies of descriptors with the manager, under a name (`FDSTORE=1`). The service gets
    /// them back with [`take_stored`] when it is started again.
    ///
    /// systemd keeps as many descriptors as `FileDescriptorStoreMax=` of the unit allows. It closes
    /// further ones, and does not report that. It also removes a descriptor for which poll(2)
    /// reports `POLLHUP` or `POLLERR`, such as a connection that has ended. If the same file is
    /// stored twice under one name, it is kept once.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
    /// use std::{net::TcpListener, os::fd::AsFd};
    ///
    /// use fdwire::systemd::Notifier;
    ///
    /// let notifier = Notifier::from_env()?;
    /// let listener = TcpListener::bind("127.0.0.1:0")?;
    /// notifier.store("http", &[listener.as_fd()]).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `InvalidInput` if the name is not [valid](Self::remove_stored), and the errors of
    /// [`notify`](Self::notify).
    ///
    /// # Cancel safety
    /// One message carries at most 253 descriptors. If there are more, some may have been sent when
    /// this is dropped before it returns.
    pub async fn store(&self, name: &str, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let name = assignment(name)?;
        for fds in fds.chunks(SCM_MAX_FD) {
            self.notify(&["FDSTORE=1", &name], fds).await?;
        }
        Ok(())
    }

    /// Removes all descriptors under a name from the store (`FDSTOREREMOVE=1`). The manager closes
    /// them.
    ///
    /// # Errors
    /// `InvalidInput` if the name is empty, longer than 255 bytes, or contains a colon or anything
    /// but printable ASCII characters; and the errors of [`notify`](Self::notify).
    pub async fn remove_stored(&self, name: &str) -> Result<()> {
        self.notify(&["FDSTOREREMOVE=1", &assignment(name)?], &[]).await
    }
}

/// Takes the descriptors that were [stored](Notifier::store) under a name, and that the manager has
/// passed to this process (`LISTEN_FDS` and `LISTEN_FDNAMES`, sd_listen_fds(3)). Each descriptor is
/// taken once, when the iterator yields it.
///
/// The inherited numbers become `/dev/null`, as described for
/// [`Socket::from_inherited`](crate::Socket::from_inherited).
///
/// ```
/// let stored = fdwire::systemd::take_stored("http").collect::<std::io::Result<Vec<_>>>()?;
/// assert!(stored.is_empty()); // nothing was stored by a process before this one
/// # std::io::Result::Ok(())
/// ```
///
/// # Errors
/// The iterator yields `EMFILE` for a descriptor that can't be taken because this process has
/// reached its limit of open descriptors. A later call can still take it.
pub fn take_stored(name: &str) -> impl Iterator<Item = Result<OwnedFd>> + use<> {
    let name = name.to_owned();
    let named = passed().into_iter().filter(move |passed| passed.name.as_ref() == Some(&name));
    // Descriptors that were taken before are skipped.
    named.map(|passed| passed.take()).filter(|taken| !taken.as_ref().is_err_and(is_taken))
}

/// Returns true if the descriptor was taken by an earlier call, or its number is no longer that of
/// an inherited descriptor: other code has closed it, or has set close-on-exec.
fn is_taken(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::ResourceBusy | ErrorKind::InvalidInput)
}

/// Returns the assignment of a name to the descriptors of the same message.
fn assignment(name: &str) -> Result<String> {
    let is_valid = (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.bytes().all(|byte| (byte == b' ' || byte.is_ascii_graphic()) && byte != b':');
    if !is_valid {
        let text = format!("{name:?} is not a valid name for a stored descriptor");
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    Ok(format!("FDNAME={name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_printable_and_has_no_colon() {
        assert_eq!(assignment("http 1").unwrap(), "FDNAME=http 1");
        assert!(assignment(&"x".repeat(255)).is_ok());
        for name in ["", "a:b", "a\nMAINPID=1", "ü", "\t", &"x".repeat(256)] {
            assert_eq!(assignment(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
        }
    }
}
