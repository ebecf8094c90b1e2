//! VirtQueue: pop, push, publish, and when to notify; whatever the layout of the ring. It never looks at what a
//! descriptor chain contains.

mod chain;
mod logged;
mod packed;
mod split;
mod tracked;

use std::fs::File;
use std::sync::Arc;

use crate::dirty_log::RingLog;
use crate::guest_memory::GuestMemory;
use crate::inflight::{InflightRegion, Part};
pub use chain::{Chain, Head};
use logged::{Logged, Plain};
use packed::PackedRing;
use split::SplitRing;
use tracked::Tracked;

/// What a guest driver and we agreed on about the ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_RING_PACKED: the layout of the ring.
    pub packed: bool,
}

impl RingFeatures {
    /// The bytes of a ring that are ours to write, of what SET_VRING_ADDR calls the used ring.
    pub(crate) fn used_bytes(self, size: u16) -> u64 {
        if self.packed { packed::EVENT_BYTES } else { split::used_bytes(size) }
    }
}

/// Where a ring is and how large. Addresses are the front-end's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingLayout {
    /// Entries, at most 32768; in a split ring a power of two.
    pub size: u16,
    /// The descriptor table or descriptor ring.
    pub desc: u64,
    /// Split: the available ring. Packed: the driver event suppression structure.
    pub avail: u64,
    /// Split: the used ring. Packed: the device event suppression structure.
    pub used: u64,
    /// The most descriptors in an indirect table.
    pub indirect_max: u16,
}

/// A ring that lies: the queue is broken until it is stopped and started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The ring is not in guest memory, or not aligned.
    #[error("the ring does not lie in guest memory, or is not aligned")]
    Addresses,
    /// Where the ring is said to stand is not in it.
    #[error("the base {base:#x} is no place in a ring of {size}")]
    Base {
        /// As SET_VRING_BASE has it.
        base: u32,
        /// Entries.
        size: u16,
    },
    /// More entries are available than the ring has room for, those in flight included: in a split ring by its index.
    #[error("the available index jumped to {avail_idx} from {last_avail} in a ring of {size}")]
    IndexJump {
        /// What the guest wrote.
        avail_idx: u16,
        /// Up to where we have popped.
        last_avail: u16,
        /// Entries.
        size: u16,
    },
    /// The same of a packed ring.
    #[error("more descriptors are available than the ring of {0} has, those in flight included")]
    Overrun(u16),
    /// A descriptor number that the table does not have.
    #[error("descriptor {0} is outside the table")]
    DescriptorOutOfRange(u16),
    /// A chain longer than the ring: a loop.
    #[error("a descriptor chain is longer than its table; it loops")]
    Loop,
    /// An indirect table where none may be, or of a length that none can have.
    #[error("an indirect table is not allowed here, or its length {0} is wrong")]
    IndirectTable(u32),
    /// A buffer outside guest memory.
    #[error("a buffer of {len} bytes at {addr:#x} is not in guest memory")]
    BufferAddress {
        /// Guest-physical.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// A readable buffer after a writable one.
    #[error("a readable buffer follows a writable one")]
    ReadAfterWrite,
    /// The in-flight region is not what we left.
    #[error("the in-flight region {0}")]
    Inflight(&'static str),
    /// The file behind guest memory, the in-flight region or the dirty log was truncated.
    #[error("the front-end truncated memory that it shares")]
    MemoryLost,
}

/// One virtqueue's device side.
pub struct VirtQueue {
    ring: Ring,
}

/// The layout of the ring. One test of it at each call is all that two layouts cost.
enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
    /// Either, with a part of the in-flight region.
    Tracked(Box<Tracked>),
    /// Any of these, while the guest is migrated.
    Logged(Box<Logged>),
}

impl VirtQueue {
    /// A queue that stands at `base`, as SET_VRING_BASE has it: the number of the next available entry in a split ring,
    /// both positions in a packed one.
    ///
    /// # Errors
    /// [`RingError::Addresses`], [`RingError::Base`].
    pub fn new(
        memory: Arc<GuestMemory>,
        layout: RingLayout,
        features: RingFeatures,
        base: u32,
    ) -> Result<Self, RingError> {
        let ring = match features.packed {
            false => Ring::Split(SplitRing::new(memory, layout, features, base)?),
            true => Ring::Packed(PackedRing::new(memory, layout, features, base)?),
        };
        Ok(Self { ring })
    }

