//! Measures what sharing saves, and `pidfd_getfd` as another way to a descriptor.

use std::{
    io::{IsTerminal, Write, stderr, stdout},
    process::Child,
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::{Peer, Result, image};

/// The time for all rounds, if their number is not given.
const TIME: Duration = Duration::from_secs(2);

/// Measures all ways in turns, so that they meet the same noise.
pub(crate) async fn run(
    peer: &mut Peer,
    image: &image::Image,
    child: &Child,
    rounds: Option<u32>,
) -> Result<()> {
    // Each image is asked for twice. The second time it is drawn already and is only handed over,
    // because the time to draw differs between the two kinds of memory.
    let mut rows = ["draw the image, hand it over", "hand over what is drawn"]
        .map(|what| (what, vec![], vec![]));
    let (mut received, mut taken, mut refusal) = (vec![], vec![], None);
    // Not `Socket::peer_pidfd`: that is the process that made the pair of sockets, this one.
    let pid = Pid::from_child(child);
    let (begin, mut number) = (Instant::now(), 0);
    while number == 0 || rounds.map_or(begin.elapsed() < TIME, |rounds| number < rounds) {
        number += 1;
        progress(number)?;
        for (_, shared, _) in &mut rows {
            timed(shared, peer.draw(number)).await?;
            image.check(number)?;
        }
        for (.., copied) in &mut rows {
            let copy = timed(copied, peer.ask(format!("copy {number}"))).await?.payload;
            (copy == image.layout.draw_copy(number)).then_some(()).ok_or(image::WRONG)?;
        }
        timed(&mut received, peer.ask("descriptor".into()))
            .await?
            .fds
            .pop()
            .ok_or("no descriptor came")?;
        let take = async {
            let number = str::from_utf8(&peer.ask("number".into()).await?.payload)?.parse()?;
            let pidfd = pidfd_open(pid, PidfdFlags::empty());
            Ok(pidfd.and_then(|pidfd| pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())))
        };
        refusal = timed(&mut taken, take).await?.err().or(refusal); // reported, and no failure
    }

    // Print the medians.
    let heads = (format!("median of {number}"), "shared memory", "copied in a frame");
    writeln!(stdout(), "{:32}{:>15}{:>20}   ratio", heads.0, heads.1, heads.2)?;
    for (what, shared, copied) in rows {
        let (shared, copied) = (median(shared), median(copied));
        let ratio = copied.as_secs_f64() / shared.as_secs_f64();
        writeln!(stdout(), "{what:32}{shared:>15.1?}{copied:>20.1?}{ratio:>8.1}")?;
    }
    let taken = refusal
        .map_or_else(|| format!("{:.1?}", median(taken)), |refusal| format!("refused: {refusal}"));
    writeln!(
        stdout(),
        "\nthe memfd in a frame:    {:.1?}; needs the socket, and an owner that sends it",
        median(received)
    )?;
    Ok(writeln!(
        stdout(),
        "the same by pidfd_getfd: {taken}; needs the right to ptrace its owner as well"
    )?)
}

/// Shows a person at a terminal that something happens.
fn progress(round: u32) -> std::io::Result<()> {
    if stderr().is_terminal() {
        write!(stderr(), "\rmeasuring, round {round} \r")?;
    }
    Ok(())
}

async fn timed<T>(times: &mut Vec<Duration>, work: impl Future<Output = Result<T>>) -> Result<T> {
    let start = Instant::now();
    let done = work.await?;
    times.push(start.elapsed());
    Ok(done)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
