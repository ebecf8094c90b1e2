//! GuestMemory: the memory that a front-end shares with us. It owns the mapped regions and the way from a guest or
//! front-end address to an [`IoVec`]; it never reads or writes what is in the memory.
#![allow(unsafe_code)] // Handing out addresses in mappings; each block gives its reason.

use std::fs::File;
use std::sync::Arc;

use blockport_block::iovec::IoVec;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::mapping::Mapping;
use crate::sigbus;

/// The most regions at once; QEMU itself never has more than 509 slots.
pub(crate) const REGIONS_MAX: usize = 512;

/// Why a region was refused: prose for the log.
#[derive(Debug, thiserror::Error)]
#[error("memory region at guest address {guest_addr:#x}, {size:#x} bytes: {why}")]
pub struct RegionError {
    guest_addr: u64,
    size: u64,
    why: String,
}

/// One region as the front-end described it, mapped.
pub struct MemoryRegion {
    /// The first guest-physical address.
    pub guest_addr: u64,
    /// The first address in the front-end's own address space (SET_VRING_ADDR speaks in these).
    pub user_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where the region begins in its file, bytes.
    pub mmap_offset: u64,
    /// The file, kept because a later process may take the region over.
    pub file: File,
    /// The host address of the region's first byte.
    host: usize,
    region: Arc<GuestRegionMmap<()>>,
    mapping: Mapping,
}

impl MemoryRegion {
    /// Maps a region.
    ///
    /// # Errors
    /// It wraps around, does not fit its file, or cannot be mapped.
    pub fn map(guest_addr: u64, user_addr: u64, size: u64, mmap_offset: u64, file: File) -> Result<Self, RegionError> {
        let refuse = |why: String| RegionError { guest_addr, size, why };
        if guest_addr.checked_add(size).is_none() || user_addr.checked_add(size).is_none() {
            return Err(refuse("its addresses wrap around".into()));
        }
        let mapping = Mapping::of(&file, mmap_offset, size).map_err(refuse)?;
        let host = mapping.host();
        // SAFETY: `host..host + size` lies inside the mapping, which lives as long as this MemoryRegion.
        let region = unsafe { MmapRegionBuilder::new(size as usize).with_raw_mmap_pointer(host as *mut u8) }
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| refuse(e.to_string()))?;
        let region = GuestRegionMmap::new(region, GuestAddress(guest_addr))
            .ok_or_else(|| refuse("its guest addresses wrap around".into()))?;
        Ok(Self { guest_addr, user_addr, size, mmap_offset, file, host, region: Arc::new(region), mapping })
    }

    fn overlaps_user(&self, other: &Self) -> bool {
        self.user_addr < other.user_addr + other.size && other.user_addr < self.user_addr + self.size
    }
}

/// Where a region's guest addresses are in host memory.
#[derive(Clone, Copy)]
struct Range {
    guest_addr: u64,
    size: u64,
    host: usize,
}

/// A memory table: all regions at one moment. Immutable; a change makes a new one, which shares unchanged regions.
#[derive(Clone, Default)]
pub struct GuestMemory {
    /// By guest address.
    regions: Vec<Arc<MemoryRegion>>,
    /// The same, as translation needs them: side by side in memory.
    ranges: Vec<Range>,
    /// The same as vm-memory knows them; it checks that they do not overlap.
    memory: GuestMemoryMmap<()>,
}

impl GuestMemory {
    /// A table of these regions.
    ///
    /// # Errors
    /// There are too many, or two overlap, in guest or in front-end addresses.
    pub fn new(mut regions: Vec<Arc<MemoryRegion>>) -> Result<Self, RegionError> {
        regions.sort_by_key(|region| region.guest_addr);
        let refuse =
            |region: &MemoryRegion, why: String| RegionError { guest_addr: region.guest_addr, size: region.size, why };
        if let Some(region) = regions.get(REGIONS_MAX) {
            return Err(refuse(region, format!("there are more than {REGIONS_MAX}")));
        }
        let mut by_user: Vec<&Arc<MemoryRegion>> = regions.iter().collect();
        by_user.sort_by_key(|region| region.user_addr);
        if let Some(pair) = by_user.windows(2).find(|pair| pair[0].overlaps_user(pair[1])) {
            return Err(refuse(pair[1], "it overlaps another one in the front-end's addresses".into()));
        }
        let memory = match regions.last() {
            None => GuestMemoryMmap::default(),
            Some(last) => {
                let known = regions.iter().map(|region| region.region.clone()).collect();
                GuestMemoryMmap::from_arc_regions(known).map_err(|e| refuse(last, e.to_string()))?
            }
        };
        let range =
            |region: &Arc<MemoryRegion>| Range { guest_addr: region.guest_addr, size: region.size, host: region.host };
        Ok(Self { ranges: regions.iter().map(range).collect(), regions, memory })
    }

