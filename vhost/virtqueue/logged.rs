//! Logged: a ring while its guest is migrated: all that is written into guest memory is noted in the front-end's log, the
//! data of a request when it completes, what we write into the ring itself when that is done. A ring that is not logged
//! knows nothing of it.

use std::sync::Arc;

use super::chain::{Chain, Head};
use super::packed::{DESCRIPTOR_BYTES, PackedRing};
use super::split::{self, SplitRing};
use super::tracked::Tracked;
use super::{Ring, RingError};
use crate::dirty_log::RingLog;
use crate::guest_memory::GuestMemory;

/// A ring that is not logged.
pub(super) enum Plain {
    Split(SplitRing),
    Packed(PackedRing),
    Tracked(Box<Tracked>),
}

impl Plain {
    /// Takes the ring out of its place, in which something else is to be put. `None`: it is logged.
    pub(super) fn take(ring: &mut Ring, memory: &Arc<GuestMemory>) -> Option<Self> {
        // It is never used.
        let nowhere = Ring::Split(SplitRing::nowhere(memory.clone()));
        match std::mem::replace(ring, nowhere) {
            Ring::Split(ring) => Some(Self::Split(ring)),
            Ring::Packed(ring) => Some(Self::Packed(ring)),
            Ring::Tracked(ring) => Some(Self::Tracked(ring)),
            logged @ Ring::Logged(_) => {
                *ring = logged;
                None
            }
        }
    }

    fn split(&self) -> Option<&SplitRing> {
        match self {
            Self::Split(ring) => Some(ring),
            Self::Tracked(tracked) => tracked.split(),
            Self::Packed(_) => None,
        }
    }

    fn packed(&self) -> Option<&PackedRing> {
        match self {
            Self::Packed(ring) => Some(ring),
            Self::Tracked(tracked) => tracked.packed(),
            Self::Split(_) => None,
        }
    }
}

impl From<Plain> for Ring {
    fn from(plain: Plain) -> Self {
        match plain {
            Plain::Split(ring) => Self::Split(ring),
            Plain::Packed(ring) => Self::Packed(ring),
            Plain::Tracked(ring) => Self::Tracked(ring),
        }
    }
}

/// A ring with its log. Its methods are not inlined, so that they cost a ring without one nothing.
pub(super) struct Logged {
    pub(super) ring: Plain,
    pub(super) log: RingLog,
}

impl Logged {
    /// Notes all that the device may have written for a request, which is complete; returns it to the guest. Bits come
    /// after the bytes, and before the guest can see that they are there.
    #[inline(never)]
    pub(super) fn complete(&mut self, chain: &Chain, written: u32) {
        let writable = chain.iov.get(chain.readable..).unwrap_or_default();
        let data = writable.iter().map(|buffer| (buffer.base() as usize, buffer.len() as u64));
        for (host, bytes) in data.chain([(chain.status, 1)]) {
            // The buffers of one that was kept for long may be in memory that the ring has left.
            let held = || chain.memory.as_ref().and_then(|memory| memory.host_to_guest(host));
            if let Some(addr) = self.memory().host_to_guest(host).or_else(held) {
                self.log.log.mark(addr, bytes);
            }
        }
        self.push(chain.head, written);
    }

    #[inline(never)]
    pub(super) fn push(&mut self, head: Head, written: u32) {
        let element = self.next_element();
        match &mut self.ring {
            Plain::Split(ring) => ring.push(head, written),
            Plain::Packed(ring) => ring.push(head, written),
            Plain::Tracked(ring) => ring.push(head, written),
        }
        self.mark(element);
    }

    #[inline(never)]
    pub(super) fn publish(&mut self) -> bool {
        // Of a packed ring, the flags of a batch's first entry are written only now.
        let first = self.ring.packed().and_then(|ring| ring.batch_entry());
        let first = first.and_then(|index| self.entries(index, 1));
        let wants_call = match &mut self.ring {
            Plain::Split(ring) => ring.publish(),
            Plain::Packed(ring) => ring.publish(),
            Plain::Tracked(ring) => ring.publish(),
        };
        match self.ring.packed() {
            Some(_) => self.mark(first),
            None => self.mark(self.in_ring(split::USED_INDEX)),
        }
        wants_call
    }

