//! Sparse: an extent that grows, or is compressed for streaming. It owns the header and how directory and tables say
//! where a grain is. Fields are little-endian, offsets in sectors.

use crate::drivers::import::{Attempt, Packed, Place, Reader, Run, Stop, Tables, check_length, field};
use crate::error::{OpenError, OpenResult};
use crate::node::SECTOR;

pub(super) const MAGIC: &[u8] = b"KDMV";

const HEADER_BYTES: u64 = 512;
/// In place of where the directory is: the header behind the data says it.
const AT_END: u64 = u64::MAX;
/// How far before the end of the file that header stands: before it a marker, behind it the last one.
const FOOTER_FROM_END: u64 = 1536;
/// The kind of that marker.
const FOOTER_MARKER: u32 = 3;
/// Flags.
const ZEROED_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;
/// The largest grain, in sectors: 1 GiB, as in QEMU.
const GRAIN_SECTORS_MAX: u64 = 1 << 21;
/// The largest that is decompressed: it is held in memory.
const PACKED_GRAIN_BYTES_MAX: u64 = 4 << 20;
/// The most entries of a table of grains.
const TABLE_ENTRIES_MAX: u64 = 1 << 16;

/// An extent with a directory and tables.
#[derive(Debug)]
pub(super) struct Sparse {
    child: usize,
    length: u64,
    grain_bytes: u64,
    table_entries: u64,
    /// Where the directory is in the file, in bytes.
    directory: u64,
    zeroed_grains: bool,
    compressed: bool,
    /// Where the text is, and how long, in bytes.
    descriptor: Option<(u64, u64)>,
}

impl Sparse {
    /// Reads the header of the extent in child number `child`.
    pub(super) async fn read(reader: &Reader, child: usize) -> OpenResult<Self> {
        let mut header = reader.read(0, HEADER_BYTES, "the header").await?;
        if u64::from_le_bytes(field(&header, 56)) == AT_END {
            let at = reader.length().checked_sub(FOOTER_FROM_END);
            let at = at.ok_or_else(|| OpenError::new("the header behind its data is not there"))?;
            let marker = reader.read(at, SECTOR, "the marker behind its data").await?;
            header = reader.read(at + SECTOR, HEADER_BYTES, "the header behind its data").await?;
            let kind = u32::from_le_bytes(field(&marker, 12));
            if kind != FOOTER_MARKER || u64::from_le_bytes(field(&header, 56)) == AT_END {
                return Err(OpenError::new("the header behind its data is damaged: was it cut short?"));
            }
        }
        Self::parse(&header, child)
    }

    fn parse(header: &[u8], child: usize) -> OpenResult<Self> {
        let number = |at| u32::from_le_bytes(field(header, at));
        let long = |at| u64::from_le_bytes(field(header, at));
        let refuse = |why: String| Err(OpenError(why));
        if !header.starts_with(MAGIC) {
            return refuse("it has no signature of VMware".to_owned());
        }
        let (version, flags) = (number(4), number(8));
        if !(1..=3).contains(&version) {
            return refuse(format!("its version {version} is not supported"));
        }
        let (capacity, grain, table_entries) = (long(12), long(20), u64::from(number(44)));
        if !grain.is_power_of_two() || grain > GRAIN_SECTORS_MAX {
            return refuse(format!("the size of its grains, {grain} sectors, is no power of two up to 1 GiB"));
        }
        if table_entries == 0 || table_entries > TABLE_ENTRIES_MAX {
            return refuse(format!("the size of its tables, {table_entries} entries, is not supported"));
        }
        let grain_bytes = grain * SECTOR;
        let compressed = flags & COMPRESSED != 0;
        if compressed && (u16::from_le_bytes(field(header, 77)) != 1 || flags & MARKERS == 0) {
            return refuse("it is compressed in a way that is not supported".to_owned());
        }
        if compressed && grain_bytes > PACKED_GRAIN_BYTES_MAX {
            return refuse(format!("its compressed grains of {grain_bytes} bytes are too large"));
        }
        let place = |sector: u64| sector.checked_mul(SECTOR).filter(|at| i64::try_from(*at).is_ok());
        let Some(directory) = place(long(56)).filter(|at| *at > 0) else {
            return refuse("its directory is in no place where it can be".to_owned());
        };
        let descriptor = match (place(long(28)), place(long(36))) {
            (Some(0), _) | (_, Some(0)) => None,
            (Some(offset), Some(bytes)) => Some((offset, bytes)),
            _ => return refuse("its descriptor is in no place where it can be".to_owned()),
        };
        Ok(Self {
            child,
            length: check_length(capacity.checked_mul(SECTOR))?,
            grain_bytes,
            table_entries,
            directory,
            zeroed_grains: flags & ZEROED_GRAINS != 0,
            compressed,
            descriptor,
        })
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    pub(super) fn descriptor(&self) -> Option<(u64, u64)> {
        self.descriptor
    }

    pub(super) fn locate(&self, offset: u64, tables: &Tables) -> Attempt<Run> {
        let (grain, inside) = (offset / self.grain_bytes, offset % self.grain_bytes);
        let (table, index) = (grain / self.table_entries, grain % self.table_entries);
        let outside = Stop::Corrupt("a table lies behind the end of any file");
        let entry_at = self.directory.checked_add(table * 4).ok_or(outside)?;
        let table = u32::from_le_bytes(tables.bytes(self.child, entry_at)?);
        if table == 0 {
            // No grain of all that it would have.
            let left = (self.table_entries - index).saturating_mul(self.grain_bytes) - inside;
            return Ok(Run { place: Place::Hole, bytes: left });
        }
        let entry = u32::from_le_bytes(tables.bytes(self.child, u64::from(table) * SECTOR + index * 4)?);
        let place = match entry {
            0 => Place::Hole,
            1 if self.zeroed_grains => Place::Zero,
            sector if self.compressed => {
                // The last one need not be whole.
                let bytes = self.grain_bytes.min(self.length - grain * self.grain_bytes);
                Place::Packed(Packed { child: self.child, offset: u64::from(sector) * SECTOR, bytes }, inside)
            }
            sector => Place::Data { child: self.child, offset: u64::from(sector) * SECTOR + inside },
        };
        Ok(Run { place, bytes: self.grain_bytes - inside })
    }
}
