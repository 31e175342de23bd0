//! The frames that pass a dispatcher's workers to the dispatcher that replaces it.

use std::{io, os::fd::OwnedFd};

use crate::{
    Frame, Socket,
    fields::{Fields, put_short},
    handoff::Group,
};

/// The first bytes of each frame. The last one is the version.
const MAGIC: [u8; 5] = *b"FDHR\x01";

/// A part of a succession.
#[derive(Debug)]
pub(super) enum Part {
    /// The links for connections that no worker has adopted.
    Connections {
        /// For connections from the dispatcher that is replaced.
        forward: Socket,
        /// For connections back to it, if the replacement is undone.
        back: Socket,
    },
    Worker(Traveller),
}

/// A worker on its way to another dispatcher.
#[derive(Debug)]
pub(super) struct Traveller {
    /// The dispatcher's end of the link at which the worker will go on.
    pub(super) link: Socket,
    pub(super) pidfd: Option<OwnedFd>,
    /// True if a dispatcher has started it.
    pub(super) is_started: bool,
    pub(super) program: Option<String>,
    pub(super) group: Group,
}

impl Part {
    pub(super) fn into_frame(self) -> Result<Frame, crate::Error> {
        let mut payload = MAGIC.to_vec();
        let fds = match self {
            Self::Connections { forward, back } => {
                payload.push(1);
                vec![OwnedFd::from(forward), back.into()]
            }
            Self::Worker(Traveller { link, pidfd, is_started, program, group }) => {
                payload.extend([2, is_started.into(), program.is_some().into()]);
                put_short(&mut payload, program.unwrap_or_default().as_bytes())?;
                put_short(&mut payload, group.as_str().as_bytes())?;
                [OwnedFd::from(link)].into_iter().chain(pidfd).collect()
            }
        };
        Ok(Frame { payload: payload.into(), fds: fds.into_iter().collect() })
    }

    /// # Errors
    /// If the frame is not a part of a succession, or has another version.
    pub(super) fn from_frame(Frame { payload, fds }: Frame) -> io::Result<Self> {
        let mut fds = fds.into_iter();
        let part = Self::read(&payload, &mut fds)?;
        match fds.next() {
            None => Ok(part),
            Some(_) => Err(no_part()),
        }
    }

    fn read(payload: &[u8], fds: &mut impl Iterator<Item = OwnedFd>) -> io::Result<Self> {
        let mut fields = Fields(payload);
        if fields.array() != Some(MAGIC) {
            return Err(no_part());
        }
        let mut socket = || Socket::try_from(fds.next().ok_or_else(no_part)?);
        match fields.u8() {
            Some(1) => Ok(Self::Connections { forward: socket()?, back: socket()? }),
            Some(2) => {
                let described = (|| {
                    let (is_started, has_program) = (fields.bool()?, fields.bool()?);
                    let (program, group) = (fields.text()?, fields.text()?);
                    Some((is_started, has_program.then_some(program), group.into()))
                })();
                let (is_started, program, group) = described.ok_or_else(no_part)?;
                let link = socket()?;
                Ok(Self::Worker(Traveller { link, pidfd: fds.next(), is_started, program, group }))
            }
            _ => Err(no_part()),
        }
    }
}

fn no_part() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a frame of a dispatcher that is replaced")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::SocketKind;

    #[tokio::test]
    async fn a_worker_arrives_as_it_was_sent() {
        for (program, pidfd) in [(Some("/bin/worker".to_owned()), true), (None, false)] {
            let (link, _there) = Socket::pair(SocketKind::Stream).unwrap();
            let pidfd = pidfd.then(|| File::open("/dev/null").unwrap().into());
            let has_pidfd = pidfd.is_some();
            let traveller = Traveller {
                link,
                pidfd,
                is_started: has_pidfd,
                program: program.clone(),
                group: "images".into(),
            };
            let frame = Part::Worker(traveller).into_frame().unwrap();
            let Part::Worker(arrived) = Part::from_frame(frame).unwrap() else { panic!() };
            assert_eq!((arrived.program, arrived.group), (program, "images".into()));
            assert_eq!((arrived.pidfd.is_some(), arrived.is_started), (has_pidfd, has_pidfd));
        }
    }

    #[tokio::test]
    async fn foreign_frames_are_refused() {
        let (link, _there) = Socket::pair(SocketKind::Stream).unwrap();
        let traveller = Traveller {
            link,
            pidfd: None,
            is_started: true,
            program: None,
            group: Group::default(),
        };
        let Frame { payload, .. } = Part::Worker(traveller).into_frame().unwrap();
        // Without its descriptor, cut short, of another version, and something else.
        let file = || OwnedFd::from(File::open("/dev/null").unwrap());
        let mut next = payload.to_vec();
        next[4] = 2;
        for frame in [
            Frame::new(payload.clone()),
            Frame::new(payload.clone()).with_fd(file()),
            Frame::new(payload.slice(..7)),
            Frame::new(next),
            Frame::new("state of the application"),
        ] {
            assert!(Part::from_frame(frame).is_err());
        }
    }
}
