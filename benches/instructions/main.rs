//! User instructions for each message of 64 bytes, sent and received in batches of 64 over a STREAM
//! socket, by fdwire's `FrameCodec` and by tokio-util's `LengthDelimitedCodec`.
//!
//! ```text
//! cargo bench --bench instructions
//! ```
//!
//! Valgrind counts the instructions, so a figure is exact, and it is the same on a busy machine.
//! The kernel's instructions do not count. The program starts itself again under valgrind for each
//! figure. It fails if a figure of `FrameCodec` is above its bound.

mod contenders;

use std::{
    error::Error,
    fs,
    path::Path,
    process::{Command, ExitCode},
};

use contenders::{Fdwire, LengthDelimited, Link};
use tokio::task::yield_now;

/// The most instructions that sending a message with `FrameCodec` may take. `LengthDelimitedCodec`
/// takes 237.
const MAX_SENDING: f64 = 205.0;

/// The most instructions that receiving a message with `FrameCodec` may take.
/// `LengthDelimitedCodec` takes 348.
const MAX_RECEIVING: f64 = 290.0;

/// Messages in a batch.
const BATCH: usize = 64;

/// Bytes in a message.
const MESSAGE_BYTES: usize = 64;

/// Batches before the counted ones. Every buffer grows to its size in them.
const WARM_UP: usize = 50;

/// Batches that are counted.
const COUNTED: usize = 1000;

/// The directory that keeps the profiles, for `callgrind_annotate`.
const PROFILES: &str = env!("CARGO_TARGET_TMPDIR");

/// Names a contender and a direction to the program under valgrind.
const ROLE: &str = "FDWIRE_INSTRUCTIONS";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Sending,
    Receiving,
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    if let Ok(role) = std::env::var(ROLE) {
        return Ok(run_role(&role));
    }

    if cfg!(debug_assertions) {
        println!("skipped: the bounds are those of an optimized build; use cargo bench");
        return Ok(ExitCode::SUCCESS);
    }

    // Without valgrind there is nothing to count.
    let installed = Command::new("valgrind")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !installed {
        println!("skipped: valgrind is not installed");
        return Ok(match std::env::var_os("FDWIRE_REQUIRE_FOREIGN") {
            Some(_) => ExitCode::FAILURE,
            None => ExitCode::SUCCESS,
        });
    }

    // One line for each contender; only fdwire's figures have bounds.
    println!(
        "user instructions for a message of {MESSAGE_BYTES} bytes, in batches of {BATCH}, \
         on STREAM:"
    );
    println!("{:<22}{:>10}{:>11}", "", "sending", "receiving");
    let mut exit = ExitCode::SUCCESS;
    for name in [Fdwire::NAME, LengthDelimited::NAME] {
        let [sending, receiving] =
            [count(name, Direction::Sending)?, count(name, Direction::Receiving)?];
        println!("{name:<22}{sending:>10.1}{receiving:>11.1}");
        if name == Fdwire::NAME && (sending > MAX_SENDING || receiving > MAX_RECEIVING) {
            exit = ExitCode::FAILURE;
        }
    }
    println!("{:<22}{MAX_SENDING:>10.1}{MAX_RECEIVING:>11.1}", "bounds of FrameCodec");
    println!("the profiles are in {PROFILES}");
    Ok(exit)
}

/// Runs one contender under valgrind. Returns the number of instructions that [`counted`] took for
/// each message.
fn count(name: &str, direction: Direction) -> Result<f64, Box<dyn Error>> {
    let profile = Path::new(PROFILES).join(format!("callgrind.{name}.{direction:?}"));
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=instructions::counted*"])
        .arg(format!("--callgrind-out-file={}", profile.display()))
        .arg(std::env::current_exe()?)
        .env(ROLE, format!("{name} {direction:?}"))
        .output()?;
    if !output.status.success() {
        return Err(format!("valgrind failed: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let profile = fs::read_to_string(&profile)?;
    let total = profile
        .lines()
        .find_map(|line| line.strip_prefix("totals: "))
        .ok_or("no total in the profile")?;
    match total.trim().parse::<u64>()? {
        0 => Err("valgrind has counted nothing: it did not find the function `counted`".into()),
        instructions => Ok(instructions as f64 / (COUNTED * BATCH) as f64),
    }
}

/// Runs one contender in this process, under valgrind.
fn run_role(role: &str) -> ExitCode {
    for direction in [Direction::Sending, Direction::Receiving] {
        match role.strip_suffix(&format!(" {direction:?}")) {
            Some(Fdwire::NAME) => run_contender::<Fdwire>(direction),
            Some(LengthDelimited::NAME) => run_contender::<LengthDelimited>(direction),
            _ => continue,
        }
        return ExitCode::SUCCESS;
    }
    eprintln!("no such role: {role}");
    ExitCode::FAILURE
}

fn run_contender<L: Link>(direction: Direction) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (mut tx, mut rx) = L::pair();
        let payload = bytes::Bytes::from(vec![7; MESSAGE_BYTES]);
        for batch in 0..WARM_UP + COUNTED {
            let is_counted = |of: Direction| batch >= WARM_UP && direction == of;
            run_step(is_counted(Direction::Sending), &mut || tx.send_batch(&payload));
            yield_now().await; // the runtime sees that there is something to receive
            run_step(is_counted(Direction::Receiving), &mut || rx.receive_batch());
            yield_now().await;
        }
    });
}

fn run_step(is_counted: bool, step: &mut dyn FnMut()) {
    if is_counted { counted(step) } else { step() }
}

/// Runs a step whose instructions count: valgrind finds this function by its name.
#[inline(never)]
fn counted(step: &mut dyn FnMut()) {
    step();
}
