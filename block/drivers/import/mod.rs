//! Import: what the formats of other programs that are only read have in common. It owns their driver and the control
//! verbs; where something lies in an image each [`Layout`] knows, and `channel.rs` reads it there.

mod channel;
mod tables;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(super) use self::channel::Reader;
use self::channel::{Channel, ImportChannel};
pub(super) use self::tables::{Attempt, Stop, Tables};
use super::own_loop::on_own_loop;
use crate::aio::AioContext;
use crate::child::Child;
use crate::driver::{BlockDriver, IoChannel};
use crate::error::{BlockError, OpenError, OpenResult};
use crate::limits::BlockLimits;
use crate::node::SECTOR;
use crate::permissions::{PermissionSet, Permissions};

/// Where the bytes of a disk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere, and so zero.
    Hole,
    /// The image says that they are zero.
    Zero,
    /// In a child, from `offset` on.
    Data {
        /// The number of the child.
        child: usize,
        /// In bytes.
        offset: u64,
    },
    /// In a unit that is compressed, from `skip` bytes in.
    Packed(Packed, u64),
}

/// A compressed unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packed {
    /// The number of the child.
    pub child: usize,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is when it is not compressed, in bytes.
    pub bytes: u64,
}

/// The bytes of a disk that are at one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Where.
    pub place: Place,
    /// How many; at least 1.
    pub bytes: u64,
}

impl Run {
    /// This one with the next, if that goes on where this one ends.
    fn joined(self, next: Self) -> Option<Self> {
        let goes_on = match (self.place, next.place) {
            (Place::Hole, Place::Hole) | (Place::Zero, Place::Zero) => true,
            (Place::Data { child, offset }, Place::Data { child: next_child, offset: next_offset }) => {
                child == next_child && offset.checked_add(self.bytes) == Some(next_offset)
            }
            _ => false,
        };
        goes_on.then_some(Self { place: self.place, bytes: self.bytes + next.bytes })
    }
}

/// How an image of some format is laid out. Made from its header; tables are read as they are needed.
pub(super) trait Layout: Send + Sync {
    /// The size of the disk in bytes.
    fn length(&self) -> u64;

    /// Where the byte at `offset`, which is below the length, and those behind it are. The run may be longer than the
    /// disk.
    ///
    /// # Errors
    /// A part of a table is needed first, or the image is corrupt.
    fn locate(&self, offset: u64, tables: &Tables) -> Attempt<Run>;
}

/// What all channels share.
struct Image {
    node: String,
    layout: Box<dyn Layout>,
    /// That it is damaged has been told.
    told: AtomicBool,
    active: AtomicBool,
}

impl Image {
    /// Says once what is wrong. The error is what requests fail with.
    fn damaged(&self, why: impl std::fmt::Display) -> BlockError {
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::error!("node \"{}\": the image is damaged: {why}", self.node);
        }
        BlockError::Host(libc::EIO)
    }
}

/// An opened image.
struct Import {
    image: Arc<Image>,
    children: Vec<Arc<Child>>,
}

/// The driver of an image that is laid out so over its children.
pub(super) fn driver(node: &str, layout: Box<dyn Layout>, children: Vec<Arc<Child>>) -> Box<dyn BlockDriver> {
    let image = Image { node: node.to_owned(), layout, told: AtomicBool::new(false), active: AtomicBool::new(false) };
    Box::new(Import { image: Arc::new(image), children })
}

/// `N` bytes of a header; zeroes where it is shorter.
pub(super) fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    header.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

/// Reads what is needed to open an image. Errors name the image.
///
/// # Errors
/// What `work` fails with.
pub(super) fn read_header<T, F>(
    format: &str,
    node: &str,
    file: &Child,
    work: impl FnOnce(Reader) -> F + Send,
) -> OpenResult<T>
where
    T: Send + 'static,
    F: Future<Output = OpenResult<T>> + 'static,
{
    let found = on_own_loop("import-control", |context| {
        let reader = Reader::new(file.channel(context)?);
        context.run_until(work(reader))
    });
    found.map_err(|e| e.context(name(format, node, file)))
}

/// What errors call an image.
pub(super) fn name(format: &str, node: &str, file: &Child) -> String {
    match file.node().file_name() {
        Some(path) => format!("{format} image \"{path}\""),
        None => format!("node \"{node}\""),
    }
}

/// That an image is no more than 2^63 − 1 bytes and a whole number of sectors long.
///
/// # Errors
/// It is not.
pub(super) fn check_length(bytes: Option<u64>) -> OpenResult<u64> {
    match bytes {
        Some(bytes) if bytes <= i64::MAX as u64 && bytes.is_multiple_of(SECTOR) => Ok(bytes),
        _ => Err(OpenError::new("the size of the disk is no number of sectors, or too large")),
    }
}

impl Import {
    /// What is needed of the children while the node is active, whoever uses it: nobody changes them.
    fn needed(&self) -> Permissions {
        if !self.image.active.load(Ordering::Relaxed) {
            return Permissions::UNUSED;
        }
        Permissions {
            held: PermissionSet::CONSISTENT_READ,
            shared: PermissionSet::ALL.without(PermissionSet::WRITE | PermissionSet::RESIZE),
        }
    }

    fn set_child_permissions(&self) -> OpenResult {
        self.children.iter().try_for_each(|child| child.set_permissions(self.needed()))
    }
}

impl BlockDriver for Import {
    fn limits(&self) -> BlockLimits {
        let file = self.children.first().map(|child| child.node().limits()).unwrap_or_default();
        BlockLimits {
            read_only: true,
            request_alignment: SECTOR as u32,
            optimal_transfer: file.optimal_transfer,
            physical_block_size: file.physical_block_size,
            ..BlockLimits::default()
        }
    }

    fn length(&self) -> u64 {
        self.image.layout.length()
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn child_permissions(&self, _: Permissions) -> Permissions {
        self.needed()
    }

    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }

    fn resize(&self, _: u64) -> OpenResult {
        Err(OpenError::new("images of this format are only read"))
    }

    fn activate(&self) -> OpenResult {
        self.image.active.store(true, Ordering::Relaxed);
        let locked = self.set_child_permissions();
        if locked.is_err() {
            self.inactivate()?;
        }
        locked
    }

    fn inactivate(&self) -> OpenResult {
        self.image.active.store(false, Ordering::Relaxed);
        self.set_child_permissions()
    }

    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        let files = self.children.iter().map(|child| child.channel(context)).collect::<OpenResult<Vec<_>>>()?;
        Ok(Rc::new(ImportChannel(Channel::new(&self.image, files))))
    }
}
