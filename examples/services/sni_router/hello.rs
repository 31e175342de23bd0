//! The first message of a TLS client, which names the server that it wants.
//!
//! `rustls` parses it, in any number of records and pieces. What was read is kept, for whoever
//! serves the connection.

use std::{io, time::Duration};

use rustls::server::Acceptor;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// The beginning of a connection, as the client has sent it.
pub(crate) struct Hello {
    /// The name of the server that it wants, in lower case.
    pub(crate) server_name: Option<String>,
    /// Everything that was read.
    pub(crate) bytes: Vec<u8>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoHello {
    #[error("no whole ClientHello within {0:?}")]
    Slow(Duration),
    #[error("ClientHello of more than {MOST_BYTES} bytes")]
    TooLong,
    #[error("HTTP without TLS")]
    Http,
    #[error("not TLS, or none that is understood: {error}")]
    Foreign { error: rustls::Error, answer: Vec<u8> },
    #[error("the client has left after {0} bytes")]
    Left(usize),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Browsers send 2 KiB at most, with keys for after quantum computers.
const MOST_BYTES: usize = 16 << 10;

/// Reads the ClientHello. `patience` is for all of it: a byte now and then does not extend it.
pub(crate) async fn read_hello(
    client: &mut TcpStream,
    patience: Duration,
) -> Result<Hello, NoHello> {
    timeout(patience, read(client)).await.unwrap_or(Err(NoHello::Slow(patience)))
}

async fn read(client: &mut TcpStream) -> Result<Hello, NoHello> {
    let (mut acceptor, mut bytes) = (Acceptor::default(), Vec::new());
    loop {
        let before = bytes.len();
        if client.read_buf(&mut bytes).await? == 0 {
            return Err(NoHello::Left(before));
        }
        if looks_like_http(&bytes) {
            return Err(NoHello::Http);
        }
        // It takes as much at a time as it has room for, and makes room when it parses.
        let mut unparsed = &bytes[before..];
        while !unparsed.is_empty() {
            acceptor.read_tls(&mut unparsed)?;
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(str::to_ascii_lowercase);
                    return Ok(Hello { server_name: name, bytes });
                }
                Ok(None) if bytes.len() > MOST_BYTES => return Err(NoHello::TooLong),
                Ok(None) => {}
                Err((error, mut last)) => {
                    let mut answer = Vec::new();
                    last.write(&mut answer)?;
                    if answer.is_empty() {
                        answer = alert(DECODE_ERROR); // it has none for what is no record
                    }
                    return Err(NoHello::Foreign { error, answer });
                }
            }
        }
    }
}

fn looks_like_http(bytes: &[u8]) -> bool {
    [&b"GET "[..], b"HEAD ", b"POST ", b"PUT ", b"OPTIONS ", b"PRI "]
        .iter()
        .any(|method| bytes.starts_with(method))
}

impl NoHello {
    /// Returns the answer to the client, in its own protocol as far as that is known.
    pub(crate) fn answer(&self) -> Vec<u8> {
        match self {
            Self::Http => {
                b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\nThis port speaks TLS.\n"
                    .to_vec()
            }
            Self::Foreign { answer, .. } => answer.clone(),
            Self::TooLong => alert(RECORD_OVERFLOW),
            Self::Slow(_) => alert(CLOSE_NOTIFY),
            Self::Left(_) | Self::Io(_) => Vec::new(),
        }
    }
}

const CLOSE_NOTIFY: u8 = 0;
const RECORD_OVERFLOW: u8 = 22;
const DECODE_ERROR: u8 = 50;
/// There is no server of the name that the client wants.
pub(crate) const UNRECOGNIZED_NAME: u8 = 112;

/// An alert before any key was agreed on (RFC 8446, section 6). It is fatal.
pub(crate) fn alert(description: u8) -> Vec<u8> {
    const ALERT: u8 = 21;
    const FATAL: u8 = 2;
    vec![ALERT, 3, 3, 0, 2, FATAL, description]
}

/// Sends the last word and ends the connection. It stays a while to read what the client still
/// sends: a connection that is closed with something unread is reset, and the answer with it.
pub(crate) async fn refuse(mut client: TcpStream, answer: &[u8]) -> io::Result<()> {
    const MOST_ROUNDS: usize = 64;

    let farewell = async {
        client.write_all(answer).await?;
        client.shutdown().await?;
        let mut rest = [0; 4096];
        for _ in 0..MOST_ROUNDS {
            if client.read(&mut rest).await? == 0 {
                break;
            }
        }
        Ok(())
    };
    timeout(Duration::from_secs(1), farewell).await.unwrap_or(Ok(()))
}
