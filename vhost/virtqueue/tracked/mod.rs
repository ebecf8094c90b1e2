//! Tracked: a ring with its part of the in-flight region, so that a process after us knows which chains were taken and
//! not returned. They come first, in the order in which they were taken; then what is new.

mod packed;
mod split;

use std::sync::Arc;

use super::chain::{Chain, Head};
use super::packed::PackedRing;
use super::split::SplitRing;
use super::{RingError, RingFeatures, RingLayout};
use crate::guest_memory::GuestMemory;
use crate::inflight::Part;
use packed::PackedTracker;
use split::SplitTracker;

/// A ring and its tracker. Its methods are not inlined, so that they cost a ring without one nothing.
pub(super) enum Tracked {
    Split(SplitRing, SplitTracker),
    Packed(PackedRing, PackedTracker),
}

impl Tracked {
    /// A ring that goes on where its part says; at `base` (`None`: unknown) where the part is new.
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        layout: RingLayout,
        features: RingFeatures,
        base: Option<u32>,
        part: Part,
    ) -> Result<Self, RingError> {
        if layout.size > part.entries() {
            return Err(RingError::Inflight("has fewer entries than the ring"));
        }
        let is_new = split::is_new(&part)?;
        if features.packed {
            let base = if is_new { base.unwrap_or(0) } else { packed::NEW_RING };
            let mut ring = PackedRing::new(memory, layout, features, base)?;
            let tracker = PackedTracker::new(part, is_new, &mut ring)?;
            Ok(Self::Packed(ring, tracker))
        } else {
            let mut ring = SplitRing::new(memory, layout, features, if is_new { base.unwrap_or(0) } else { 0 })?;
            if is_new && base.is_none() {
                ring.resume_at_used();
            }
            let tracker = SplitTracker::new(part, is_new, &mut ring)?;
            Ok(Self::Split(ring, tracker))
        }
    }

    #[inline(never)]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        match self {
            Self::Split(ring, tracker) => tracker.pop(ring, chain),
            Self::Packed(ring, tracker) => tracker.pop(ring, chain),
        }
    }

    #[inline(never)]
    pub(super) fn push(&mut self, head: Head, written: u32) {
        match self {
            Self::Split(ring, tracker) => {
                ring.push(head, written);
                tracker.pushed(head.number);
            }
            Self::Packed(ring, tracker) => {
                ring.push(head, written);
                tracker.pushed(head);
            }
        }
    }

    #[inline(never)]
    pub(super) fn publish(&mut self) -> bool {
        match self {
            Self::Split(ring, tracker) => {
                let call = ring.publish();
                tracker.published(ring);
                call
            }
            Self::Packed(ring, tracker) => tracker.publish(ring),
        }
    }

    pub(super) fn has_more(&self) -> bool {
        match self {
            Self::Split(ring, tracker) => tracker.has_replay() || ring.has_more(),
            Self::Packed(ring, tracker) => tracker.has_replay() || ring.has_more(),
        }
    }

    #[inline(never)]
    pub(super) fn enable_kicks(&mut self) -> bool {
        match self {
            Self::Split(ring, tracker) => ring.enable_kicks() || tracker.has_replay(),
            Self::Packed(ring, tracker) => ring.enable_kicks() || tracker.has_replay(),
        }
    }

    #[inline(never)]
    pub(super) fn suppress_kicks(&mut self) {
        match self {
            Self::Split(ring, _) => ring.suppress_kicks(),
            Self::Packed(ring, _) => ring.suppress_kicks(),
        }
    }

    pub(super) fn split(&self) -> Option<&SplitRing> {
        match self {
            Self::Split(ring, _) => Some(ring),
            Self::Packed(..) => None,
        }
    }

    pub(super) fn packed(&self) -> Option<&PackedRing> {
        match self {
            Self::Packed(ring, _) => Some(ring),
            Self::Split(..) => None,
        }
    }

    pub(super) fn base(&self) -> u32 {
        match self {
            Self::Split(ring, _) => ring.next_avail().into(),
            Self::Packed(ring, _) => ring.base(),
        }
    }

    pub(super) fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        match self {
            Self::Split(ring, _) => ring.set_memory(memory),
            Self::Packed(ring, _) => ring.set_memory(memory),
        }
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        match self {
            Self::Split(ring, _) => ring.memory(),
            Self::Packed(ring, _) => ring.memory(),
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        match self {
            Self::Split(_, tracker) => tracker.is_lost(),
            Self::Packed(_, tracker) => tracker.is_lost(),
        }
    }
}