    #[inline(never)]
    pub(super) fn suppress_kicks(&mut self) {
        match &mut self.ring {
            Plain::Split(ring) => ring.suppress_kicks(),
            Plain::Packed(ring) => ring.suppress_kicks(),
            Plain::Tracked(ring) => ring.suppress_kicks(),
        }
        self.mark_wish();
    }

    #[inline(never)]
    pub(super) fn enable_kicks(&mut self) -> bool {
        let more = match &mut self.ring {
            Plain::Split(ring) => ring.enable_kicks(),
            Plain::Packed(ring) => ring.enable_kicks(),
            Plain::Tracked(ring) => ring.enable_kicks(),
        };
        self.mark_wish();
        more
    }

    #[inline(never)]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        match &mut self.ring {
            Plain::Split(ring) => ring.pop(chain),
            Plain::Packed(ring) => ring.pop(chain),
            Plain::Tracked(ring) => ring.pop(chain),
        }
    }

    pub(super) fn has_more(&self) -> bool {
        match &self.ring {
            Plain::Split(ring) => ring.has_more(),
            Plain::Packed(ring) => ring.has_more(),
            Plain::Tracked(ring) => ring.has_more(),
        }
    }

    pub(super) fn base(&self) -> u32 {
        match &self.ring {
            Plain::Split(ring) => ring.next_avail().into(),
            Plain::Packed(ring) => ring.base(),
            Plain::Tracked(ring) => ring.base(),
        }
    }

    pub(super) fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        match &mut self.ring {
            Plain::Split(ring) => ring.set_memory(memory),
            Plain::Packed(ring) => ring.set_memory(memory),
            Plain::Tracked(ring) => ring.set_memory(memory),
        }
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        match &self.ring {
            Plain::Split(ring) => ring.memory(),
            Plain::Packed(ring) => ring.memory(),
            Plain::Tracked(ring) => ring.memory(),
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.log.log.is_lost() || matches!(&self.ring, Plain::Tracked(ring) if ring.is_lost())
    }

    /// Notes the whole ring: a new one may have been repaired at its start.
    pub(super) fn mark_all(&self) {
        let all = match (self.ring.split(), self.ring.packed()) {
            (Some(ring), _) => self.in_ring((0, split::used_bytes(ring.size()))),
            (_, Some(ring)) => self.entries(0, ring.size()),
            _ => None,
        };
        self.mark(all);
        self.mark_wish();
    }

    /// Where the next completion is written, and how many bytes it takes.
    fn next_element(&self) -> Option<(u64, u64)> {
        match (self.ring.split(), self.ring.packed()) {
            (Some(ring), _) => self.in_ring(ring.next_element()),
            (_, Some(ring)) => self.entries(ring.next_used().index, 1),
            _ => None,
        }
    }

    /// Entries of a packed ring, by their own guest address: the front-end's is of the event suppression structure.
    fn entries(&self, index: u16, count: u16) -> Option<(u64, u64)> {
        let host = self.ring.packed()?.entry(index) as usize;
        Some((self.memory().host_to_guest(host)?, DESCRIPTOR_BYTES * u64::from(count)))
    }

    /// Notes our wish for kicks, which was just written.
    fn mark_wish(&self) {
        let at = self.ring.split().map_or(Some((0, 4)), |ring| ring.wish());
        self.mark(at.and_then(|at| self.in_ring(at)));
    }

    /// A part of what log_guest_addr is the address of.
    fn in_ring(&self, (offset, bytes): (u64, u64)) -> Option<(u64, u64)> {
        Some((self.log.ring_addr?.checked_add(offset)?, bytes))
    }

    fn mark(&self, what: Option<(u64, u64)>) {
        if let Some((addr, bytes)) = what.filter(|_| self.log.ring_addr.is_some()) {
            self.log.log.mark(addr, bytes);
        }
    }
}
