//! Header: the first cluster of an image. It owns every limit that is enforced when an image is opened, and which bytes
//! change when the header is written again; it does no I/O and follows no table.
//!
//! Sections are those of QEMU's docs/interop/qcow2.txt.

use crate::error::{OpenError, OpenResult};

/// "QFI\xfb".
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// How much of the header is ever written again: one sector, so that it is replaced as a whole or not at all.
pub(super) const HEADER_SECTOR: usize = 512;
/// The largest cluster, and so the most that a header takes.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
pub(super) const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
pub(super) const SNAPSHOTS_MAX: u32 = 65_536;
pub(super) const BITMAPS_MAX: u32 = 65_535;
const NAME_BYTES_MAX: u32 = 1_023;
/// Host offsets have 56 bits.
pub(super) const HOST_OFFSET_END: u64 = 1 << 56;

/// The incompatible feature bits.
pub(super) mod incompatible {
    pub(in super::super) const DIRTY: u64 = 1 << 0;
    pub(in super::super) const CORRUPT: u64 = 1 << 1;
    pub(in super::super) const DATA_FILE: u64 = 1 << 2;
    pub(in super::super) const COMPRESSION: u64 = 1 << 3;
    pub(in super::super) const EXTENDED_L2: u64 = 1 << 4;
    pub(super) const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// The compatible bit that lets refcounts be written late.
pub(super) const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;
/// The autoclear bit that says that an external data file can be read as a raw image.
pub(super) const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;
/// The autoclear bit that says that the bitmaps were kept up to date.
pub(super) const AUTOCLEAR_BITMAPS: u64 = 1 << 0;

pub(super) const EXTENSION_END: u32 = 0;
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
pub(super) const EXTENSION_BITMAPS: u32 = 0x2385_2875;
pub(super) const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
/// Where the header of the encryption lies.
pub(super) const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
/// The method of encryption that has one: LUKS.
pub(super) const CRYPT_METHOD_LUKS: u32 = 2;

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    /// Raw deflate.
    Zlib,
    Zstd,
}

/// Where the directory of persistent bitmaps lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BitmapDirectory {
    pub count: u32,
    /// Bytes of the directory.
    pub bytes: u64,
    pub offset: u64,
}

/// The most bytes of the header of the encryption: what it is ever read of.
const ENCRYPTION_BYTES_MAX: u64 = crate::drivers::luks::REGION_BYTES_MAX;

/// All that the header says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// 2 or 3.
    pub version: u32,
    pub cluster_bits: u32,
    /// Of the virtual disk, in bytes.
    pub size: u64,
    pub l1_entries: u32,
    pub l1_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    /// Refcounts are 1 << this bits wide.
    pub refcount_order: u32,
    pub compression: Compression,
    /// The name of the backing file, as it is written.
    pub backing: Option<String>,
    pub backing_format: Option<String>,
    pub data_file: Option<String>,
    pub bitmaps: Option<BitmapDirectory>,
    /// Where the LUKS header with its keys lies, and how long it is, in bytes: the guest's data is encrypted.
    pub encryption: Option<(u64, u64)>,
}

/// The cluster size in bytes, from the first bytes of an image, so that all of the header can be read.
pub(super) fn cluster_size(start: &[u8]) -> OpenResult<usize> {
    let bytes = Bytes(start);
    if bytes.u32(0)? != MAGIC {
        return Err(OpenError::new("it is no qcow2 image: the magic number is missing"));
    }
    let bits = bytes.u32(20)?;
    if !CLUSTER_BITS.contains(&bits) {
        return Err(OpenError(format!("clusters of 2^{bits} bytes are not supported: 512 bytes to 2 MiB are")));
    }
    Ok(1 << bits)
}

