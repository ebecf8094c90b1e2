//! The format `vmdk` of VMware, which is only read, as its "Virtual Disk Format" 5.0 has it: a disk of one or many
//! extents, sparse, flat, or compressed for streaming. This file owns the disk and its extents; `descriptor.rs` reads the
//! text that lists them, `sparse.rs` a sparse one. Images that stand on others are refused.

mod descriptor;
mod sparse;

use self::descriptor::{Descriptor, ExtentKind};
use self::sparse::Sparse;
use super::import::{self, Attempt, Layout, Place, Reader, Run, Stop, Tables};
use super::{DriverKind, DriverRow};
use crate::driver::BlockDriver;
use crate::error::{OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::node::SECTOR;
use crate::options::Options;

pub(super) const ROW: DriverRow = DriverRow {
    name: "vmdk",
    kind: DriverKind::Format,
    summary: "an image of VMware, for reading",
    options: &[
        ("file", "the node with the image, or with the descriptor that names its extents"),
        (
            "extents",
            "extents.0, extents.1, ...: the nodes with the extents; default: the files that the descriptor names",
        ),
    ],
    open,
};

/// A piece of the disk.
struct Extent {
    /// Where it ends on the disk, in bytes; it begins where the one before ends.
    end: u64,
    content: Content,
}

enum Content {
    Zero,
    Flat { child: usize, offset: u64 },
    Sparse(Sparse),
}

/// The extents, in order.
struct Vmdk(Vec<Extent>);

/// What the file is.
enum Start {
    Sparse(Sparse),
    Descriptor(Descriptor),
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let file = context.read_only_child(options, "file")?;
    let node = &context.node.name;
    let start = import::read_header("vmdk", node, &file, async |reader| read_start(&reader).await)?;
    let descriptor = match start {
        Start::Sparse(sparse) => {
            let extent = Extent { end: sparse.length(), content: Content::Sparse(sparse) };
            return Ok(import::driver(node, Box::new(Vmdk(vec![extent])), vec![file]));
        }
        Start::Descriptor(descriptor) => descriptor,
    };
    let named = |e: OpenError| e.context(import::name("vmdk", node, &file));
    let mut children = vec![file.clone()];
    let mut extents = Vec::new();
    let mut end = 0u64;
    let in_extent = |name: &str| {
        let what = format!("extent \"{name}\"");
        move |e: OpenError| named(e.context(&what))
    };
    for (index, stated) in descriptor.extents.iter().enumerate() {
        let key = format!("extents.{index}");
        let length = import::check_length(stated.sectors.checked_mul(SECTOR)).map_err(named)?;
        let content = match &stated.kind {
            ExtentKind::Zero => Content::Zero,
            ExtentKind::Flat { name, offset } => {
                children.push(context.stated_extent(&key, &file, name).map_err(in_extent(name))?);
                Content::Flat { child: children.len() - 1, offset: *offset }
            }
            ExtentKind::Sparse { name } => {
                let extent = context.stated_extent(&key, &file, name).map_err(in_extent(name))?;
                let child = children.len();
                let sparse =
                    import::read_header("vmdk", node, &extent, async move |reader| Sparse::read(&reader, child).await);
                let sparse = sparse.map_err(|e| named(e.context(format_args!("extent \"{name}\""))))?;
                if sparse.length() < length {
                    let has = sparse.length();
                    return Err(named(OpenError(format!("extent \"{name}\" has {has} of its {length} bytes"))));
                }
                children.push(extent);
                Content::Sparse(sparse)
            }
        };
        end = import::check_length(end.checked_add(length)).map_err(named)?;
        extents.push(Extent { end, content });
    }
    Ok(import::driver(node, Box::new(Vmdk(extents)), children))
}

async fn read_start(reader: &Reader) -> OpenResult<Start> {
    let magic = reader.read(0, reader.length().min(4), "the header").await?;
    if magic == sparse::MAGIC {
        let sparse = Sparse::read(reader, 0).await?;
        if let Some((offset, bytes)) = sparse.descriptor() {
            // The extent that it lists is this one.
            Descriptor::read(reader, offset, bytes).await?.check_parent()?;
        }
        return Ok(Start::Sparse(sparse));
    }
    let descriptor = Descriptor::read(reader, 0, reader.length()).await?;
    descriptor.check_parent()?;
    match descriptor.extents.is_empty() {
        true => Err(OpenError::new("it is neither a sparse image of VMware nor a descriptor with extents")),
        false => Ok(Start::Descriptor(descriptor)),
    }
}

impl Layout for Vmdk {
    fn length(&self) -> u64 {
        self.0.last().map_or(0, |extent| extent.end)
    }

    fn locate(&self, offset: u64, tables: &Tables) -> Attempt<Run> {
        let index = self.0.partition_point(|extent| extent.end <= offset);
        let start = index.checked_sub(1).and_then(|before| self.0.get(before)).map_or(0, |before| before.end);
        let extent = self.0.get(index).ok_or(Stop::Corrupt("no extent reaches that far"))?;
        let (inside, left) = (offset - start, extent.end - offset);
        let run = match &extent.content {
            Content::Zero => Run { place: Place::Zero, bytes: left },
            Content::Flat { child, offset: begin } => {
                let offset = begin.checked_add(inside).ok_or(Stop::Corrupt("an extent ends behind any file"))?;
                Run { place: Place::Data { child: *child, offset }, bytes: left }
            }
            Content::Sparse(sparse) => sparse.locate(inside, tables)?,
        };
        Ok(Run { bytes: run.bytes.min(left), ..run })
    }
}
