//! The example that shares an image between two processes, run as a user would.

mod common;

use std::process::{Output, Stdio};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::Command,
};

fn shm_share(arguments: &[&str]) -> Command {
    let mut command = Command::from(common::example("shm_share"));
    command.args(["--width", "101", "--height", "67"]).args(arguments).kill_on_drop(true);
    command
}

fn output(arguments: &[&str]) -> Output {
    common::run(async { shm_share(arguments).output().await.unwrap() })
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

/// Exit code 1, nothing but one line, and that is the reason.
fn check_refused(sabotage: &str, reason: &str) {
    let output = output(&["--sabotage", sabotage]);
    assert_eq!(text(&output.stderr), format!("shm_share: {reason}\n"));
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""));
}

#[test]
fn two_processes_draw_in_one_image_and_both_ways_are_measured() {
    let output = output(&["--rounds", "3"]);
    let stdout = text(&output.stdout);
    assert_eq!((text(&output.stderr), output.status.code()), ("", Some(0)), "{stdout}");
    // A row of 101 pixels takes 404 bytes and begins at a multiple of 64.
    assert!(stdout.starts_with("101 x 67 pixels, 30016 bytes"), "{stdout}");
    assert!(stdout.contains("had pixel (50, 33) as 00000000"), "{stdout}");
    let drawn = ((50u32 ^ 33) + 7).wrapping_mul(0x9E37_79B9);
    assert!(stdout.contains(&format!("drew in the same memory: {drawn:08x}")), "{stdout}");
    for row in ["median of 3", "draw the image, hand it over", "hand over what is drawn", "in a frame", "pidfd_getfd"] {
        assert!(stdout.contains(row), "{row} in {stdout}");
    }
}

#[test]
fn a_memfd_shorter_than_the_image_is_not_mapped() {
    check_refused("short", "the other process refused: the memfd has 15008 bytes, the image needs 30016");
}

#[test]
fn a_memfd_that_could_still_be_cut_short_is_not_mapped() {
    check_refused("unsealed", "the other process refused: the memfd is not sealed against shrinking and growing");
}

#[test]
fn a_descriptor_of_another_kind_is_refused() {
    check_refused("kind", "the other process refused: the descriptor is not a memfd");
    check_refused("doorbell", "the other process refused: the doorbell is not an eventfd");
}

#[test]
fn a_process_that_dies_before_it_rings_is_noticed() {
    check_refused("gone", "the other process is gone");
}

#[test]
fn a_refused_pidfd_getfd_is_told_and_is_no_failure() {
    let output = output(&["--rounds", "2", "--sabotage", "untraceable"]);
    let stdout = text(&output.stdout);
    assert_eq!((text(&output.stderr), output.status.code()), ("", Some(0)), "{stdout}");
    assert!(stdout.contains("refused: "), "{stdout}");
}

#[test]
fn the_child_ends_with_its_parent() {
    common::run(async {
        let mut parent =
            shm_share(&["--rounds", "1000000000"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(parent.stdout.take().unwrap());
        stdout.read_line(&mut String::new()).await.unwrap();
        parent.kill().await.unwrap();
        // Both processes hold these pipes, which end with the last of them.
        let mut stderr = String::new();
        stdout.read_to_end(&mut Vec::new()).await.unwrap();
        parent.stderr.take().unwrap().read_to_string(&mut stderr).await.unwrap();
        assert_eq!(stderr, "");
    });
}

#[test]
fn nonsense_arguments_are_refused() {
    for nonsense in
        [["--width", "0"], ["--height", "8193"], ["--rounds", "0"], ["--rounds", "many"], ["--sabotage", "x"]]
    {
        let output = common::run(async {
            Command::from(common::example("shm_share")).args(nonsense).kill_on_drop(true).output().await.unwrap()
        });
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{nonsense:?}");
        assert!(text(&output.stderr).starts_with("error: invalid value"), "{nonsense:?}");
    }
}
