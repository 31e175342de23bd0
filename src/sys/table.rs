//! The table of descriptors of this process.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, fcntl};

/// The most descriptors for which the table is enlarged at once: 512 KiB of the kernel's memory.
const MOST: u32 = 1 << 16;

/// Enlarges the table of descriptors once for all descriptors that follow this one. `more` is their
/// number.
///
/// The kernel doubles the table otherwise, and in a process with several threads it waits each time
/// until no other thread uses the old one. For 1,000 descriptors that takes 30 ms instead of 10 ms.
/// A failure changes nothing.
pub(crate) fn enlarge_table(fd: BorrowedFd<'_>, more: u32) {
    // A copy with a high number makes room for it.
    let number = fd.as_raw_fd().saturating_add(more.min(MOST).cast_signed());
    if let Ok(copy) = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(number)) {
        // SAFETY: fcntl has just returned this descriptor, so nobody else owns it.
        drop(unsafe { OwnedFd::from_raw_fd(copy) });
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsFd};

    use super::*;

    #[test]
    fn the_table_has_room_and_no_descriptor_stays_open() {
        let file = fs::File::open("/dev/null").unwrap();
        enlarge_table(file.as_fd(), 3000);
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
        if limit.unwrap().0 > 4096 {
            assert!(size.trim().parse::<u32>().unwrap() > 3000, "{size}");
        }
        let copy = format!("/proc/self/fd/{}", file.as_raw_fd() + 3000);
        assert!(!fs::exists(copy).unwrap());
        enlarge_table(file.as_fd(), u32::MAX); // beyond the limit
    }
}
