use std::{
    collections::BTreeSet,
    fs,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    libc,
    sys::memfd::{MFdFlags, memfd_create},
};

use crate::sys::{self, FileKind};

/// File systems of Linux whose files no other process and no other host provides.
const LOCAL_FILE_SYSTEMS: [&str; 12] = [
    "bcachefs",
    "btrfs",
    "devpts",
    "devtmpfs",
    "hugetlbfs",
    "overlay",
    "proc",
    "ramfs",
    "rootfs",
    "sysfs",
    "tmpfs",
    "zfs",
];

/// How a descriptor is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// By a task that exits: it is a socket.
    Exit,
    /// At once: its `close` can't wait for anyone.
    Quick,
    /// By a thread that may be stuck in it.
    Slow,
}

/// Knows files whose `close` asks nobody.
///
/// The `close` of a regular file of a FUSE file system waits for the daemon's answer, which no signal ends and which a
/// hostile daemon never gives. Network file systems wait for their server. Such a file system has no device of its
/// own (major number 0), and it is not one of the local ones that are mounted where this process can see them.
#[derive(Debug)]
pub(super) struct KnownFiles {
    /// Devices with major number 0 on which local file systems are.
    devices: BTreeSet<(u32, u32)>,
}

impl KnownFiles {
    /// Reads the mounts of this process, and finds the device of memfds, which is mounted nowhere.
    pub(super) fn find() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let memfd = memfd_create("fdwire", MFdFlags::MFD_CLOEXEC).ok();
        let memfd = memfd.and_then(|memfd| sys::file_kind(memfd.as_fd()).ok()).map(|kind| kind.device);
        Self { devices: mounts.lines().filter_map(local_device).chain(memfd).collect() }
    }

    /// Decides how to close a descriptor of any kind.
    pub(super) fn lane(&self, fd: BorrowedFd<'_>) -> Lane {
        const MEMORY: u32 = 1; // /dev/null and its kin
        const TERMINALS: std::ops::RangeInclusive<u32> = 136..=143; // /dev/pts

        let Ok(FileKind { file_type, device, own_major }) = sys::file_kind(fd) else {
            return if sys::is_socket(fd) { Lane::Exit } else { Lane::Slow };
        };
        let is_quick = match file_type {
            libc::S_IFSOCK => return Lane::Exit,
            libc::S_IFREG => device.0 != 0 || self.devices.contains(&device),
            libc::S_IFCHR => own_major == MEMORY || TERMINALS.contains(&own_major),
            libc::S_IFBLK => false,
            _ => true, // pipes, directories, eventfds: only the kernel provides these
        };
        if is_quick { Lane::Quick } else { Lane::Slow }
    }
}

/// The device of a line of proc_pid_mountinfo(5), if a local file system is on it.
fn local_device(line: &str) -> Option<(u32, u32)> {
    let (mount, file_system) = line.split_once(" - ")?;
    let (major, minor) = mount.split(' ').nth(2)?.split_once(':')?;
    let is_local = LOCAL_FILE_SYSTEMS.contains(&file_system.split(' ').next()?);
    is_local.then_some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io, os::fd::OwnedFd, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn files_that_the_kernel_provides_are_known() -> io::Result<()> {
        let known = KnownFiles::find();
        let memfd = memfd_create("test", MFdFlags::MFD_CLOEXEC)?;
        let (reader, writer) = io::pipe()?;
        let null = File::open("/dev/null")?;
        let executable = File::open(std::env::current_exe()?)?;
        let files: [OwnedFd; 5] = [memfd, reader.into(), writer.into(), null.into(), executable.into()];
        for fd in &files {
            assert_eq!(known.lane(fd.as_fd()), Lane::Quick, "{fd:?}");
        }
        assert_eq!(known.lane(UnixStream::pair()?.0.as_fd()), Lane::Exit);
        Ok(())
    }

    #[test]
    fn a_file_of_an_unknown_file_system_is_not() {
        let line = |kind| format!("36 35 0:42 / /mnt rw,noatime shared:1 - {kind} /dev/root rw,errors=continue");
        assert_eq!(local_device(&line("tmpfs")), Some((0, 42)));
        for kind in ["fuse", "fuse.sshfs", "fuse.tmpfs", "nfs4", "9p"] {
            assert_eq!(local_device(&line(kind)), None);
        }
        assert_eq!(local_device("36 35 0:42"), None);
    }
}
