//! A fast way to close many descriptors.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::libc;

/// Closes descriptors. Consecutive numbers are closed by one call, because a system call for each
/// takes longer than the work itself. Descriptors that were opened one after another usually have
/// consecutive numbers.
pub(crate) fn close_all(fds: impl IntoIterator<Item = OwnedFd>) {
    let mut run = Run { first: 0, count: 0 };
    for fd in fds {
        if run.count > 0 && fd.as_raw_fd() != run.first + run.count {
            run.close();
            run.count = 0;
        }
        if run.count == 0 {
            run.first = fd.as_raw_fd();
        }
        run.count += 1;
        let _ = fd.into_raw_fd(); // the run owns it now
    }
    run.close();
}

/// A run of descriptors with consecutive numbers, which it owns.
struct Run {
    first: RawFd,
    count: RawFd,
}

impl Run {
    fn close(&self) {
        let Self { first, count } = *self;
        if count > 1 {
            // SAFETY: closes the descriptors that this run owns, which nobody else uses, and no
            // others.
            let closed =
                unsafe { libc::syscall(libc::SYS_close_range, first, first + count - 1, 0) };
            if closed == 0 {
                return;
            }
        }
        // Close each one: there is only one, or the kernel is older than 5.9, or a sandbox forbids
        // the call.
        for fd in first..first + count {
            // SAFETY: the run owns it, and has not closed it: the call above failed or was not
            // made.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io};

    use super::*;

    #[test]
    fn closes_exactly_what_it_is_given() -> io::Result<()> {
        let mut readers = Vec::new();
        let mut writers = Vec::new();
        for _ in 0..20 {
            let (reader, writer) = io::pipe()?;
            readers.push(reader);
            writers.push(OwnedFd::from(writer));
        }
        // The numbers of the writers have gaps, and come in both orders.
        let consecutive = (0..20)
            .map(|_| File::open("/dev/null").map(OwnedFd::from))
            .collect::<io::Result<Vec<_>>>()?;
        let kept = writers.split_off(15);
        close_all(writers.into_iter().rev().chain(consecutive));
        for (index, mut reader) in readers.into_iter().enumerate() {
            if index < 15 {
                assert_eq!(io::Read::read(&mut reader, &mut [0])?, 0); // its writer is closed
            } else {
                let writer = &kept[index - 15];
                assert_eq!(nix::unistd::write(writer, b"x")?, 1); // both ends are open
            }
        }
        close_all(None);
        Ok(())
    }
}
