//! The format `vdi` of VirtualBox, which is only read: a header, and a table that says where each block is. Fields are
//! little-endian and stand where VirtualBox's `VDICore.h` has them. Images that stand on others are refused.

use super::import::{self, Attempt, Layout, Place, Run, Stop, Tables, field};
use super::{DriverKind, DriverRow};
use crate::driver::BlockDriver;
use crate::error::{OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::node::SECTOR;
use crate::options::Options;

pub(super) const ROW: DriverRow = DriverRow {
    name: "vdi",
    kind: DriverKind::Format,
    summary: "an image of VirtualBox, for reading",
    options: &[("file", "the node with the image")],
    open,
};

const HEADER_BYTES: u64 = 512;
const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x0001_0001;
/// The kinds of image: those that grow, and those that have all blocks from the start.
const KINDS: [u32; 2] = [1, 2];
/// In place of the number of a block: there is none.
const NONE: u32 = 0xffff_ffff;
/// The same: it was discarded.
const DISCARDED: u32 = 0xffff_fffe;

struct Vdi {
    length: u64,
    /// Where the table of blocks is in the file.
    table: u64,
    /// Where the first block is in the file.
    data: u64,
    block_bytes: u64,
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let file = context.read_only_child(options, "file")?;
    let node = &context.node.name;
    let layout = import::read_header("vdi", node, &file, async |reader| {
        let header = reader.read(0, HEADER_BYTES, "the header").await?;
        Vdi::parse(&header)
    })?;
    Ok(import::driver(node, Box::new(layout), vec![file]))
}

impl Vdi {
    fn parse(header: &[u8]) -> OpenResult<Self> {
        let number = |at| u32::from_le_bytes(field(header, at));
        let refuse = |why: String| Err(OpenError(why));
        if number(0x40) != SIGNATURE {
            return refuse("it has no signature of VirtualBox".to_owned());
        }
        if number(0x44) != VERSION {
            return refuse(format!("its version {:#x} is not supported", number(0x44)));
        }
        if !KINDS.contains(&number(0x4c)) || field::<32>(header, 0x1a8) != [0; 32] {
            return refuse("it stands on another image, which is not supported".to_owned());
        }
        let (table, data, block_bytes) = (number(0x154), number(0x158), number(0x178));
        if number(0x168) != SECTOR as u32 || number(0x17c) != 0 {
            return refuse("the size of its sectors, or what it keeps with each block, is not supported".to_owned());
        }
        if !block_bytes.is_power_of_two() || !(4096..=256 << 20).contains(&block_bytes) {
            return refuse(format!("the size of its blocks, {block_bytes}, is no power of two from 4K to 256M"));
        }
        let aligned = |offset: u32| offset.is_multiple_of(SECTOR as u32) && u64::from(offset) >= HEADER_BYTES;
        if !aligned(table) || !aligned(data) {
            return refuse("its table or its first block is in no place where it can be".to_owned());
        }
        let size = u64::from_le_bytes(field(header, 0x170));
        // As in QEMU: old programs made such images.
        let length = import::check_length(size.checked_next_multiple_of(SECTOR))?;
        if length.div_ceil(block_bytes.into()) > u64::from(number(0x180)) {
            return refuse(format!("its {} blocks are too few for {length} bytes", number(0x180)));
        }
        Ok(Self { length, table: table.into(), data: data.into(), block_bytes: block_bytes.into() })
    }
}

impl Layout for Vdi {
    fn length(&self) -> u64 {
        self.length
    }

    fn locate(&self, offset: u64, tables: &Tables) -> Attempt<Run> {
        let (block, inside) = (offset / self.block_bytes, offset % self.block_bytes);
        let entry = u32::from_le_bytes(tables.bytes(0, self.table + block * 4)?);
        let place = match entry {
            NONE => Place::Hole,
            DISCARDED => Place::Zero,
            number => {
                let start = u64::from(number).checked_mul(self.block_bytes).and_then(|at| at.checked_add(self.data));
                let start = start.ok_or(Stop::Corrupt("a block lies behind the end of any file"))?;
                Place::Data { child: 0, offset: start + inside }
            }
        };
        Ok(Run { place, bytes: self.block_bytes - inside })
    }
}
