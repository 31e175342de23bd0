//! A ProxyCommand for OpenSSH that does not stay in the path: it connects, passes the connected
//! socket to `ssh` over its standard output, and ends. `ssh` then uses the connection itself.
//!
//! ```sh
//! cargo build --example ssh_proxy
//! ssh -o ProxyUseFdpass=yes -o ProxyCommand='target/debug/examples/ssh_proxy %h %p' HOST
//! ```
//!
//! A real one would decide here how to connect: to another address, through a tunnel, or after a
//! login at a gateway. `ssh` expects one byte with one descriptor and no header, which is what
//! [`PacketCodec`] sends. One message needs no runtime: `fdwire::blocking` sends it.

use std::{error::Error, io, net::TcpStream, os::fd::AsFd};

use clap::Parser;
use fdwire::{
    Frame,
    blocking::{Framed, Socket},
    codec::PacketCodec,
};

/// Connects to HOST and PORT, and passes the connection to the `ssh` that has started this.
#[derive(Parser)]
struct Args {
    /// The host to connect to
    host: String,
    /// The port to connect to
    port: u16,
}

fn main() {
    let Args { host, port } = Args::parse();
    if let Err(error) = pass_connection(&host, port) {
        eprintln!("ssh_proxy: {host} port {port}: {error}");
        std::process::exit(1);
    }
}

fn pass_connection(host: &str, port: u16) -> Result<(), Box<dyn Error>> {
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    let ssh = Socket::try_from(stdout).map_err(|error| {
        format!("standard output is not the socket of ssh ({error}); set ProxyUseFdpass=yes")
    })?;

    let connection = TcpStream::connect((host, port))?;
    let mut ssh = Framed::new(ssh, PacketCodec::default());
    ssh.send(Frame::new(&b"\0"[..]).with_fd(connection))?;
    Ok(())
}
