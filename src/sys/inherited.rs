//! A safe way to take a descriptor with which the process was started.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Error, ErrorKind},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::{Mutex, PoisonError},
};

use nix::{
    errno::Errno,
    libc,
    sys::resource::{Resource, getrlimit},
};

/// The numbers that were taken. They stay open until the process ends, so none of them becomes the
/// number of another file.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes the open file away from a number that this process has inherited, and leaves /dev/null
/// there. `make` gets the file under another number, close-on-exec.
///
/// **Why this is safe to call with any number.** `make` owns a new number, which the kernel has
/// made for it. The inherited number is never closed. If other code believes that it owns the
/// inherited number too, it can close only `/dev/null`, and never another file. A number is taken
/// only if it is open and not close-on-exec. The standard library and most others open everything
/// close-on-exec, so such a number is usually one with which the process was started.
///
/// # Errors
/// `ResourceBusy` if the number was taken before, `InvalidInput` if it is not open or is
/// close-on-exec, the errors of `make`, and `EMFILE`. Then the number still has its open file, and
/// can be taken later.
pub(crate) fn take_inherited<T>(
    number: RawFd,
    make: impl FnOnce(OwnedFd) -> io::Result<T>,
) -> io::Result<T> {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return Err(Error::new(ErrorKind::ResourceBusy, "it was taken before"));
    }
    // Everything that can fail comes first, so that the number keeps its file.
    let copy = copy_inherited(number)?;
    let placeholder = placeholder()?;
    let made = make(copy)?;
    replace(number, placeholder.as_fd())?;
    taken.insert(number);
    Ok(made)
}

/// Copies an inherited descriptor to a number above standard error's. The number keeps its file.
///
/// # Errors
/// `InvalidInput` if the number is not open or is close-on-exec, for example because it was taken.
/// `EMFILE` if there is no free descriptor.
pub(crate) fn copy_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: reads a flag of a number. It need not be open.
    let flags = Errno::result(unsafe { libc::fcntl(number, libc::F_GETFD) });
    match flags {
        Err(Errno::EBADF) => return Err(Error::new(ErrorKind::InvalidInput, "it is not open")),
        flags if flags? & libc::FD_CLOEXEC != 0 => {
            let reason =
                "it is close-on-exec, so this process has opened it and did not inherit it";
            return Err(Error::new(ErrorKind::InvalidInput, reason));
        }
        _ => {}
    }
    // `dup3` would refuse such a number later, when the other steps are done.
    if getrlimit(Resource::RLIMIT_NOFILE).is_ok_and(|(soft, _)| number as u64 >= soft) {
        return Err(Error::new(ErrorKind::InvalidInput, "it is not below the limit RLIMIT_NOFILE"));
    }
    // SAFETY: makes a new descriptor and changes no other.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, libc::STDERR_FILENO + 1) };
    // SAFETY: the call has just returned this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(Errno::result(copy)?) })
}

/// Opens /dev/null or, if there is none, as in some containers, a pipe without a writer. Reading
/// from either yields the end of file.
fn placeholder() -> io::Result<OwnedFd> {
    match File::options().read(true).write(true).open("/dev/null") {
        Ok(null) => Ok(null.into()),
        Err(_) => io::pipe().map(|(reader, _)| reader.into()),
    }
}

/// Replaces the open file of a number. Only standard input is not close-on-exec then, because
/// children need one.
fn replace(number: RawFd, file: BorrowedFd<'_>) -> io::Result<()> {
    let flags = if number == libc::STDIN_FILENO { 0 } else { libc::O_CLOEXEC };
    loop {
        // SAFETY: closes no file for good, since `make` has a copy of the one that the number had.
        // Nobody owns the number, as `take_inherited` explains.
        let replaced = unsafe { libc::dup3(file.as_raw_fd(), number, flags) };
        match Errno::result(replaced) {
            Err(Errno::EINTR | Errno::EBUSY) => {} // another thread opens a file at this moment
            replaced => {
                replaced?;
                return Ok(());
            }
        }
    }
}
