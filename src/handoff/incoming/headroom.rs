//! How many more descriptors this process can take. The kernel drops those that are too many when they are received, and
//! their connections have to go to another worker.

use std::{fs, os::fd::AsFd};

use nix::libc;

use crate::handoff::reserve::{first_of_reserve, is_of_reserve};

/// Descriptors that the application does not need: all below a reserve for what it opens.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Headroom {
    /// First descriptor of the reserve.
    ceiling: u64,
}

impl Headroom {
    /// Counts those that are free.
    pub(super) fn count(&mut self) -> u64 {
        self.ceiling = first_of_reserve(64);
        self.ceiling.saturating_sub(open_descriptors())
    }

    /// Returns true if a descriptor that was just received shows that the reserve is in use.
    pub(super) fn is_reserve(&self, fd: impl AsFd) -> bool {
        is_of_reserve(fd, self.ceiling)
    }
}

/// Number of open descriptors of this process; 0 if /proc is not to be had. If none is left to count them with, all are open.
fn open_descriptors() -> u64 {
    let directory = "/proc/self/fd";
    match fs::metadata(directory) {
        Ok(metadata) if metadata.len() > 0 => metadata.len(),
        // A kernel before 6.2 does not report it there.
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
