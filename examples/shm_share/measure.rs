//! What sharing saves, and what the other way to a descriptor needs.

use std::{
    fs::File,
    io::{Write, stdout},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    process::Child,
    time::{Duration, Instant},
};

use comfy_table::{Table, presets};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{
    Result,
    image::{Image, draw_copy},
    parent::{Peer, check},
};

/// An image in shared memory against the same bytes in a frame, in turns, so that both meet the same noise.
///
/// Drawing is slower in shared memory: an atomic at a time, and another processor has just read it. So the hand-over is
/// shown alone too.
pub(crate) async fn images(peer: &mut Peer, image: &Image, rounds: u32) -> Result<()> {
    let [mut drawn, mut drawn_copied, mut rung, mut copied] = [(); 4].map(|()| Vec::new());
    peer.ask("copy 0").await?; // touches the memory for the first time
    for number in 1..=rounds {
        let start = Instant::now();
        peer.ask_for_ring(&format!("draw {number}")).await?;
        drawn.push(start.elapsed());
        check(image.shows(number)?)?;

        let start = Instant::now();
        let copy = peer.ask(&format!("copy {number}")).await?.payload;
        drawn_copied.push(start.elapsed());
        check(copy == draw_copy(image.layout, number))?;

        let start = Instant::now();
        peer.ask_for_ring("ring").await?;
        rung.push(start.elapsed());

        let start = Instant::now();
        peer.ask("copy-again").await?;
        copied.push(start.elapsed());
    }
    let title = format!("median of {rounds}");
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header([&title, "shared memory", "copied in a frame", "ratio"]);
    for (what, shared, copied) in
        [("draw the image, hand it over", drawn, drawn_copied), ("hand over what is drawn", rung, copied)]
    {
        let (shared, copied) = (median(shared), median(copied));
        let ratio = format!("{:.1}", copied.as_secs_f64() / shared.as_secs_f64());
        table.add_row([what, &format!("{shared:.1?}"), &format!("{copied:.1?}"), &ratio]);
    }
    writeln!(stdout(), "\n{table}")?;
    Ok(())
}

/// A descriptor in a frame against one taken by its number. The latter may be refused, which is no failure.
pub(crate) async fn descriptors(peer: &mut Peer, image: &Image, child: &Child, rounds: u32) -> Result<()> {
    // Of the child itself: `Socket::peer_pidfd` would name who made the pair of sockets, this process.
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty());
    let (mut received, mut taken) = (Vec::new(), pidfd.as_ref().map(|_| Vec::new()).map_err(|&refusal| refusal));
    for _ in 0..rounds {
        let start = Instant::now();
        let fd = peer.receive_memfd().await?;
        received.push(start.elapsed());
        check_same_file(image, fd)?;

        let (Ok(pidfd), Ok(times)) = (&pidfd, &mut taken) else { continue };
        let start = Instant::now();
        match peer.take_memfd(pidfd).await {
            Ok(fd) => {
                times.push(start.elapsed());
                check_same_file(image, fd)?;
            }
            Err(error) => match error.downcast::<rustix::io::Errno>() {
                Ok(refusal) => taken = Err(*refusal),
                Err(error) => return Err(error),
            },
        }
    }
    let taken = match taken {
        Ok(times) => format!("{:.1?}", median(times)),
        Err(refusal) => format!("refused: {refusal}"),
    };
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(["ask for the memfd", "median", "what it needs"]);
    table.add_row(["in a frame", &format!("{:.1?}", median(received)), "the socket; the owner decides what it gives"]);
    let needs = "also the process id, and the right to ptrace:\n\
        same user, traceable, Yama lets it; or CAP_SYS_PTRACE.\n\
        Takes any descriptor, and what has the number by then";
    table.add_row(["pidfd_getfd", &taken, needs]);
    writeln!(stdout(), "\n{table}")?;
    Ok(())
}

fn check_same_file(image: &Image, fd: OwnedFd) -> Result<()> {
    let (ours, other) = (image.file.metadata()?, File::from(fd).metadata()?);
    match (ours.dev(), ours.ino()) == (other.dev(), other.ino()) {
        true => Ok(()),
        false => Err("another file came than the image's".into()),
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
