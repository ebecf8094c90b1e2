//! The split virtqueue (virtio 1.3 §2.7), on host addresses that are looked up once. The memory is the guest's: every
//! field is read once, atomically where the guest may write it at that moment, and checked after it was read.
#![allow(unsafe_code)] // Ring memory is shared with the guest; each block says why its address is valid.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use blockport_block::handoff::store_then_look;
use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use super::chain::{Chain, Head, Table};
use super::{RingError, RingFeatures, RingLayout};
use crate::guest_memory::GuestMemory;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// A descriptor (§2.7.5), as the guest wrote it: little-endian, which every supported host is.
#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

const DESCRIPTOR_BYTES: u64 = size_of::<Descriptor>() as u64;

/// A used element (§2.7.8).
#[derive(Clone, Copy)]
#[repr(C)]
struct UsedElement {
    id: u32,
    len: u32,
}

/// Byte offsets in the available and used rings (§2.7.6, §2.7.8).
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;

/// Where in the used ring its index is, and how many bytes it has.
pub(super) const USED_INDEX: (u64, u64) = (INDEX as u64, 2);

/// The host addresses of the three parts. Valid as long as the table they were looked up in is held.
#[derive(Clone, Copy)]
struct Parts {
    desc: *const Descriptor,
    avail: *mut u8,
    used: *mut u8,
}

pub(super) struct SplitRing {
    parts: Parts,
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    features: RingFeatures,
    mask: u16,
    /// The next available entry to pop.
    next_avail: u16,
    /// Up to where `avail.idx` was seen to be; saves reading the guest's cache line for each chain.
    seen_avail: u16,
    /// Popped and not yet pushed: with those still in the ring, never more than the ring has entries.
    outstanding: u16,
    /// The next used entry to write.
    next_used: u16,
    /// Up to where the guest has been shown used entries.
    published: u16,
    /// Whether nothing was published since the start. With event indices the guest is called then, whatever it says:
    /// its wish may be from before the start.
    first: bool,
    /// Whether kicks are suppressed at the moment.
    suppressed: bool,
}

// SAFETY: the addresses are of shared memory that stays mapped while `memory` is held; they are used by one thread at a
// time, as every method that touches them takes `&mut self`.
unsafe impl Send for SplitRing {}

/// The bytes of the used ring, the event field included (§2.7.8).
pub(super) fn used_bytes(size: u16) -> u64 {
    ENTRIES as u64 + 8 * u64::from(size) + 2
}

fn look_up(memory: &GuestMemory, layout: &RingLayout) -> Result<Parts, RingError> {
    let size = u64::from(layout.size);
    let desc = memory.user_to_host(layout.desc, size * DESCRIPTOR_BYTES, 16);
    // With the event fields behind, whether or not they are negotiated.
    let avail = memory.user_to_host(layout.avail, ENTRIES as u64 + 2 * size + 2, 2);
    let used = memory.user_to_host(layout.used, used_bytes(layout.size), 4);
    match (desc, avail, used) {
        (Some(desc), Some(avail), Some(used)) => Ok(Parts { desc: desc.cast_const().cast(), avail, used }),
        _ => Err(RingError::Addresses),
    }
}

