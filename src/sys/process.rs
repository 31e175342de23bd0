//! Processes by descriptor (pidfd_open(2)).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::{errno::Errno, libc};

/// Returns a pidfd of a process, close-on-exec. The number of a child is not used again until this
/// process has waited for the child.
///
/// # Errors
/// `ESRCH` if there is no such process, and `EMFILE` or `ENFILE`.
pub(crate) fn pidfd_open(pid: u32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes two numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    let fd = Errno::result(fd)?;
    // SAFETY: the descriptor was just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Kills the process of a pidfd.
///
/// # Errors
/// `ESRCH` if it has ended, and `EPERM` if it belongs to another user.
pub(crate) fn kill(pidfd: BorrowedFd<'_>) -> nix::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null pointer stands for the information that kill(2) would give.
    let outcome = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, no_info, 0)
    };
    Errno::result(outcome).map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        os::{fd::AsFd, unix::process::ExitStatusExt},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn a_child_is_killed_by_its_pidfd() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pidfd = pidfd_open(child.id()).unwrap();
        kill(pidfd.as_fd()).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert_eq!(kill(pidfd.as_fd()), Err(Errno::ESRCH));
    }
}
