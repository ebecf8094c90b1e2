//! Geometry: the sizes that follow from the header, and what the bits of a table's entry mean. It owns the arithmetic
//! and the coding of L2 entries; it knows no table's content and does no I/O.
//!
//! A cluster is described by *subclusters*: 32 with extended L2 entries, one without, so that both are the same to
//! everybody else.

use super::header::{HOST_OFFSET_END, Header};

/// Bit 63 of L1 and L2 entries: the refcount is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry that is not extended.
const ZERO: u64 = 1;
/// Bits 9 to 55.
pub(super) const OFFSET_MASK: u64 = (HOST_OFFSET_END - 1) & !0x1ff;
/// The largest piece of a table that is cached as one, in bytes: refcounts.
const REFCOUNT_UNIT_MAX: u64 = 64 << 10;

/// The sizes of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub cluster_bits: u32,
    /// Version 3, which has zero flags.
    pub v3: bool,
    pub extended: bool,
    refcount_order: u32,
    pub data_file: bool,
    pub raw_data: bool,
    /// 2^this bytes of an L2 table are cached as one: 512 to a cluster.
    slice_bits: u32,
}

/// What an entry of an L2 table says, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Bit n of the masks is subcluster n. Never set in both; what is in neither is unallocated.
    Standard { host: Option<u64>, copied: bool, allocated: u32, zero: u32 },
    /// `bytes` from `offset` on, of which the last sector need not be used up.
    Compressed { offset: u64, bytes: u64 },
}

/// An entry of an L2 table: the descriptor and, if extended, the bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Entry {
    pub word: u64,
    pub bitmap: u64,
}

/// Why metadata cannot be right.
pub(super) type Corrupt = &'static str;

impl Cluster {
    /// Neither here nor zero.
    pub(super) const UNALLOCATED: Self = Self::Standard { host: None, copied: false, allocated: 0, zero: 0 };
}

