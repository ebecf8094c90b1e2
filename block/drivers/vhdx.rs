//! The format `vhdx` of Hyper-V, which is only read, as Microsoft's [MS-VHDX] has it: two headers, two tables of regions,
//! metadata, and a table of blocks. Fields are little-endian. An image whose log is to be replayed first, and one that
//! stands on another, are refused.

use super::import::{self, Attempt, Layout, Place, Reader, Run, Stop, Tables, field};
use super::{DriverKind, DriverRow};
use crate::driver::BlockDriver;
use crate::error::{OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::options::Options;

pub(super) const ROW: DriverRow = DriverRow {
    name: "vhdx",
    kind: DriverKind::Format,
    summary: "an image of Hyper-V, for reading",
    options: &[("file", "the node with the image")],
    open,
};

const MIB: u64 = 1 << 20;
/// Where the two headers are (2.2).
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const HEADER_BYTES: u64 = 4096;
/// Where the two tables of regions are (2.2).
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
/// The size of a table of regions, and of that of the metadata.
const TABLE_BYTES: u64 = 64 << 10;
/// The most entries of one of them.
const ENTRIES_MAX: u64 = 2047;

/// A GUID as it stands in a file.
type Guid = [u8; 16];

const fn guid(first: u32, second: u16, third: u16, rest: [u8; 8]) -> Guid {
    let ([a, b, c, d], [e, f], [g, h]) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes());
    let [i, j, k, l, m, n, o, p] = rest;
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// Regions (2.2.3.2).
const BLOCK_TABLE: Guid = guid(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
const METADATA: Guid = guid(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);
/// Items of the metadata (2.6.2).
const FILE_PARAMETERS: Guid = guid(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
const DISK_SIZE: Guid = guid(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
const DISK_ID: Guid = guid(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);
const LOGICAL_SECTOR: Guid = guid(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
const PHYSICAL_SECTOR: Guid = guid(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);
const PARENT: Guid = guid(0xa8d3_5f2d, 0xb30b, 0x454d, [0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c]);

struct Vhdx {
    length: u64,
    /// Where the table of blocks is in the file.
    table: u64,
    /// How long it is in bytes.
    table_bytes: u64,
    block_bytes: u64,
    /// After so many blocks the table has an entry for something else (2.5).
    chunk_blocks: u64,
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let file = context.read_only_child(options, "file")?;
    let node = &context.node.name;
    let layout = import::read_header("vhdx", node, &file, async |reader| Vhdx::read(&reader).await)?;
    Ok(import::driver(node, Box::new(layout), vec![file]))
}

/// CRC-32C, Castagnoli's polynomial, bit by bit: it is only over headers.
fn crc32c(bytes: impl IntoIterator<Item = u8>) -> u32 {
    let step = |crc: u32, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    !bytes.into_iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(byte), step))
}

/// Whether a structure whose sum stands behind its signature is what it was when it was written.
fn is_whole(bytes: &[u8], signature: &[u8; 4]) -> bool {
    let without = bytes.iter().enumerate().map(|(at, byte)| if (4..8).contains(&at) { 0 } else { *byte });
    bytes.starts_with(signature) && u32::from_le_bytes(field(bytes, 4)) == crc32c(without)
}

/// What an image says of itself.
#[derive(Default)]
struct Metadata {
    parameters: Option<(u32, u32)>,
    length: Option<u64>,
    sector: Option<u32>,
}

impl Vhdx {
    async fn read(reader: &Reader) -> OpenResult<Self> {
        if reader.read(0, 8, "the signature").await? != b"vhdxfile" {
            return Err(OpenError::new("it has no signature of Hyper-V"));
        }
        check_headers(reader).await?;
        let regions = read_regions(reader).await?;
        let metadata = read_metadata(reader, regions.metadata).await?;
        let (Some((block, flags)), Some(length), Some(sector)) =
            (metadata.parameters, metadata.length, metadata.sector)
        else {
            return Err(OpenError::new("its metadata lacks the size of the disk, its blocks or its sectors"));
        };
        let block_bytes = u64::from(block);
        if flags & 2 != 0 {
            return Err(OpenError::new(
                "it is a differencing image, which stands on another one: that is not supported",
            ));
        }
        if !block_bytes.is_power_of_two() || !(MIB..=256 * MIB).contains(&block_bytes) {
            return Err(OpenError(format!(
                "the size of its blocks, {block_bytes}, is no power of two from 1M to 256M"
            )));
        }
        if ![512, 4096].contains(&sector) || !length.is_multiple_of(u64::from(sector)) {
            return Err(OpenError(format!("the size of its sectors, {sector}, is not supported")));
        }
        let length = import::check_length(Some(length))?;
        let chunk_blocks = (u64::from(sector) << 23) / block_bytes;
        let (table, table_bytes) = regions.blocks;
        let last = length.div_ceil(block_bytes).saturating_sub(1);
        if (last + last / chunk_blocks + 1) * 8 > table_bytes && length > 0 {
            return Err(OpenError(format!("its table of {table_bytes} bytes is too short for {length} bytes")));
        }
        Ok(Self { length, table, table_bytes, block_bytes, chunk_blocks })
    }
}

/// Looks whether there is a header that is whole, and no log that is to be replayed (2.2.2).
async fn check_headers(reader: &Reader) -> OpenResult {
    let mut newest: Option<(u64, Vec<u8>)> = None;
    for at in HEADERS {
        let Ok(header) = reader.read(at, HEADER_BYTES, "a header").await else { continue };
        let sequence = u64::from_le_bytes(field(&header, 8));
        if is_whole(&header, b"head") && newest.as_ref().is_none_or(|(best, _)| sequence > *best) {
            newest = Some((sequence, header));
        }
    }
    let Some((_, header)) = newest else {
        return Err(OpenError::new("both its headers are damaged"));
    };
    let version = u16::from_le_bytes(field(&header, 66));
    if version != 1 {
        return Err(OpenError(format!("its version {version} is not supported")));
    }
    if field::<16>(&header, 48) != [0; 16] {
        return Err(OpenError::new(
            "it was not closed properly, and its log is to be replayed first: let Hyper-V open it, or repair it with \
             qemu-img check -r all",
        ));
    }
    Ok(())
}

/// Where something is in the file, and how long it is.
type Region = (u64, u64);

struct Regions {
    blocks: Region,
    metadata: Region,
}

async fn read_regions(reader: &Reader) -> OpenResult<Regions> {
    let mut table = None;
    for at in REGION_TABLES {
        let found = reader.read(at, TABLE_BYTES, "a table of regions").await;
        table = table.or(found.ok().filter(|bytes| is_whole(bytes, b"regi")));
    }
    let table = table.ok_or_else(|| OpenError::new("both its tables of regions are damaged"))?;
    let entries: u64 = u32::from_le_bytes(field(&table, 8)).into();
    if entries > ENTRIES_MAX {
        return Err(OpenError(format!("its {entries} regions are too many")));
    }
    let (mut blocks, mut metadata) = (None, None);
    for entry in table.get(16..).unwrap_or_default().chunks_exact(32).take(entries as usize) {
        let (offset, bytes) = (u64::from_le_bytes(field(entry, 16)), u32::from_le_bytes(field(entry, 24)).into());
        let known = match field::<16>(entry, 0) {
            BLOCK_TABLE => &mut blocks,
            METADATA => &mut metadata,
            // A bit says that who does not know it must not open the image.
            _ if u32::from_le_bytes(field(entry, 28)) & 1 != 0 => {
                return Err(OpenError::new("it has a region that is unknown and not to be ignored"));
            }
            _ => continue,
        };
        if offset < MIB || !offset.is_multiple_of(MIB) || i64::try_from(offset).is_err() {
            return Err(OpenError::new("one of its regions is in no place where it can be"));
        }
        *known = Some((offset, bytes));
    }
    match (blocks, metadata) {
        (Some(blocks), Some(metadata)) => Ok(Regions { blocks, metadata }),
        _ => Err(OpenError::new("it lacks its table of blocks or its metadata")),
    }
}

async fn read_metadata(reader: &Reader, (region, region_bytes): Region) -> OpenResult<Metadata> {
    let table = reader.read(region, TABLE_BYTES, "the table of the metadata").await?;
    let entries: u64 = u16::from_le_bytes(field(&table, 10)).into();
    if !table.starts_with(b"metadata") || entries > ENTRIES_MAX {
        return Err(OpenError::new("the table of its metadata is damaged"));
    }
    let mut metadata = Metadata::default();
    for entry in table.get(32..).unwrap_or_default().chunks_exact(32).take(entries as usize) {
        let (offset, bytes): (u64, u64) =
            (u32::from_le_bytes(field(entry, 16)).into(), u32::from_le_bytes(field(entry, 20)).into());
        let known = field::<16>(entry, 0);
        match known {
            FILE_PARAMETERS | DISK_SIZE | LOGICAL_SECTOR => {}
            DISK_ID | PHYSICAL_SECTOR | PARENT => continue,
            _ if u32::from_le_bytes(field(entry, 24)) & 4 != 0 => {
                return Err(OpenError::new("its metadata has an item that is unknown and not to be ignored"));
            }
            _ => continue,
        }
        let wanted = if known == LOGICAL_SECTOR { 4 } else { 8 };
        if offset < TABLE_BYTES || bytes < wanted || offset + bytes > region_bytes {
            return Err(OpenError::new("an item of its metadata is in no place where it can be"));
        }
        let item = reader.read(region + offset, wanted, "an item of the metadata").await?;
        let first = u32::from_le_bytes(field(&item, 0));
        match known {
            FILE_PARAMETERS => metadata.parameters = Some((first, u32::from_le_bytes(field(&item, 4)))),
            DISK_SIZE => metadata.length = Some(u64::from_le_bytes(field(&item, 0))),
            _ => metadata.sector = Some(first),
        }
    }
    Ok(metadata)
}

impl Layout for Vhdx {
    fn length(&self) -> u64 {
        self.length
    }

    fn locate(&self, offset: u64, tables: &Tables) -> Attempt<Run> {
        let (block, inside) = (offset / self.block_bytes, offset % self.block_bytes);
        let entry_at = (block + block / self.chunk_blocks) * 8;
        if entry_at + 8 > self.table_bytes {
            return Err(Stop::Corrupt("the table of blocks is too short"));
        }
        let entry = u64::from_le_bytes(tables.bytes(0, self.table + entry_at)?);
        // The state of a block, and where it is (2.5.1.1).
        let place = match entry & 7 {
            0 | 1 => Place::Hole,
            // 5: as early versions wrote what was given back.
            2 | 3 | 5 => Place::Zero,
            6 => Place::Data { child: 0, offset: (entry & !(MIB - 1)).saturating_add(inside) },
            _ => return Err(Stop::Corrupt("a block is in a state that only images over others know")),
        };
        Ok(Run { place, bytes: self.block_bytes - inside })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_crc_32c() {
        assert_eq!(crc32c(*b"123456789"), 0xe306_9283);
    }
}
