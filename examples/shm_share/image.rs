//! The image in shared memory.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::{fs::File, os::fd::OwnedFd, sync::Arc};

use nix::libc::{MAP_SHARED, PROT_READ, PROT_WRITE};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::Result;

/// The limit of what a process maps or receives, whatever the other one claims.
pub(crate) const LARGEST_BYTES: usize = 256 << 20;

pub(crate) const WRONG: &str = "the picture is not what was asked for";

/// The layout of the image, which is the payload of the first frame.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Bytes from one row to the next.
    pub(crate) stride: u32,
}

impl Layout {
    pub(crate) fn from_payload(payload: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(payload);
        let numbers =
            text.split(' ').map(|number| number.parse().ok()).collect::<Option<Vec<u32>>>();
        let [width, height, stride] = numbers.unwrap_or_default()[..] else {
            return Err("no width, height and stride".into());
        };
        let layout = Self { width, height, stride };
        let rows_fit = stride.is_multiple_of(4) && width <= stride / 4;
        if width == 0 || height == 0 || !rows_fit || layout.bytes() > LARGEST_BYTES {
            return Err(
                format!("no image has {width} x {height} pixels and {stride} bytes a row").into()
            );
        }
        Ok(layout)
    }

    pub(crate) fn bytes(self) -> usize {
        (self.stride as usize).saturating_mul(self.height as usize)
    }

    /// Returns the pixels of picture `number`: the offset of each in memory, and its colour.
    fn picture(self, number: u32) -> impl Iterator<Item = (usize, u32)> {
        let offset = move |x: u32, y: u32| y as usize * self.stride as usize + 4 * x as usize;
        let color = move |x: u32, y: u32| (x ^ y).wrapping_add(number).wrapping_mul(0x9E37_79B9);
        (0..self.height)
            .flat_map(move |y| (0..self.width).map(move |x| (offset(x, y), color(x, y))))
    }

    /// Draws the picture into memory of its own, to be copied.
    pub(crate) fn draw_copy(self, number: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes()];
        for (offset, color) in self.picture(number) {
            bytes[offset..offset + 4].copy_from_slice(&color.to_ne_bytes());
        }
        bytes
    }
}

/// An image whose memory other processes may have mapped too.
///
/// Another process may write to the memory at any time, so every pixel is an atomic, and none is
/// trusted. A process that draws out of turn spoils the picture and nothing else. `Relaxed` is
/// enough, because turns are passed by system calls on both sides: one process writes between the
/// request to draw and the doorbell, the other reads between the doorbell and its next request.
pub(crate) struct Image {
    pub(crate) file: Arc<File>,
    pub(crate) layout: Layout,
    memory: MmapRegion,
}

impl Image {
    pub(crate) fn new(layout: Layout) -> Result<Self> {
        let file =
            File::from(memfd_create("image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.set_len(layout.bytes() as u64)?;
        // The last seal keeps the receiver from adding others, such as one against writing.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(file.into(), layout)
    }

    /// Maps the image, if nobody can take its memory away. A process that touches a page which is
    /// gone is killed (SIGBUS).
    pub(crate) fn map(fd: OwnedFd, layout: Layout) -> Result<Self> {
        // Check the seals before the size: without seals, the size could change after the check.
        let seals = fcntl_get_seals(&fd).map_err(|_| "the descriptor is not a memfd")?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err("the memfd is not sealed against shrinking and growing".into());
        }
        let file = Arc::new(File::from(fd));
        let (is, needed) = (file.metadata()?.len(), layout.bytes());
        if is < needed as u64 {
            return Err(format!("the memfd has {is} bytes, the image needs {needed}").into());
        }
        // Not `MmapRegion::from_file`: its MAP_NORESERVE maps a memfd of huge pages even if the
        // machine has none.
        let whole = Some(FileOffset::from_arc(Arc::clone(&file), 0));
        let memory = MmapRegion::build(whole, needed, PROT_READ | PROT_WRITE, MAP_SHARED)
            .map_err(|error| format!("the memfd cannot be mapped: {error}"))?;
        Ok(Self { file, layout, memory })
    }

    pub(crate) fn pixel(&self, offset: usize) -> Result<&AtomicU32> {
        Ok(self.memory.get_atomic_ref(offset)?)
    }

    pub(crate) fn draw(&self, number: u32) -> Result<()> {
        self.layout.picture(number).try_for_each(|(offset, color)| {
            self.pixel(offset).map(|pixel| pixel.store(color, Relaxed))
        })
    }

    /// Checks that the image is the picture of this number.
    pub(crate) fn check(&self, number: u32) -> Result<()> {
        let is =
            |(offset, color)| self.pixel(offset).is_ok_and(|pixel| pixel.load(Relaxed) == color);
        self.layout.picture(number).all(is).then_some(()).ok_or(WRONG.into())
    }
}
