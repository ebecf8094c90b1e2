//! The in-flight region (vhost-user, "Inflight I/O tracking"): memory that the front-end keeps for us over our death, and
//! in it a part for each queue. It owns the file, the mapping, where each part is, and a trailer of our own. What the
//! parts mean is `virtqueue/tracked/`'s.
#![allow(unsafe_code)] // Memory shared with the front-end; each block says why its address is valid.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::handover::{Descriptors, InflightImage};
use crate::mapping::Mapping;

/// Each queue's part begins at a multiple of this, bytes.
const ALIGNMENT: u64 = 64;
/// The fewest entries that a queue gets in a region of ours. QEMU asks for as many as its device says, but a guest driver
/// may make larger rings, and firmware does; 1024 are the most in QEMU.
const ENTRIES_MIN: u16 = 1024;
/// What follows the parts, where there is room: magic u64, layout u8, write cache u8.
const TRAILER_BYTES: u64 = 64;
const TRAILER_MAGIC: u64 = u64::from_le_bytes(*b"blockprt");
const TRAILER_LAYOUT: usize = 8;
const TRAILER_WRITE_CACHE: usize = 9;

/// Offset of the version in every part: 0 is a part that nobody has used yet.
pub(crate) const VERSION: usize = 8;

/// The bytes of the header and of each descriptor's entry.
pub(crate) struct PartLayout {
    pub(crate) header: usize,
    pub(crate) entry: usize,
}

pub(crate) const SPLIT: PartLayout = PartLayout { header: 16, entry: 16 };
pub(crate) const PACKED: PartLayout = PartLayout { header: 32, entry: 32 };

impl PartLayout {
    fn stride(&self, queue_size: u16) -> u64 {
        (self.header as u64 + self.entry as u64 * u64::from(queue_size)).next_multiple_of(ALIGNMENT)
    }
}

/// The region of a device, mapped.
pub(crate) struct InflightRegion {
    mapping: Mapping,
    file: File,
    /// Where it is in the file: offset and size.
    range: (u64, u64),
    packed: bool,
    num_queues: u16,
    queue_size: u16,
    /// Where the trailer is, from the start.
    trailer: Option<usize>,
}

impl InflightRegion {
    /// The size in bytes of a region that is made for so many queues of a size.
    pub(crate) fn size(num_queues: u16, queue_size: u16) -> u64 {
        Self::bytes(num_queues, queue_size.max(ENTRIES_MIN))
    }

    /// The bytes of a region with so many entries a queue: for either layout, as the guest driver may choose the other
    /// one at its next start.
    pub(crate) fn bytes(num_queues: u16, entries: u16) -> u64 {
        u64::from(num_queues) * PACKED.stride(entries) + TRAILER_BYTES
    }

