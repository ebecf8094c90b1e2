//! The driver side of a packed virtqueue (virtio 1.3, 2.8) in guest memory: where it stands and which buffer ids are on
//! their way.

use std::sync::atomic::{Ordering, fence};

use super::memory::GuestMemory;
use super::queue::{Descriptor, NEXT, RingLayout, Used};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A place in the ring and the wrap counter of its lap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub index: u16,
    pub wrap: bool,
}

impl Place {
    fn advance(&mut self, by: u16, size: u16) {
        let to = u32::from(self.index) + u32::from(by);
        self.wrap ^= to >= u32::from(size);
        self.index = (to % u32::from(size)) as u16;
    }

    /// As event structures and SET_VRING_BASE have it.
    pub fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }
}

/// The driver's state of one ring.
#[derive(Debug)]
pub struct Packed {
    pub avail: Place,
    pub used: Place,
    free_slots: u16,
    free_ids: Vec<u16>,
    /// The entries that each id takes.
    slots: Vec<u16>,
}

impl Packed {
    /// A new ring, both of whose wrap counters are 1.
    pub fn new(size: u16) -> Self {
        let start = Place { index: 0, wrap: true };
        // Not in order, so that an id is no place in the ring.
        let free_ids = (0..size).step_by(2).chain((1..size).step_by(2)).collect();
        Self { avail: start, used: start, free_slots: size, free_ids, slots: vec![0; usize::from(size)] }
    }

    /// Makes a list of descriptors available; returns its id.
    #[track_caller]
    pub fn offer(&mut self, memory: &GuestMemory, ring: &RingLayout, descriptors: &[Descriptor]) -> u16 {
        let count = descriptors.len() as u16;
        assert!(count <= self.free_slots, "{count} free entries");
        let id = self.free_ids.pop().expect("a free id");
        let head = self.avail;
        let mut head_flags = 0;
        for (at, descriptor) in descriptors.iter().enumerate() {
            let next = if at + 1 < descriptors.len() { NEXT } else { 0 };
            let flags = descriptor.flags | next | if self.avail.wrap { AVAIL } else { USED };
            let entry = ring.descriptors + Descriptor::SIZE * u64::from(self.avail.index);
            memory.write(entry, &descriptor.to_packed_bytes(id)[..14]);
            if at == 0 {
                head_flags = flags;
            } else {
                memory.store_u16(entry + 14, flags);
            }
            self.avail.advance(1, ring.size);
        }
        memory.store_u16(ring.descriptors + Descriptor::SIZE * u64::from(head.index) + 14, head_flags);
        self.slots[usize::from(id)] = count;
        self.free_slots -= count;
        id
    }

    /// Whether a completion waits to be taken.
    pub fn has_completion(&self, memory: &GuestMemory, ring: &RingLayout) -> bool {
        let flags = memory.load_u16(ring.descriptors + Descriptor::SIZE * u64::from(self.used.index) + 14);
        flags & (AVAIL | USED) == if self.used.wrap { AVAIL | USED } else { 0 }
    }

    pub fn try_take(&mut self, memory: &GuestMemory, ring: &RingLayout) -> Option<Used> {
        if !self.has_completion(memory, ring) {
            return None;
        }
        let entry = ring.descriptors + Descriptor::SIZE * u64::from(self.used.index);
        let len = u32::from_le_bytes(memory.read(entry + 8, 4).try_into().expect("4 bytes"));
        let id = memory.load_u16(entry + 12);
        let slots = self.slots.get_mut(usize::from(id)).map_or(0, std::mem::take);
        assert!(slots > 0, "id {id} is completed, and not on its way");
        self.free_ids.push(id);
        self.free_slots += slots;
        self.used.advance(slots, ring.size);
        Some(Used { id: id.into(), len })
    }

    /// Whether the device wants to be kicked for the entries from `since` on.
    pub fn wants_kick(&self, memory: &GuestMemory, ring: &RingLayout, since: Place) -> bool {
        // The flags first: the place that they mean is there with them.
        match memory.load_u16(ring.used + 2) {
            EVENT_DISABLE => false,
            EVENT_DESC => {
                let event = memory.load_u16(ring.used);
                let mut at = since;
                while at != self.avail {
                    if at.bits() == event {
                        return true;
                    }
                    at.advance(1, ring.size);
                }
                false
            }
            _ => true,
        }
    }

    /// With EVENT_IDX: asks for a call at a place; the event flags tell so.
    pub fn ask_for_call_at(memory: &GuestMemory, ring: &RingLayout, place: Place) {
        memory.store_u16(ring.avail, place.bits());
        memory.store_u16(ring.avail + 2, EVENT_DESC);
        fence(Ordering::SeqCst);
    }

    pub fn suppress_calls(memory: &GuestMemory, ring: &RingLayout, suppress: bool) {
        memory.store_u16(ring.avail + 2, if suppress { EVENT_DISABLE } else { 0 });
        fence(Ordering::SeqCst);
    }

    /// With EVENT_IDX: whether the device has looked at everything offered and sleeps.
    pub fn device_waits_here(&self, memory: &GuestMemory, ring: &RingLayout) -> bool {
        memory.load_u16(ring.used + 2) == EVENT_DESC && memory.load_u16(ring.used) == self.avail.bits()
    }
}
