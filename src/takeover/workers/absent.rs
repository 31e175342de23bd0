//! Placeholders for the types of the hand-off, without the feature `handoff`. They have no values.

use std::io;

use crate::Frame;

#[derive(Debug)]
pub(in crate::takeover) enum Dispatcher {}

#[derive(Debug)]
pub(in crate::takeover) enum Succession {}

#[derive(Debug)]
pub(in crate::takeover) enum TakenWorkers {}

impl Dispatcher {
    pub(super) fn prepare_succession(&self) -> io::Result<(Succession, Vec<Frame>)> {
        match *self {}
    }
}

impl Succession {
    pub(in crate::takeover) fn begin(&mut self) {
        match *self {}
    }

    pub(in crate::takeover) fn undo(&mut self) {
        match *self {}
    }
}

impl TakenWorkers {
    pub(super) fn give_back(&mut self) {
        match *self {}
    }
}
