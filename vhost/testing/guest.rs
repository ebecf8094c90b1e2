//! Guest: memory in several regions with a ring in it, written byte by byte as a guest driver may, or as none should.
//! The front-end's addresses of the regions are in another order than the guest's.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::memfd;
use crate::guest_memory::{GuestMemory, MemoryRegion};
use crate::virtqueue::{Chain, RingFeatures, RingLayout, VirtQueue};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Where a region is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placement {
    pub(crate) guest: u64,
    pub(crate) user: u64,
    pub(crate) size: u64,
}

/// Two regions that are neighbours for the guest and far apart for the front-end, one alone, and one at the end of all
/// addresses.
pub(crate) const BUFFERS: [Placement; 4] = [
    Placement { guest: 0x8000_0000, user: 0x7f33_0000_0000, size: 0x8000 },
    Placement { guest: 0x8000_8000, user: 0x7f11_0000_0000, size: 0x7000 },
    Placement { guest: 0x1_0000_0000, user: 0x5555_0000, size: 0x5000 },
    Placement { guest: 0xffff_ffff_ffff_0000, user: 0x7f22_0000_0000, size: 0xf000 },
];
/// The border of the two neighbours.
pub(crate) const BORDER: u64 = BUFFERS[1].guest;

/// Where the region with the ring begins.
const RING_GUEST: u64 = 0x10_0000;
const RING_USER: u64 = 0x7f00_0010_0000;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        let number = |from: usize, to: usize| {
            bytes[from..to].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        Self {
            addr: number(0, 8),
            len: number(8, 12) as u32,
            flags: number(12, 14) as u16,
            next: number(14, 16) as u16,
        }
    }
}

/// A piece of guest memory that a chain names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffer {
    pub(crate) addr: u64,
    pub(crate) len: u64,
    pub(crate) writable: bool,
}

/// Joins buffers that follow one another in guest addresses, and leaves out empty ones: the same bytes, cut in one way.
pub(crate) fn joined(buffers: &[Buffer]) -> Vec<Buffer> {
    let mut out: Vec<Buffer> = Vec::new();
    for buffer in buffers.iter().filter(|buffer| buffer.len > 0) {
        match out.last_mut() {
            Some(last) if last.writable == buffer.writable && last.addr + last.len == buffer.addr => {
                last.len += buffer.len;
            }
            _ => out.push(*buffer),
        }
    }
    out
}

/// Guest memory and the place of one ring in it; guest addresses.
pub(crate) struct Guest {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
}

impl Guest {
    /// A ring of `size` entries. Its parts lie in a region of their own, pushed back by `skew` bytes and more where
    /// they must be aligned; the used ring ends where the region ends.
    pub(crate) fn new(size: u16, skew: u64) -> Self {
        let entries = u64::from(size);
        let desc = (RING_GUEST + skew).next_multiple_of(16);
        let avail = (desc + 16 * entries + skew).next_multiple_of(2);
        let used = (avail + 6 + 2 * entries + skew).next_multiple_of(4);
        let end = used + 6 + 8 * entries;
        Self { memory: memory_with_ring_until(end), size, desc, avail, used }
    }

    /// A packed ring: `avail` is the driver event suppression structure, `used` the device's, with which the region ends.
    pub(crate) fn packed(size: u16, skew: u64) -> Self {
        let desc = (RING_GUEST + skew).next_multiple_of(16);
        let avail = (desc + 16 * u64::from(size) + skew).next_multiple_of(4);
        let used = (avail + 4 + skew).next_multiple_of(4);
        Self { memory: memory_with_ring_until(used + 4), size, desc, avail, used }
    }

    /// Where the ring is, in the front-end's addresses.
    pub(crate) fn layout(&self) -> RingLayout {
        let user = |guest: u64| guest - RING_GUEST + RING_USER;
        let (desc, avail, used) = (user(self.desc), user(self.avail), user(self.used));
        RingLayout { size: self.size, desc, avail, used, indirect_max: 128 }
    }

    /// The device's side of a split ring whose next available entry is number `base`.
    pub(crate) fn device(&self, features: RingFeatures, base: u16) -> VirtQueue {
        self.device_at(features, base.into())
    }

    /// The device's side of the ring, which stands where SET_VRING_BASE would say.
    pub(crate) fn device_at(&self, features: RingFeatures, base: u32) -> VirtQueue {
        VirtQueue::new(self.memory.clone(), self.layout(), features, base).expect("the ring is in guest memory")
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.vm_memory().write_slice(bytes, GuestAddress(addr)).expect("inside guest memory");
    }

