//! Programs that tests run: whether they are installed, and the numbers that their demos print. The
//! tests of `examples/services` use this file too.

use std::{collections::BTreeMap, path::PathBuf, process::Command};

/// Returns the path of a program. If it is not installed, prints that and returns `None`, or fails
/// if `FDWIRE_REQUIRE_FOREIGN` is set.
pub(crate) fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<_> = std::env::split_paths(&path).collect();
    directories.push("/usr/sbin".into());
    let found = directories
        .into_iter()
        .map(|directory| directory.join(program))
        .find(|path| path.is_file());
    if found.is_none() {
        skipped(&format!("{program} is not installed"));
    }
    found
}

/// Returns the path of strace if it can be attached to a process. Otherwise prints the reason, as
/// [`installed`] does.
pub(crate) fn attachable_strace() -> Option<PathBuf> {
    let strace = installed("strace")?;
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root to attach strace to a process");
        return None;
    }
    Some(strace)
}

/// Prints why a test does not run, or fails if `FDWIRE_REQUIRE_FOREIGN` is set.
pub(crate) fn skipped(reason: &str) {
    assert!(
        std::env::var_os("FDWIRE_REQUIRE_FOREIGN").is_none(),
        "{reason}, and FDWIRE_REQUIRE_FOREIGN is set"
    );
    eprintln!("skipped: {reason}");
}

/// Runs the demo of a program. Returns its last lines: numbers with their names.
pub(crate) fn demo_of(mut program: Command, arguments: &[&str]) -> BTreeMap<String, f64> {
    let output = program.arg("--demo").args(arguments).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    let number = |line: &str| {
        let (name, number) = line.trim_end_matches(" ms").rsplit_once(' ')?;
        Some((name.to_owned(), number.parse().ok()?))
    };
    stdout.lines().filter(|line| !line.starts_with("restart ")).filter_map(number).collect()
}
