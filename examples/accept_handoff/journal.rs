//! The connections that the applications of the workers were given, in a file that outlives them.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{Error, Result, Write},
    net::Ipv4Addr,
    path::Path,
    process,
};

use fdwire::handoff::Address;
use tempfile::NamedTempFile;

/// The journal as the front reads it.
pub(crate) struct Journal(NamedTempFile);

/// The journal as a worker writes it.
pub(crate) struct Writer {
    file: File,
    number: u16,
}

/// A record: an application was given a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Given {
    /// The number of the worker, which stays the same when the worker is started again.
    pub(crate) worker: u16,
    pub(crate) pid: u32,
}

/// All records, by the address of the client. Each client of the demo has an address of its own.
pub(crate) type Entries = HashMap<Ipv4Addr, Vec<Given>>;

impl Journal {
    pub(crate) fn new() -> Result<Self> {
        NamedTempFile::new().map(Self)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn read(&self) -> Result<Entries> {
        let mut entries = Entries::new();
        for line in fs::read_to_string(self.path())?.lines() {
            let (client, given) =
                parse(line).ok_or_else(|| Error::other(format!("a broken journal: {line:?}")))?;
            entries.entry(client).or_default().push(given);
        }
        Ok(entries)
    }
}

fn parse(line: &str) -> Option<(Ipv4Addr, Given)> {
    let mut words = line.split(' ');
    let client = words.next()?.parse().ok()?;
    Some((client, Given { worker: words.next()?.parse().ok()?, pid: words.next()?.parse().ok()? }))
}

impl Writer {
    pub(crate) fn open(path: &Path, number: u16) -> Result<Self> {
        Ok(Self { file: OpenOptions::new().append(true).open(path)?, number })
    }

    /// Appends a record with one `write`, so that the line is there whole or not at all, even if
    /// this process is killed.
    pub(crate) fn given(&mut self, peer: &Address) -> Result<()> {
        let Some(client) = peer.socket_addr() else { return Ok(()) };
        self.file
            .write_all(format!("{} {} {}\n", client.ip(), self.number, process::id()).as_bytes())
    }
}
