//! The driver `memory`: a disk in the daemon's own memory, gone when it closes. All iothreads copy to and from one
//! mapping without a lock; who writes the same sector twice at once gets a mixture, as from any disk.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{DriverKind, DriverRow};
use crate::aio::AioContext;
use crate::child::Child;
use crate::driver::{BlockDriver, BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::iovec::IoVec;
use crate::limits::BlockLimits;
use crate::options::Options;
use crate::permissions::Permissions;
use crate::sys::Mapping;

pub(super) const ROW: DriverRow = DriverRow {
    name: "memory",
    kind: DriverKind::Protocol,
    summary: "a disk in the daemon's memory, gone when it ends",
    options: &[("size", "size in bytes; memory is taken as it is written")],
    open,
};

/// Address space, in bytes, set aside for each disk to grow into. It costs nothing until then.
const ROOM_TO_GROW: u64 = 64 << 30;
/// In how large steps, in bytes, [`IoChannel::block_status`] looks for zeroes.
const STATUS_STEP: u64 = 4096;
/// How far, in bytes, one such call looks.
const STATUS_MAX: u64 = 1 << 20;

struct Memory {
    length: AtomicU64,
    mapping: Arc<Mapping>,
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let size = options.take_size("size").map_err(OpenError::new)?;
    let size = size.ok_or_else(|| OpenError::new(options.missing("size")))?;
    if let Some(previous) = context.previous::<Memory>() {
        // The content is nowhere else.
        let length = previous.length();
        if size != length {
            return Err(OpenError::new(options.invalid("size", size, format!("{length} as it is; resize it instead"))));
        }
        return Ok(Box::new(Memory { length: AtomicU64::new(length), mapping: previous.mapping.clone() }));
    }
    // Where address space is short (a limit on it), the disk does without growing.
    let mapping = Mapping::reserve(size.max(ROOM_TO_GROW)).or_else(|_| Mapping::reserve(size));
    let mapping = mapping.and_then(|mapping| mapping.make_usable(size).map(|()| mapping));
    let mapping = mapping.map_err(|e| OpenError(format!("{size} bytes of memory are not to be had: {e}")))?;
    Ok(Box::new(Memory { length: AtomicU64::new(size), mapping: Arc::new(mapping) }))
}

/// The most bytes of one request: it is carried out at once, and others wait that long.
const AT_ONCE_MAX: u32 = 1 << 20;

impl BlockDriver for Memory {
    fn limits(&self) -> BlockLimits {
        BlockLimits {
            can_discard: true,
            can_write_zeroes: true,
            can_unmap_zeroes: true,
            max_transfer: AT_ONCE_MAX,
            max_discard: AT_ONCE_MAX.into(),
            max_write_zeroes: AT_ONCE_MAX.into(),
            ..BlockLimits::default()
        }
    }

    fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }

    fn children(&self) -> &[Arc<Child>] {
        &[]
    }

    fn child_permissions(&self, own: Permissions) -> Permissions {
        own
    }

    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }

    fn resize(&self, bytes: u64) -> OpenResult {
        let grown = self.mapping.make_usable(bytes);
        grown.map_err(|e| OpenError(format!("{bytes} bytes of memory are not to be had: {e}")))?;
        let old = self.length.swap(bytes, Ordering::Relaxed);
        // Growing again must not bring back what was cut off.
        if bytes < old {
            self.mapping.give_back(bytes, old - bytes);
        }
        Ok(())
    }

    fn activate(&self) -> OpenResult {
        Ok(())
    }

    fn inactivate(&self) -> OpenResult {
        Ok(())
    }

    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, _: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        Ok(Rc::new(MemoryChannel(self.mapping.clone())))
    }
}

struct MemoryChannel(Arc<Mapping>);

fn answer(inside: bool) -> BlockFuture {
    BlockFuture::ready(if inside { Ok(()) } else { Err(BlockError::OutOfRange) })
}

impl IoChannel for MemoryChannel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        answer(self.0.read(offset, iov))
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], _: WriteFlags) -> BlockFuture {
        answer(self.0.write(offset, iov))
    }

    fn flush(&self) -> BlockFuture {
        // Nothing is more stable than this memory.
        BlockFuture::ready(Ok(()))
    }

    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture {
        answer(self.0.give_back(offset, bytes))
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        answer(if flags.may_unmap { self.0.give_back(offset, bytes) } else { self.0.zero(offset, bytes) })
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        let most = bytes.min(STATUS_MAX);
        let is_zero = |done| self.0.is_zero(offset + done, STATUS_STEP.min(most - done));
        let zero = is_zero(0);
        let same = (0..most).step_by(STATUS_STEP as usize).skip(1).find(|done| is_zero(*done) != zero);
        Box::pin(std::future::ready(Ok(BlockStatus {
            bytes: same.unwrap_or(most),
            zero,
            allocated: true,
            ..BlockStatus::default()
        })))
    }
}
