//! The driver's side of a packed virtqueue (virtio 1.3 §2.8). A chain's descriptors are written for each request, as the
//! ring is one; its buffer id is the slot.

use std::sync::atomic::{Ordering, fence};

use super::super::memory::Area;
use super::{Kind, NEXT, NOT_IN_FLIGHT, Requests};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Of an event suppression structure: a place, then two bits of what is wanted (§2.8.14).
const EVENT_FLAGS: usize = 2;
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const AT_PLACE: u16 = 2;

/// A place in the ring, with the wrap counter that belongs to it.
#[derive(Clone, Copy)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    #[inline]
    fn advance(&mut self, by: u16, size: u16) {
        self.index += by;
        if self.index >= size {
            self.index -= size;
            self.wrap ^= true;
        }
    }

    #[inline]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }
}

pub(super) struct PackedRing {
    area: Area,
    size: u16,
    event_idx: bool,
    /// How many descriptors each slot has in the ring; 0: it is not in flight.
    slots: Vec<u16>,
    next_avail: Place,
    /// The flags of the first descriptor that is not shown, and where it is.
    hidden: Option<(u16, u16)>,
    /// Descriptors made available since the device was last asked whether it wants a kick.
    not_asked: u16,
    next_used: Place,
}

impl PackedRing {
    pub(super) fn new(area: Area, size: u16, event_idx: bool, slots: u16) -> Self {
        let start = Place { index: 0, wrap: true };
        let slots = vec![0; slots.into()];
        Self { area, size, event_idx, slots, next_avail: start, hidden: None, not_asked: 0, next_used: start }
    }

    #[inline]
    fn flags_at(index: u16) -> usize {
        16 * usize::from(index) + 14
    }

    #[inline]
    pub(super) fn submit(&mut self, requests: &Requests, slot: u16, kind: Kind) {
        let mut count = 0;
        for (part, (addr, len, flags)) in requests.parts(slot, kind).into_iter().enumerate() {
            if part == 1 && kind == Kind::Flush {
                continue;
            }
            let Place { index, .. } = self.next_avail;
            let at = 16 * usize::from(index);
            self.area.u64(at).store(addr, Ordering::Relaxed);
            // The id counts in the last one only (§2.8.5).
            self.area.u32(at + 8).store(len, Ordering::Relaxed);
            self.area.u16(at + 12).store(slot, Ordering::Relaxed);
            let flags = flags | self.next_avail.available();
            if self.hidden.is_none() {
                self.hidden = Some((index, flags));
            } else {
                // What is hidden hides all behind it.
                self.area.u16(Self::flags_at(index)).store(flags, Ordering::Relaxed);
            }
            self.next_avail.advance(1, self.size);
            count += 1;
            debug_assert!(flags & NEXT != 0 || part == 2);
        }
        self.slots[usize::from(slot)] = count;
        self.not_asked += count;
    }

    #[inline]
    pub(super) fn show(&mut self) {
        if let Some((index, flags)) = self.hidden.take() {
            // Release: all else of the batch comes before.
            self.area.u16(Self::flags_at(index)).store(flags, Ordering::Release);
        }
    }

    #[inline]
    pub(super) fn needs_kick(&mut self) -> bool {
        let new = std::mem::take(&mut self.not_asked);
        // §2.8.21.3.1: the flags must be visible before the device's wish is read.
        fence(Ordering::SeqCst);
        let device = 16 * usize::from(self.size) + 4;
        match self.area.u16(device + EVENT_FLAGS).load(Ordering::Relaxed) & 3 {
            DISABLE => false,
            AT_PLACE if self.event_idx => {
                let event = self.area.u16(device).load(Ordering::Relaxed);
                // Both counted from where this lap of the ring begins.
                let lap = if (event & USED != 0) == self.next_avail.wrap { 0 } else { i32::from(self.size) };
                let behind = i32::from(self.next_avail.index) - (i32::from(event & !USED) - lap);
                (1..=i32::from(new)).contains(&behind)
            }
            _ => true,
        }
    }

    #[inline]
    pub(super) fn has_answer(&self) -> bool {
        let flags = self.area.u16(Self::flags_at(self.next_used.index)).load(Ordering::Acquire);
        let both = if self.next_used.wrap { AVAIL | USED } else { 0 };
        flags & (AVAIL | USED) == both
    }

    #[inline]
    pub(super) fn next_answer(&mut self) -> Result<Option<u16>, &'static str> {
        // A slot of an idle ring would look used in the second lap.
        if !self.has_answer() {
            return Ok(None);
        }
        let slot = self.area.u16(16 * usize::from(self.next_used.index) + 12).load(Ordering::Relaxed);
        match self.slots.get_mut(usize::from(slot)).map(std::mem::take) {
            None | Some(0) => Err(NOT_IN_FLIGHT),
            Some(count) => {
                self.next_used.advance(count, self.size);
                Ok(Some(slot))
            }
        }
    }

    pub(super) fn ask_for_calls(&mut self, enabled: bool) {
        let driver = 16 * usize::from(self.size);
        let flags = match (enabled, self.event_idx) {
            (false, _) => DISABLE,
            (true, false) => ENABLE,
            (true, true) => AT_PLACE,
        };
        let wrap = if self.next_used.wrap { USED } else { 0 };
        self.area.u16(driver).store(self.next_used.index | wrap, Ordering::Relaxed);
        self.area.u16(driver + EVENT_FLAGS).store(flags, Ordering::Release);
        // Our wish must be visible before the ring is looked at once more.
        fence(Ordering::SeqCst);
    }
}
