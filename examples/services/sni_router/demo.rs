//! The demo: two names, with certificates made on the spot.

use std::{env, error::Error, fs, net::SocketAddr, path::Path};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use tempfile::TempDir;
use tokio::process::Command;

use crate::router::Router;

const NAMES: [&str; 2] = ["one.test", "two.test"];

/// Certificates and keys, in a directory that is removed at the end.
pub(crate) struct Demo(TempDir);

impl Demo {
    /// Starts two workers for each name.
    pub(crate) fn start(router: &mut Router) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let directory = tempfile::tempdir()?;
        let mut all = String::new();
        for name in NAMES {
            let CertifiedKey { cert, signing_key } = generate_simple_self_signed([name.into()])?;
            let file = |extension| directory.path().join(format!("{name}.{extension}"));
            fs::write(file("pem"), cert.pem())?;
            fs::write(file("key"), signing_key.serialize_pem())?;
            all += &cert.pem();
            for _ in 0..2 {
                let mut worker = Command::new(env::current_exe()?);
                worker.arg("--worker").args([file("pem"), file("key")]);
                router.add_worker(name, worker)?;
            }
        }
        fs::write(directory.path().join("all.pem"), all)?;
        Ok(Self(directory))
    }

    /// Prints commands to try.
    pub(crate) fn print_commands(&self, address: SocketAddr) {
        let all: &Path = &self.0.path().join("all.pem");
        let (host, port) = (address.ip(), address.port());
        let curl = |options: &str, name: &str| {
            println!(
                "  curl {options} --cacert {} --resolve {name}:{port}:{host} \
                 https://{name}:{port}/",
                all.display()
            );
        };
        println!("try");
        curl("--http2", NAMES[0]);
        curl("--http1.1", NAMES[1]);
        println!("and clients that get another answer:");
        curl("", "three.test");
        println!("  curl http://{address}/");
    }
}
