//! Memory that the client shares with the daemon: a mapping, and areas in it whose numbers both sides read and write. It
//! owns the only unsafe code of the bench, and knows no ring.
#![allow(unsafe_code)] // The daemon writes this memory at any time; each block says why its address is valid.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// A part of a mapping, which it keeps.
#[derive(Clone)]
pub struct Area {
    memory: Arc<MmapRegion<()>>,
    start: *mut u8,
    first: usize,
    bytes: usize,
}

// SAFETY: the address is of shared memory that stays mapped while `memory` is held; other threads, and the daemon, see it
// through atomics and volatile accesses only.
unsafe impl Send for Area {}

impl Area {
    /// New memory of so many bytes, all zero, made known to the daemon.
    ///
    /// # Errors
    /// There is no such memory, or the daemon does not take it.
    pub fn new(transport: &mut VirtioBlkTransport, bytes: usize) -> io::Result<Self> {
        let file = File::from(memfd_create("blockport-bench", MemfdFlags::CLOEXEC)?);
        file.set_len(bytes as u64)?;
        let fd = file.as_raw_fd();
        let memory: MmapRegion<()> = MmapRegion::from_file(FileOffset::new(file, 0), bytes)
            .map_err(|e| io::Error::other(format!("mapping {bytes} bytes of buffers: {e}")))?;
        transport.map_mem_region(memory.as_ptr() as usize, bytes, fd, 0)?;
        let start = memory.as_ptr();
        Ok(Self { memory: Arc::new(memory), start, first: 0, bytes })
    }

    /// The part of `bytes` bytes that begins `first` bytes into this one.
    ///
    /// # Panics
    /// If it does not lie in it.
    pub fn part(&self, first: usize, bytes: usize) -> Self {
        assert!(first <= self.bytes && bytes <= self.bytes - first, "{bytes} bytes at {first} of {}", self.bytes);
        let start = self.start.wrapping_add(first);
        Self { memory: Arc::clone(&self.memory), start, first: self.first + first, bytes }
    }

    /// What the daemon is told that the byte at `at` is called.
    pub fn address(&self, at: usize) -> u64 {
        self.start.wrapping_add(at) as u64
    }

    /// Bytes of it, to copy from and to.
    pub fn bytes(&self, at: usize, count: usize) -> VolatileSlice<'_, ()> {
        assert!(at <= self.bytes && count <= self.bytes - at, "{count} bytes at {at} of {}", self.bytes);
        self.memory.get_slice(self.first + at, count).unwrap_or_else(|e| panic!("{count} bytes at {at}: {e}"))
    }

    #[inline]
    fn place<T>(&self, at: usize) -> *mut T {
        let place = self.start.wrapping_add(at);
        assert!(at < self.bytes && size_of::<T>() <= self.bytes - at, "{at} of {}", self.bytes);
        assert!((place as usize).is_multiple_of(align_of::<T>()), "{at} is not aligned");
        place.cast()
    }

    /// Two bytes of it.
    #[inline]
    pub fn u16(&self, at: usize) -> &AtomicU16 {
        // SAFETY: `place` found it mapped and aligned; the mapping is held.
        unsafe { AtomicU16::from_ptr(self.place(at)) }
    }

    /// Four bytes of it.
    #[inline]
    pub fn u32(&self, at: usize) -> &AtomicU32 {
        // SAFETY: as for `u16`.
        unsafe { AtomicU32::from_ptr(self.place(at)) }
    }

    /// Eight bytes of it.
    #[inline]
    pub fn u64(&self, at: usize) -> &AtomicU64 {
        // SAFETY: as for `u16`.
        unsafe { AtomicU64::from_ptr(self.place(at)) }
    }
}

/// How many bytes a ring of `size` entries takes, laid out for these features.
///
/// # Errors
/// No ring has this size.
pub fn ring_bytes(size: u16, features: VirtioFeatureFlags) -> io::Result<usize> {
    Ok(VirtqueueLayout::new::<VirtioBlkReqBuf>(1, size.into(), features)?.end_offset)
}

/// Tells the daemon of one ring in each area, of `size` entries and laid out as virtio-driver does it; starts them.
///
/// # Errors
/// The areas are too small, or the daemon refuses.
pub fn start_rings(transport: &mut VirtioBlkTransport, areas: &[Area], size: u16) -> io::Result<()> {
    let features = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
    let rings = areas.iter().map(|area| {
        // SAFETY: the area is mapped while it is held, longer than the ring that is made here, and nobody else uses it
        // yet: the daemon learns of it by what is done with these rings, which then are dropped.
        let buffer = unsafe { std::slice::from_raw_parts_mut(area.start, area.bytes) };
        Virtqueue::new(transport.iova_translator(), buffer, size, features)
    });
    let rings: Vec<Virtqueue<'_, VirtioBlkReqBuf>> = rings.collect::<io::Result<_>>()?;
    transport.setup_queues(&rings)
}
