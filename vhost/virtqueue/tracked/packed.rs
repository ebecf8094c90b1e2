//! The tracker of a packed ring: QueueRegionPacked and DescStatePacked of the vhost-user specification. An entry keeps a
//! descriptor, as those in the ring are overwritten by completions; the entries of a chain are linked, and so are the free
//! ones. Every store is a release. Fields that must change together share a store of eight bytes. What it needs again it
//! keeps in memory of its own: the region is only read at the start.

use std::sync::atomic::Ordering::{Acquire, Release};

use super::super::chain::{Chain, Head};
use super::super::packed::{PackedRing, Place};
use super::RingError;
use crate::inflight::Part;

/// The only version there is.
const CURRENT: u16 = 1;
/// The base of a ring that is new.
pub(super) const NEW_RING: u32 = 0x8000_8000;
/// Of the header: version, entries, free_head, old_free_head, from the lowest 16 bits on.
const LISTS: usize = 8;
/// Of the header: used_idx, old_used_idx, and in a byte each used_wrap_counter and old_used_wrap_counter.
const PLACES: usize = 16;
/// Of an entry: a byte inflight, then from 16 bits on next, last, num.
const LINKS: usize = 0;
const INFLIGHT: usize = 0;
const NEXT: usize = 2;
const COUNTER: usize = 8;
/// Of an entry: id, flags, and 32 bits of length.
const ID_FLAGS_LEN: usize = 16;
const ADDR: usize = 24;

/// A chain that the process before us had taken and not returned.
struct Taken {
    counter: u64,
    entries: Vec<u16>,
}

pub(in crate::virtqueue) struct PackedTracker {
    part: Part,
    /// The number of the next chain taken.
    counter: u64,
    /// The links of the entries, as in the region.
    next: Box<[u16]>,
    free_head: u16,
    /// Pushed, and not published.
    batch: Vec<Head>,
    /// The place up to which completions are published.
    used: Place,
    /// What the process before us had taken and not returned; the first to be taken again comes last.
    replay: Vec<Taken>,
}

fn lists(entries: u16, free_head: u16, old_free_head: u16) -> u64 {
    u64::from(CURRENT) | u64::from(entries) << 16 | u64::from(free_head) << 32 | u64::from(old_free_head) << 48
}

fn places(used: Place, old: Place) -> u64 {
    let wraps = u64::from(used.wrap) << 32 | u64::from(old.wrap) << 40;
    u64::from(used.index) | u64::from(old.index) << 16 | wraps
}

impl PackedTracker {
    pub(super) fn new(part: Part, is_new: bool, ring: &mut PackedRing) -> Result<Self, RingError> {
        let entries = part.entries();
        let mut tracker = Self {
            counter: 0,
            next: (1..=entries).collect(),
            free_head: 0,
            batch: Vec::with_capacity(ring.size().into()),
            used: ring.next_used(),
            replay: Vec::new(),
            part,
        };
        if is_new {
            tracker.initialise();
        } else {
            tracker.recover(ring)?;
        }
        Ok(tracker)
    }

    fn initialise(&self) {
        for (index, next) in (0..).zip(&self.next) {
            self.part.entry_u64(index, LINKS).store(u64::from(*next) << 16, Release);
        }
        self.part.header_u64(PLACES).store(places(self.used, self.used), Release);
        self.part.header_u64(LISTS).store(lists(self.part.entries(), 0, 0), Release);
    }

    fn recover(&mut self, ring: &mut PackedRing) -> Result<(), RingError> {
        let entries = self.part.entries();
        let (at, state) = (self.part.header_u64(PLACES).load(Acquire), self.part.header_u64(LISTS).load(Acquire));
        let place = |index: u64, wrap: u64| Place { index: index as u16, wrap: wrap as u8 != 0 };
        let (used, old_used) = (place(at, at >> 32), place(at >> 16, at >> 40));
        let (free_head, old_free_head) = ((state >> 32) as u16, (state >> 48) as u16);
        if (state >> 16) as u16 != entries {
            return Err(RingError::Inflight("says another number of entries than the front-end"));
        }
        if used.index >= ring.size() || old_used.index >= ring.size() {
            return Err(RingError::Inflight("stands where the ring has nothing"));
        }
        // A batch that was begun: was its first entry shown?
        let shown = used != old_used && ring.is_used_at(old_used);
        let (head, used) = if shown { (free_head, used) } else { (old_free_head, old_used) };
        self.part.header_u64(LISTS).store(lists(entries, head, head), Release);
        self.part.header_u64(PLACES).store(places(used, used), Release);
        // What is free is not in flight, whatever it is marked with.
        let mut index = head;
        for _ in 0..entries {
            if index >= entries {
                break;
            }
            self.part.entry_u8(index, INFLIGHT).store(0, Release);
            index = self.part.entry_u16(index, NEXT).load(Acquire);
        }
        self.replay = self.taken(ring.size())?;
        self.counter = self.replay.last().map_or(0, |taken| taken.counter.wrapping_add(1));
        self.replay.reverse();
        self.link_free_entries();
        self.used = used;
        let slots = self.replay.iter().map(|taken| taken.entries.len()).sum::<usize>();
        ring.resume_with(used, slots as u16);
        Ok(())
    }