/// Big-endian numbers at their places.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn array<const N: usize>(&self, at: usize) -> OpenResult<[u8; N]> {
        let end = at.checked_add(N).ok_or_else(|| OpenError::new("the header is cut off"))?;
        let bytes = self.0.get(at..end).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| OpenError::new("the header is cut off"))
    }

    fn u32(&self, at: usize) -> OpenResult<u32> {
        self.array(at).map(u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> OpenResult<u64> {
        self.array(at).map(u64::from_be_bytes)
    }

    fn text(&self, at: usize, len: usize, what: &str) -> OpenResult<String> {
        let end = at.checked_add(len);
        let bytes = end.and_then(|end| self.0.get(at..end));
        let bytes = bytes.ok_or_else(|| OpenError(format!("{what} lies outside the header's cluster")))?;
        match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
            _ => Err(OpenError(format!("{what} is not text in UTF-8"))),
        }
    }
}

impl Header {
    /// Reads the header from the whole first cluster.
    ///
    /// # Errors
    /// It breaks a rule of the format, or needs what we do not have; the error says which.
    pub(super) fn parse(cluster: &[u8]) -> OpenResult<Self> {
        let cluster_size = cluster_size(cluster)? as u64;
        let bytes = Bytes(cluster);
        let version = bytes.u32(4)?;
        if !(2..=3).contains(&version) {
            return Err(OpenError(format!("version {version} of the format is not supported: 2 and 3 are")));
        }
        let v3 = version == 3;
        let field = |at| if v3 { bytes.u64(at) } else { Ok(0) };
        let length = if v3 { bytes.u32(100)? } else { 72 };
        if v3 && (length < 104 || length % 8 != 0 || u64::from(length) > cluster_size) {
            return Err(OpenError(format!("a header of {length} bytes is invalid")));
        }
        let mut header = Self {
            version,
            cluster_bits: bytes.u32(20)?,
            size: bytes.u64(24)?,
            l1_entries: bytes.u32(36)?,
            l1_offset: bytes.u64(40)?,
            refcount_table_offset: bytes.u64(48)?,
            refcount_table_clusters: bytes.u32(56)?,
            snapshots: bytes.u32(60)?,
            snapshots_offset: bytes.u64(64)?,
            incompatible: field(72)?,
            compatible: field(80)?,
            autoclear: field(88)?,
            refcount_order: if v3 { bytes.u32(96)? } else { 4 },
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            data_file: None,
            bitmaps: None,
            encryption: None,
        };
        let feature_names = header.read_extensions(&bytes, length as usize)?;
        header.refuse_unknown_features(feature_names)?;
        match bytes.u32(32)? {
            // The extension by itself means nothing.
            0 => header.encryption = None,
            CRYPT_METHOD_LUKS if header.encryption.is_some() => {}
            1 => return Err(OpenError::new("it is encrypted by the legacy AES method, which is not supported")),
            CRYPT_METHOD_LUKS => {
                return Err(OpenError::new("it is encrypted by LUKS, and does not say where its keys are"));
            }
            method => return Err(OpenError(format!("it is encrypted by the unknown method {method}"))),
        }
        header.read_compression(if length > 104 { cluster.get(104).copied().unwrap_or(0) } else { 0 })?;
        let (offset, len) = (bytes.u64(8)?, bytes.u32(16)?);
        if offset != 0 {
            if len > NAME_BYTES_MAX {
                return Err(OpenError(format!("a backing file name of {len} bytes is too long")));
            }
            let offset = usize::try_from(offset).unwrap_or(usize::MAX);
            let name = bytes.text(offset, len as usize, "the backing file name")?;
            header.backing = Some(name).filter(|name| !name.is_empty());
        }
        header.check(cluster_size)?;
        Ok(header)
    }

