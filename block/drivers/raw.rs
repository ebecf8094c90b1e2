//! The format `raw`: its file as it is, or a window of it. Requests are passed on within the window and change nothing
//! on the way; the file's own edge gives them the shape that the file asks for, so that it is done once.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{DriverKind, DriverRow};
use crate::aio::AioContext;
use crate::child::{Child, ChildChannel};
use crate::driver::{BlockDriver, BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::iovec::{self, IoVec};
use crate::limits::BlockLimits;
use crate::node::SECTOR;
use crate::options::Options;
use crate::permissions::Permissions;

pub(super) const ROW: DriverRow = DriverRow {
    name: "raw",
    kind: DriverKind::Format,
    summary: "an image without a format: the bytes of its file",
    options: &[
        ("file", "the node with the bytes"),
        ("offset", "where the disk begins in the file, in bytes, a multiple of 512, default 0"),
        ("size", "how long the disk is, in bytes, a multiple of 512; default: to the end of the file"),
    ],
    open,
};

struct Raw {
    file: [Arc<Child>; 1],
    /// Where the window begins in the file.
    offset: u64,
    /// How long it is; `None`: to the end of the file.
    size: Option<u64>,
    /// How long the disk is now. Shared with the channels, which hold requests inside it.
    length: Arc<AtomicU64>,
}

/// Where the disk begins in its file, in bytes, if the driver is this one.
pub(crate) fn offset(driver: &dyn BlockDriver) -> Option<u64> {
    let driver: &dyn std::any::Any = driver;
    driver.downcast_ref::<Raw>().map(|raw| raw.offset)
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let offset = options.take_size("offset").map_err(OpenError::new)?.unwrap_or(0);
    let size = options.take_size("size").map_err(OpenError::new)?;
    for (key, value) in [("offset", offset), ("size", size.unwrap_or(0))] {
        if !value.is_multiple_of(SECTOR) {
            return Err(OpenError::new(options.invalid(key, value, "a multiple of 512")));
        }
    }
    let file = context.child(options, "file")?;
    let raw = Raw { file: [file], offset, size, length: Arc::default() };
    raw.measure().map_err(|e| e.context(format_args!("node \"{}\"", context.node.name)))?;
    Ok(Box::new(raw))
}

impl Raw {
    fn file(&self) -> &Child {
        &self.file[0]
    }

    /// Fits the window to the file as it is now.
    fn measure(&self) -> OpenResult {
        let there = self.file().node().length();
        let Some(rest) = there.checked_sub(self.offset) else {
            return Err(OpenError(format!("offset {} lies behind the end of the file ({there} bytes)", self.offset)));
        };
        if let Some(size) = self.size
            && size > rest
        {
            let offset = self.offset;
            return Err(OpenError(format!("size {size} at offset {offset} is more than the file has ({there} bytes)")));
        }
        self.length.store(self.size.unwrap_or(rest), Ordering::Relaxed);
        Ok(())
    }
}

impl BlockDriver for Raw {
    fn limits(&self) -> BlockLimits {
        let file = self.file().node();
        let limits = file.limits();
        BlockLimits {
            read_only: file.is_read_only(),
            // What the file asks for beyond a sector is its own edge's business. Padding here would reach past the
            // window where that ends inside one of the file's blocks.
            request_alignment: limits.request_alignment.min(SECTOR as u32),
            memory_alignment: 1,
            max_transfer: 0,
            max_iov: 0,
            can_discard: limits.can_discard && file.options().discard,
            // That of the whole disk is none of a window's.
            geometry: limits.geometry.filter(|_| self.offset == 0 && self.size.is_none()),
            ..limits
        }
    }

    fn length(&self) -> u64 {
        // The file may have been resized by itself. A window that no longer fits keeps its length, and reads fail.
        if let Err(error) = self.measure() {
            tracing::warn!("{error}");
        }
        self.length.load(Ordering::Relaxed)
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.file
    }

    fn child_permissions(&self, own: Permissions) -> Permissions {
        own
    }

    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }

    fn resize(&self, bytes: u64) -> OpenResult {
        if self.size.is_some() {
            return Err(OpenError::new("a disk whose size is given cannot be resized"));
        }
        let Some(end) = self.offset.checked_add(bytes).filter(|end| *end <= i64::MAX as u64) else {
            return Err(OpenError(format!("{bytes} bytes behind offset {} are too many", self.offset)));
        };
        self.file().node().resize(end)?;
        self.measure()
    }

    fn activate(&self) -> OpenResult {
        self.measure()
    }

    fn inactivate(&self) -> OpenResult {
        Ok(())
    }

    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        let file = self.file().channel(context)?;
        Ok(match (self.offset, self.size) {
            (0, None) => Rc::new(Whole(file)),
            (offset, _) => Rc::new(Window { file, offset, length: self.length.clone() }),
        })
    }
}

/// The whole file: the file's own edge checks everything.
struct Whole(Rc<ChildChannel>);

impl IoChannel for Whole {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        self.0.preadv(offset, iov)
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        self.0.pwritev(offset, iov, flags)
    }

    fn flush(&self) -> BlockFuture {
        self.0.flush()
    }

    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture {
        self.0.pdiscard(offset, bytes)
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        self.0.pwrite_zeroes(offset, bytes, flags)
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        self.0.block_status(offset, bytes)
    }
}

/// A part of the file. What lies around it belongs to somebody else, so the range is checked here once more.
struct Window {
    file: Rc<ChildChannel>,
    offset: u64,
    length: Arc<AtomicU64>,
}

impl Window {
    /// Where the request lies in the file.
    fn place(&self, offset: u64, bytes: u64) -> BlockResult<u64> {
        let length = self.length.load(Ordering::Relaxed);
        match offset.checked_add(bytes) {
            Some(end) if end <= length => self.offset.checked_add(offset).ok_or(BlockError::OutOfRange),
            _ => Err(BlockError::OutOfRange),
        }
    }

    fn placed(&self, offset: u64, bytes: u64, go: impl FnOnce(u64) -> BlockFuture) -> BlockFuture {
        match self.place(offset, bytes) {
            Ok(place) => go(place),
            Err(error) => BlockFuture::ready(Err(error)),
        }
    }
}

impl IoChannel for Window {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        self.placed(offset, iovec::total_len(iov), |place| self.file.preadv(place, iov))
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        self.placed(offset, iovec::total_len(iov), |place| self.file.pwritev(place, iov, flags))
    }

    fn flush(&self) -> BlockFuture {
        self.file.flush()
    }

    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture {
        self.placed(offset, bytes, |place| self.file.pdiscard(place, bytes))
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        self.placed(offset, bytes, |place| self.file.pwrite_zeroes(place, bytes, flags))
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        match self.place(offset, bytes) {
            Ok(place) => self.file.block_status(place, bytes),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}
