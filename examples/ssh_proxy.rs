//! A ProxyCommand for OpenSSH that does not stay in between: it connects, passes the connected socket to `ssh` over its
//! standard output, and ends. `ssh` then speaks on the connection itself.
//!
//! ```sh
//! cargo build --example ssh_proxy
//! ssh -o ProxyUseFdpass=yes -o ProxyCommand='target/debug/examples/ssh_proxy %h %p' HOST
//! ```
//!
//! Whatever decides how to connect goes here: another address, a tunnel, a login at a gateway. `ssh` expects one byte with
//! one descriptor, so [`PacketCodec`] it is.

use std::{error::Error, io, os::fd::AsFd};

use clap::Parser;
use fdwire::{Frame, Framed, PacketCodec, Socket};
use futures::SinkExt;
use tokio::net::TcpStream;

/// Connects to HOST and PORT, and passes the connection to the `ssh` that started this.
#[derive(Parser)]
struct Args {
    host: String,
    port: u16,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let Args { host, port } = Args::parse();
    if let Err(error) = pass_connection(&host, port).await {
        eprintln!("ssh_proxy: {host} port {port}: {error}");
        std::process::exit(1);
    }
}

async fn pass_connection(host: &str, port: u16) -> Result<(), Box<dyn Error>> {
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    let ssh = Socket::try_from(stdout)
        .map_err(|error| format!("standard output is not ssh's socket ({error}): use it with ProxyUseFdpass=yes"))?;

    let connection = TcpStream::connect((host, port)).await?;
    let mut ssh = Framed::new(ssh, PacketCodec::default());
    ssh.send(Frame::new(&b"\0"[..]).with_fd(connection.into_std()?)).await?;
    Ok(())
}
