//! BlockLimits: what a node can do and how its requests must be shaped. Capabilities are fields here, never trait
//! methods with a default.

use crate::node::{Node, SECTOR};

/// What a node can do. Fixed while the node is open, but for a drained section (resize, reopen, graph change).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockLimits {
    /// Whether nothing can be written although the options would allow it: the host did not, and auto-read-only was on.
    pub read_only: bool,
    /// Offset and length of reads and writes must be multiples of this; bytes, a power of two, at least 1.
    /// The edge pads what is not.
    pub request_alignment: u32,
    /// Address and length of every buffer must be multiples of this; bytes, a power of two, at least 1.
    /// The edge bounces what is not.
    pub memory_alignment: u32,
    /// The most bytes in one read or write, a multiple of `request_alignment`; the edge splits. 0: no limit but
    /// [`MAX_TRANSFER`].
    pub max_transfer: u32,
    /// The most buffers in one read or write; the edge splits. 0: no limit but [`MAX_IOV`].
    pub max_iov: u32,
    /// Whether discard does something. Where it does not, a discard succeeds and has no effect.
    pub can_discard: bool,
    /// Ranges of a discard are only useful in multiples of this; bytes. 0: unknown.
    pub discard_alignment: u32,
    /// The most bytes in one discard; 0: no limit.
    pub max_discard: u64,
    /// Whether the node zeroes ranges by itself, faster than by writing; where it cannot, the edge writes zeroes.
    pub can_write_zeroes: bool,
    /// Whether zeroing may give the space back when asked to (may-unmap).
    pub can_unmap_zeroes: bool,
    /// The most bytes in one write-zeroes; 0: no limit.
    pub max_write_zeroes: u64,
    /// Whether a write may be stored compressed ([`crate::driver::WriteFlags::compressed`]).
    pub can_compress: bool,
    /// The unit in which the node takes room; bytes, a power of two. 0: none, or unknown.
    pub cluster_size: u32,
    /// The preferred size of requests; bytes. 0: none.
    pub optimal_transfer: u32,
    /// The smallest unit the medium writes without reading first, told to the guest in the topology; bytes, a power of
    /// two. 0: unknown.
    pub physical_block_size: u32,
    /// Cylinders, heads and sectors, where a device of the host has them.
    pub geometry: Option<Geometry>,
}

/// What the host says of a disk's geometry, as partition tables of old count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// At least 1.
    pub cylinders: u32,
    /// At least 1.
    pub heads: u8,
    /// On a track, at least 1.
    pub sectors: u8,
}

/// The most bytes in one request to a driver, whatever its limits say: the kernel transfers at most 2 GiB − 4 KiB.
pub const MAX_TRANSFER: u32 = 1 << 30;
/// The most buffers in one request to a driver: the kernel's IOV_MAX.
pub const MAX_IOV: u32 = 1024;

impl Default for BlockLimits {
    /// No constraint and no capability beyond reading and writing.
    fn default() -> Self {
        Self {
            read_only: false,
            request_alignment: 1,
            memory_alignment: 1,
            max_transfer: 0,
            max_iov: 0,
            can_discard: false,
            discard_alignment: 0,
            max_discard: 0,
            can_write_zeroes: false,
            can_unmap_zeroes: false,
            max_write_zeroes: 0,
            can_compress: false,
            cluster_size: 0,
            optimal_transfer: 0,
            physical_block_size: 0,
            geometry: None,
        }
    }
}

impl BlockLimits {
    /// Those of a filter that passes requests on to `child` as they are. What the child asks for beyond a sector is its
    /// own edge's business, so that it is done once.
    pub fn of_filter(child: &Node) -> Self {
        let limits = child.limits();
        Self {
            read_only: child.is_read_only(),
            request_alignment: limits.request_alignment.min(SECTOR as u32),
            memory_alignment: 1,
            max_transfer: 0,
            max_iov: 0,
            can_discard: limits.can_discard && child.options().discard,
            // The child's edge can always do it, if need be by writing.
            can_write_zeroes: true,
            ..limits
        }
    }

    /// The effective most bytes of one transfer, never 0.
    pub fn transfer_max(&self) -> u64 {
        let align = u64::from(self.request_alignment.max(1));
        let max = match self.max_transfer {
            0 => MAX_TRANSFER,
            n => n.min(MAX_TRANSFER),
        };
        (u64::from(max) / align * align).max(align)
    }

    /// The effective most buffers of one transfer, never 0.
    pub fn iov_max(&self) -> usize {
        match self.max_iov {
            0 => MAX_IOV as usize,
            n => n.min(MAX_IOV) as usize,
        }
    }
}
