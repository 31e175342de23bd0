use std::{
    io::{BufRead, BufReader, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use bytes::Bytes;
use ipc_channel::ipc::{
    IpcBytesReceiver, IpcBytesSender, IpcOneShotServer, IpcReceiver, IpcSender, IpcSharedMemory,
    bytes_channel, channel,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Link, Received, Setup, Side};

/// Sends `for_near`, which the far end has made, to the near end, and returns it there. ipc-channel
/// makes its own sockets, blocking ones with the default send buffer; `socket` only carries the
/// name of its server.
fn meet<T: Serialize + DeserializeOwned>(
    socket: OwnedFd,
    side: Side,
    for_near: Option<T>,
) -> Option<T> {
    let mut socket = UnixStream::from(socket);
    socket.set_nonblocking(false).expect("it is a socket");
    match side {
        Side::Near => {
            let (server, name) = IpcOneShotServer::<T>::new().expect("a server");
            writeln!(socket, "{name}").expect("the far end is there");
            Some(server.accept().expect("the far end connects").1)
        }
        Side::Far => {
            let mut name = String::new();
            BufReader::new(socket).read_line(&mut name).expect("the near end is there");
            let sender = IpcSender::connect(name.trim_end().to_owned()).expect("a server");
            sender.send(for_near.expect("made by the far end")).expect("the near end is there");
            None
        }
    }
}

/// ipc-channel, which is synchronous. Bytes go through its channel for bytes. A message with a
/// descriptor is a tuple of bytes and a handle. ipc-channel can pass only its own handles, so each
/// message has the same sender of it, without a `dup`.
pub(crate) enum IpcChannel {
    Bytes(IpcBytesSender, IpcBytesReceiver),
    Handles {
        sender: IpcSender<Message>,
        receiver: IpcReceiver<Message>,
        own: IpcSender<()>,
        arrived: Option<IpcSender<()>>,
    },
}

type Message = (Bytes, IpcSender<()>);

impl Link for IpcChannel {
    const PASSES_FDS: bool = false;

    fn new(socket: OwnedFd, Setup { side, load, .. }: Setup) -> Self {
        // Bytes alone have a type of channel of their own.
        if !load.fd {
            let pair = || bytes_channel().expect("a channel");
            let ((to_far, from_near), (to_near, from_far)) = (pair(), pair());
            return match meet(socket, side, (side == Side::Far).then_some((to_far, from_far))) {
                Some((to_far, from_far)) => Self::Bytes(to_far, from_far),
                None => Self::Bytes(to_near, from_near),
            };
        }
        // Messages with a handle.
        let pair = || channel::<Message>().expect("a channel");
        let ((to_far, from_near), (to_near, from_far)) = (pair(), pair());
        let (sender, receiver) =
            match meet(socket, side, (side == Side::Far).then_some((to_far, from_far))) {
                Some(near) => near,
                None => (to_near, from_near),
            };
        Self::Handles { sender, receiver, own: channel().expect("a channel").0, arrived: None }
    }

    async fn send(&mut self, payload: &Bytes, _: Option<OwnedFd>) {
        match self {
            Self::Bytes(sender, _) => sender.send(payload).expect("sending"),
            Self::Handles { sender, own, arrived, .. } => {
                let handle = arrived.take().unwrap_or_else(|| own.clone());
                sender.send((payload.clone(), handle)).expect("sending");
            }
        }
    }

    async fn flush(&mut self) {}

    async fn recv(&mut self, received: &mut Received) {
        match self {
            Self::Bytes(_, receiver) => received.bytes += receiver.recv().expect("receiving").len(),
            Self::Handles { receiver, arrived, .. } => {
                let (payload, handle) = receiver.recv().expect("receiving");
                received.bytes += payload.len();
                received.handles += 1;
                *arrived = Some(handle); // closes the handle received before
            }
        }
    }
}

/// The shared memory of ipc-channel: the sender copies the message into it, and the receiver maps
/// it without reading it.
pub(crate) struct IpcSharedMem {
    sender: IpcSender<IpcSharedMemory>,
    receiver: IpcReceiver<IpcSharedMemory>,
}

#[derive(Serialize, Deserialize)]
struct SharedMemEnds(IpcSender<IpcSharedMemory>, IpcReceiver<IpcSharedMemory>);

impl Link for IpcSharedMem {
    const PASSES_FDS: bool = false;

    fn new(socket: OwnedFd, Setup { side, .. }: Setup) -> Self {
        let pair = || channel().expect("a channel");
        let ((to_far, from_near), (to_near, from_far)) = (pair(), pair());
        match meet(socket, side, (side == Side::Far).then_some(SharedMemEnds(to_far, from_far))) {
            Some(SharedMemEnds(sender, receiver)) => Self { sender, receiver },
            None => Self { sender: to_near, receiver: from_near },
        }
    }

    async fn send(&mut self, payload: &Bytes, _: Option<OwnedFd>) {
        self.sender.send(IpcSharedMemory::from_bytes(payload)).expect("sending");
    }

    async fn flush(&mut self) {}

    async fn recv(&mut self, received: &mut Received) {
        received.bytes += self.receiver.recv().expect("receiving").len();
    }
}