    /// Reads the header extensions; returns the data of the feature name table.
    fn read_extensions<'a>(&mut self, bytes: &Bytes<'a>, mut at: usize) -> OpenResult<&'a [u8]> {
        let mut names: &[u8] = &[];
        // Version 2 may have them as well. A header that fills its cluster has none.
        while at + 8 <= bytes.0.len() {
            let (kind, len) = (bytes.u32(at)?, bytes.u32(at + 4)? as usize);
            if kind == EXTENSION_END {
                break;
            }
            at += 8;
            let data = at.checked_add(len).and_then(|end| bytes.0.get(at..end));
            let data = data.ok_or_else(|| OpenError(format!("header extension {kind:#010x} is too long")))?;
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    self.backing_format = Some(bytes.text(at, len, "the format of the backing file")?);
                }
                EXTENSION_DATA_FILE => {
                    self.data_file = Some(bytes.text(at, len, "the name of the external data file")?);
                }
                EXTENSION_FEATURE_NAMES => names = data,
                EXTENSION_ENCRYPTION => {
                    if len < 16 {
                        return Err(OpenError::new("the encryption extension has a wrong length"));
                    }
                    self.encryption = Some((bytes.u64(at)?, bytes.u64(at + 8)?));
                }
                EXTENSION_BITMAPS => {
                    if len != 24 {
                        return Err(OpenError::new("the bitmaps extension has a wrong length"));
                    }
                    let (count, bytes, offset) = (bytes.u32(at)?, bytes.u64(at + 8)?, bytes.u64(at + 16)?);
                    self.bitmaps = Some(BitmapDirectory { count, bytes, offset });
                }
                // Kept as it is, like everything in the header that is not changed.
                _ => {}
            }
            at += len.next_multiple_of(8);
        }
        Ok(names)
    }

    fn refuse_unknown_features(&self, names: &[u8]) -> OpenResult {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let name_of = |bit: u32| {
            let entry = names.chunks_exact(48).find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit);
            let name = entry.map(|entry| String::from_utf8_lossy(&entry[2..]).trim_end_matches('\0').to_owned());
            name.filter(|name| !name.is_empty()).unwrap_or_else(|| format!("bit {bit}"))
        };
        let list: Vec<String> = (0..64).filter(|bit| unknown & 1 << bit != 0).map(name_of).collect();
        Err(OpenError(format!("it needs features that are not supported: {}", list.join(", "))))
    }

    fn read_compression(&mut self, kind: u8) -> OpenResult {
        let stated = self.incompatible & incompatible::COMPRESSION != 0;
        self.compression = match (kind, stated) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (0 | 1, _) => return Err(OpenError::new("the compression type and its feature bit contradict each other")),
            (kind, _) => return Err(OpenError(format!("compression type {kind} is unknown"))),
        };
        Ok(())
    }

    /// Whether the external-data-file bit is set.
    pub(super) fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Whether entries of L2 tables have bitmaps of subclusters.
    pub(super) fn is_extended(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Whether refcounts may be written late.
    pub(super) fn has_lazy_refcounts(&self) -> bool {
        self.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    /// Whether the external data file is a raw image by itself.
    pub(super) fn is_raw_data(&self) -> bool {
        self.autoclear & AUTOCLEAR_RAW_DATA != 0
    }

    /// The autoclear bits that stay when somebody writes: those that we keep true.
    pub(super) fn kept_autoclear(&self) -> u64 {
        self.autoclear & (AUTOCLEAR_RAW_DATA | AUTOCLEAR_BITMAPS)
    }

    /// Whether there are persistent bitmaps, and nobody wrote to the image who did not know of them.
    pub(super) fn has_valid_bitmaps(&self) -> bool {
        self.autoclear & AUTOCLEAR_BITMAPS != 0
    }

    /// The bytes that one entry of the active L1 table maps.
    fn l1_entry_span(&self) -> u64 {
        let entries = (1u64 << self.cluster_bits) / if self.is_extended() { 16 } else { 8 };
        entries << self.cluster_bits
    }

    /// How many L1 entries a disk of `size` bytes needs.
    pub(super) fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l1_entry_span())
    }

    fn check(&self, cluster: u64) -> OpenResult {
        let fail = |text: String| Err(OpenError(text));
        if self.refcount_order > 6 {
            return fail(format!("refcounts of 2^{} bits are invalid: 64 is the most", self.refcount_order));
        }
        if self.is_extended() && self.cluster_bits < 14 {
            return fail("extended L2 entries need clusters of 16 KiB or more".to_owned());
        }
        if self.size > i64::MAX as u64 {
            return fail(format!("a disk of {} bytes is too large", self.size));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > L1_BYTES_MAX {
            return fail(format!("an L1 table of {l1_bytes} bytes is too large: 32 MiB is the most"));
        }
        if self.l1_entries_for(self.size) > self.l1_entries.into() {
            return fail("the L1 table is too small for the size of the disk".to_owned());
        }
        let table_bytes = u64::from(self.refcount_table_clusters) * cluster;
        if table_bytes > REFCOUNT_TABLE_BYTES_MAX {
            return fail(format!("a refcount table of {table_bytes} bytes is too large: 8 MiB is the most"));
        }
        if self.refcount_table_clusters == 0 {
            return fail("it has no refcount table".to_owned());
        }
        check_place("the active L1 table", self.l1_offset, l1_bytes, cluster)?;
        check_place("the refcount table", self.refcount_table_offset, table_bytes, cluster)?;
        if self.snapshots > SNAPSHOTS_MAX {
            return fail(format!("{} snapshots are too many: {SNAPSHOTS_MAX} is the most", self.snapshots));
        }
        if self.snapshots > 0 {
            check_place("the snapshot table", self.snapshots_offset, cluster, cluster)?;
        }
        if let Some(bitmaps) = &self.bitmaps {
            // A directory entry has 24 bytes, and a name of one byte at least.
            if bitmaps.count == 0 || bitmaps.count > BITMAPS_MAX || bitmaps.bytes > u64::from(bitmaps.count) * 2048 {
                return fail("the directory of bitmaps is too large or empty".to_owned());
            }
            check_place("the directory of bitmaps", bitmaps.offset, bitmaps.bytes, cluster)?;
        } else if self.has_valid_bitmaps() {
            return fail("it claims to have bitmaps and does not say where".to_owned());
        }
        if let Some((offset, bytes)) = self.encryption {
            if bytes == 0 || bytes > ENCRYPTION_BYTES_MAX {
                return fail(format!("a header of the encryption of {bytes} bytes is too large or empty"));
            }
            check_place("the header of the encryption", offset, bytes, cluster)?;
        }
        if self.autoclear & AUTOCLEAR_RAW_DATA != 0 && !self.has_data_file() {
            return fail("it claims to have a raw external data file and has none".to_owned());
        }
        if self.has_data_file() && self.snapshots > 0 {
            return fail("it has snapshots and an external data file, which the format does not allow".to_owned());
        }
        Ok(())
    }
}

