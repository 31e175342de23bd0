//! The decision how to close a descriptor, by the kind of its file.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Seek},
    os::fd::{AsFd, BorrowedFd},
};

use crate::sys::{self, FileKind, FileType};

/// The file systems of Linux that depend neither on another process nor on another host.
const LOCAL_FILE_SYSTEMS: [&str; 28] = [
    "bcachefs",
    "btrfs",
    "cramfs",
    "devpts",
    "devtmpfs",
    "erofs",
    "exfat",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "hfsplus",
    "hugetlbfs",
    "iso9660",
    "jfs",
    "nilfs2",
    "ntfs3",
    "overlay",
    "proc",
    "ramfs",
    "rootfs",
    "squashfs",
    "sysfs",
    "tmpfs",
    "udf",
    "vfat",
    "xfs",
    "zfs",
];

/// The way in which a descriptor is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// A task that exits closes it. For sockets.
    Exit,
    /// The closer's thread closes it, because its `close` does not block.
    Quick,
    /// One of the slow threads closes it, and may block.
    Slow,
}

/// The facts that decide which files close quickly.
///
/// The `close` of a regular file of a FUSE file system waits for an answer of the daemon. No signal
/// ends that wait, and a hostile daemon never answers. Network file systems wait for their server.
/// So only files of local file systems count as quick, and only while the file system is mounted
/// for this process. When a file system is unmounted, the kernel may use its device number for
/// another.
#[derive(Debug)]
pub(super) struct KnownFiles {
    /// The file `/proc/thread-self/mountinfo`, which poll(2) reports with priority when the mounts
    /// change.
    mounts: Option<File>,
    /// The devices of the local file systems that are mounted.
    devices: BTreeSet<Device>,
    /// The device of memfds, which is mounted nowhere and never changes.
    memfd: Option<Device>,
}

/// The major and minor number of the device of a file system.
type Device = (u32, u32);

impl KnownFiles {
    /// Reads the mounts of this thread, and finds the device of memfds.
    pub(super) fn find() -> Self {
        let memfd = sys::new_memfd().ok();
        let memfd =
            memfd.and_then(|memfd| sys::file_kind(memfd.as_fd()).ok()).map(|kind| kind.device);
        let mounts = File::open("/proc/thread-self/mountinfo").ok();
        let mut known = Self { mounts, devices: BTreeSet::new(), memfd };
        known.read_mounts();
        known
    }

    /// Reads the devices of the local file systems that are mounted now.
    fn read_mounts(&mut self) {
        self.devices.clear();
        let Some(mounts) = &mut self.mounts else { return };
        let mut text = String::new();
        if mounts.rewind().and_then(|()| mounts.read_to_string(&mut text)).is_ok() {
            self.devices.extend(text.lines().filter_map(local_device));
        }
    }

    /// Returns true if a local file system is on this device. The caller has read the device number
    /// from the file before this call. So if the mounts have not changed by now, the number still
    /// means the same file system.
    fn is_local(&mut self, device: Device) -> bool {
        if self.memfd == Some(device) {
            return true;
        }
        if self.mounts_have_changed() {
            self.read_mounts();
            // The number may have meant another file system when the caller read it.
            return false;
        }
        self.devices.contains(&device)
    }

    fn mounts_have_changed(&self) -> bool {
        self.mounts.as_ref().is_some_and(|mounts| sys::has_changed(mounts.as_fd()))
    }

    /// Decides how to close a descriptor of any kind.
    pub(super) fn lane(&mut self, fd: BorrowedFd<'_>) -> Lane {
        const MEMORY: u32 = 1; // /dev/null, /dev/zero and others
        const TERMINALS: std::ops::RangeInclusive<u32> = 136..=143; // /dev/pts

        let Ok(FileKind { file_type, device, own_major }) = sys::file_kind(fd) else {
            return if sys::is_socket(fd) { Lane::Exit } else { Lane::Slow };
        };
        let is_quick = match file_type {
            FileType::Socket => return Lane::Exit,
            FileType::Regular | FileType::Directory => self.is_local(device),
            FileType::CharacterDevice => own_major == MEMORY || TERMINALS.contains(&own_major),
            FileType::BlockDevice => false,
            FileType::Pipe | FileType::Other => true, // only the kernel provides these
        };
        if is_quick { Lane::Quick } else { Lane::Slow }
    }
}

