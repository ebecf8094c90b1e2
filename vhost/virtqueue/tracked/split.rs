//! The tracker of a split ring: QueueRegionSplit and DescStateSplit of the vhost-user specification. Every store to the
//! region is a release, so that they and the used index are seen in the order in which they stand here. What it needs
//! again it keeps in memory of its own: the region is only read at the start.

use std::sync::atomic::Ordering::{Acquire, Release};

use super::super::chain::Chain;
use super::super::split::SplitRing;
use super::RingError;
use crate::inflight::{Part, VERSION};

/// The only version there is.
const CURRENT: u16 = 1;
/// Of the header: version, entries, head of the last batch, used index, from the lowest 16 bits on.
const STATE: usize = 8;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
/// Of an entry.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Whether nobody has used a part yet, of whichever layout.
pub(super) fn is_new(part: &Part) -> Result<bool, RingError> {
    match part.header_u16(VERSION).load(Acquire) {
        0 => Ok(true),
        CURRENT => Ok(false),
        _ => Err(RingError::Inflight("has a version that is not known")),
    }
}

pub(in crate::virtqueue) struct SplitTracker {
    part: Part,
    /// The number of the next chain taken.
    counter: u64,
    last_batch_head: u16,
    /// Pushed, and not published.
    batch: Vec<u16>,
    /// What the process before us had taken and not returned; the first to be taken again comes last.
    replay: Vec<u16>,
}

impl SplitTracker {
    pub(super) fn new(part: Part, is_new: bool, ring: &mut SplitRing) -> Result<Self, RingError> {
        let batch = Vec::with_capacity(ring.size().into());
        let mut tracker = Self { part, counter: 0, last_batch_head: 0, batch, replay: Vec::new() };
        if is_new {
            tracker.initialise(ring.used_idx());
        } else {
            tracker.recover(ring)?;
        }
        Ok(tracker)
    }

    /// The used index is the ring's: with 0, the first recovery would take what was used before for the last batch.
    fn initialise(&self, used_idx: u16) {
        for index in 0..self.part.entries() {
            self.part.entry_u64(index, INFLIGHT).store(0, Release);
            self.part.entry_u64(index, COUNTER).store(0, Release);
        }
        let state = u64::from(CURRENT) | u64::from(self.part.entries()) << 16 | u64::from(used_idx) << 48;
        self.part.header_u64(STATE).store(state, Release);
    }

    fn recover(&mut self, ring: &mut SplitRing) -> Result<(), RingError> {
        let part = &self.part;
        let state = part.header_u64(STATE).load(Acquire);
        let (entries, used_idx) = ((state >> 16) as u16, (state >> 48) as u16);
        self.last_batch_head = (state >> 32) as u16;
        if entries != part.entries() {
            return Err(RingError::Inflight("says another number of entries than the front-end"));
        }
        // What the last batch published may still be marked: it was not cleared before the end.
        let published = ring.used_idx().wrapping_sub(used_idx);
        let is_marked = |index: &u16| part.entry_u8(*index, INFLIGHT).load(Acquire) != 0;
        if published > ring.size() {
            // Another ring, begun anew. Where nothing is in flight, there is nothing to be wrong about.
            if (0..entries).any(|index| is_marked(&index)) {
                return Err(RingError::Inflight("is of another ring"));
            }
        } else {
            let mut index = self.last_batch_head;
            for _ in 0..published {
                if index >= entries {
                    return Err(RingError::Inflight("has a batch with an entry that it has not"));
                }
                part.entry_u8(index, INFLIGHT).store(0, Release);
                index = part.entry_u16(index, NEXT).load(Acquire);
            }
        }
        part.header_u16(USED_IDX).store(ring.used_idx(), Release);
        let counter = |index: u16| part.entry_u64(index, COUNTER).load(Acquire);
        let mut taken: Vec<(u64, u16)> = (0..entries).filter(is_marked).map(|index| (counter(index), index)).collect();
        if taken.len() > usize::from(ring.size()) || taken.iter().any(|(_, index)| *index >= ring.size()) {
            return Err(RingError::Inflight("has more in flight than the ring"));
        }
        taken.sort_unstable();
        self.counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        ring.resume_with(taken.len() as u16);
        self.replay = taken.into_iter().rev().map(|(_, index)| index).collect();
        Ok(())
    }

    pub(super) fn has_replay(&self) -> bool {
        !self.replay.is_empty()
    }

    pub(super) fn is_lost(&self) -> bool {
        self.part.is_lost()
    }

    #[inline]
    pub(super) fn pop(&mut self, ring: &mut SplitRing, chain: &mut Chain) -> Result<bool, RingError> {
        if let Some(head) = self.replay.last() {
            ring.take_again(*head, chain)?;
            self.replay.pop();
            return Ok(true);
        }
        let popped = ring.pop(chain)?;
        if popped {
            let head = chain.head.number;
            self.part.entry_u64(head, COUNTER).store(self.counter, Release);
            self.part.entry_u8(head, INFLIGHT).store(1, Release);
            self.counter = self.counter.wrapping_add(1);
        }
        Ok(popped)
    }

    #[inline]
    pub(super) fn pushed(&mut self, head: u16) {
        self.part.entry_u16(head, NEXT).store(self.last_batch_head, Release);
        self.part.header_u16(LAST_BATCH_HEAD).store(head, Release);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    #[inline]
    pub(super) fn published(&mut self, ring: &SplitRing) {
        if self.batch.is_empty() {
            return;
        }
        for head in self.batch.drain(..) {
            self.part.entry_u8(head, INFLIGHT).store(0, Release);
        }
        self.part.header_u16(USED_IDX).store(ring.used_idx(), Release);
    }
}
