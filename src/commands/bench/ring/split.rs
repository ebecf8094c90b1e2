//! The driver's side of a split virtqueue (virtio 1.3 §2.7). Slot `n` has descriptors `3n` to `3n + 2` for ever; they are
//! written again only when the slot changes between reading, writing and flushing.

use std::sync::atomic::{Ordering, fence};

use super::super::memory::Area;
use super::{DESCRIPTORS_PER_REQUEST, Kind, NEXT, NOT_IN_FLIGHT, Requests};

/// Byte offsets in the available and used rings (§2.7.6, §2.7.8).
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;
/// Of the available ring's flags and the used ring's: no call or kick, please.
const NO_NOTIFICATION: u16 = 1;

pub(super) struct SplitRing {
    area: Area,
    avail: usize,
    used: usize,
    size: u16,
    event_idx: bool,
    /// What the descriptors of each slot are for, and whether it is in flight.
    slots: Vec<(Option<Kind>, bool)>,
    next_avail: u16,
    /// Where the device was last asked whether it wants a kick.
    asked_at: u16,
    next_used: u16,
    seen_used: u16,
}

impl SplitRing {
    pub(super) fn new(area: Area, size: u16, event_idx: bool, slots: u16) -> Self {
        let entries = usize::from(size);
        let avail = 16 * entries;
        let used = avail + (8 + 2 * entries).next_multiple_of(4);
        let slots = vec![(None, false); slots.into()];
        Self { area, avail, used, size, event_idx, slots, next_avail: 0, asked_at: 0, next_used: 0, seen_used: 0 }
    }

    #[inline]
    fn entry(&self, index: u16) -> usize {
        usize::from(index % self.size)
    }

    #[cold]
    fn describe(&mut self, requests: &Requests, slot: u16, kind: Kind) {
        let first = DESCRIPTORS_PER_REQUEST * slot;
        for (index, (addr, len, flags)) in (first..).zip(requests.parts(slot, kind)) {
            let at = 16 * usize::from(index);
            self.area.u64(at).store(addr, Ordering::Relaxed);
            self.area.u32(at + 8).store(len, Ordering::Relaxed);
            self.area.u16(at + 12).store(flags, Ordering::Relaxed);
            let skips_data = index == first && kind == Kind::Flush;
            let next = if flags & NEXT == 0 { 0 } else { index + 1 + u16::from(skips_data) };
            self.area.u16(at + 14).store(next, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(super) fn submit(&mut self, requests: &Requests, slot: u16, kind: Kind) {
        if self.slots[usize::from(slot)].0 != Some(kind) {
            self.describe(requests, slot, kind);
        }
        self.slots[usize::from(slot)] = (Some(kind), true);
        let at = self.avail + ENTRIES + 2 * self.entry(self.next_avail);
        self.area.u16(at).store(DESCRIPTORS_PER_REQUEST * slot, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    #[inline]
    pub(super) fn show(&self) {
        // Release: entries, descriptors and headers come before.
        self.area.u16(self.avail + INDEX).store(self.next_avail, Ordering::Release);
    }

    #[inline]
    pub(super) fn needs_kick(&mut self) -> bool {
        let (old, new) = (std::mem::replace(&mut self.asked_at, self.next_avail), self.next_avail);
        // The index must be visible before the device's wish is read (§2.7.13.4.1).
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.area.u16(self.used + FLAGS).load(Ordering::Relaxed) & NO_NOTIFICATION == 0;
        }
        let event = self.area.u16(self.used + ENTRIES + 8 * usize::from(self.size)).load(Ordering::Relaxed);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    #[inline]
    pub(super) fn has_answer(&self) -> bool {
        self.seen_used != self.next_used || self.area.u16(self.used + INDEX).load(Ordering::Relaxed) != self.next_used
    }

    #[inline]
    pub(super) fn next_answer(&mut self) -> Result<Option<u16>, &'static str> {
        if self.seen_used == self.next_used {
            // Acquire: what it covers was written before it.
            self.seen_used = self.area.u16(self.used + INDEX).load(Ordering::Acquire);
            if self.seen_used == self.next_used {
                return Ok(None);
            }
        }
        let at = self.used + ENTRIES + 8 * self.entry(self.next_used);
        let head = self.area.u32(at).load(Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        let slot = (head / u32::from(DESCRIPTORS_PER_REQUEST)) as usize;
        match self.slots.get_mut(slot) {
            Some((_, in_flight)) if *in_flight && head.is_multiple_of(u32::from(DESCRIPTORS_PER_REQUEST)) => {
                *in_flight = false;
                Ok(Some(slot as u16))
            }
            _ => Err(NOT_IN_FLIGHT),
        }
    }

    pub(super) fn ask_for_calls(&mut self, enabled: bool) {
        if self.event_idx {
            // A place that was just passed is reached again only after 65536 answers.
            let event = if enabled { self.next_used } else { self.next_used.wrapping_sub(1) };
            self.area.u16(self.avail + ENTRIES + 2 * usize::from(self.size)).store(event, Ordering::Relaxed);
        } else {
            let flags = if enabled { 0 } else { NO_NOTIFICATION };
            self.area.u16(self.avail + FLAGS).store(flags, Ordering::Relaxed);
        }
        // Our wish must be visible before the ring is looked at once more (§2.7.14).
        fence(Ordering::SeqCst);
    }
}
