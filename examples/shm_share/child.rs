//! The process that is given an image and draws in it.

use std::{
    fs::{self, File},
    io::Write,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use bytes::Bytes;
use fdwire::{Error, Frame, FrameCodec, Framed, Socket};
use futures::{SinkExt, TryStreamExt};
use rustix::process::{DumpableBehavior, Signal, getpid, kill_process, set_dumpable_behavior};

use crate::{
    Result, Sabotage, framed,
    image::{Image, Layout, draw_copy},
    is_end,
};

pub(crate) async fn run(sabotage: Option<Sabotage>) -> Result<()> {
    match work(sabotage).await {
        // The parent says itself why it ended. If it was killed, nobody is left to be told.
        Err(error) if error.downcast_ref().is_some_and(is_end) => Ok(()),
        worked => worked,
    }
}

async fn work(sabotage: Option<Sabotage>) -> Result<()> {
    if sabotage == Some(Sabotage::Untraceable) {
        set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    let mut parent = framed(Socket::try_from(std::io::stdin().as_fd().try_clone_to_owned()?)?)?;
    let Some(frame) = parent.try_next().await? else { return Ok(()) };
    let (image, doorbell) = match take_image(frame) {
        Ok(taken) => taken,
        Err(reason) => return send(&mut parent, Frame::new(reason.to_string())).await,
    };
    send(&mut parent, Frame::new("mapped")).await?;
    if sabotage == Some(Sabotage::Gone) {
        parent.try_next().await?;
        kill_process(getpid(), Signal::KILL)?;
    }
    serve(&mut parent, &image, doorbell).await
}

async fn send(parent: &mut Framed<FrameCodec>, frame: Frame) -> Result<()> {
    Ok(parent.send(frame).await.map_err(Error::from)?)
}

/// Believes nothing: neither the payload nor what kind of descriptors came.
fn take_image(frame: Frame) -> Result<(Image, File)> {
    let layout = Layout::from_payload(&frame.payload)?;
    let Ok([memfd, doorbell]) = frame.fds.into_array() else { return Err("two descriptors are expected".into()) };
    Ok((Image::map(memfd, layout)?, eventfd(doorbell)?))
}

/// No system call tells an eventfd from others, but a write to a full pipe would block.
fn eventfd(fd: OwnedFd) -> Result<File> {
    let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    match name.to_str() {
        Some("anon_inode:[eventfd]") => Ok(fd.into()),
        _ => Err("the doorbell is not an eventfd".into()),
    }
}

async fn serve(parent: &mut Framed<FrameCodec>, image: &Image, mut doorbell: File) -> Result<()> {
    let mut copy = Bytes::new();
    while let Some(request) = parent.try_next().await? {
        let request = str::from_utf8(&request.payload)?;
        let (what, number) = request.split_once(' ').unwrap_or((request, "0"));
        match what {
            "draw" => image.draw(number.parse()?)?,
            "copy" => copy = draw_copy(image.layout, number.parse()?).into(),
            _ => {}
        }
        let answer = match what {
            "draw" | "ring" => {
                doorbell.write_all(&1u64.to_ne_bytes())?;
                continue;
            }
            "copy" | "copy-again" => Frame::new(copy.clone()),
            "descriptor" => Frame::new("").with_fd(image.file.try_clone()?),
            "number" => Frame::new(image.file.as_raw_fd().to_string()),
            _ => return Err(format!("request {request:?} is not known").into()),
        };
        send(parent, answer).await?;
    }
    Ok(())
}
