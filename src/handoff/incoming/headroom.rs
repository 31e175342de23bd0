//! How many more descriptors this process can take. One offer too many and the kernel drops descriptors on receipt, which
//! ends the connection to the dispatcher.

use std::{fs, os::fd::OwnedFd};

use crate::handoff::reserve::{first_of_reserve, is_of_reserve};

/// Descriptors that are free at the moment, less a reserve for what the application opens.
#[derive(Debug, Default)]
pub(super) struct Headroom {
    /// First descriptor of the reserve.
    ceiling: u64,
    /// What may be granted before counting again: half of what was free, since the application opens files too.
    spare: u64,
}

impl Headroom {
    /// How many of the `wanted` offers may be asked for, when `on_their_way` were asked for and have not come.
    pub(super) fn grant(&mut self, wanted: u64, on_their_way: u64) -> u64 {
        if wanted > self.spare {
            self.count(on_their_way);
        }
        let granted = wanted.min(self.spare);
        self.spare -= granted;
        granted
    }

    /// Whether a descriptor that was just received shows that the reserve is in use: then no more is granted before counting again.
    pub(super) fn is_reserve(&mut self, fd: &OwnedFd) -> bool {
        let is_reserve = is_of_reserve(fd, self.ceiling);
        if is_reserve {
            self.spare = 0;
        }
        is_reserve
    }

    fn count(&mut self, on_their_way: u64) {
        self.ceiling = first_of_reserve(64);
        let free = self.ceiling.saturating_sub(open_descriptors() + on_their_way);
        self.spare = free.div_ceil(2);
    }
}

/// Number of open descriptors of this process; 0 where /proc is not to be had.
fn open_descriptors() -> u64 {
    let directory = "/proc/self/fd";
    match fs::metadata(directory) {
        Ok(metadata) if metadata.len() > 0 => metadata.len(),
        // A kernel before 6.2 does not say it there.
        _ => fs::read_dir(directory).map_or(0, |entries| entries.count() as u64),
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