/// Checks that a table lies at a cluster's start, behind the header and below 2^56.
pub(super) fn check_place(what: &str, offset: u64, bytes: u64, cluster: u64) -> OpenResult {
    let end = offset.checked_add(bytes);
    if !offset.is_multiple_of(cluster) || end.is_none_or(|end| end > HOST_OFFSET_END) {
        return Err(OpenError(format!("{what} lies at an invalid place ({offset:#x})")));
    }
    if bytes > 0 && offset == 0 {
        return Err(OpenError(format!("{what} lies on the header")));
    }
    Ok(())
}

/// The first sector of the header, with what may change in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HeaderSector(Vec<u8>);

impl HeaderSector {
    /// From the image's first bytes.
    pub(super) fn new(cluster: &[u8]) -> Self {
        Self(cluster.iter().copied().chain(std::iter::repeat(0)).take(HEADER_SECTOR).collect())
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        // The places are below 104, and the sector is longer.
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn set_size(&mut self, bytes: u64) {
        self.put(24, &bytes.to_be_bytes());
    }

    pub(super) fn set_l1(&mut self, entries: u32, offset: u64) {
        self.put(36, &entries.to_be_bytes());
        self.put(40, &offset.to_be_bytes());
    }

    pub(super) fn set_refcount_table(&mut self, offset: u64, clusters: u32) {
        self.put(48, &offset.to_be_bytes());
        self.put(56, &clusters.to_be_bytes());
    }

    pub(super) fn set_snapshots(&mut self, count: u32, offset: u64) {
        self.put(60, &count.to_be_bytes());
        self.put(64, &offset.to_be_bytes());
    }

    /// Version 3 only.
    pub(super) fn set_incompatible(&mut self, bits: u64) {
        self.put(72, &bits.to_be_bytes());
    }

    /// Version 3 only.
    pub(super) fn set_autoclear(&mut self, bits: u64) {
        self.put(88, &bits.to_be_bytes());
    }
}
