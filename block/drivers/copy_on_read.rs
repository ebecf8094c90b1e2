//! The filter `copy-on-read`: what is read from behind an image is written into the image, so that the next read finds
//! it there. Its child says what is there (`BlockStatus::allocated`). It never changes what a read gives.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{DriverKind, DriverRow};
use crate::aio::AioContext;
use crate::child::{Child, ChildChannel};
use crate::driver::{BlockDriver, BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::iovec::{self, IoVec};
use crate::limits::BlockLimits;
use crate::options::Options;
use crate::permissions::{PermissionSet, Permissions};
use crate::ranges::RangeLocks;
use crate::shaping::BounceBudget;

#[cfg(test)]
mod tests;

pub(super) const ROW: DriverRow = DriverRow {
    name: "copy-on-read",
    kind: DriverKind::Filter,
    summary: "a filter that copies what is read from a backing file into the image",
    options: &[("file", "the node with the image; nothing is copied while that is read-only")],
    open,
};

/// The most bytes copied at a time.
const COPY_MAX: u64 = 1 << 20;
/// Of the memory that they go through; fits every node.
const MEMORY_ALIGNMENT: u32 = 4096;

struct CopyOnRead {
    file: [Arc<Child>; 1],
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    /// Keeps what a guest writes from being overwritten by what was read before.
    ranges: Arc<RangeLocks>,
    /// A copy has failed, and the log says so.
    has_failed: AtomicBool,
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    options.take_unsupported(&["bottom"]).map_err(OpenError::new)?;
    let file = context.child(options, "file")?;
    let name = context.node.name.clone();
    let shared = Shared { name, ranges: Arc::default(), has_failed: AtomicBool::new(false) };
    Ok(Box::new(CopyOnRead { file: [file], shared: Arc::new(shared) }))
}

impl BlockDriver for CopyOnRead {
    fn limits(&self) -> BlockLimits {
        BlockLimits::of_filter(&self.file[0].node())
    }

    fn length(&self) -> u64 {
        self.file[0].node().length()
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.file
    }

    fn child_permissions(&self, own: Permissions) -> Permissions {
        if own == Permissions::UNUSED {
            return own;
        }
        // A write that passes us by could be overwritten by a copy.
        let alone = PermissionSet::WRITE | PermissionSet::RESIZE;
        Permissions { held: own.held | PermissionSet::WRITE_UNCHANGED, shared: own.shared.without(alone) }
    }

    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }

    fn resize(&self, bytes: u64) -> OpenResult {
        self.file[0].node().resize(bytes)
    }

    fn activate(&self) -> OpenResult {
        Ok(())
    }

    fn inactivate(&self) -> OpenResult {
        Ok(())
    }

    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        let file = self.file[0].channel(context)?;
        let copies = !self.file[0].node().is_read_only();
        let (shared, budget) = (self.shared.clone(), BounceBudget::default());
        Ok(Rc::new(Channel(Rc::new(Inner { file, copies, shared, budget }))))
    }
}

struct Channel(Rc<Inner>);

struct Inner {
    file: Rc<ChildChannel>,
    copies: bool,
    shared: Arc<Shared>,
    budget: BounceBudget,
}

impl Inner {
    async fn read(&self, offset: u64, iov: &[IoVec]) -> BlockResult {
        let end = offset + iovec::total_len(iov);
        let mut at = offset;
        while at < end {
            let BlockStatus { bytes, allocated, .. } = self.file.block_status(at, end - at).await?;
            let bytes = if allocated { bytes } else { bytes.min(COPY_MAX) };
            let part = iovec::slice(iov, at - offset, bytes);
            match allocated {
                true => self.file.preadv(at, &part).await?,
                false => self.copy(at, bytes, &part).await?,
            }
            at += bytes;
        }
        Ok(())
    }

    /// Reads and writes back, with nobody else writing there meanwhile.
    async fn copy(&self, offset: u64, bytes: u64, iov: &[IoVec]) -> BlockResult {
        // Through memory of our own: what a guest does to its buffers must not get into the image.
        let bounce = self.budget.buffer(bytes, MEMORY_ALIGNMENT).await;
        let data = [bounce.part(0, bytes as usize)];
        let _range = self.shared.ranges.lock(offset, offset + bytes, true).await;
        self.file.preadv(offset, &data).await?;
        iovec::copy(&data, 0, iov, 0, bytes);
        // Somebody may have written it before it was our turn.
        let status = self.file.block_status(offset, bytes).await?;
        if status.allocated && status.bytes >= bytes {
            return Ok(());
        }
        let flags = WriteFlags::default();
        let copied = match iovec::is_zero(&data) {
            true => self.file.pwrite_zeroes(offset, bytes, flags).await,
            false => self.file.pwritev(offset, &data, flags).await,
        };
        self.note(offset, copied);
        Ok(())
    }

    /// A copy that fails is no reason to fail the read, whose data is there.
    fn note(&self, offset: u64, copied: BlockResult) {
        if let Err(error) = copied
            && !self.shared.has_failed.swap(true, Ordering::Relaxed)
        {
            let name = &self.shared.name;
            tracing::warn!("node \"{name}\": what is read is not copied, first at offset {offset}: {error}");
        }
    }
}

impl Channel {
    /// Passes a change of the range on, kept apart from copies.
    fn change(
        &self,
        offset: u64,
        bytes: u64,
        go: impl FnOnce(&Rc<ChildChannel>) -> BlockFuture + 'static,
    ) -> BlockFuture {
        let this = self.0.clone();
        if !this.copies {
            return go(&this.file);
        }
        let Some(end) = offset.checked_add(bytes) else { return BlockFuture::ready(Err(BlockError::OutOfRange)) };
        BlockFuture::boxed(async move {
            let _range = this.shared.ranges.lock(offset, end, false).await;
            go(&this.file).await
        })
    }
}

impl IoChannel for Channel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        if !self.0.copies {
            return self.0.file.preadv(offset, iov);
        }
        let (this, iov) = (self.0.clone(), iov.to_vec());
        BlockFuture::boxed(async move { this.read(offset, &iov).await })
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        let iov = iov.to_vec();
        self.change(offset, iovec::total_len(&iov), move |file| file.pwritev(offset, &iov, flags))
    }

    fn flush(&self) -> BlockFuture {
        self.0.file.flush()
    }

    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture {
        self.change(offset, bytes, move |file| file.pdiscard(offset, bytes))
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        self.change(offset, bytes, move |file| file.pwrite_zeroes(offset, bytes, flags))
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        self.0.file.block_status(offset, bytes)
    }
}
