//! VirtQueue: pop, push, publish, and when to notify; whatever the layout of the ring. It owns the in-flight tracker.
//! It never looks at what a descriptor chain contains.

mod split;

use std::sync::Arc;

use blockport_block::iovec::IoVec;

use crate::guest_memory::GuestMemory;
use crate::inflight::Inflight;
use split::SplitRing;

/// A popped descriptor chain: who pops it pushes it exactly once.
#[derive(Debug, Default)]
pub struct Chain {
    /// The number by which it is returned.
    pub head: u16,
    /// The device-readable buffers, then the device-writable ones; none is empty.
    pub iov: Vec<IoVec>,
    /// How many of them are readable.
    pub readable: usize,
}

/// What a guest driver and we agreed on about the ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC.
    pub indirect: bool,
}

/// Where a ring is and how large. Addresses are the front-end's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingLayout {
    /// Entries, a power of two, at most 32768.
    pub size: u16,
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
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
    /// More entries than the ring has room for, those in flight included.
    #[error("the available index jumped to {avail_idx} from {last_avail} in a ring of {size}")]
    IndexJump {
        /// What the guest wrote.
        avail_idx: u16,
        /// Up to where we have popped.
        last_avail: u16,
        /// Entries.
        size: u16,
    },
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
    /// The file behind guest memory was truncated.
    #[error("the front-end truncated the guest's memory")]
    MemoryLost,
}

/// One virtqueue's device side.
pub struct VirtQueue {
    ring: SplitRing,
    inflight: Option<Inflight>,
}

impl VirtQueue {
    /// A queue whose next available entry is number `base`.
    ///
    /// # Errors
    /// [`RingError::Addresses`].
    pub fn new(
        memory: Arc<GuestMemory>,
        layout: RingLayout,
        features: RingFeatures,
        base: u16,
    ) -> Result<Self, RingError> {
        Ok(Self { ring: SplitRing::new(memory, layout, features, base)?, inflight: None })
    }

    /// Goes on behind what the guest's memory says is used, for a front-end that does not say where. Before the first
    /// pop.
    pub fn resume_at_used(&mut self) {
        self.ring.resume_at_used();
    }

    /// Takes the next chain into `chain`, whose content is replaced. False when there is none.
    ///
    /// # Errors
    /// The ring lies; nothing was taken, and no further pop makes sense.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let popped = self.ring.pop(chain)?;
        if popped && let Some(inflight) = &mut self.inflight {
            inflight.popped(chain.head);
        }
        Ok(popped)
    }

    /// Returns a chain with the number of bytes written, from the first device-writable byte on. The guest sees it at
    /// the next [`VirtQueue::publish`].
    #[inline]
    pub fn push(&mut self, head: u16, written: u32) {
        self.ring.push(head, written);
        if let Some(inflight) = &mut self.inflight {
            inflight.pushed(head);
        }
    }

    /// Shows the guest everything pushed so far. True when the guest wants to be called.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let call = self.ring.publish();
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.ring.used_idx());
        }
        call
    }

    /// Asks the guest not to kick: we look by ourselves. A hint; kicks may still come.
    #[inline]
    pub fn suppress_kicks(&mut self) {
        self.ring.suppress_kicks();
    }

    /// Asks the guest to kick again. True when something came meanwhile, for which no kick may have been sent.
    #[inline]
    pub fn enable_kicks(&mut self) -> bool {
        self.ring.enable_kicks()
    }

    /// The number of the next available entry: what GET_VRING_BASE answers.
    pub fn next_avail(&self) -> u16 {
        self.ring.next_avail()
    }

    /// Goes over to another memory table that holds the ring too.
    ///
    /// # Errors
    /// [`RingError::Addresses`]; the old table stays in use then.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        self.ring.set_memory(memory)
    }

    /// The memory table in use.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        self.ring.memory()
    }
}

#[cfg(test)]
mod tests;