    /// The chains in flight, in the order in which they were taken.
    fn taken(&self, ring_size: u16) -> Result<Vec<Taken>, RingError> {
        let entries = self.part.entries();
        let mut all = Vec::new();
        let mut seen = vec![false; usize::from(entries)];
        let mut slots = 0;
        for head in 0..entries {
            let links = self.part.entry_u64(head, LINKS).load(Acquire);
            if links as u8 == 0 {
                continue;
            }
            let count = usize::from((links >> 48) as u16);
            slots += count;
            if count == 0 || slots > usize::from(ring_size) {
                return Err(RingError::Inflight("has more in flight than the ring, or a chain of nothing"));
            }
            let mut chain = Vec::with_capacity(count);
            let mut index = head;
            for _ in 0..count {
                if index >= entries || std::mem::replace(&mut seen[usize::from(index)], true) {
                    return Err(RingError::Inflight("has a chain that runs out of it, or into another"));
                }
                chain.push(index);
                index = self.part.entry_u16(index, NEXT).load(Acquire);
            }
            all.push(Taken { counter: self.part.entry_u64(head, COUNTER).load(Acquire), entries: chain });
        }
        all.sort_unstable_by_key(|taken| taken.counter);
        Ok(all)
    }

    /// Links all entries that are not in flight anew, as the front-end may have written anything. Every link in between
    /// leads from one of them to another, so that it does no harm to end here.
    fn link_free_entries(&mut self) {
        let entries = self.part.entries();
        let mut free = vec![true; usize::from(entries)];
        for taken in &self.replay {
            for (at, index) in taken.entries.iter().enumerate() {
                free[usize::from(*index)] = false;
                self.next[usize::from(*index)] = taken.entries.get(at + 1).copied().unwrap_or(entries);
            }
        }
        self.free_head = entries;
        for index in (0..entries).rev().filter(|index| free[usize::from(*index)]) {
            self.next[usize::from(index)] = self.free_head;
            self.part.entry_u16(index, NEXT).store(self.free_head, Release);
            self.free_head = index;
        }
        self.part.header_u64(LISTS).store(lists(entries, self.free_head, self.free_head), Release);
    }

    pub(super) fn has_replay(&self) -> bool {
        !self.replay.is_empty()
    }

    pub(super) fn is_lost(&self) -> bool {
        self.part.is_lost()
    }

    #[inline]
    pub(super) fn pop(&mut self, ring: &mut PackedRing, chain: &mut Chain) -> Result<bool, RingError> {
        if !self.replay.is_empty() {
            return self.take_again(ring, chain);
        }
        let from = ring.next_avail();
        let popped = ring.pop(chain)?;
        if popped {
            self.popped(ring, from, &mut chain.head);
        }
        Ok(popped)
    }

    /// Keeps the descriptors of a chain that begins at a place of the ring. It counts as taken when the free list no
    /// longer has its entries.
    #[inline]
    fn popped(&mut self, ring: &PackedRing, from: Place, head: &mut Head) {
        let (mut at, mut index, first) = (from, self.free_head, self.free_head);
        let mut last = first;
        for _ in 0..head.slots {
            let (addr, len_id_flags) = ring.raw_at(at);
            self.part.entry_u64(index, ADDR).store(addr, Release);
            self.part.entry_u64(index, ID_FLAGS_LEN).store(len_id_flags.rotate_left(32), Release);
            last = index;
            index = self.next[usize::from(index)];
            at.advance(1, ring.size());
        }
        let links =
            u64::from(self.next[usize::from(first)]) << 16 | u64::from(last) << 32 | u64::from(head.slots) << 48;
        self.part.entry_u64(first, COUNTER).store(self.counter, Release);
        self.part.entry_u64(first, LINKS).store(links | 1, Release);
        self.part.header_u64(LISTS).store(lists(self.part.entries(), index, index), Release);
        self.counter = self.counter.wrapping_add(1);
        self.free_head = index;
        (head.entry, head.last) = (first, last);
    }

    #[cold]
    fn take_again(&mut self, ring: &PackedRing, chain: &mut Chain) -> Result<bool, RingError> {
        let Some(taken) = self.replay.last() else { return Ok(false) };
        let descriptor = |index: &u16| {
            let id_flags_len = self.part.entry_u64(*index, ID_FLAGS_LEN).load(Acquire);
            (self.part.entry_u64(*index, ADDR).load(Acquire), id_flags_len.rotate_right(32))
        };
        ring.take_again(taken.entries.iter().map(descriptor), chain)?;
        let ends = (taken.entries.first(), taken.entries.last());
        if let (Some(first), Some(last)) = ends {
            (chain.head.entry, chain.head.last) = (*first, *last);
        }
        self.replay.pop();
        Ok(true)
    }

    #[inline]
    pub(super) fn pushed(&mut self, head: Head) {
        self.batch.push(head);
    }

    /// Gives the entries of the batch back to the free list, shows the batch, and says so.
    #[inline]
    pub(super) fn publish(&mut self, ring: &mut PackedRing) -> bool {
        if self.batch.is_empty() {
            return false;
        }
        let (entries, old_free_head, old_used) = (self.part.entries(), self.free_head, self.used);
        for head in &self.batch {
            self.part.entry_u16(head.last, NEXT).store(self.free_head, Release);
            self.next[usize::from(head.last)] = self.free_head;
            self.free_head = head.entry;
        }
        self.used = ring.next_used();
        self.part.header_u64(LISTS).store(lists(entries, self.free_head, old_free_head), Release);
        self.part.header_u64(PLACES).store(places(self.used, old_used), Release);
        let call = ring.publish();
        for head in self.batch.drain(..) {
            self.part.entry_u8(head.entry, INFLIGHT).store(0, Release);
        }
        self.part.header_u64(LISTS).store(lists(entries, self.free_head, self.free_head), Release);
        self.part.header_u64(PLACES).store(places(self.used, self.used), Release);
        call
    }
}
