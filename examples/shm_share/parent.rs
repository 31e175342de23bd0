//! The process that owns the image and asks for drawings.

use std::{
    io::{Write, stdout},
    os::fd::{AsFd, OwnedFd},
    process::{Child, Command, Stdio},
    sync::atomic::Ordering::Relaxed,
};

use fdwire::{Error, Frame, FrameCodec, Framed, Socket, SocketKind};
use futures::{SinkExt, TryStreamExt};
use rustix::{
    event::{EventfdFlags, eventfd},
    fs::SealFlags,
    process::{PidfdGetfdFlags, pidfd_getfd},
    thread::{CapabilitySet, capabilities, set_capabilities},
};
use tokio::{io::AsyncReadExt, net::unix::pipe};

use crate::{
    Arguments, Result, Sabotage, framed,
    image::{Image, Layout, SEALS, memfd},
    is_end, measure,
};

pub(crate) async fn run(arguments: &Arguments) -> Result<()> {
    let (ours, theirs) = Socket::pair(SocketKind::SeqPacket)?;
    let sabotage = arguments.sabotage.and_then(|sabotage| clap::ValueEnum::to_possible_value(&sabotage));
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--child")
        .args(sabotage.map(|value| format!("--sabotage={}", value.get_name())))
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    let outcome = share(arguments, framed(ours)?, &child).await;
    // Our end of the socket is closed by now, and so the child has ended or is about to.
    let status = child.wait()?;
    outcome?;
    status.success().then_some(()).ok_or_else(|| format!("the other process failed: {status}").into())
}

async fn share(arguments: &Arguments, mut socket: Framed<FrameCodec>, child: &Child) -> Result<()> {
    if arguments.sabotage == Some(Sabotage::Untraceable) {
        // Root could trace the child all the same.
        let mut rights = capabilities(None)?;
        rights.effective.remove(CapabilitySet::SYS_PTRACE);
        set_capabilities(None, rights)?;
    }
    let layout = Layout::new(arguments.width, arguments.height);
    let image = Image::map(memfd(layout.bytes(), SEALS)?.into(), layout)?;
    let doorbell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let other_memory = match arguments.sabotage {
        Some(Sabotage::Short) => memfd(layout.bytes() / 2, SEALS)?.into(),
        Some(Sabotage::Unsealed) => memfd(layout.bytes(), SealFlags::empty())?.into(),
        Some(Sabotage::Kind) => std::io::pipe()?.0.into(),
        _ => OwnedFd::from(image.file.try_clone()?),
    };
    let other_doorbell = match arguments.sabotage {
        Some(Sabotage::Doorbell) => std::io::pipe()?.1.into(),
        _ => doorbell.try_clone()?,
    };
    let frame = Frame::new(layout.to_payload()).with_fd(other_memory).with_fd(other_doorbell);
    socket.send(frame).await?;

    // To the event loop an eventfd is what a pipe is: readable or not. `unchecked`, since it is none.
    let doorbell = pipe::Receiver::from_owned_fd_unchecked(doorbell)?;
    let mut peer = Peer { socket, doorbell };
    let answer = answer(&mut peer.socket).await?;
    if answer.payload != "mapped" {
        return Err(format!("the other process refused: {}", String::from_utf8_lossy(&answer.payload)).into());
    }
    show(&mut peer, &image, child).await?;
    measure::images(&mut peer, &image, arguments.rounds).await?;
    measure::descriptors(&mut peer, &image, child, arguments.rounds).await
}

/// The other process, from here.
pub(crate) struct Peer {
    socket: Framed<FrameCodec>,
    doorbell: pipe::Receiver,
}

impl Peer {
    async fn send(&mut self, request: &str) -> Result<()> {
        self.socket.send(Frame::new(request.to_owned())).await.map_err(|error| gone_or(error.error))
    }

    pub(crate) async fn ask(&mut self, request: &str) -> Result<Frame> {
        self.send(request).await?;
        answer(&mut self.socket).await
    }

    /// Sends a request that is answered by the doorbell. A process that died never rings, so its socket is watched too.
    pub(crate) async fn ask_for_ring(&mut self, request: &str) -> Result<()> {
        self.send(request).await?;
        let mut rings = [0; 8];
        tokio::select! {
            rung = self.doorbell.read_exact(&mut rings) => rung?,
            answer = answer(&mut self.socket) => {
                return Err(format!("the doorbell is expected, not {:?}", answer?.payload).into());
            }
        };
        Ok(())
    }

    /// The other process gives its memfd.
    pub(crate) async fn receive_memfd(&mut self) -> Result<OwnedFd> {
        let Ok([fd]) = self.ask("descriptor").await?.fds.into_array() else { return Err("no descriptor came".into()) };
        Ok(fd)
    }

    /// The other process tells only its number for the memfd, and it is taken from there.
    pub(crate) async fn take_memfd(&mut self, pidfd: impl AsFd) -> Result<OwnedFd> {
        let number = str::from_utf8(&self.ask("number").await?.payload)?.parse()?;
        Ok(pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())?)
    }
}

const GONE: &str = "the other process is gone";

async fn answer(socket: &mut Framed<FrameCodec>) -> Result<Frame> {
    socket.try_next().await.map_err(gone_or)?.ok_or_else(|| GONE.into())
}

fn gone_or(error: Error) -> Box<dyn std::error::Error> {
    if is_end(&error) { GONE.into() } else { error.into() }
}

async fn show(peer: &mut Peer, image: &Image, child: &Child) -> Result<()> {
    let Layout { width, height, .. } = image.layout;
    let (x, y) = (width / 2, height / 2);
    let before = image.pixel(x, y)?.load(Relaxed);
    peer.ask_for_ring("draw 7").await?;
    check(image.shows(7)?)?;
    writeln!(stdout(), "{width} x {height} pixels, {} bytes, in a memfd sealed to that size", image.layout.bytes())?;
    writeln!(stdout(), "process {} had pixel ({x}, {y}) as {before:08x}", std::process::id())?;
    writeln!(stdout(), "process {} drew in the same memory: {:08x}", child.id(), image.pixel(x, y)?.load(Relaxed))?;
    Ok(())
}

pub(crate) fn check(picture_is_right: bool) -> Result<()> {
    picture_is_right.then_some(()).ok_or_else(|| "the picture is not what was asked for".into())
}
