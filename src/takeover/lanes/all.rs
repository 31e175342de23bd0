//! The lanes of all sockets of a server.

use std::{io, sync::Arc};

use super::Lanes;
use crate::{
    SendFd,
    takeover::{
        listeners::Listeners,
        protocol::{Lane, ToTaker, in_messages},
    },
};

/// The lanes of each UDP socket, by its name and index, and the generations of processes.
#[derive(Debug, Default)]
pub(in crate::takeover) struct AllLanes {
    sockets: Vec<(String, u32, Arc<Lanes>)>,
    /// The generation of this process.
    own: u32,
    /// The generation of the last process that has requested a takeover.
    last: u32,
}

impl AllLanes {
    pub(in crate::takeover) fn new(own: u32) -> Self {
        Self { sockets: Vec::new(), own, last: own }
    }

    /// Returns the lanes of a socket.
    pub(in crate::takeover) fn of(&mut self, name: &str, index: u32) -> Arc<Lanes> {
        let mut sockets = self.sockets.iter();
        if let Some((.., found)) =
            sockets.find(|(its_name, its_index, _)| its_name == name && *its_index == index)
        {
            return Arc::clone(found);
        }
        let new = Arc::<Lanes>::default();
        self.sockets.push((name.to_owned(), index, Arc::clone(&new)));
        new
    }

    /// Returns the messages that contain the generation of a new process, and its lanes to this
    /// process and to older ones.
    pub(in crate::takeover) fn offer(
        &mut self,
        listeners: &Listeners,
    ) -> io::Result<Vec<ToTaker<SendFd>>> {
        // Each request gets a new number, even if that process does not take over in the end.
        self.last = self.last.wrapping_add(1);
        let mut offered = Vec::new();
        for (name, index, lanes) in &self.sockets {
            let Some(listener) = listeners.position(name, *index) else { continue };
            for (generation, socket) in lanes.offer(self.own, self.last)? {
                offered.push(Lane { listener, generation, fd: SendFd::assume_socket(socket) });
            }
        }
        let (generation, giver) = (self.last, self.own);
        let mut messages: Vec<_> =
            in_messages(offered).map(|lanes| ToTaker::Lanes { generation, giver, lanes }).collect();
        if messages.is_empty() {
            // The new process gets its generation even if there are no lanes.
            messages.push(ToTaker::Lanes { generation, giver, lanes: Vec::new() });
        }
        Ok(messages)
    }
}
