//! Allocations for a frame, those of sender and receiver together.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use fdwire::Frame;
use futures::{FutureExt, SinkExt, StreamExt};

use crate::{
    BATCH, Connection, Load, Start,
    common::{KINDS, encoded, framed_pair, raw_send, run, with_raw_peer},
    half, sender,
};

/// The system's allocator, which counts the allocations of each thread.
struct Counting;

thread_local! {
    static COUNT: Cell<Count> = const { Cell::new(Count { calls: 0, bytes: 0, freed: 0 }) };
}

#[derive(Clone, Copy)]
struct Count {
    calls: usize,
    bytes: usize,
    freed: usize,
}

impl Count {
    /// Returns the bytes that are allocated and not freed.
    fn held(self) -> isize {
        self.bytes as isize - self.freed as isize
    }
}

fn count(bytes: usize) {
    let count = COUNT.get();
    COUNT.set(Count { calls: count.calls + 1, bytes: count.bytes + bytes, ..count });
}

fn count_freed(bytes: usize) {
    let count = COUNT.get();
    COUNT.set(Count { freed: count.freed + bytes, ..count });
}

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: each method is the system's, with the arguments that it was given.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes);
        count_freed(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(place, layout, bytes) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count_freed(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(place, layout) }
    }
}

/// Returns the number of allocations and of allocated bytes for each frame, on each kind of socket,
/// after the buffers have grown to their sizes.
fn per_frame(load: &Load, batch: usize, outgoing: Start, what: &str) -> [(f64, f64); 2] {
    const BATCHES: usize = 200;
    KINDS.map(|kind| {
        run(async {
            let mut connection = Connection::new(kind, batch, None, outgoing);
            for _ in 0..BATCHES {
                connection.batch((0..batch).map(|_| load.frame())).await;
            }
            let before = COUNT.get();
            for _ in 0..BATCHES {
                connection.batch((0..batch).map(|_| load.frame())).await;
            }
            let after = COUNT.get();
            let frames = (BATCHES * batch) as f64;
            let (calls, bytes) = (
                (after.calls - before.calls) as f64 / frames,
                (after.bytes - before.bytes) as f64 / frames,
            );
            println!(
                "{what}, {kind:?}: {calls:.4} allocations of {bytes:.0} bytes in all per frame"
            );
            (calls, bytes)
        })
    })
}

#[test]
fn small_frames_take_less_than_a_tenth_of_an_allocation() {
    for (outgoing, how) in [(half as Start, "half"), (sender, "Sender")] {
        for (load, what) in
            [(Load::plain(64), "64 B"), (Load::with_fd(64), "64 B with a descriptor")]
        {
            for (calls, _) in per_frame(&load, BATCH, outgoing, &format!("{what}, {how}")) {
                assert!(calls < 0.1, "{calls} allocations per frame of {what}, {how}");
            }
        }
    }
}

#[test]
fn a_frame_with_a_descriptor_sent_alone_takes_less_than_a_tenth_of_an_allocation() {
    for (calls, _) in per_frame(&Load::with_fd(64), 1, half, "64 B with a descriptor, one by one") {
        assert!(calls < 0.1, "{calls} allocations per frame");
    }
}

#[test]
fn a_large_frame_is_received_in_one_buffer_of_its_size() {
    let size = 1 << 20;
    for (_, bytes) in per_frame(&Load::plain(size), 1, half, "1 MiB") {
        assert!(bytes < 1.5 * size as f64, "{bytes} bytes are allocated for a frame of {size}");
    }
}

#[test]
fn connections_that_wait_to_receive_hold_no_read_buffer() {
    const CONNECTIONS: usize = 1000;
    for kind in KINDS {
        run(async {
            let mut connections: Vec<_> = (0..CONNECTIONS).map(|_| with_raw_peer(kind)).collect();
            let (mut tx, mut rx) = framed_pair(kind);
            let before = COUNT.get().held();
            for (rx, peer) in &mut connections {
                raw_send(peer, &encoded(b"small", 0), &[]);
                assert_eq!(rx.next().await.unwrap().unwrap().payload, "small");
                assert!(rx.next().now_or_never().is_none());
            }
            let large = async { tx.send(Frame::new(vec![7; 8 << 20])).await.unwrap() };
            let ((), received) = tokio::join!(large, rx.next());
            drop(received.unwrap().unwrap());
            assert!(rx.next().now_or_never().is_none());
            let held = COUNT.get().held() - before;
            println!("{kind:?}: {CONNECTIONS} connections that wait hold {held} bytes together");
            assert!(held < 1 << 20, "{held} bytes");
        });
    }
}

#[test]
fn a_small_frame_keeps_no_large_buffer() {
    for kind in KINDS {
        // The small frame follows the large one at once, or after the receiver has waited.
        for waits in [false, true] {
            run(async {
                // A large frame, and then a small one, which is kept.
                let before = COUNT.get().held();
                let (mut tx, mut rx) = framed_pair(kind);
                let send = async {
                    tx.feed(Frame::new(vec![7; 8 << 20])).await.unwrap();
                    if waits {
                        tx.flush().await.unwrap();
                        tokio::task::yield_now().await;
                    }
                    tx.send(Frame::new("small")).await.unwrap();
                };
                let receive = async {
                    drop(rx.next().await.unwrap().unwrap());
                    rx.next().await.unwrap().unwrap()
                };
                let ((), small) = tokio::join!(send, receive);

                // It keeps only its own bytes.
                drop((tx, rx));
                let held = COUNT.get().held() - before;
                println!(
                    "{kind:?}: {held} bytes are held for a frame of {} bytes",
                    small.payload.len()
                );
                assert!(held < 1 << 20, "{held} bytes");
            });
        }
    }
}
