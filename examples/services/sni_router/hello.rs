//! The first message of a TLS client, the ClientHello, which names the server that it asks for.
//!
//! `rustls` parses it, however many TLS records and TCP segments it comes in. The bytes are kept,
//! because the worker needs them again.

use std::io;

use rustls::{AlertDescription, server::Acceptor};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// The beginning of a connection, as the client has sent it.
pub(crate) struct Hello {
    /// The name of the server that the client asks for, in lower case. The public name, if the
    /// client encrypts its hello (ECH). Empty if it sends none.
    pub(crate) server_name: String,
    /// Everything that was read: the ClientHello, and perhaps more.
    pub(crate) bytes: Vec<u8>,
}

/// Why a client has sent no ClientHello.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoHello {
    #[error("the ClientHello is longer than {MAX_BYTES} bytes")]
    TooLong,
    #[error("plain HTTP on a port for TLS")]
    PlainHttp,
    #[error("no valid ClientHello: {error}")]
    Invalid { error: rustls::Error, answer: Vec<u8> },
    #[error("the client has ended the connection after {0} bytes")]
    Ended(usize),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Browsers send 2 KiB at most, keys for post-quantum cryptography included.
const MAX_BYTES: usize = 16 << 10;

/// Reads until the ClientHello is complete. At most [`MAX_BYTES`] are kept of a client.
pub(crate) async fn read_hello(client: &mut TcpStream) -> Result<Hello, NoHello> {
    let (mut acceptor, mut bytes) = (Acceptor::default(), Vec::new());
    loop {
        // Read a piece.
        let before = bytes.len();
        let room = (MAX_BYTES - before) as u64;
        if (&mut *client).take(room).read_buf(&mut bytes).await? == 0 {
            return Err(NoHello::Ended(before));
        }
        if is_http(&bytes) {
            return Err(NoHello::PlainHttp);
        }

        // Parse it. The acceptor takes a part of the piece at a time, and makes room as it parses.
        let mut unparsed = &bytes[before..];
        while !unparsed.is_empty() {
            acceptor.read_tls(&mut unparsed)?;
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(str::to_ascii_lowercase);
                    return Ok(Hello { server_name: name.unwrap_or_default(), bytes });
                }
                Ok(None) => {}
                Err((error, mut alert)) => {
                    let mut answer = Vec::new();
                    alert.write(&mut answer)?;
                    return Err(NoHello::Invalid { error, answer });
                }
            }
        }
        if bytes.len() == MAX_BYTES {
            return Err(NoHello::TooLong);
        }
    }
}

/// Looks at the first bytes only, because rustls gives up after five that are no TLS record.
fn is_http(bytes: &[u8]) -> bool {
    [b"GET ", b"HEAD", b"POST", b"PUT ", b"DELE", b"OPTI", b"PATC", b"CONN", b"PRI "]
        .iter()
        .any(|method| bytes.starts_with(*method))
}

impl NoHello {
    /// Returns the answer to the client: plain HTTP to plain HTTP, otherwise a TLS alert.
    pub(crate) fn answer(&self) -> Vec<u8> {
        match self {
            Self::PlainHttp => {
                b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\nThis port is for TLS.\n"
                    .to_vec()
            }
            // rustls has no alert for bytes that are no TLS record.
            Self::Invalid { answer, .. } if !answer.is_empty() => answer.clone(),
            Self::Invalid { .. } | Self::TooLong | Self::Ended(1..) => {
                alert(AlertDescription::DecodeError)
            }
            Self::Ended(0) | Self::Io(_) => Vec::new(),
        }
    }
}

/// Returns a fatal alert, as it is before the two sides have keys (RFC 8446, sections 5.1 and 6).
pub(crate) fn alert(description: AlertDescription) -> Vec<u8> {
    const RECORD_OF_TWO_BYTES: [u8; 5] = [21, 3, 3, 0, 2];
    const FATAL: u8 = 2;
    [&RECORD_OF_TWO_BYTES[..], &[FATAL, description.into()]].concat()
}

/// Sends the answer and ends the connection. Reads on until the client has ended it too: the close
/// of a connection with unread bytes is a reset, and the client might lose the answer.
///
/// # Errors
/// The client is gone.
pub(crate) async fn refuse(mut client: TcpStream, answer: &[u8]) -> io::Result<()> {
    client.write_all(answer).await?;
    client.shutdown().await?;
    let mut unwanted = [0; 4096];
    while client.read(&mut unwanted).await? > 0 {}
    Ok(())
}
