//! The packed virtqueue (virtio 1.3 §2.8), on host addresses that are looked up once. The memory is the guest's: every
//! field is read once and checked after it was read. What completes is written into the ring at once, but for the flags
//! of a batch's first entry: the guest driver, which looks no further than that one, sees the whole batch with them.
#![allow(unsafe_code)] // Ring memory is shared with the guest; each block says why its address is valid.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use blockport_block::handoff::store_then_look;
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_F_WRAP_CTR, VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::chain::{Chain, Head, Table};
use super::{RingError, RingFeatures, RingLayout};
use crate::guest_memory::GuestMemory;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
const WRAP: u16 = 1 << VRING_PACKED_EVENT_F_WRAP_CTR;

/// The most entries of a ring (§2.8).
const SIZE_MAX: u16 = 32768;

/// A descriptor (§2.8.13), as the guest or we wrote it: little-endian, which every supported host is.
#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    id: u16,
    flags: u16,
}

pub(super) const DESCRIPTOR_BYTES: u64 = size_of::<Descriptor>() as u64;
const ID_OFFSET: usize = std::mem::offset_of!(Descriptor, id);
const LEN_OFFSET: usize = std::mem::offset_of!(Descriptor, len);
const FLAGS_OFFSET: usize = std::mem::offset_of!(Descriptor, flags);

/// An event suppression structure (§2.8.14): the position in the low half, the flags in the high one.
pub(super) const EVENT_BYTES: u64 = 4;
const EVENT_FLAGS_SHIFT: u32 = 16;
const EVENT_FLAGS_MASK: u32 = 3;

/// A place in the ring, with the wrap counter of those that are there (§2.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Below the ring's size.
    pub(super) index: u16,
    /// The wrap counter.
    pub(super) wrap: bool,
}