    /// The regions, by guest address.
    pub fn regions(&self) -> &[Arc<MemoryRegion>] {
        &self.regions
    }

    /// The regions as vm-memory knows them.
    pub fn vm_memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Whether a file behind a region was truncated under us.
    pub(crate) fn is_lost(&self) -> bool {
        sigbus::any_lost() && self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// Appends the pieces of host memory that hold `len` bytes at a guest address: one, or several where regions meet.
    /// False, and nothing is promised of `to`, when not all of them are guest memory.
    #[inline]
    pub(crate) fn push_iovecs(&self, guest_addr: u64, len: u32, to: &mut Vec<IoVec>) -> bool {
        match self.find(guest_addr) {
            Some(range) if len > 0 && u64::from(len) <= range.size - (guest_addr - range.guest_addr) => {
                to.push(range.piece(guest_addr, len.into()));
                true
            }
            _ => self.push_pieces(guest_addr, len, to),
        }
    }

    /// The same for buffers that no region holds alone.
    #[cold]
    fn push_pieces(&self, guest_addr: u64, len: u32, to: &mut Vec<IoVec>) -> bool {
        let (mut at, mut left) = (guest_addr, u64::from(len));
        while left > 0 {
            let Some(range) = self.find(at) else { return false };
            let here = left.min(range.size - (at - range.guest_addr));
            to.push(range.piece(at, here));
            left -= here;
            let Some(next) = at.checked_add(here) else { return left == 0 };
            at = next;
        }
        true
    }

    /// The host address of `len` bytes at a guest address, all in one region, at a multiple of `align`.
    #[inline]
    pub(crate) fn guest_to_host(&self, guest_addr: u64, len: u64, align: usize) -> Option<*mut u8> {
        let range = self.find(guest_addr)?;
        let inside = guest_addr - range.guest_addr;
        let fits = inside.checked_add(len).is_some_and(|end| end <= range.size);
        let host = range.host + usize::try_from(inside).ok()?;
        (fits && host.is_multiple_of(align)).then_some(host as *mut u8)
    }

    /// The host address of `len` bytes at a front-end address, all in one region, at a multiple of `align`.
    pub(crate) fn user_to_host(&self, user_addr: u64, len: u64, align: usize) -> Option<*mut u8> {
        let region = self
            .regions
            .iter()
            .find(|region| user_addr.checked_sub(region.user_addr).is_some_and(|inside| inside < region.size))?;
        region.host_at(user_addr - region.user_addr, len, align)
    }

    /// The guest address of what an [`IoVec`] from here points to.
    pub(crate) fn host_to_guest(&self, host: usize) -> Option<u64> {
        let offset = |range: &Range| host.checked_sub(range.host).map(|inside| inside as u64);
        let found = self.ranges.iter().find(|range| offset(range).is_some_and(|inside| inside < range.size))?;
        Some(found.guest_addr + offset(found)?)
    }

    #[inline]
    fn find(&self, guest_addr: u64) -> Option<&Range> {
        // Few ranges, and most of the memory is in the last: from behind.
        self.ranges.iter().rev().find(|range| guest_addr.wrapping_sub(range.guest_addr) < range.size)
    }
}

impl Range {
    /// `len` bytes at a guest address, which the caller has found to lie in this range.
    #[inline]
    fn piece(&self, guest_addr: u64, len: u64) -> IoVec {
        let inside = (guest_addr - self.guest_addr) as usize;
        // SAFETY: the bytes lie in the region's mapping, which lives as long as the table does, and a queue keeps its
        // table until every request that uses it has completed (queue.rs). No Rust reference is made to guest memory
        // anywhere.
        unsafe { IoVec::new((self.host + inside) as *mut u8, len as usize) }
    }
}

impl MemoryRegion {
    fn host_at(&self, inside: u64, len: u64, align: usize) -> Option<*mut u8> {
        let fits = inside.checked_add(len).is_some_and(|end| end <= self.size);
        let host = self.host.checked_add(usize::try_from(inside).ok()?)?;
        (fits && host.is_multiple_of(align)).then_some(host as *mut u8)
    }
}

#[cfg(test)]
mod tests;
