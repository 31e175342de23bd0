//! The processes that have sent the received messages.

use std::{os::fd::AsFd, sync::Arc};

use crate::{credentials::Credentials, error::Error, sys};

/// Attributes messages to the processes that wrote them.
///
/// While credentials are on, the kernel ends a read where the bytes of another process begin. So
/// all bytes of one receive are from one process. Before each receive, all complete messages are
/// decoded. So only the first message that a receive completes can have begun in an earlier one.
#[derive(Debug, Default)]
pub(crate) struct Senders {
    /// The sender of the bytes of the last receive. `None` if it is not known.
    last: Option<Arc<Credentials>>,
    /// The number of messages that were decoded before the last receive.
    decoded: u64,
    /// The sender of the last message that was decoded before the last receive.
    before: Option<Arc<Credentials>>,
    /// True if part of the first message after that one is from an unknown process.
    first_is_unknown: bool,
}

impl Senders {
    /// Returns true if the sender of any bytes is known. Otherwise a receive without credentials
    /// need not be reported here.
    pub(super) fn know_any(&self) -> bool {
        self.last.is_some() || self.before.is_some()
    }

    /// Records the sender of the bytes that were just received. `decoded` is the number of messages
    /// that were decoded before. `is_rest` is true if part of one more had arrived before.
    ///
    /// # Errors
    /// [`Error::MixedSenders`] if the rest of a message is from another process than its beginning.
    pub(super) fn received(
        &mut self,
        credentials: Option<Credentials>,
        decoded: u64,
        is_rest: bool,
    ) -> Result<(), Error> {
        let was_unknown = self.first_is_unknown && decoded == self.decoded;
        let before = self.of_message(decoded).cloned();
        let is_same = match (&self.last, &credentials) {
            (Some(last), Some(now)) if is_rest && !is_same_process(last, now) => {
                return Err(Error::MixedSenders);
            }
            (last, now) => last.is_some() == now.is_some(),
        };
        self.before = before;
        self.decoded = decoded;
        self.first_is_unknown = is_rest && (was_unknown || !is_same);
        self.last = credentials.map(Arc::new);
        Ok(())
    }

    /// Returns the sender of the last of `decoded` messages.
    pub(super) fn of_message(&self, decoded: u64) -> Option<&Arc<Credentials>> {
        match decoded - self.decoded {
            0 => self.before.as_ref(),
            1 if self.first_is_unknown => None,
            _ => self.last.as_ref(),
        }
    }

    /// Returns the senders for a new receiving direction with the same bytes, which counts its
    /// messages from 0.
    pub(super) fn carried_over(self, decoded: u64) -> Self {
        Self {
            before: self.of_message(decoded).cloned(),
            decoded: 0,
            first_is_unknown: self.first_is_unknown && decoded == self.decoded,
            last: self.last,
        }
    }
}