impl Place {
    /// From the index in bits 0 to 14 and the wrap counter in bit 15.
    fn from_bits(bits: u16) -> Self {
        Self { index: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    fn to_bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// Goes `by` entries on, at most `size`.
    #[inline]
    pub(super) fn advance(&mut self, by: u16, size: u16) {
        self.index += by;
        if self.index >= size {
            self.index -= size;
            self.wrap ^= true;
        }
    }

    /// How many entries `other` is ahead, if that is possible in a ring of `size`.
    fn distance_to(self, other: Self, size: u16) -> Option<u16> {
        if self.wrap == other.wrap {
            other.index.checked_sub(self.index)
        } else {
            (size - self.index).checked_add(other.index).filter(|distance| *distance <= size)
        }
    }

    /// §2.8.1: whether a descriptor with these flags, found here, is available.
    #[inline]
    fn is_available(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == self.available_flags()
    }

    /// The flags that make a descriptor here available.
    #[inline]
    fn available_flags(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The flags that make a descriptor here used.
    #[inline]
    fn used_flags(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// Where a ring stands: the next entry to pop, and the next one to write a completion into. As SET_VRING_BASE has it
/// ("Vring descriptor indices for packed virtqueues"): the first in bits 0 to 15, the second in bits 16 to 31.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Base {
    avail: Place,
    used: Place,
}

impl Base {
    fn from_bits(bits: u32) -> Self {
        Self { avail: Place::from_bits(bits as u16), used: Place::from_bits((bits >> 16) as u16) }
    }

    fn to_bits(self) -> u32 {
        u32::from(self.avail.to_bits()) | u32::from(self.used.to_bits()) << 16
    }

    /// How many entries lie between the two; `None` for what no ring of `size` can be.
    fn outstanding(self, size: u16) -> Option<u16> {
        if self.avail.index >= size || self.used.index >= size {
            return None;
        }
        self.used.distance_to(self.avail, size)
    }
}

/// Whether a ring of `size` entries can stand at this base.
pub(super) fn is_base(base: u32, size: u16) -> bool {
    Base::from_bits(base).outstanding(size).is_some()
}

/// The host addresses of the three parts. Valid as long as the table they were looked up in is held.
#[derive(Clone, Copy)]
struct Parts {
    desc: *mut u8,
    /// The driver event suppression structure: when the guest wants to be called.
    driver_event: *mut u8,
    /// The device event suppression structure: when we want to be kicked.
    device_event: *mut u8,
}

pub(super) struct PackedRing {
    parts: Parts,
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    features: RingFeatures,
    next_avail: Place,
    next_used: Place,
    /// Entries of what was popped and not yet published: with those still in the ring, never more than the ring has.
    outstanding: u16,
    /// Where the batch of completions begins that is not shown yet, and the flags that will show it.
    batch: Option<(u16, u16)>,
    /// How many entries that batch takes, at most the ring's size.
    batch_slots: u16,
    /// Whether nothing was published since the start. With event indices the guest is called then, whatever it says:
    /// its wish may be from before the start.
    first: bool,
    /// Whether kicks are suppressed at the moment.
    suppressed: bool,
}

// SAFETY: the addresses are of shared memory that stays mapped while `memory` is held; they are used by one thread at a
// time, as every method that touches them takes `&mut self`.
unsafe impl Send for PackedRing {}

fn look_up(memory: &GuestMemory, layout: &RingLayout) -> Result<Parts, RingError> {
    // §2.8.10: the alignments of the three.
    let desc = memory.user_to_host(layout.desc, u64::from(layout.size) * DESCRIPTOR_BYTES, 16);
    let driver_event = memory.user_to_host(layout.avail, EVENT_BYTES, 4);
    let device_event = memory.user_to_host(layout.used, EVENT_BYTES, 4);
    match (desc, driver_event, device_event) {
        (Some(desc), Some(driver_event), Some(device_event)) => Ok(Parts { desc, driver_event, device_event }),
        _ => Err(RingError::Addresses),
    }
}

impl PackedRing {
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        layout: RingLayout,
        features: RingFeatures,
        base: u32,
    ) -> Result<Self, RingError> {
        if layout.size == 0 || layout.size > SIZE_MAX {
            return Err(RingError::Addresses);
        }
        let parts = look_up(&memory, &layout)?;
        let Base { avail, used } = Base::from_bits(base);
        let refused = RingError::Base { base, size: layout.size };
        let outstanding = Base { avail, used }.outstanding(layout.size).ok_or(refused)?;
        let mut ring = Self {
            parts,
            memory,
            layout,
            features,
            next_avail: avail,
            next_used: used,
            outstanding,
            batch: None,
            batch_slots: 0,
            first: true,
            suppressed: false,
        };
        if base == 0 && ring.is_new() {
            ring.next_avail.wrap = true;
            ring.next_used.wrap = true;
        }
        Ok(ring)
    }

    /// Whether a ring at base 0 is a new one. Both wrap counters of a new ring are 1 (§2.8.1), yet libblkio tells its base
    /// as 0. Where that is true, at least one request of the lap that has just ended was completed, and since then
    /// entries were made available with the counter at 0: both set this flag, which a new ring has nowhere.
    fn is_new(&self) -> bool {
        (0..self.layout.size).all(|index| self.flags(index).load(Ordering::Acquire) & USED == 0)
    }

    pub(super) fn base(&self) -> u32 {
        Base { avail: self.next_avail, used: self.next_used }.to_bits()
    }

    pub(super) fn size(&self) -> u16 {
        self.layout.size
    }

    /// The entry that shows the batch of completions when it is published.
    pub(super) fn batch_entry(&self) -> Option<u16> {
        self.batch.map(|(index, _)| index)
    }

    pub(super) fn next_avail(&self) -> Place {
        self.next_avail
    }

    /// Where the next completion goes; what is pushed and not published counts.
    pub(super) fn next_used(&self) -> Place {
        self.next_used
    }

    /// Whether the entry at a place, which lies between used and available ones, was made a used one.
    pub(super) fn is_used_at(&self, place: Place) -> bool {
        // One that is available there, or in the lap after, has this bit the other way round or the same as a used one.
        (self.flags(place.index).load(Ordering::Acquire) & USED != 0) == place.wrap
    }

    /// An entry as it lies in the ring: address; length, id and flags from the lowest bit on.
    #[inline]
    pub(super) fn raw_at(&self, place: Place) -> (u64, u64) {
        // SAFETY: as for `descriptor`.
        unsafe {
            let entry = self.entry(place.index).cast::<u64>();
            (entry.read_volatile(), entry.add(1).read_volatile())
        }
    }

    /// Goes on where a process before us stood: completions go to `used`, and the `slots` entries from there on are of
    /// chains in flight. What it wrote there of a batch that it did not show would be taken for completions later.
    pub(super) fn resume_with(&mut self, used: Place, slots: u16) {
        (self.next_used, self.next_avail, self.outstanding) = (used, used, slots);
        for _ in 0..slots {
            let at = self.next_avail;
            let flags = self.flags(at.index).load(Ordering::Acquire);
            if !at.is_available(flags) {
                self.flags(at.index).store(flags & !(AVAIL | USED) | at.available_flags(), Ordering::Release);
            }
            self.next_avail.advance(1, self.layout.size);
        }
    }

    /// Takes a chain in flight once more, from descriptors as [`PackedRing::raw_at`] gave them.
    pub(super) fn take_again(
        &self,
        descriptors: impl Iterator<Item = (u64, u64)>,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        chain.clear();
        chain.head = Head::default();
        let mut writable = false;
        for (addr, rest) in descriptors {
            let descriptor = Descriptor { addr, len: rest as u32, id: (rest >> 32) as u16, flags: (rest >> 48) as u16 };
            self.add(descriptor, chain.head.slots == 0, chain, &mut writable)?;
            chain.head.slots += 1;
            chain.head.number = descriptor.id;
        }
        Ok(())
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    pub(super) fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        self.parts = look_up(&memory, &self.layout)?;
        self.memory = memory;
        Ok(())
    }

    /// The flags of an entry of the ring: what makes it the guest's or ours.
    #[inline]
    fn flags(&self, index: u16) -> &AtomicU16 {
        // SAFETY: every index is below the ring's size, as positions are, and `look_up` found as many descriptors
        // mapped and aligned. Both sides access flags atomically.
        unsafe { AtomicU16::from_ptr(self.entry(index).add(FLAGS_OFFSET).cast()) }
    }

    #[inline]
    pub(super) fn entry(&self, index: u16) -> *mut u8 {
        self.parts.desc.wrapping_add(usize::from(index) * DESCRIPTOR_BYTES as usize)
    }

    #[inline]
    fn descriptor(&self, index: u16) -> Descriptor {
        // SAFETY: as for `flags`. Volatile: read once, whatever the guest does meanwhile.
        unsafe { self.entry(index).cast::<Descriptor>().read_volatile() }
    }

    #[inline]
    fn driver_event(&self) -> &AtomicU32 {
        // SAFETY: `look_up` found its 4 bytes mapped and aligned; they are only ever accessed atomically.
        unsafe { AtomicU32::from_ptr(self.parts.driver_event.cast()) }
    }

    #[inline]
    fn device_event(&self) -> &AtomicU32 {
        // SAFETY: as for `driver_event`.
        unsafe { AtomicU32::from_ptr(self.parts.device_event.cast()) }
    }

    #[inline]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        // Acquire: the guest writes these flags after everything else of the chain (§2.8.21).
        let flags = self.flags(self.next_avail.index).load(Ordering::Acquire);
        if !self.next_avail.is_available(flags) {
            return Ok(false);
        }
        chain.clear();
        let mut at = self.next_avail;
        let slots = self.walk(&mut at, chain)?;
        self.next_avail = at;
        self.outstanding += slots;
        Ok(true)
    }

    #[inline]
    pub(super) fn has_more(&self) -> bool {
        self.next_avail.is_available(self.flags(self.next_avail.index).load(Ordering::Relaxed))
    }

    /// Follows a chain to its end, from `at` to the entry after it. Returns how many entries it takes.
    #[inline]
    fn walk(&self, at: &mut Place, chain: &mut Chain) -> Result<u16, RingError> {
        let room = self.layout.size - self.outstanding;
        if room == 0 {
            return Err(RingError::Overrun(self.layout.size));
        }
        let mut slots = 0;
        let mut writable = false;
        loop {
            let descriptor = self.descriptor(at.index);
            at.advance(1, self.layout.size);
            slots += 1;
            self.add(descriptor, slots == 1, chain, &mut writable)?;
            if descriptor.flags & NEXT == 0 {
                // §2.8.5: the id of a list stands in its last descriptor.
                chain.head = Head { number: descriptor.id, slots, ..Head::default() };
                return Ok(slots);
            }
            if slots == room {
                return Err(RingError::Loop);
            }
        }
    }

    /// Adds what one descriptor of a chain stands for.
    #[inline(always)]
    fn add(
        &self,
        descriptor: Descriptor,
        is_first: bool,
        chain: &mut Chain,
        writable: &mut bool,
    ) -> Result<(), RingError> {
        let Descriptor { addr, len, flags, .. } = descriptor;
        if flags & INDIRECT == 0 {
            return chain.add(&self.memory, (addr, len, flags & WRITE != 0), writable);
        }
        // §2.8.19.1: not in a list of others.
        if !is_first || flags & NEXT != 0 {
            return Err(RingError::IndirectTable(len));
        }
        self.walk_indirect(descriptor, chain)
    }

    /// §2.8.7: the entries of a table follow each other to its end; of their flags only WRITE means anything.
    fn walk_indirect(&self, table: Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let refuse = RingError::IndirectTable(table.len);
        let count = u64::from(table.len) / DESCRIPTOR_BYTES;
        let most = u64::from(self.layout.indirect_max.max(self.layout.size));
        let whole = u64::from(table.len).is_multiple_of(DESCRIPTOR_BYTES);
        if !self.features.indirect || !whole || count == 0 || count > most {
            return Err(refuse);
        }
        let found = Table::find(&self.memory, table.addr, table.len)?;
        let mut writable = false;
        for index in 0..count as usize {
            // SAFETY: `count` descriptors from the start on were found in guest memory, or are a copy of ours; the table
            // may lie at any address, so the read is unaligned (and of bytes that the guest may change: each field is
            // checked after this one read).
            let Descriptor { addr, len, flags, .. } =
                unsafe { found.start().add(index * DESCRIPTOR_BYTES as usize).cast::<Descriptor>().read_unaligned() };
            if flags & INDIRECT != 0 {
                return Err(refuse);
            }
            chain.add(&self.memory, (addr, len, flags & WRITE != 0), &mut writable)?;
        }
        Ok(())
    }

    #[inline]
    pub(super) fn push(&mut self, head: Head, written: u32) {
        let Place { index, .. } = self.next_used;
        let entry = self.entry(index);
        // SAFETY: the index is below the ring's size, and `look_up` found as many descriptors mapped and aligned. The
        // entry is of a chain that was popped, so it is ours until its flags say otherwise.
        unsafe {
            entry.add(LEN_OFFSET).cast::<u32>().write_volatile(written);
            entry.add(ID_OFFSET).cast::<u16>().write_volatile(head.number);
        }
        // §2.8.4: the length means something only together with this flag.
        let flags = self.next_used.used_flags() | if written > 0 { WRITE } else { 0 };
        if self.batch.is_none() {
            self.batch = Some((index, flags));
        } else {
            self.flags(index).store(flags, Ordering::Relaxed);
        }
        self.next_used.advance(head.slots, self.layout.size);
        self.batch_slots += head.slots;
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let Some((index, flags)) = self.batch.take() else { return false };
        let slots = std::mem::take(&mut self.batch_slots);
        self.outstanding -= slots;
        // Release: the rest of the batch, and the data it stands for, come before.
        self.flags(index).store(flags, Ordering::Release);
        // §2.8.21.3.1: the flags must be visible before the guest's wish is read.
        fence(Ordering::SeqCst);
        let first = std::mem::take(&mut self.first);
        let event = self.driver_event().load(Ordering::Relaxed);
        match event >> EVENT_FLAGS_SHIFT & EVENT_FLAGS_MASK {
            _ if first && self.features.event_idx => true,
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.features.event_idx => self.is_in_batch(event as u16, slots),
            _ => true,
        }
    }

    /// Whether a position that the guest named lies in the last `slots` entries before the next used one.
    #[inline]
    fn is_in_batch(&self, bits: u16, slots: u16) -> bool {
        let event = Place::from_bits(bits);
        let Place { index, wrap } = self.next_used;
        // Both counted from where this lap of the ring begins.
        let lap = if event.wrap == wrap { 0 } else { i32::from(self.layout.size) };
        let behind = i32::from(index) - (i32::from(event.index) - lap);
        (1..=i32::from(slots)).contains(&behind)
    }

    #[inline]
    pub(super) fn suppress_kicks(&mut self) {
        if !std::mem::replace(&mut self.suppressed, true) {
            self.device_event().store(VRING_PACKED_EVENT_FLAG_DISABLE << EVENT_FLAGS_SHIFT, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(super) fn enable_kicks(&mut self) -> bool {
        self.suppressed = false;
        let event = if self.features.event_idx {
            VRING_PACKED_EVENT_FLAG_DESC << EVENT_FLAGS_SHIFT | u32::from(self.next_avail.to_bits())
        } else {
            VRING_PACKED_EVENT_FLAG_ENABLE << EVENT_FLAGS_SHIFT
        };
        let flags = store_then_look(
            || self.device_event().store(event, Ordering::Relaxed),
            || self.flags(self.next_avail.index).load(Ordering::Relaxed),
        );
        self.next_avail.is_available(flags)
    }
}
