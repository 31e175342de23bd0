//! Codecs of `tokio_util` for the payloads of frames, and messages that are values of the
//! application's own types.

use std::{
    fs::File,
    io::{Read, Seek},
    os::fd::OwnedFd,
};

use bytes::{Bytes, BytesMut};
use fdwire::{
    Error, Fds, Frame, FrameCodec, Framed, Limits, SendError, Socket, SocketKind,
    codec::{Codec, PacketCodec, PayloadCodec, PayloadError},
};
use futures::{SinkExt, StreamExt, TryStreamExt, stream};
use tokio_util::codec::{LengthDelimitedCodec, LinesCodec, LinesCodecError};

use crate::common::{KINDS, encoded, mark_of, marked, raw_send, run};

fn fds(marks: impl IntoIterator<Item = u32>) -> Fds {
    marks.into_iter().map(marked).collect()
}

#[test]
fn lines_in_frames_go_both_ways() {
    for kind in KINDS {
        run(async {
            let codec = || PayloadCodec::new(FrameCodec::default(), LinesCodec::new());
            let (a, b) = Socket::pair(kind).unwrap();
            let (mut a, mut b) = (Framed::new(a, codec()), Framed::new(b, codec()));
            for n in 0..10 {
                a.feed((format!("there {n}"), fds(0..n))).await.unwrap();
                b.feed((format!("back {n}"), fds([n]))).await.unwrap();
            }
            a.flush().await.unwrap();
            b.flush().await.unwrap();
            for n in 0..10 {
                let (line, fds) = b.try_next().await.unwrap().unwrap();
                assert_eq!(line, format!("there {n}"));
                assert!(fds.iter().map(mark_of).eq(0..n));
                let (line, fds) = a.try_next().await.unwrap().unwrap();
                assert_eq!((line, mark_of(&fds[0])), (format!("back {n}"), n));
            }
        });
    }
}

#[test]
fn length_delimited_messages_in_frames_go_both_ways() {
    for kind in KINDS {
        run(async {
            let codec = || PayloadCodec::new(FrameCodec::default(), LengthDelimitedCodec::new());
            let (a, b) = Socket::pair(kind).unwrap();
            let (mut a, mut b) = (Framed::new(a, codec()), Framed::new(b, codec()));
            for length in [0, 1, 5000, 1 << 20] {
                let message = Bytes::from(vec![7; length]);
                let (sent, received) =
                    tokio::join!(a.send((message.clone(), fds([1, 2]))), b.try_next());
                sent.unwrap();
                let (bytes, fds) = received.unwrap().unwrap();
                assert!(bytes == message && fds.len() == 2);
                let (sent, received) = tokio::join!(b.send((bytes.freeze(), fds)), a.try_next());
                sent.unwrap();
                let (bytes, fds): (BytesMut, Fds) = received.unwrap().unwrap();
                assert!(bytes == message && fds.iter().map(mark_of).eq([1, 2]));
            }
        });
    }
}

#[test]
fn a_payload_that_is_not_one_message_is_refused() {
    type Check = fn(&PayloadError<LinesCodecError>) -> bool;
    let cases: [(&[u8], Check); 3] = [
        (b"one\ntwo\n", |error| matches!(error, PayloadError::NotOneMessage)),
        (b"", |error| matches!(error, PayloadError::NotOneMessage)),
        (b"\xff\n", |error| matches!(error, PayloadError::Payload(LinesCodecError::Io(_)))),
    ];
    for (payload, expected) in cases {
        run(async {
            let (a, peer) = Socket::pair(SocketKind::Stream).unwrap();
            let mut a = Framed::new(a, PayloadCodec::new(FrameCodec::default(), LinesCodec::new()));
            raw_send(&peer, &encoded(payload, 1), &[marked(1)]);
            let error = a.next().await.unwrap().unwrap_err();
            assert!(expected(&error), "{error:?} of {payload:?}");
            assert!(a.next().await.is_none());
        });
    }
}