impl Geometry {
    pub(super) fn new(header: &Header, slice_bytes: u64) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            v3: header.version >= 3,
            extended: header.is_extended(),
            refcount_order: header.refcount_order,
            data_file: header.has_data_file(),
            raw_data: header.is_raw_data(),
            slice_bits: slice_bytes.max(512).ilog2().min(header.cluster_bits),
        }
    }

    /// The same with refcounts of another width.
    pub(super) fn with_refcount_order(self, refcount_order: u32) -> Self {
        Self { refcount_order, ..self }
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// Past the cluster that holds `offset`.
    pub(super) fn cluster_end(&self, offset: u64) -> u64 {
        self.cluster_start(offset).saturating_add(self.cluster_size())
    }

    /// 64-bit words of an L2 entry.
    pub(super) fn entry_words(&self) -> usize {
        if self.extended { 2 } else { 1 }
    }

    pub(super) fn slice_bytes(&self) -> u64 {
        1 << self.slice_bits
    }

    pub(super) fn slices_per_table(&self) -> u64 {
        1 << (self.cluster_bits - self.slice_bits)
    }

    pub(super) fn entries_per_slice(&self) -> u64 {
        self.slice_bytes() >> if self.extended { 4 } else { 3 }
    }

    /// The bytes of the disk that a slice maps.
    pub(super) fn slice_span(&self) -> u64 {
        self.entries_per_slice() << self.cluster_bits
    }

    /// The number of the slice that maps `offset`. Shifts, here and below, as every request comes by.
    pub(super) fn slice_number(&self, offset: u64) -> u64 {
        offset >> (self.slice_bits - if self.extended { 4 } else { 3 } + self.cluster_bits)
    }

    /// Where the slice that maps `offset` ends on the disk.
    pub(super) fn slice_end(&self, offset: u64) -> u64 {
        (self.slice_number(offset) + 1).saturating_mul(self.slice_span())
    }

    /// Which word of its slice the entry of the cluster at `offset` begins with.
    pub(super) fn word_of(&self, offset: u64) -> usize {
        let index = (offset >> self.cluster_bits) & (self.entries_per_slice() - 1);
        index as usize * self.entry_words()
    }

    /// The bytes of the disk that an L2 table maps.
    pub(super) fn table_span(&self) -> u64 {
        self.slice_span() * self.slices_per_table()
    }

    pub(super) fn subclusters(&self) -> u32 {
        if self.extended { 32 } else { 1 }
    }

    pub(super) fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    pub(super) fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - if self.extended { 5 } else { 0 }
    }

    /// The mask of all subclusters.
    pub(super) fn all(&self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// The mask of the subclusters that `start..end`, within one cluster, touches.
    pub(super) fn mask(&self, start: u64, end: u64) -> u32 {
        if !self.extended {
            return 1;
        }
        let base = self.cluster_start(start);
        let first = (start - base) / self.subcluster_size();
        let last = (end - 1 - base) / self.subcluster_size();
        // Both are below 32.
        (u32::MAX << first) & (u32::MAX >> (31 - last))
    }

    pub(super) fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    pub(super) fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Bytes of refcounts that are cached as one.
    pub(super) fn unit_bytes(&self) -> u64 {
        self.cluster_size().min(REFCOUNT_UNIT_MAX)
    }

    pub(super) fn refcounts_per_unit(&self) -> u64 {
        (self.unit_bytes() * 8) >> self.refcount_order
    }

    pub(super) fn refcounts_per_block(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// In which word, and how far up in it, refcount `index` of a table stands. Words are big-endian; entries below a
    /// byte begin at the least significant bit.
    fn refcount_place(&self, index: u64) -> (usize, u32) {
        let bits = u64::from(self.refcount_bits());
        // As shifts: this is asked for one cluster after another.
        let per_word_bits = 6 - self.refcount_order;
        let inside = index & ((1 << per_word_bits) - 1);
        let shift = match bits {
            8.. => 64 - bits * (inside + 1),
            _ => {
                let per_byte = 8 / bits;
                56 - 8 * (inside / per_byte) + bits * (inside % per_byte)
            }
        };
        ((index >> per_word_bits) as usize, shift as u32)
    }

    /// Refcount `index` of a table; 0 past its end.
    pub(super) fn refcount(&self, words: &[u64], index: u64) -> u64 {
        let (at, shift) = self.refcount_place(index);
        words.get(at).map_or(0, |word| word >> shift & self.refcount_max())
    }

    /// The word of a table that holds refcount `index`, with its new content.
    pub(super) fn with_refcount(&self, words: &[u64], index: u64, value: u64) -> (usize, u64) {
        let (at, shift) = self.refcount_place(index);
        let old = words.get(at).copied().unwrap_or(0);
        (at, old & !(self.refcount_max() << shift) | (value & self.refcount_max()) << shift)
    }

    /// The offset of the L2 table that an L1 entry names; `None`: there is none.
    pub(super) fn l2_table(&self, entry: u64) -> Result<Option<u64>, Corrupt> {
        if entry & !(OFFSET_MASK | COPIED) != 0 {
            return Err("an L1 entry has reserved bits set");
        }
        match entry & OFFSET_MASK {
            0 => Ok(None),
            offset if offset & (self.cluster_size() - 1) != 0 => Err("an L2 table is not aligned to a cluster"),
            offset => Ok(Some(offset)),
        }
    }

    /// The offset of the block that an entry of the refcount table names; `None`: there is none.
    pub(super) fn refcount_block(&self, entry: u64) -> Result<Option<u64>, Corrupt> {
        match entry {
            0 => Ok(None),
            _ if entry & (self.cluster_size() - 1) != 0 => Err("a refcount block is not aligned to a cluster"),
            _ if entry >= HOST_OFFSET_END => Err("a refcount block lies past 2^56"),
            _ => Ok(Some(entry)),
        }
    }

    /// What an L2 entry says of the cluster at `guest`.
    pub(super) fn decode(&self, entry: Entry, guest: u64) -> Result<Cluster, Corrupt> {
        let Entry { word, bitmap } = entry;
        if word & COMPRESSED != 0 {
            return self.decode_compressed(word, bitmap);
        }
        if word & !(OFFSET_MASK | COPIED | ZERO) != 0 {
            return Err("an L2 entry has reserved bits set");
        }
        let (offset, copied) = (word & OFFSET_MASK, word & COPIED != 0);
        if offset & (self.cluster_size() - 1) != 0 {
            return Err("a data cluster is not aligned");
        }
        // Offset 0 is the header, unless data lies in a file of its own.
        let host = match offset {
            0 if self.data_file && copied => Some(0),
            0 if copied => return Err("a data cluster lies on the header"),
            0 => None,
            offset => Some(offset),
        };
        if self.data_file && host.is_some_and(|host| host != guest) {
            return Err("a cluster of an external data file is not where the guest's is");
        }
        let (allocated, zero) = if self.extended {
            if word & ZERO != 0 {
                return Err("an extended L2 entry has the zero flag set");
            }
            (bitmap as u32, (bitmap >> 32) as u32)
        } else if word & ZERO != 0 {
            if !self.v3 {
                return Err("an L2 entry of version 2 has the zero flag set");
            }
            (0, 1)
        } else {
            (u32::from(host.is_some()), 0)
        };
        if allocated & zero != 0 {
            return Err("a subcluster is both allocated and zero");
        }
        if allocated != 0 && host.is_none() {
            return Err("a subcluster is allocated and lies nowhere");
        }
        Ok(Cluster::Standard { host, copied, allocated, zero })
    }

    fn decode_compressed(&self, word: u64, bitmap: u64) -> Result<Cluster, Corrupt> {
        if word & COPIED != 0 || self.data_file || bitmap != 0 {
            return Err("a compressed cluster has flags that it cannot have");
        }
        let offset_bits = 62 - (self.cluster_bits - 8);
        let offset = word & ((1 << offset_bits) - 1);
        if offset >= HOST_OFFSET_END {
            return Err("a compressed cluster lies past 2^56");
        }
        if offset < self.cluster_size() {
            return Err("a compressed cluster lies on the header");
        }
        let sectors = (word >> offset_bits & ((1 << (self.cluster_bits - 8)) - 1)) + 1;
        Ok(Cluster::Compressed { offset, bytes: sectors * 512 - offset % 512 })
    }

    /// How many bits of a compressed cluster's entry say where it lies.
    fn compressed_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// Before which offset compressed clusters lie.
    pub(super) fn compressed_end(&self) -> u64 {
        HOST_OFFSET_END.min(1 << self.compressed_bits())
    }

    /// The entry of a compressed cluster of `bytes` bytes, less than a cluster's, from `host` on.
    pub(super) fn encode_compressed(&self, host: u64, bytes: u64) -> Entry {
        let more_sectors = ((host + bytes - 1) >> 9) - (host >> 9);
        Entry { word: COMPRESSED | more_sectors << self.compressed_bits() | host, bitmap: 0 }
    }

    /// The entry that says so, of a standard cluster.
    pub(super) fn encode(&self, host: Option<u64>, copied: bool, allocated: u32, zero: u32) -> Entry {
        let word = host.unwrap_or(0) | if copied { COPIED } else { 0 };
        match self.extended {
            true => Entry { word, bitmap: u64::from(zero) << 32 | u64::from(allocated) },
            false => Entry { word: word | (u64::from(zero & 1) * ZERO), bitmap: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, extended: bool, refcount_order: u32) -> Geometry {
        Geometry {
            cluster_bits,
            v3: true,
            extended,
            refcount_order,
            data_file: false,
            raw_data: false,
            slice_bits: cluster_bits.min(12),
        }
    }

    #[test]
    fn refcounts_stand_where_the_format_puts_them() {
        let bytes: Vec<u8> = (1..=16).map(|n: u8| n.wrapping_mul(37)).collect();
        let words: Vec<u64> = bytes.chunks_exact(8).map(|c| u64::from_be_bytes(c.try_into().expect("8"))).collect();
        for order in 0..=6 {
            let geometry = geometry(16, false, order);
            let bits = 1usize << order;
            for index in 0..128 / bits {
                let expected = if bits < 8 {
                    u64::from(bytes[index * bits / 8] >> (index * bits % 8)) & ((1 << bits) - 1)
                } else {
                    let at = index * bits / 8;
                    bytes[at..at + bits / 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
                };
                assert_eq!(geometry.refcount(&words, index as u64), expected, "{bits} bits, entry {index}");
                let value = geometry.refcount_max() / 3 + 1;
                let mut changed = words.clone();
                let (at, word) = geometry.with_refcount(&words, index as u64, value);
                changed[at] = word;
                for other in 0..128 / bits {
                    let old = geometry.refcount(&words, other as u64);
                    let expected = if other == index { value & geometry.refcount_max() } else { old };
                    assert_eq!(geometry.refcount(&changed, other as u64), expected);
                }
            }
        }
    }

    #[test]
    fn address_bits_of_compressed_clusters_shrink_as_clusters_grow() {
        // 64 KiB: 54 bits of address, 8 of additional sectors.
        let decoded = geometry(16, false, 4).decode(Entry { word: 1 << 62 | 3 << 54 | 0x12345, bitmap: 0 }, 0);
        assert_eq!(decoded, Ok(Cluster::Compressed { offset: 0x12345, bytes: 4 * 512 - 0x145 }));
        // 2 MiB: 49 bits, 13.
        let decoded = geometry(21, false, 4).decode(Entry { word: 1 << 62 | 5000 << 49 | 0x40_0000, bitmap: 0 }, 0);
        assert_eq!(decoded, Ok(Cluster::Compressed { offset: 0x40_0000, bytes: 5001 * 512 }));
        // 512 bytes: 61 bits, of which 5 must be 0.
        assert!(geometry(9, false, 4).decode(Entry { word: 1 << 62 | 1 << 58, bitmap: 0 }, 0).is_err());
    }

    #[test]
    fn entries_that_cannot_be_are_corrupt() {
        let plain = geometry(16, false, 4);
        let wide = geometry(16, true, 4);
        let v2 = Geometry { v3: false, ..plain };
        let data = Geometry { data_file: true, ..plain };
        for (geometry, word, bitmap) in [
            (plain, COPIED, 0),
            (plain, COPIED | 0x1_0002, 0),
            (plain, 1 << 60, 0),
            (plain, 0x8200, 0),
            (v2, ZERO, 0),
            (wide, ZERO, 0),
            (wide, 0x1_0000, 1 << 32 | 1),
            (wide, 0, 1),
            (wide, 1 << 62 | 0x1_0000, 1),
            (plain, 1 << 62 | COPIED | 0x1_0000, 0),
            (plain, 1 << 62 | 0x100, 0),
            (data, COPIED | 0x1_0000, 0),
            (data, 1 << 62 | 0x1_0000, 0),
        ] {
            assert!(geometry.decode(Entry { word, bitmap }, 0).is_err(), "{word:#x} {bitmap:#x}");
        }
        assert_eq!(data.decode(Entry { word: COPIED, bitmap: 0 }, 0).map(|_| ()), Ok(()));
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let (plain, wide) = (geometry(16, false, 4), geometry(16, true, 4));
        for (geometry, host, copied, allocated, zero) in [
            (plain, Some(0x7_0000), true, 1, 0),
            (plain, Some(0x7_0000), true, 0, 1),
            (plain, None, false, 0, 1),
            (plain, None, false, 0, 0),
            (wide, Some(0x7_0000), true, 0xff, 0xff00),
            (wide, None, false, 0, u32::MAX),
        ] {
            let entry = geometry.encode(host, copied, allocated, zero);
            assert_eq!(geometry.decode(entry, 0), Ok(Cluster::Standard { host, copied, allocated, zero }));
        }
        assert_eq!(wide.mask(0x1_0000, 0x1_0001), 1);
        assert_eq!(wide.mask(0x1_0800, 0x1_1801), 0b1110);
        assert_eq!(wide.mask(0x1_0000, 0x2_0000), u32::MAX);
    }
}
