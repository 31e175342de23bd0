//! The machine and the run that the figures are from.

use std::{env, fs, process::Command};

use nix::sys::utsname::uname;

use crate::{
    processes::{CORES, send_buffer},
    results::Machine,
};

impl Machine {
    pub(crate) fn this() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model =
            cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let kernel =
            uname().map(|it| format!("{} {}", it.sysname().display(), it.release().display()));
        let args = env::args().skip(1).filter(|arg| arg != "--bench").collect::<Vec<_>>();
        let separator = if args.is_empty() { "" } else { " -- " };
        Self {
            cpu: model.map_or("unknown", |(_, model)| model).to_owned(),
            cores: CORES.allowed.len(),
            bound_to: CORES.two,
            kernel: kernel.unwrap_or_default(),
            rustc: output_of("rustc", &["--version"]),
            date: output_of("date", &["--utc", "+%Y-%m-%d"]),
            command: format!("cargo bench --bench transport{separator}{}", args.join(" ")),
            send_buffer_bytes: (send_buffer(false), send_buffer(true)),
        }
    }

    /// Returns what a reader has to know about the machine and the run, a line each.
    pub(crate) fn lines(&self) -> Vec<String> {
        let (small, large) = self.send_buffer_bytes;
        let cores = match self.bound_to {
            Some((near, far)) => {
                format!("{} cores, the two ends bound to cores {near} and {far}", self.cores)
            }
            None => format!("{} core(s), the ends **not bound** to cores of their own", self.cores),
        };
        let asked = if large < 4 << 20 { ", where 4 MiB were asked for" } else { "" };
        vec![
            format!("{}, {cores}", self.cpu),
            format!("{}, {}", self.kernel, self.rustc),
            format!("send buffers: {small} bytes up to 64 B, {large} bytes from 4 KiB on{asked}"),
            format!("{}: `{}`", self.date, self.command),
        ]
    }
}

fn output_of(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}
