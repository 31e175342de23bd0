//! Allocations, sender and receiver together.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use crate::{
    BATCH, Connection, Load, Start,
    common::{KINDS, run},
    half, sender,
};

/// The system's allocator. Counts for each thread what it has allocated.
struct Counting;

thread_local! {
    static COUNT: Cell<Count> = const { Cell::new(Count { calls: 0, bytes: 0 }) };
}

#[derive(Clone, Copy)]
struct Count {
    calls: usize,
    bytes: usize,
}

fn count(bytes: usize) {
    COUNT.set(Count { calls: COUNT.get().calls + 1, bytes: COUNT.get().bytes + bytes });
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
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(place, layout, bytes) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(place, layout) }
    }
}

/// Allocations and bytes allocated for each frame, once everything has found its size.
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
            let (calls, bytes) =
                ((after.calls - before.calls) as f64 / frames, (after.bytes - before.bytes) as f64 / frames);
            println!("{what}, {kind:?}: {calls:.4} allocations of {bytes:.0} bytes in all per frame");
            (calls, bytes)
        })
    })
}

#[test]
fn small_frames_take_less_than_a_tenth_of_an_allocation() {
    for (outgoing, how) in [(half as Start, "half"), (sender, "Sender")] {
        for (load, what) in [(Load::plain(64), "64 B"), (Load::with_fd(64), "64 B with a descriptor")] {
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
