//! The descriptors that a process manager has passed: systemd, einhorn or Server::Starter.

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    process,
};

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::getppid,
};
use tracing::debug;

use super::{take_numbered, take_stdin};
use crate::sys;

/// The first number that systemd passes (`SD_LISTEN_FDS_START`, sd_listen_fds(3)).
const FIRST: RawFd = 3;

/// The number of a descriptor that a manager has passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Passed {
    pub(crate) number: RawFd,
    /// The name of the descriptor. Only systemd passes names.
    pub(crate) name: Option<String>,
}

/// Returns the numbers that a manager has passed to this process.
pub(crate) fn passed() -> Vec<Passed> {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    let ids = Ids { own: process::id(), parent: getppid().as_raw() as u32, limit };
    passed_in(|name| std::env::var(name).ok(), ids)
}

impl Passed {
    /// Takes the open file away from the number. The number may be 0, because Server::Starter can
    /// be configured to pass a listener as standard input.
    ///
    /// # Errors
    /// The errors of [`Socket::from_inherited`](crate::Socket::from_inherited).
    pub(crate) fn take(&self) -> io::Result<OwnedFd> {
        let Taken(fd) = if self.number == 0 { take_stdin()? } else { take_numbered(self.number)? };
        Ok(fd)
    }

    /// Calls `look` with a copy of the descriptor. Returns `None` if the descriptor was taken
    /// before, or if `look` fails because it is of another type.
    pub(crate) fn look_at<T>(&self, look: impl FnOnce(OwnedFd) -> io::Result<T>) -> Option<T> {
        let looked = sys::copy_inherited(self.number).and_then(look);
        looked
            .inspect_err(
                |error| debug!(passed = ?self, %error, "a passed descriptor is not suitable"),
            )
            .ok()
    }
}

/// An open file of any type, for [`take_numbered`].
struct Taken(OwnedFd);

impl TryFrom<OwnedFd> for Taken {
    type Error = io::Error;

    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(fd))
    }
}

/// The facts about this process with which the environment is compared.
#[derive(Debug, Clone, Copy)]
struct Ids {
    own: u32,
    parent: u32,
    /// All open descriptors are below this number.
    limit: u64,
}

/// Reads the environment. Children inherit variables, so those that were set for another process do
/// not count.
fn passed_in(variable: impl Fn(&str) -> Option<String>, ids: Ids) -> Vec<Passed> {
    let number = |name: &str| variable(name)?.parse::<u32>().ok();
    let mut passed = Vec::new();
    // systemd: sd_listen_fds(3).
    if number("LISTEN_PID") == Some(ids.own) {
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':').filter(|name| !name.is_empty()).map(str::to_owned);
        let numbers = (FIRST..).take(number("LISTEN_FDS").unwrap_or_default() as usize);
        let numbers = numbers.take_while(|&number| (number as u64) < ids.limit);
        passed.extend(numbers.map(|number| Passed { number, name: names.next() }));
    }
    let unnamed = |number: &str| Some(Passed { number: number.trim().parse().ok()?, name: None });
    // https://github.com/contribsys/einhorn, README and `prepare_child_environment`.
    if number("EINHORN_MASTER_PID") == Some(ids.parent) {
        match number("EINHORN_FD_COUNT") {
            Some(count) => passed.extend(
                (0..count)
                    .map_while(|index| variable(&format!("EINHORN_FD_{index}")))
                    .filter_map(|number| unnamed(&number)),
            ),
            None => passed
                .extend(variable("EINHORN_FDS").unwrap_or_default().split(' ').filter_map(unnamed)),
        }
    }
    // Server::Starter(3pm): `host:port=number`, `port=number` and `path=number`. Only the number is
    // used, because the address can be read from the socket.
    let ports = variable("SERVER_STARTER_PORT").unwrap_or_default();
    passed.extend(ports.split(';').filter_map(|port| unnamed(port.rsplit_once('=')?.1)));
    passed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(variables: &[(&str, &str)]) -> Vec<(RawFd, Option<String>)> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(variable, _)| *variable == name)?;
            Some(found.1.to_owned())
        };
        let passed = passed_in(variable, Ids { own: 7, parent: 1, limit: 1024 });
        passed.into_iter().map(|Passed { number, name }| (number, name)).collect()
    }

    fn named(name: &str) -> Option<String> {
        Some(name.to_owned())
    }

    #[test]
    fn systemd_names_consecutive_numbers() {
        let ours =
            [("LISTEN_PID", "7"), ("LISTEN_FDS", "3"), ("LISTEN_FDNAMES", "http:http:admin")];
        assert_eq!(numbers(&ours), [(3, named("http")), (4, named("http")), (5, named("admin"))]);
        assert_eq!(numbers(&ours[..2]), [(3, None), (4, None), (5, None)]);
        assert_eq!(numbers(&ours[1..]), []);
        let of_parent = [("LISTEN_PID", "1"), ("LISTEN_FDS", "3")];
        assert_eq!(numbers(&of_parent), [], "they were for the parent");
        let nonsense = [("LISTEN_PID", "7"), ("LISTEN_FDS", "4294967295")];
        assert_eq!(numbers(&nonsense).len(), 1021);
        assert_eq!(numbers(&[("LISTEN_PID", "7"), ("LISTEN_FDS", "-1")]), []);
    }

    #[test]
    fn einhorn_counts_its_variables() {
        let ours = [
            ("EINHORN_MASTER_PID", "1"),
            ("EINHORN_FD_COUNT", "2"),
            ("EINHORN_FD_0", "6"),
            ("EINHORN_FD_1", "9"),
            ("EINHORN_FDS", "6 9"),
        ];
        assert_eq!(numbers(&ours), [(6, None), (9, None)]);
        let old = [("EINHORN_MASTER_PID", "1"), ("EINHORN_FDS", "6 9")];
        assert_eq!(numbers(&old), [(6, None), (9, None)]);
        assert_eq!(numbers(&ours[1..]), [], "it is no child of einhorn");
        let of_grandparent = [&[("EINHORN_MASTER_PID", "4")], &ours[1..]].concat();
        assert_eq!(numbers(&of_grandparent), []);
        let nonsense = [
            ("EINHORN_MASTER_PID", "1"),
            ("EINHORN_FD_COUNT", "4294967295"),
            ("EINHORN_FD_0", "x"),
        ];
        assert_eq!(numbers(&nonsense), []);
    }

    #[test]
    fn server_starter_lists_addresses_with_numbers() {
        let listed = "127.0.0.1:80=4;8080=5;[::1]:80=6;/run/a=b;c.sock=7;/run/x";
        let found = numbers(&[("SERVER_STARTER_PORT", listed)]);
        assert_eq!(found, [(4, None), (5, None), (6, None), (7, None)]);
        assert_eq!(numbers(&[("SERVER_STARTER_PORT", "")]), []);
    }
}