    pub(crate) fn read<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.vm_memory().read_slice(&mut bytes, GuestAddress(addr)).expect("inside guest memory");
        bytes
    }

    /// The content of all regions, in the order of guest addresses.
    pub(crate) fn content(&self) -> Vec<Vec<u8>> {
        let regions = self.memory.regions().iter();
        regions
            .map(|region| {
                let mut bytes = vec![0; region.size as usize];
                let at = GuestAddress(region.guest_addr);
                self.memory.vm_memory().read_slice(&mut bytes, at).expect("inside guest memory");
                bytes
            })
            .collect()
    }

    pub(crate) fn set_descriptor(&self, table: u64, index: u16, descriptor: Descriptor) {
        self.write(table + 16 * u64::from(index), &descriptor.to_bytes());
    }

    /// Writes a table anywhere.
    pub(crate) fn set_table(&self, table: u64, descriptors: &[Descriptor]) {
        let bytes: Vec<u8> = descriptors.iter().flat_map(|descriptor| descriptor.to_bytes()).collect();
        self.write(table, &bytes);
    }

    /// Writes entry number `at` of the available ring.
    pub(crate) fn set_avail(&self, at: u16, head: u16) {
        self.write(self.avail + 4 + 2 * u64::from(at % self.size), &head.to_le_bytes());
    }

    pub(crate) fn set_avail_idx(&self, idx: u16) {
        self.write(self.avail + 2, &idx.to_le_bytes());
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.write(self.avail, &flags.to_le_bytes());
    }

    pub(crate) fn set_used_event(&self, idx: u16) {
        self.write(self.avail + 4 + 2 * u64::from(self.size), &idx.to_le_bytes());
    }

    pub(crate) fn set_used_idx(&self, idx: u16) {
        self.write(self.used + 2, &idx.to_le_bytes());
    }

    pub(crate) fn avail_flags(&self) -> u16 {
        u16::from_le_bytes(self.read(self.avail))
    }

    pub(crate) fn used_flags(&self) -> u16 {
        u16::from_le_bytes(self.read(self.used))
    }

    pub(crate) fn used_idx(&self) -> u16 {
        u16::from_le_bytes(self.read(self.used + 2))
    }

    /// Element number `at` of the used ring: id and length.
    pub(crate) fn used(&self, at: u16) -> (u32, u32) {
        let [a, b, c, d, e, f, g, h] = self.read(self.used + 4 + 8 * u64::from(at % self.size));
        (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
    }

    pub(crate) fn avail_event(&self) -> u16 {
        u16::from_le_bytes(self.read(self.used + 4 + 8 * u64::from(self.size)))
    }

    /// Makes the chains of these heads available from entry `base` on.
    pub(crate) fn offer(&self, base: u16, heads: &[u16]) {
        let mut at = base;
        for head in heads {
            self.set_avail(at, *head);
            at = at.wrapping_add(1);
        }
        self.set_avail_idx(at);
    }

    /// What a popped chain names, in guest addresses.
    ///
    /// # Panics
    /// If a piece of it is empty or not wholly inside one region.
    pub(crate) fn buffers_of(&self, chain: &Chain) -> Vec<Buffer> {
        assert!(chain.readable <= chain.iov.len());
        let pieces = chain.iov.iter().enumerate();
        pieces
            .map(|(index, piece)| {
                let (base, len) = (piece.base() as usize, piece.len());
                let region = self.memory.regions().iter().find_map(|region| {
                    let host = self.memory.vm_memory().get_host_address(GuestAddress(region.guest_addr));
                    let host = host.expect("a region's first byte") as usize;
                    let inside = base.checked_sub(host).filter(|inside| *inside as u64 + len as u64 <= region.size)?;
                    Some(region.guest_addr + inside as u64)
                });
                let addr = region.unwrap_or_else(|| panic!("{len} bytes at {base:#x} are not inside one region"));
                assert!(len > 0, "an empty piece at {addr:#x}");
                Buffer { addr, len: len as u64, writable: index >= chain.readable }
            })
            .collect()
    }
}

fn memory_with_ring_until(end: u64) -> Arc<GuestMemory> {
    let ring = Placement { guest: RING_GUEST, user: RING_USER, size: end - RING_GUEST };
    let regions = BUFFERS.iter().chain([&ring]).map(|at| Arc::new(region(*at))).collect();
    Arc::new(GuestMemory::new(regions).expect("they do not overlap"))
}

fn region(at: Placement) -> MemoryRegion {
    // Not from the file's start, so that an offset that is forgotten shows.
    let offset = 0x3000;
    MemoryRegion::map(at.guest, at.user, at.size, offset, memfd(offset + at.size)).expect("it fits its file")
}
