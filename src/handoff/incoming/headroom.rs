//! The number of descriptors that this process can still open. If there are too few when a message
//! is received, the kernel drops those that do not fit, and their connections have to go to another
//! worker.

use std::{fs, os::fd::AsFd};

use nix::libc;

use crate::handoff::reserve::{first_of_reserve, is_of_reserve};

/// The descriptors that offers may use: all below a reserve for what the application opens.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Headroom {
    /// The first descriptor of the reserve.
    ceiling: u64,
}

impl Headroom {
    /// Counts the free descriptors below the reserve.
    pub(super) fn count(&mut self) -> u64 {
        self.ceiling = first_of_reserve(64);
        self.ceiling.saturating_sub(open_descriptors())
    }

    /// Returns true if a descriptor that was just received is in the reserve. The kernel assigns
    /// the lowest free number, so everything below the reserve is in use then.
    pub(super) fn is_reserve(&self, fd: impl AsFd) -> bool {
        is_of_reserve(fd, self.ceiling)
    }
}

/// Returns the number of open descriptors of this process, or 0 if /proc is not available. If no
/// descriptor is left to open that directory with, returns `u64::MAX`.
fn open_descriptors() -> u64 {
    let directory = "/proc/self/fd";
    match fs::metadata(directory) {
        Ok(metadata) if metadata.len() > 0 => metadata.len(),
        // A kernel before 6.2 does not report the number as the size of the directory.
        _ => match fs::read_dir(directory) {
            Ok(entries) => entries.count() as u64,
            Err(error) if error.raw_os_error() == Some(libc::EMFILE) => u64::MAX,
            Err(_) => 0,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_descriptors_are_counted() {
        let before = open_descriptors();
        assert!(before >= 3);
        let _files = [(); 500].map(|()| fs::File::open("/dev/null").unwrap());
        assert!(open_descriptors() >= before + 400, "others may have closed some meanwhile");
    }
}