impl SplitRing {
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        layout: RingLayout,
        features: RingFeatures,
        base: u32,
    ) -> Result<Self, RingError> {
        if !layout.size.is_power_of_two() {
            return Err(RingError::Addresses);
        }
        let base = u16::try_from(base).map_err(|_| RingError::Base { base, size: layout.size })?;
        let parts = look_up(&memory, &layout)?;
        let mut ring = Self {
            parts,
            memory,
            layout,
            features,
            mask: layout.size - 1,
            next_avail: base,
            seen_avail: base,
            outstanding: 0,
            next_used: 0,
            published: 0,
            first: true,
            suppressed: false,
        };
        // The guest's used index survives a stop and start of the ring; ours is a copy of it.
        ring.next_used = ring.used_u16(INDEX).load(Ordering::Relaxed);
        ring.published = ring.next_used;
        Ok(ring)
    }

    /// A ring that is nowhere, and never used.
    pub(super) fn nowhere(memory: Arc<GuestMemory>) -> Self {
        let parts = Parts { desc: std::ptr::null(), avail: std::ptr::null_mut(), used: std::ptr::null_mut() };
        Self {
            parts,
            memory,
            layout: RingLayout { size: 1, desc: 0, avail: 0, used: 0, indirect_max: 0 },
            features: RingFeatures::default(),
            mask: 0,
            next_avail: 0,
            seen_avail: 0,
            outstanding: 0,
            next_used: 0,
            published: 0,
            first: true,
            suppressed: false,
        }
    }

    pub(super) fn resume_at_used(&mut self) {
        self.next_avail = self.next_used;
        self.seen_avail = self.next_used;
    }

    pub(super) fn size(&self) -> u16 {
        self.layout.size
    }

    /// Up to where the guest has been shown used entries.
    pub(super) fn used_idx(&self) -> u16 {
        self.published
    }

    /// Goes on where a process before us stood, with so many chains in flight.
    pub(super) fn resume_with(&mut self, in_flight: u16) {
        self.next_avail = self.published.wrapping_add(in_flight);
        self.seen_avail = self.next_avail;
        self.outstanding = in_flight;
    }

    /// Takes a chain in flight once more.
    pub(super) fn take_again(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.head = head.into();
        chain.clear();
        self.walk(head, chain)
    }

    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Where in the used ring the next element goes, and how many bytes it has.
    pub(super) fn next_element(&self) -> (u64, u64) {
        (ENTRIES as u64 + 8 * u64::from(self.next_used & self.mask), 8)
    }

    /// Where in the used ring our wish for kicks was written last, and how many bytes it has; `None` if it was not.
    pub(super) fn wish(&self) -> Option<(u64, u64)> {
        match (self.features.event_idx, self.suppressed) {
            (true, true) => None,
            (true, false) => Some((used_bytes(self.layout.size) - 2, 2)),
            (false, _) => Some((FLAGS as u64, 2)),
        }
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    pub(super) fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        self.parts = look_up(&memory, &self.layout)?;
        self.memory = memory;
        Ok(())
    }

    #[inline]
    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: every caller's offset is even and within the available ring of `layout.size` entries, which
        // `look_up` found mapped and aligned to 2; the memory is only ever accessed atomically here.
        unsafe { AtomicU16::from_ptr(self.parts.avail.add(offset).cast()) }
    }

    #[inline]
    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as for `avail_u16`, with the used ring, aligned to 4.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(offset).cast()) }
    }

    /// §2.7.7: the guest's wish for when to be called, behind the available ring.
    #[inline]
    fn used_event(&self) -> &AtomicU16 {
        self.avail_u16(ENTRIES + 2 * usize::from(self.layout.size))
    }

    /// §2.7.10: our wish for when to be kicked, behind the used ring.
    #[inline]
    fn avail_event(&self) -> &AtomicU16 {
        self.used_u16(ENTRIES + 8 * usize::from(self.layout.size))
    }

    #[inline]
    fn descriptor(&self, index: u16) -> Result<Descriptor, RingError> {
        if index > self.mask {
            return Err(RingError::DescriptorOutOfRange(index));
        }
        // SAFETY: the table has `mask + 1` entries, found mapped and aligned. Volatile: read once, whatever the guest
        // does meanwhile.
        Ok(unsafe { self.parts.desc.add(usize::from(index)).read_volatile() })
    }

    #[inline]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if self.seen_avail == self.next_avail && !self.look_for_more()? {
            return Ok(false);
        }
        let slot = usize::from(self.next_avail & self.mask);
        let head = self.avail_u16(ENTRIES + 2 * slot).load(Ordering::Relaxed);
        chain.head = head.into();
        chain.clear();
        self.walk(head, chain)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.outstanding += 1;
        Ok(true)
    }

    #[inline]
    pub(super) fn has_more(&self) -> bool {
        self.seen_avail != self.next_avail || self.avail_u16(INDEX).load(Ordering::Relaxed) != self.next_avail
    }

    /// Reads the guest's available index. Acquire: what it covers was written before it.
    #[inline]
    fn look_for_more(&mut self) -> Result<bool, RingError> {
        let avail_idx = self.avail_u16(INDEX).load(Ordering::Acquire);
        let new = avail_idx.wrapping_sub(self.next_avail);
        if new > self.layout.size - self.outstanding {
            let (last_avail, size) = (self.next_avail, self.layout.size);
            return Err(RingError::IndexJump { avail_idx, last_avail, size });
        }
        self.seen_avail = avail_idx;
        Ok(new > 0)
    }

    /// Follows a chain from its head in the ring's own table.
    #[inline]
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        let mut descriptor = self.descriptor(head)?;
        let mut left = self.layout.size;
        let mut writable = false;
        loop {
            if descriptor.flags & INDIRECT != 0 {
                // §2.7.5.3.1: an indirect descriptor ends the chain.
                if descriptor.flags & NEXT != 0 {
                    return Err(RingError::IndirectTable(descriptor.len));
                }
                return self.walk_indirect(descriptor, &mut writable, chain);
            }
            self.add(descriptor, &mut writable, chain)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            left -= 1;
            if left == 0 {
                return Err(RingError::Loop);
            }
            descriptor = self.descriptor(descriptor.next)?;
        }
    }

    fn walk_indirect(&self, table: Descriptor, writable: &mut bool, chain: &mut Chain) -> Result<(), RingError> {
        let refuse = RingError::IndirectTable(table.len);
        let count = u64::from(table.len) / DESCRIPTOR_BYTES;
        let most = u64::from(self.layout.indirect_max.max(self.layout.size));
        let whole = u64::from(table.len).is_multiple_of(DESCRIPTOR_BYTES);
        if !self.features.indirect || !whole || count == 0 || count > most {
            return Err(refuse);
        }
        let found = Table::find(&self.memory, table.addr, table.len)?;
        let mut index = 0;
        for _ in 0..count {
            // SAFETY: `index < count`, and `count` descriptors from the start on were found in guest memory, or are a
            // copy of ours; the table may lie at any address, so the read is unaligned (and of bytes that the guest may
            // change: each field is checked after this one read).
            let descriptor: Descriptor =
                unsafe { found.start().add(index * DESCRIPTOR_BYTES as usize).cast::<Descriptor>().read_unaligned() };
            if descriptor.flags & INDIRECT != 0 {
                return Err(refuse);
            }
            self.add(descriptor, writable, chain)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            if u64::from(descriptor.next) >= count {
                return Err(RingError::DescriptorOutOfRange(descriptor.next));
            }
            index = usize::from(descriptor.next);
        }
        Err(RingError::Loop)
    }

    #[inline(always)]
    fn add(&self, descriptor: Descriptor, writable: &mut bool, chain: &mut Chain) -> Result<(), RingError> {
        let Descriptor { addr, len, flags, .. } = descriptor;
        chain.add(&self.memory, (addr, len, flags & WRITE != 0), writable)
    }

    #[inline]
    pub(super) fn push(&mut self, head: Head, written: u32) {
        let slot = usize::from(self.next_used & self.mask);
        let element = UsedElement { id: u32::from(head.number), len: written };
        // SAFETY: the used ring has `mask + 1` elements, found mapped and aligned to 4.
        unsafe { self.parts.used.add(ENTRIES + 8 * slot).cast::<UsedElement>().write_volatile(element) };
        self.next_used = self.next_used.wrapping_add(1);
        self.outstanding = self.outstanding.saturating_sub(1);
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        // Release: the elements, and the data they stand for, come before the index.
        self.used_u16(INDEX).store(new, Ordering::Release);
        self.published = new;
        // §2.7.7.2: the index must be visible before the guest's wish is read.
        fence(Ordering::SeqCst);
        let first = std::mem::take(&mut self.first);
        if self.features.event_idx {
            if first {
                return true;
            }
            let event = self.used_event().load(Ordering::Relaxed);
            // §2.7.10: whether `event` lies in the entries published just now.
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.avail_u16(FLAGS).load(Ordering::Relaxed) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        }
    }

    #[inline]
    pub(super) fn suppress_kicks(&mut self) {
        if std::mem::replace(&mut self.suppressed, true) {
            return;
        }
        // With event indices it is enough to leave `avail_event` behind; §2.7.10 wants the flags 0 then.
        if !self.features.event_idx {
            self.used_u16(FLAGS).store(VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(super) fn enable_kicks(&mut self) -> bool {
        self.suppressed = false;
        let want = || match self.features.event_idx {
            true => self.avail_event().store(self.next_avail, Ordering::Relaxed),
            false => self.used_u16(FLAGS).store(0, Ordering::Relaxed),
        };
        store_then_look(want, || self.avail_u16(INDEX).load(Ordering::Relaxed) != self.next_avail)
    }
}