/// Returns true if both name the same process with the same ids, as far as that can be determined.
///
/// A process id may have been used again, and processes of another PID namespace have none. If
/// there are pidfds, they distinguish even these processes.
fn is_same_process(a: &Credentials, b: &Credentials) -> bool {
    let has_same_ids = (a.pid, a.uid, a.gid) == (b.pid, b.uid, b.gid);
    has_same_ids
        && match (&a.pidfd, &b.pidfd) {
            (Some(a), Some(b)) => sys::may_have_same_file(a.as_fd(), b.as_fd()),
            _ => true,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32) -> Option<Credentials> {
        Some(Credentials { uid: 1000, gid: 1000, pid: Some(pid), pidfd: None })
    }

    fn pid_of(senders: &Senders, decoded: u64) -> Option<i32> {
        senders.of_message(decoded).and_then(|credentials| credentials.pid)
    }

    #[test]
    fn each_message_has_the_sender_of_its_receive() {
        let mut senders = Senders::default();
        senders.received(process(1), 0, false).unwrap();
        assert_eq!([0, 1, 2].map(|decoded| pid_of(&senders, decoded)), [None, Some(1), Some(1)]);
        senders.received(process(2), 2, false).unwrap();
        // A receive that completes no message does not change the sender of the last one.
        assert_eq!([2, 3, 9].map(|decoded| pid_of(&senders, decoded)), [Some(1), Some(2), Some(2)]);
        senders.received(process(2), 2, true).unwrap();
        assert_eq!([2, 3].map(|decoded| pid_of(&senders, decoded)), [Some(1), Some(2)]);
        senders.received(None, 3, false).unwrap();
        assert_eq!([3, 4].map(|decoded| pid_of(&senders, decoded)), [Some(2), None]);
    }

    #[test]
    fn a_message_of_two_processes_is_an_error() {
        let mut senders = Senders::default();
        senders.received(process(1), 0, false).unwrap();
        senders.received(process(1), 0, true).unwrap();
        assert!(matches!(senders.received(process(2), 0, true), Err(Error::MixedSenders)));
        assert!(matches!(senders.received(process(2), 5, true), Err(Error::MixedSenders)));
        senders.received(process(2), 5, false).unwrap();
    }

    /// Processes of another PID namespace have no number. The files represent pidfds.
    #[test]
    fn processes_without_a_number_are_distinguished_by_their_pidfds() {
        let [(one, _), (other, _)] = [(); 2].map(|()| std::io::pipe().unwrap());
        let process = |pidfd: &std::io::PipeReader| {
            let pidfd = pidfd.try_clone().unwrap().into();
            Some(Credentials { uid: 1000, gid: 1000, pid: None, pidfd: Some(pidfd) })
        };
        let mut senders = Senders::default();
        senders.received(process(&one), 0, false).unwrap();
        senders.received(process(&one), 0, true).unwrap();
        assert!(matches!(senders.received(process(&other), 0, true), Err(Error::MixedSenders)));
    }

    #[test]
    fn a_message_of_which_a_part_has_no_known_sender_has_none() {
        for (first, second) in [(None, process(1)), (process(1), None)] {
            let mut senders = Senders::default();
            let expected = second.as_ref().and_then(|credentials| credentials.pid);
            senders.received(first, 0, false).unwrap();
            senders.received(second, 0, true).unwrap();
            assert_eq!([1, 2].map(|decoded| pid_of(&senders, decoded)), [None, expected]);
        }
        // That is so for any number of receives that follow.
        let mut senders = Senders::default();
        senders.received(None, 0, false).unwrap();
        senders.received(process(1), 0, true).unwrap();
        senders.received(process(1), 0, true).unwrap();
        assert_eq!([1, 2].map(|decoded| pid_of(&senders, decoded)), [None, Some(1)]);
        senders.received(process(1), 1, true).unwrap();
        assert_eq!([1, 2].map(|decoded| pid_of(&senders, decoded)), [None, Some(1)]);
    }

    #[test]
    fn receives_without_credentials_need_not_be_noted_while_none_are_known() {
        let mut senders = Senders::default();
        assert!(!senders.know_any());
        // Ten messages later, in the middle of another one.
        senders.received(process(1), 10, true).unwrap();
        assert!(senders.know_any());
        assert_eq!([10, 11, 12].map(|decoded| pid_of(&senders, decoded)), [None, None, Some(1)]);
        senders.received(None, 12, false).unwrap();
        assert!(senders.know_any(), "the last message has a sender");
    }

    #[test]
    fn another_codec_finds_the_senders_of_what_was_received() {
        let mut senders = Senders::default();
        senders.received(None, 0, false).unwrap();
        senders.received(process(1), 0, true).unwrap();
        let senders = senders.carried_over(0);
        assert_eq!([0, 1, 2].map(|decoded| pid_of(&senders, decoded)), [None, None, Some(1)]);
        let mut senders = senders.carried_over(2);
        assert_eq!([0, 1].map(|decoded| pid_of(&senders, decoded)), [Some(1), Some(1)]);
        assert!(senders.received(process(2), 0, true).is_err());
    }
}
