//! The format `vpc` (VHD) of Virtual PC and Hyper-V, which is only read, as Microsoft's "Virtual Hard Disk Image Format
//! Specification" 1.0 has it: a footer, and in images that grow a header and a table of blocks. Fields are big-endian.
//! Differencing images, which stand on others, are refused.

use super::import::{self, Attempt, Layout, Place, Reader, Run, Stop, Tables, field};
use super::{DriverKind, DriverRow};
use crate::driver::BlockDriver;
use crate::error::{OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::node::SECTOR;
use crate::options::Options;

pub(super) const ROW: DriverRow = DriverRow {
    name: "vpc",
    kind: DriverKind::Format,
    summary: "an image of Virtual PC or Hyper-V (VHD), for reading",
    options: &[
        ("file", "the node with the image"),
        (
            "force-size-calc",
            "chs, current_size: where the size of the disk stands; default auto: by the program that made it",
        ),
    ],
    open,
};

const FOOTER_BYTES: u64 = 512;
const HEADER_BYTES: u64 = 1024;
/// In place of where a block is: there is none.
const NONE: u32 = 0xffff_ffff;
/// The geometry of disks that are longer than one can say.
const GEOMETRY_MAX: u64 = 65535 * 16 * 255;
/// The programs whose images are as long as `Current Size` says, as QEMU knows them. Those of others have the size that
/// their geometry gives.
const EXACT_CREATORS: [&[u8; 4]; 6] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0"];

/// Where the size of the disk stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SizeFrom {
    Creator,
    Geometry,
    CurrentSize,
}

/// The table of an image that grows.
struct Blocks {
    /// Where it is in the file.
    table: u64,
    block_bytes: u64,
    /// What stands before the data of each block: which sectors were ever written. The others are zero in the file, too.
    bitmap_bytes: u64,
}

struct Vpc {
    length: u64,
    /// `None`: the file is the disk, up to the footer.
    blocks: Option<Blocks>,
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let choices = [("auto", SizeFrom::Creator), ("chs", SizeFrom::Geometry), ("current_size", SizeFrom::CurrentSize)];
    let size_from = options.take_enum("force-size-calc", &choices).map_err(OpenError::new)?;
    let file = context.read_only_child(options, "file")?;
    let node = &context.node.name;
    let layout = import::read_header("vpc", node, &file, async move |reader| {
        Vpc::read(&reader, size_from.unwrap_or(SizeFrom::Creator)).await
    })?;
    Ok(import::driver(node, Box::new(layout), vec![file]))
}

/// Whether the sum of a structure is right: the complement of the sum of its bytes without its own.
fn is_whole(bytes: &[u8], checksum_at: usize) -> bool {
    let own: u32 = field::<4>(bytes, checksum_at).iter().map(|byte| u32::from(*byte)).sum();
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    u32::from_be_bytes(field(bytes, checksum_at)) == !(sum - own)
}

impl Vpc {
    async fn read(reader: &Reader, size_from: SizeFrom) -> OpenResult<Self> {
        let is_footer = |bytes: &[u8]| bytes.starts_with(b"conectix") && is_whole(bytes, 64);
        // The copy at the start, which only images that grow have; the footer itself where that is damaged.
        let mut footer = reader.read(0, FOOTER_BYTES, "the header").await?;
        if !is_footer(&footer) {
            // Old programs made it a byte shorter.
            for bytes in [FOOTER_BYTES, FOOTER_BYTES - 1] {
                footer = reader.read(reader.length() - bytes, bytes, "the footer").await?;
                footer.resize(FOOTER_BYTES as usize, 0);
                if is_footer(&footer) {
                    break;
                }
            }
        }
        if !is_footer(&footer) {
            return Err(OpenError::new("it has no footer of Virtual PC, or a damaged one"));
        }
        let kind = u32::from_be_bytes(field(&footer, 60));
        let length = length(&footer, size_from)?;
        match kind {
            2 if length > reader.length() => {
                Err(OpenError(format!("its file is too short for its {length} bytes ({} bytes)", reader.length())))
            }
            2 => Ok(Self { length, blocks: None }),
            3 => {
                let at = u64::from_be_bytes(field(&footer, 16));
                let header = reader.read(at, HEADER_BYTES, "the header of the table").await?;
                Ok(Self { length, blocks: Some(Blocks::parse(&header, length)?) })
            }
            4 => Err(OpenError::new("it is a differencing image, which stands on another one: that is not supported")),
            other => Err(OpenError(format!("its type {other} is unknown"))),
        }
    }
}

fn length(footer: &[u8], size_from: SizeFrom) -> OpenResult<u64> {
    let current = u64::from_be_bytes(field(footer, 48));
    let cylinders: u64 = u16::from_be_bytes(field(footer, 56)).into();
    let [heads, sectors] = field::<2>(footer, 58).map(u64::from);
    let geometry = cylinders * heads * sectors;
    let by_geometry = match size_from {
        SizeFrom::Creator => !EXACT_CREATORS.contains(&&field(footer, 28)),
        SizeFrom::Geometry => true,
        SizeFrom::CurrentSize => false,
    };
    match by_geometry && geometry < GEOMETRY_MAX {
        true => import::check_length(Some(geometry * SECTOR)),
        false => import::check_length(Some(current / SECTOR * SECTOR)),
    }
}

impl Blocks {
    fn parse(header: &[u8], length: u64) -> OpenResult<Self> {
        if !header.starts_with(b"cxsparse") || !is_whole(header, 36) {
            return Err(OpenError::new("the header of its table is damaged"));
        }
        let table = u64::from_be_bytes(field(header, 16));
        let entries = u32::from_be_bytes(field(header, 28));
        let block_bytes: u64 = u32::from_be_bytes(field(header, 32)).into();
        if !block_bytes.is_power_of_two() || !(SECTOR..=256 << 20).contains(&block_bytes) {
            return Err(OpenError(format!(
                "the size of its blocks, {block_bytes}, is no power of two from 512 to 256M"
            )));
        }
        if !table.is_multiple_of(SECTOR) || i64::try_from(table).is_err() {
            return Err(OpenError::new("its table is in no place where it can be"));
        }
        if length.div_ceil(block_bytes) > u64::from(entries) {
            return Err(OpenError(format!("its {entries} blocks are too few for {length} bytes")));
        }
        let bitmap_bytes = block_bytes.div_ceil(SECTOR * 8).next_multiple_of(SECTOR);
        Ok(Self { table, block_bytes, bitmap_bytes })
    }
}

impl Layout for Vpc {
    fn length(&self) -> u64 {
        self.length
    }

    fn locate(&self, offset: u64, tables: &Tables) -> Attempt<Run> {
        let Some(blocks) = &self.blocks else {
            return Ok(Run {
                place: Place::Data { child: 0, offset },
                bytes: self.length.saturating_sub(offset).max(1),
            });
        };
        let (block, inside) = (offset / blocks.block_bytes, offset % blocks.block_bytes);
        let at =
            blocks.table.checked_add(block * 4).ok_or(Stop::Corrupt("its table lies behind the end of any file"))?;
        let place = match u32::from_be_bytes(tables.bytes(0, at)?) {
            NONE => Place::Hole,
            sector => Place::Data { child: 0, offset: u64::from(sector) * SECTOR + blocks.bitmap_bytes + inside },
        };
        Ok(Run { place, bytes: blocks.block_bytes - inside })
    }
}
