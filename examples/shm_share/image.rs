//! The image in shared memory.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use nix::libc::{MAP_SHARED, PROT_READ, PROT_WRITE};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::Result;

/// Neither process maps or receives more, whatever the other one says.
pub(crate) const LARGEST_BYTES: usize = 256 << 20;

/// With these the size is final. The last one keeps the receiver from adding others: sealed against writing, say.
pub(crate) const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// What the payload of the first frame says.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Bytes from one row to the next.
    pub(crate) stride: u32,
}

impl Layout {
    /// Rows begin at multiples of 64 bytes.
    pub(crate) fn new(width: u32, height: u32) -> Self {
        Self { width, height, stride: (width * 4).next_multiple_of(64) }
    }

    pub(crate) fn to_payload(self) -> String {
        format!("{} {} {}", self.width, self.height, self.stride)
    }

    pub(crate) fn from_payload(payload: &[u8]) -> Result<Self> {
        let numbers = str::from_utf8(payload)?.split(' ').map(str::parse).collect::<std::result::Result<Vec<u32>, _>>();
        let [width, height, stride] = numbers?[..] else { return Err("width, height and stride are expected".into()) };
        let layout = Self { width, height, stride };
        let rows_fit = stride.is_multiple_of(4) && width <= stride / 4;
        if width == 0 || height == 0 || !rows_fit || layout.bytes() > LARGEST_BYTES {
            return Err(format!("no image has {width} x {height} pixels and {stride} bytes a row").into());
        }
        Ok(layout)
    }

    pub(crate) fn bytes(self) -> usize {
        (self.stride as usize).saturating_mul(self.height as usize)
    }

    fn places(self) -> impl Iterator<Item = (u32, u32)> {
        (0..self.height).flat_map(move |y| (0..self.width).map(move |x| (x, y)))
    }
}

/// A memfd of this size, with these seals.
pub(crate) fn memfd(bytes: usize, seals: SealFlags) -> io::Result<File> {
    let file = File::from(memfd_create("image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(bytes as u64)?;
    fcntl_add_seals(&file, seals)?;
    Ok(file)
}

/// An image whose memory other processes may have mapped too.
///
/// What is right with memory that others write to: every pixel is an atomic, and none is trusted. A process that draws
/// out of turn spoils the picture and nothing else. `Relaxed` is enough, because whose turn it is goes through system
/// calls on both sides: one process writes between the request to draw and the doorbell, the other reads between the
/// doorbell and its next request.
pub(crate) struct Image {
    pub(crate) file: Arc<File>,
    pub(crate) layout: Layout,
    memory: MmapRegion,
}

impl Image {
    /// Maps the image, if nobody can take its memory away: touching a page that is gone kills a process (SIGBUS).
    pub(crate) fn map(fd: OwnedFd, layout: Layout) -> Result<Self> {
        // The seals before the size: whoever holds the descriptor could change it at any time without them.
        let Ok(seals) = fcntl_get_seals(&fd) else { return Err("the descriptor is not a memfd".into()) };
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err("the memfd is not sealed against shrinking and growing".into());
        }
        let file = Arc::new(File::from(fd));
        let (is, needed) = (file.metadata()?.len(), layout.bytes());
        if is < needed as u64 {
            return Err(format!("the memfd has {is} bytes, the image needs {needed}").into());
        }
        // Not `MmapRegion::from_file`: with its MAP_NORESERVE a memfd of huge pages is mapped though there are none.
        let whole = Some(FileOffset::from_arc(Arc::clone(&file), 0));
        let memory = MmapRegion::build(whole, needed, PROT_READ | PROT_WRITE, MAP_SHARED)
            .map_err(|error| format!("the memfd cannot be mapped: {error}"))?;
        Ok(Self { file, layout, memory })
    }

    pub(crate) fn pixel(&self, x: u32, y: u32) -> Result<&AtomicU32> {
        Ok(self.memory.get_atomic_ref(y as usize * self.layout.stride as usize + 4 * x as usize)?)
    }

    pub(crate) fn draw(&self, number: u32) -> Result<()> {
        for (x, y) in self.layout.places() {
            self.pixel(x, y)?.store(color(number, x, y), Relaxed);
        }
        Ok(())
    }

    /// Whether it is the picture of this number.
    pub(crate) fn shows(&self, number: u32) -> Result<bool> {
        for (x, y) in self.layout.places() {
            if self.pixel(x, y)?.load(Relaxed) != color(number, x, y) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Picture `number` at this place.
fn color(number: u32, x: u32, y: u32) -> u32 {
    (x ^ y).wrapping_add(number).wrapping_mul(0x9E37_79B9)
}

/// The same picture in memory of its own, to be copied.
pub(crate) fn draw_copy(layout: Layout, number: u32) -> Vec<u8> {
    let mut bytes = vec![0; layout.bytes()];
    for (y, row) in (0..).zip(bytes.chunks_exact_mut(layout.stride as usize)) {
        for (x, pixel) in (0..layout.width).zip(row.chunks_exact_mut(4)) {
            pixel.copy_from_slice(&color(number, x, y).to_ne_bytes());
        }
    }
    bytes
}