/// Returns the device in a line of proc_pid_mountinfo(5) if a local file system is on it.
fn local_device(line: &str) -> Option<Device> {
    let (mount, file_system) = line.split_once(" - ")?;
    let (major, minor) = mount.split(' ').nth(2)?.split_once(':')?;
    let is_local = LOCAL_FILE_SYSTEMS.contains(&file_system.split(' ').next()?);
    is_local.then_some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::{fs, io, os::fd::OwnedFd, os::unix::net::UnixStream, thread};

    use nix::{
        mount::{MsFlags, mount, umount},
        sched::{CloneFlags, unshare},
        sys::memfd::{MFdFlags, memfd_create},
    };

    use super::*;

    #[test]
    fn files_that_the_kernel_provides_are_known() -> io::Result<()> {
        let mut known = KnownFiles::find();
        let memfd = memfd_create("test", MFdFlags::MFD_CLOEXEC)?;
        let (reader, writer) = io::pipe()?;
        let null = File::open("/dev/null")?;
        let executable = File::open(std::env::current_exe()?)?;
        let directory = File::open("/proc/self")?;
        let files: [OwnedFd; 6] =
            [memfd, reader.into(), writer.into(), null.into(), executable.into(), directory.into()];
        for fd in &files {
            assert_eq!(known.lane(fd.as_fd()), Lane::Quick, "{fd:?}");
        }
        assert_eq!(known.lane(UnixStream::pair()?.0.as_fd()), Lane::Exit);
        Ok(())
    }

    #[test]
    fn a_file_of_an_unknown_file_system_is_not() {
        let line = |kind| {
            format!("36 35 0:42 / /mnt rw,noatime shared:1 - {kind} /dev/root rw,errors=continue")
        };
        assert_eq!(local_device(&line("tmpfs")), Some((0, 42)));
        for kind in ["fuse", "fuseblk", "fuse.sshfs", "fuse.tmpfs", "nfs4", "9p"] {
            assert_eq!(local_device(&line(kind)), None);
        }
        assert_eq!(local_device("36 35 0:42"), None);
    }

    /// Runs in a thread with mounts of its own.
    #[test]
    fn a_file_system_that_is_gone_is_not_known_any_longer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        thread::scope(|scope| {
            scope.spawn(|| {
                if unshare(CloneFlags::CLONE_NEWNS).is_err() {
                    return eprintln!("skipped: needs root to mount a file system");
                }
                // In a mount namespace of its own, mount a file system and let it be known.
                mount(
                    None::<&str>,
                    "/",
                    None::<&str>,
                    MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                    None::<&str>,
                )
                .unwrap();
                let mount_tmpfs = || {
                    mount(Some("test"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>)
                        .unwrap();
                    File::create(path.join("file")).unwrap()
                };
                let before = mount_tmpfs();
                let mut known = KnownFiles::find();
                assert_eq!(known.lane(before.as_fd()), Lane::Quick);
                drop(before);
                umount(path).unwrap();

                // Mount another one, whose device number is likely the same.
                let after = mount_tmpfs();
                assert_eq!(
                    known.lane(after.as_fd()),
                    Lane::Slow,
                    "it may be a file of any file system"
                );
                assert_eq!(known.lane(after.as_fd()), Lane::Quick, "the mounts were read again");
                drop(after);
                fs::remove_file(path.join("file")).unwrap();
                umount(path).unwrap();
            });
        });
    }
}