    /// A new region's file, all zeroes, whose size can never change.
    pub(crate) fn create(num_queues: u16, queue_size: u16) -> io::Result<File> {
        let file = File::from(memfd_create("blockport-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.set_len(Self::size(num_queues, queue_size))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    }

    /// Maps a region that the front-end kept.
    ///
    /// # Errors
    /// Prose: it is too small for its queues, not aligned, or cannot be mapped.
    pub(crate) fn map(
        file: File,
        range @ (offset, size): (u64, u64),
        num_queues: u16,
        queue_size: u16,
        packed: bool,
    ) -> Result<Self, String> {
        if num_queues == 0 || queue_size == 0 || queue_size > 32768 {
            return Err(format!("an in-flight region of {num_queues} queues of {queue_size}"));
        }
        // One of ours has more entries than the front-end says.
        let is_roomy = size >= Self::size(num_queues, queue_size);
        let queue_size = if is_roomy { queue_size.max(ENTRIES_MIN) } else { queue_size };
        let layout = if packed { PACKED } else { SPLIT };
        let needed = u64::from(num_queues) * layout.stride(queue_size);
        if size < needed {
            return Err(format!("an in-flight region of {size} bytes: its queues need {needed}"));
        }
        if !offset.is_multiple_of(ALIGNMENT) {
            return Err(format!("an in-flight region at offset {offset:#x}: no multiple of {ALIGNMENT}"));
        }
        let mapping = Mapping::of(&file, offset, size).map_err(|why| format!("the in-flight region: {why}"))?;
        let room = u64::from(num_queues) * PACKED.stride(queue_size);
        let trailer = usize::try_from(room).ok().filter(|_| size >= room + TRAILER_BYTES);
        let region = Self { mapping, file, range, packed, num_queues, queue_size, trailer };
        region.check_layout();
        Ok(region)
    }

    /// Whether the front-end truncated its file.
    pub(crate) fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Entries that each queue has room for.
    pub(crate) fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// The same region for rings of this layout.
    ///
    /// # Errors
    /// Prose: it is too small for them, or cannot be mapped.
    pub(crate) fn for_layout(self: &Arc<Self>, packed: bool) -> Result<Arc<Self>, String> {
        if self.packed == packed {
            return Ok(self.clone());
        }
        let file = self.file.try_clone().map_err(|e| format!("the in-flight region: {e}"))?;
        Self::map(file, self.range, self.num_queues, self.queue_size, packed).map(Arc::new)
    }

    /// What a process after us must know to map it.
    ///
    /// # Errors
    /// There are too few descriptors.
    pub(crate) fn image(&self, descriptors: &mut Descriptors) -> io::Result<InflightImage> {
        Ok(InflightImage {
            file: descriptors.add(&self.file)?,
            mmap_offset: self.range.0,
            mmap_size: self.range.1,
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            packed: self.packed,
        })
    }

    fn layout(&self) -> PartLayout {
        if self.packed { PACKED } else { SPLIT }
    }

    /// The part of a queue. `None`: the region has none for it.
    pub(crate) fn part(self: &Arc<Self>, index: usize) -> Option<Part> {
        let offset = self.part_offset(index)?;
        Some(Part { start: self.mapping.host() + offset, layout: self.layout(), region: self.clone() })
    }

    fn part_offset(&self, index: usize) -> Option<usize> {
        let stride = self.layout().stride(self.queue_size) as usize;
        (index < usize::from(self.num_queues)).then(|| index * stride)
    }

    /// Forgets all queues, as after a reset of the device.
    pub(crate) fn forget(&self) {
        for offset in (0..usize::from(self.num_queues)).filter_map(|index| self.part_offset(index)) {
            self.u16(offset + VERSION).store(0, Ordering::Release);
        }
    }

    /// What is known of the write cache from the process before us. `None`: nothing.
    pub(crate) fn write_cache(&self) -> Option<bool> {
        let trailer = self.own_trailer()?;
        match self.u8(trailer + TRAILER_WRITE_CACHE).load(Ordering::Relaxed) {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }

    /// Keeps the write cache's value for the process after us.
    pub(crate) fn set_write_cache(&self, on: bool) {
        if let Some(trailer) = self.own_trailer() {
            self.u8(trailer + TRAILER_WRITE_CACHE).store(1 + u8::from(on), Ordering::Release);
        }
    }

    /// A region whose queues had the other layout has nothing to say of these.
    fn check_layout(&self) {
        let Some(trailer) = self.own_trailer() else { return };
        let (kept, layout) = (self.u8(trailer + TRAILER_LAYOUT), 1 + u8::from(self.packed));
        if ![0, layout].contains(&kept.load(Ordering::Acquire)) {
            self.forget();
        }
        kept.store(layout, Ordering::Release);
    }

    /// The trailer, if it is ours or nobody's yet; then it becomes ours.
    fn own_trailer(&self) -> Option<usize> {
        let trailer = self.trailer?;
        // SAFETY: `map` found the trailer's 64 bytes mapped; parts and trailer are multiples of 64 from an aligned start.
        let magic = unsafe { AtomicU64::from_ptr((self.mapping.host() + trailer) as *mut u64) };
        match magic.load(Ordering::Acquire) {
            TRAILER_MAGIC => Some(trailer),
            0 => {
                magic.store(TRAILER_MAGIC, Ordering::Release);
                Some(trailer)
            }
            _ => None,
        }
    }

    fn u8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: callers' offsets are in the trailer, which `map` found mapped.
        unsafe { AtomicU8::from_ptr((self.mapping.host() + offset) as *mut u8) }
    }

    fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers' offsets are of versions in the parts, which `map` found mapped, and even.
        unsafe { AtomicU16::from_ptr((self.mapping.host() + offset) as *mut u16) }
    }
}

/// One queue's part: a header and an entry for each descriptor. The front-end may write it at any time.
pub(crate) struct Part {
    start: usize,
    layout: PartLayout,
    region: Arc<InflightRegion>,
}

impl Part {
    /// The only part of a region that nobody else has.
    pub(crate) fn new_for_bench(queue_size: u16, packed: bool) -> Self {
        let range = (0, InflightRegion::size(1, queue_size));
        let file = InflightRegion::create(1, queue_size).unwrap_or_else(|error| panic!("{error}"));
        let region = InflightRegion::map(file, range, 1, queue_size, packed).map(Arc::new);
        let part = region.map(|region| region.part(0));
        part.ok().flatten().unwrap_or_else(|| panic!("a region of one queue"))
    }

    /// How many entries it has.
    pub(crate) fn entries(&self) -> u16 {
        self.region.queue_size
    }

    /// Whether the front-end truncated the file.
    pub(crate) fn is_lost(&self) -> bool {
        self.region.is_lost()
    }

    #[inline]
    fn header(&self, offset: usize, bytes: usize) -> usize {
        assert!(offset + bytes <= self.layout.header && offset.is_multiple_of(bytes), "a field of the header");
        self.start + offset
    }

    #[inline]
    fn entry(&self, index: u16, offset: usize, bytes: usize) -> usize {
        assert!(index < self.region.queue_size, "an entry of the part");
        debug_assert!(offset + bytes <= self.layout.entry && offset.is_multiple_of(bytes));
        self.start + self.layout.header + usize::from(index) * self.layout.entry + offset
    }

    #[inline]
    pub(crate) fn header_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `header` gives an aligned address in this part, which the region keeps mapped.
        unsafe { AtomicU16::from_ptr(self.header(offset, 2) as *mut u16) }
    }

    #[inline]
    pub(crate) fn header_u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as for `header_u16`.
        unsafe { AtomicU64::from_ptr(self.header(offset, 8) as *mut u64) }
    }

    #[inline]
    pub(crate) fn entry_u8(&self, index: u16, offset: usize) -> &AtomicU8 {
        // SAFETY: `entry` gives an aligned address in this part, which the region keeps mapped: all callers' offsets are
        // constants of the layout's fields.
        unsafe { AtomicU8::from_ptr(self.entry(index, offset, 1) as *mut u8) }
    }

    #[inline]
    pub(crate) fn entry_u16(&self, index: u16, offset: usize) -> &AtomicU16 {
        // SAFETY: as for `entry_u8`.
        unsafe { AtomicU16::from_ptr(self.entry(index, offset, 2) as *mut u16) }
    }

    #[inline]
    pub(crate) fn entry_u64(&self, index: u16, offset: usize) -> &AtomicU64 {
        // SAFETY: as for `entry_u8`.
        unsafe { AtomicU64::from_ptr(self.entry(index, offset, 8) as *mut u64) }
    }
}