    /// A queue that goes on where its part of the in-flight region says, first with what was in flight; at `base`
    /// (`None`: nobody said) where the part is new.
    ///
    /// # Errors
    /// [`RingError::Addresses`], [`RingError::Base`], [`RingError::Inflight`].
    pub(crate) fn with_inflight(
        memory: Arc<GuestMemory>,
        layout: RingLayout,
        features: RingFeatures,
        base: Option<u32>,
        part: Part,
    ) -> Result<Self, RingError> {
        let tracked = Tracked::new(memory, layout, features, base, part)?;
        Ok(Self { ring: Ring::Tracked(Box::new(tracked)) })
    }

    /// A new queue with an in-flight region of its own, for benches.
    ///
    /// # Panics
    /// If there is no memory for a region, or no ring.
    #[doc(hidden)]
    pub fn with_new_inflight(memory: Arc<GuestMemory>, layout: RingLayout, features: RingFeatures) -> Self {
        let part = Part::new_for_bench(layout.size, features.packed);
        Self::with_inflight(memory, layout, features, Some(0), part).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A queue with the only part of the in-flight region that is `file`, for fuzzing.
    ///
    /// # Errors
    /// Prose: the file is too small for the ring, or what is in it or in the ring contradicts itself.
    #[doc(hidden)]
    pub fn with_inflight_file(
        memory: Arc<GuestMemory>,
        layout: RingLayout,
        features: RingFeatures,
        file: File,
    ) -> Result<Self, String> {
        let size = file.metadata().map_err(|e| e.to_string())?.len();
        let region = InflightRegion::map(file, (0, size), 1, layout.size, features.packed).map(Arc::new)?;
        let part = region.part(0).ok_or("the region has no part")?;
        Self::with_inflight(memory, layout, features, None, part).map_err(|e| e.to_string())
    }

    /// Whether a ring of this layout and size can stand at `base`.
    pub(crate) fn is_base(features: RingFeatures, size: u16, base: u32) -> bool {
        if features.packed { packed::is_base(base, size) } else { u16::try_from(base).is_ok() }
    }

    /// Goes on behind what the guest's memory says is used, for a front-end that does not say where. Before the first
    /// pop. A packed ring's memory does not say it.
    pub fn resume_at_used(&mut self) {
        match &mut self.ring {
            Ring::Split(ring) => ring.resume_at_used(),
            Ring::Packed(_) | Ring::Tracked(_) | Ring::Logged(_) => {}
        }
    }

    /// Takes the next chain into `chain`, whose content is replaced. False when there is none.
    ///
    /// # Errors
    /// The ring lies; nothing was taken, and no further pop makes sense.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.pop(chain),
            Ring::Packed(ring) => ring.pop(chain),
            Ring::Tracked(ring) => ring.pop(chain),
            Ring::Logged(ring) => ring.pop(chain),
        }
    }

    /// Returns a chain with the number of bytes written, from the first device-writable byte on. The guest sees it at
    /// the next [`VirtQueue::publish`].
    #[inline]
    pub fn push(&mut self, head: Head, written: u32) {
        match &mut self.ring {
            Ring::Split(ring) => ring.push(head, written),
            Ring::Packed(ring) => ring.push(head, written),
            Ring::Tracked(ring) => ring.push(head, written),
            Ring::Logged(ring) => ring.push(head, written),
        }
    }

    /// Returns a chain that was carried out, with the number of bytes written, as [`VirtQueue::push`] does.
    #[inline(always)]
    pub(crate) fn complete(&mut self, chain: &Chain, written: u32) {
        match &mut self.ring {
            Ring::Split(ring) => ring.push(chain.head, written),
            Ring::Packed(ring) => ring.push(chain.head, written),
            Ring::Tracked(ring) => ring.push(chain.head, written),
            Ring::Logged(ring) => ring.complete(chain, written),
        }
    }

    /// Shows the guest everything pushed so far. True when the guest wants to be called.
    #[inline]
    pub fn publish(&mut self) -> bool {
        match &mut self.ring {
            Ring::Split(ring) => ring.publish(),
            Ring::Packed(ring) => ring.publish(),
            Ring::Tracked(ring) => ring.publish(),
            Ring::Logged(ring) => ring.publish(),
        }
    }

    /// Whether the guest has shown us a chain that was not popped yet.
    #[inline]
    pub fn has_more(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.has_more(),
            Ring::Packed(ring) => ring.has_more(),
            Ring::Tracked(ring) => ring.has_more(),
            Ring::Logged(ring) => ring.has_more(),
        }
    }

    /// Asks the guest not to kick: we look by ourselves. A hint; kicks may still come.
    #[inline]
    pub fn suppress_kicks(&mut self) {
        match &mut self.ring {
            Ring::Split(ring) => ring.suppress_kicks(),
            Ring::Packed(ring) => ring.suppress_kicks(),
            Ring::Tracked(ring) => ring.suppress_kicks(),
            Ring::Logged(ring) => ring.suppress_kicks(),
        }
    }

    /// Asks the guest to kick again. True when something came meanwhile, for which no kick may have been sent.
    #[inline]
    pub fn enable_kicks(&mut self) -> bool {
        match &mut self.ring {
            Ring::Split(ring) => ring.enable_kicks(),
            Ring::Packed(ring) => ring.enable_kicks(),
            Ring::Tracked(ring) => ring.enable_kicks(),
            Ring::Logged(ring) => ring.enable_kicks(),
        }
    }

    /// Where the queue stands: what GET_VRING_BASE answers, and SET_VRING_BASE takes.
    pub fn base(&self) -> u32 {
        match &self.ring {
            Ring::Split(ring) => ring.next_avail().into(),
            Ring::Packed(ring) => ring.base(),
            Ring::Tracked(ring) => ring.base(),
            Ring::Logged(ring) => ring.base(),
        }
    }

    /// Goes over to another memory table that holds the ring too.
    ///
    /// # Errors
    /// [`RingError::Addresses`]; the old table stays in use then.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.set_memory(memory),
            Ring::Packed(ring) => ring.set_memory(memory),
            Ring::Tracked(ring) => ring.set_memory(memory),
            Ring::Logged(ring) => ring.set_memory(memory),
        }
    }

    /// Whether the front-end truncated the memory, the in-flight region or the log under us.
    pub(crate) fn is_lost(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.memory().is_lost(),
            Ring::Packed(ring) => ring.memory().is_lost(),
            Ring::Tracked(ring) => ring.memory().is_lost() || ring.is_lost(),
            Ring::Logged(ring) => ring.memory().is_lost() || ring.is_lost(),
        }
    }

    /// Begins, changes or ends the logging of what is written into guest memory.
    pub(crate) fn set_log(&mut self, log: Option<RingLog>) {
        let memory = self.memory().clone();
        match (&mut self.ring, log) {
            (Ring::Logged(logged), Some(log)) => logged.log = log,
            (_, None) => {
                let nowhere = Ring::Split(SplitRing::nowhere(memory));
                self.ring = match std::mem::replace(&mut self.ring, nowhere) {
                    Ring::Logged(logged) => logged.ring.into(),
                    plain => plain,
                };
            }
            (ring, Some(log)) => {
                if let Some(plain) = Plain::take(ring, &memory) {
                    *ring = Ring::Logged(Box::new(Logged { ring: plain, log }));
                }
            }
        }
    }

    /// Notes all of the ring in its log, if it has one: at its start it may have been repaired.
    pub(crate) fn log_all(&self) {
        if let Ring::Logged(logged) = &self.ring {
            logged.mark_all();
        }
    }

    /// The memory table in use.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        match &self.ring {
            Ring::Split(ring) => ring.memory(),
            Ring::Packed(ring) => ring.memory(),
            Ring::Tracked(ring) => ring.memory(),
            Ring::Logged(ring) => ring.memory(),
        }
    }
}

#[cfg(test)]
mod tests;