#[test]
fn a_message_that_the_inner_codec_or_the_frame_refuses_leaves_the_connection_usable() {
    run(async {
        let codec = || {
            let mut inner = LengthDelimitedCodec::new();
            inner.set_max_frame_length(100);
            PayloadCodec::new(FrameCodec::new(Limits::default().max_fds_per_frame(1)), inner)
        };
        let (a, b) = Socket::pair(SocketKind::SeqPacket).unwrap();
        let (mut a, mut b) = (Framed::new(a, codec()), Framed::new(b, codec()));
        let error = a.send((Bytes::from(vec![0; 101]), Fds::none())).await.unwrap_err().error;
        assert!(matches!(error, PayloadError::Payload(_)), "{error:?}");
        let error = a.send((Bytes::new(), fds([1, 2]))).await.unwrap_err().error;
        assert!(
            matches!(error, PayloadError::Frame(Error::TooManyFds { fds: 2, limit: 1 })),
            "{error:?}"
        );
        a.send((Bytes::from("fits"), fds([3]))).await.unwrap();
        let (bytes, fds) = b.try_next().await.unwrap().unwrap();
        assert_eq!((&bytes[..], mark_of(&fds[0])), (&b"fits"[..], 3));
    });
}

/// The messages of an application.
#[derive(Debug)]
enum Job {
    Print(File),
    Stop,
}

fn job_of(frame: Frame) -> Result<Job, Error> {
    match (&frame.payload[..], frame.fds.into_array()) {
        (b"print", Ok([file])) => Ok(Job::Print(file.into())),
        (b"stop", Err(fds)) if fds.is_empty() => Ok(Job::Stop),
        (_, fds) => Err(Error::UnclaimedFds {
            fds: fds.map_or_else(|fds| fds.len(), |fds: [OwnedFd; 1]| fds.len()),
        }),
    }
}

/// Makes a frame of a job. Refuses a file that is no regular file, and gives the job back.
fn frame_of(job: Job) -> Result<Frame, SendError<Job>> {
    match job {
        Job::Stop => Ok(Frame::new("stop")),
        Job::Print(file) => match file.metadata() {
            Ok(metadata) if metadata.is_file() => Ok(Frame::new("print").with_fd(file)),
            _ => Err(SendError::refused(
                Job::Print(file),
                std::io::Error::from(std::io::ErrorKind::InvalidInput),
            )),
        },
    }
}

#[test]
fn messages_can_be_values_of_the_applications_own_type() {
    async fn check<C>(codec: C, kind: SocketKind)
    where
        C: fdwire::codec::Decoder<Item = Job> + fdwire::codec::Encoder<Job, Error = Error> + Clone,
        <C as fdwire::codec::Decoder>::Error: std::fmt::Debug,
    {
        let (a, b) = Socket::pair(kind).unwrap();
        let (mut a, mut b) = (Framed::new(a, codec.clone()), Framed::new(b, codec));
        let refused = a.send(Job::Print(File::open("/").unwrap())).await.unwrap_err();
        assert!(matches!(
            refused.item,
            Some(Job::Print(directory)) if directory.metadata().unwrap().is_dir()
        ));

        a.send(Job::Print(marked(5).into())).await.unwrap();
        let Job::Print(mut file) = b.try_next().await.unwrap().unwrap() else {
            panic!("not what was sent")
        };
        let mut content = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut content).unwrap();
        assert_eq!(content, 5u32.to_be_bytes());
        a.send(Job::Stop).await.unwrap();
        assert!(matches!(b.try_next().await.unwrap(), Some(Job::Stop)));
    }
    for kind in KINDS {
        run(check(FrameCodec::default().map(job_of, frame_of), kind));
        run(check(PacketCodec::default().map(job_of, frame_of), kind));
    }
}

#[test]
fn a_frame_that_a_mapping_refuses_on_receipt_ends_the_stream() {
    run(async {
        let (a, b) = Socket::pair(SocketKind::Stream).unwrap();
        let mut a = Framed::new(a, FrameCodec::default());
        let mut b = Framed::new(b, FrameCodec::default().map(job_of, frame_of));
        let frames =
            [Frame::new("stop"), Frame::new("stop").with_fd(marked(1)), Frame::new("stop")];
        a.send_all(&mut stream::iter(frames.map(Ok))).await.unwrap();
        assert!(matches!(b.next().await, Some(Ok(Job::Stop))));
        assert!(matches!(b.next().await, Some(Err(Error::UnclaimedFds { fds: 1 }))));
        assert!(b.next().await.is_none());
    });
}
