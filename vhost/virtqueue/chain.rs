//! Chain: what a ring gives out, and how one is put together from descriptors, whatever the ring's layout. It owns the
//! rules that split and packed rings share: the order of buffers, what lies in guest memory, where a table is.

use std::sync::Arc;

use blockport_block::iovec::{self, IoVec};

use super::RingError;
use crate::guest_memory::GuestMemory;

/// By what a chain is returned. For the ring's own use but for `number`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Head {
    /// Split: the number of the chain's first descriptor. Packed: its buffer id, which is the guest driver's to choose.
    pub number: u16,
    /// Packed: how many entries of the ring it takes. Split: 0.
    pub(super) slots: u16,
    /// Packed, with an in-flight region: the first and the last entry of the chain there.
    pub(super) entry: u16,
    pub(super) last: u16,
}

impl From<u16> for Head {
    /// The head of a chain in a split ring.
    #[inline]
    fn from(number: u16) -> Self {
        Self { number, ..Self::default() }
    }
}

/// A popped descriptor chain: who pops it pushes it exactly once.
#[derive(Default)]
pub struct Chain {
    /// By what it is returned.
    pub head: Head,
    /// The device-readable buffers, then the device-writable ones; none is empty.
    pub iov: Vec<IoVec>,
    /// How many of them are readable.
    pub readable: usize,
    /// The host address of the status byte, which was cut off the writable buffers; 0: of none.
    pub(crate) status: usize,
    /// The memory that the buffers are in, if that need not be the ring's any more.
    pub(crate) memory: Option<Arc<GuestMemory>>,
}

impl Chain {
    #[inline]
    pub(super) fn clear(&mut self) {
        self.iov.clear();
        self.readable = 0;
    }

    /// Adds one descriptor's buffer. One of no length counts as no bytes, wherever it points. `writable` says whether
    /// the buffer before it was.
    #[inline(always)]
    pub(super) fn add(
        &mut self,
        memory: &GuestMemory,
        (addr, len, is_writable): (u64, u32, bool),
        writable: &mut bool,
    ) -> Result<(), RingError> {
        if *writable && !is_writable {
            return Err(RingError::ReadAfterWrite);
        }
        *writable = is_writable;
        if !memory.push_iovecs(addr, len, &mut self.iov) {
            return Err(RingError::BufferAddress { addr, len });
        }
        if !is_writable {
            self.readable = self.iov.len();
        }
        Ok(())
    }
}

/// An indirect table: where it is in guest memory, or a copy of it.
pub(super) enum Table {
    /// All of it lies in one region, from this host address on, which need not be aligned.
    InPlace(*const u8),
    /// Where regions meet, a table may lie across.
    Copied(Vec<u8>),
}

impl Table {
    /// Finds the table of `len` bytes, a multiple of a descriptor's.
    ///
    /// # Errors
    /// It is not in guest memory.
    #[inline]
    pub(super) fn find(memory: &GuestMemory, addr: u64, len: u32) -> Result<Self, RingError> {
        match memory.guest_to_host(addr, u64::from(len), 1) {
            Some(start) => Ok(Self::InPlace(start.cast_const())),
            None => Self::copy(memory, addr, len),
        }
    }

    #[cold]
    fn copy(memory: &GuestMemory, addr: u64, len: u32) -> Result<Self, RingError> {
        let mut pieces = Vec::new();
        if !memory.push_iovecs(addr, len, &mut pieces) {
            return Err(RingError::BufferAddress { addr, len });
        }
        let mut copy = vec![0; len as usize];
        iovec::copy_to(&pieces, &mut copy);
        Ok(Self::Copied(copy))
    }

    /// The address of its first byte.
    #[inline]
    pub(super) fn start(&self) -> *const u8 {
        match self {
            Self::InPlace(start) => *start,
            Self::Copied(copy) => copy.as_ptr(),
        }
    }
}
