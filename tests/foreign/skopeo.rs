//! A real `skopeo experimental-image-proxy`: each packet is a JSON object, and a reply with more
//! data has the read end of a pipe.

use std::{
    fs,
    os::fd::OwnedFd,
    path::Path,
    process::{Command, Stdio},
};

use fdwire::{
    Error, Frame, Framed, Socket, SocketKind,
    codec::{Codec, Decoder, Encoder, PacketCodec},
};
use futures::{SinkExt, TryStreamExt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, net::unix::pipe};

use crate::{Daemon, common::run, installed};

/// An answer of skopeo.
#[derive(Debug, Deserialize)]
struct Reply {
    success: bool,
    value: Value,
    error: String,
    /// 0 if the reply has no pipe.
    #[serde(rename = "pipeid")]
    pipe_id: u32,
    #[serde(skip)]
    pipe: Option<OwnedFd>,
}

/// Returns the codec: `PacketCodec` with two mappings.
fn codec() -> impl Decoder<Item = Reply, Error = Error> + Encoder<Value, Error = Error> + Clone {
    PacketCodec::default().map(
        |frame: Frame| {
            let mut reply: Reply =
                serde_json::from_slice(&frame.payload).map_err(Error::invalid)?;
            match (frame.fds.into_array(), reply.pipe_id) {
                (Ok([pipe]), 1..) => reply.pipe = Some(pipe),
                (Err(fds), 0) if fds.is_empty() => {}
                _ => return Err(Error::invalid("a pipe without a number, or the reverse")),
            }
            Ok(reply)
        },
        |request: Value| Ok(Frame::new(request.to_string())),
    )
}

struct Proxy<C> {
    connection: Framed<C>,
}

impl<C: Decoder<Item = Reply, Error = Error> + Encoder<Value, Error = Error>> Proxy<C> {
    async fn call(&mut self, method: &str, args: Value) -> Reply {
        self.connection.send(json!({ "method": method, "args": args })).await.unwrap();
        self.connection.try_next().await.unwrap().expect("skopeo is there")
    }

    /// Makes a call that succeeds.
    async fn succeed(&mut self, method: &str, args: Value) -> Reply {
        let reply = self.call(method, args).await;
        assert!(reply.success, "{method}: {}", reply.error);
        reply
    }

    /// Makes a call whose reply has a pipe. Returns the value of the reply and all bytes of the
    /// pipe.
    async fn read(&mut self, method: &str, args: Value) -> (Value, Vec<u8>) {
        let reply = self.succeed(method, args).await;
        let mut pipe = pipe::Receiver::from_owned_fd(reply.pipe.expect("a pipe")).unwrap();
        let mut bytes = Vec::new();
        // skopeo answers whether all was written only while the pipe is being read to its end.
        let (read, finished) = tokio::join!(
            pipe.read_to_end(&mut bytes),
            self.succeed("FinishPipe", json!([reply.pipe_id]))
        );
        read.unwrap();
        assert!(finished.pipe.is_none());
        (reply.value, bytes)
    }
}

/// Writes an image of one layer as a directory that skopeo reads. Returns the digest of the layer.
fn write_image(directory: &Path, layer: &[u8]) -> String {
    let put = |bytes: &[u8]| {
        let path = directory.join("new");
        fs::write(&path, bytes).unwrap();
        let sum = Command::new("sha256sum").arg(&path).output().unwrap().stdout;
        let digest = str::from_utf8(&sum[..64]).unwrap().to_owned();
        fs::rename(path, directory.join(&digest)).unwrap();
        format!("sha256:{digest}")
    };
    fs::write(directory.join("version"), "Directory Transport Version: 1.1\n").unwrap();
    let config =
        br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let layer_digest = put(layer);
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": put(config),
            "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": layer_digest,
            "size": layer.len(),
        }],
    });
    fs::write(directory.join("manifest.json"), manifest.to_string()).unwrap();
    layer_digest
}

#[test]
fn skopeo_sends_an_image_through_the_pipes_that_come_with_its_replies() {
    let Some(program) = installed("skopeo") else { return };
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let layer: Vec<u8> = (0..3_000_000_u32).map(|n| (n ^ (n >> 8)) as u8).collect();
        let digest = write_image(directory.path(), &layer);

        // Start skopeo.
        let (ours, theirs) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let mut command = Command::new(program);
        command.arg("experimental-image-proxy").stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        let mut daemon = Daemon::start(&mut command, directory.path());
        drop(command); // our copy of its end
        let mut proxy = Proxy { connection: Framed::new(ours, codec()) };

        // Open the image, and read its manifest and its layer from pipes.
        let version = proxy.succeed("Initialize", json!([])).await.value;
        assert!(version.as_str().unwrap().starts_with("0.2."), "{version}");
        let reference = format!("dir:{}", directory.path().display());
        let image = proxy.succeed("OpenImage", json!([reference])).await.value;
        let manifest = proxy.read("GetManifest", json!([image])).await.1;
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        assert_eq!(manifest["layers"][0]["digest"], digest.as_str());

        let arguments = json!([image, digest, layer.len()]);
        let (length, blob) = proxy.read("GetBlob", arguments).await;
        assert_eq!(length.as_u64(), Some(layer.len() as u64));
        assert!(blob == layer, "{} bytes of {}", blob.len(), layer.len());

        // A call that fails brings no pipe.
        let refused = proxy.call("OpenImage", json!(["no-such-transport:image"])).await;
        assert!(!refused.success && refused.pipe.is_none(), "{refused:?}");
        proxy.succeed("CloseImage", json!([image])).await;
        // skopeo ends without an answer.
        proxy.connection.send(json!({ "method": "Shutdown", "args": [] })).await.unwrap();
        daemon.ended().await;
        assert!(proxy.connection.try_next().await.unwrap_or(None).is_none());
    });
}
