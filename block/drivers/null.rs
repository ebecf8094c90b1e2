//! The driver `null-co`: a disk of a given size that keeps nothing. It is the floor in benchmarks, and the file to copy
//! for a new driver.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{DriverKind, DriverRow};
use crate::aio::AioContext;
use crate::child::Child;
use crate::driver::{BlockDriver, BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockResult, OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::iovec::{self, IoVec};
use crate::limits::BlockLimits;
use crate::options::Options;
use crate::permissions::Permissions;

pub(super) const ROW: DriverRow = DriverRow {
    name: "null-co",
    kind: DriverKind::Protocol,
    summary: "a disk that keeps nothing, for benchmarks",
    options: &[
        ("size", "size in bytes, default 1G"),
        ("latency-ns", "how long each request takes, in nanoseconds, default 0"),
        ("read-zeroes", "on: reads give zeroes; off (default): reads leave the buffer as it is"),
    ],
    open,
};

struct Null {
    length: AtomicU64,
    latency: Duration,
    read_zeroes: bool,
}

fn open(options: &mut Options, _: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let size = options.take_size("size").map_err(OpenError::new)?.unwrap_or(1 << 30);
    let latency_ns = options.take_u64("latency-ns").map_err(OpenError::new)?.unwrap_or(0);
    let read_zeroes = options.take_bool("read-zeroes").map_err(OpenError::new)?.unwrap_or(false);
    Ok(Box::new(Null { length: AtomicU64::new(size), latency: Duration::from_nanos(latency_ns), read_zeroes }))
}

impl BlockDriver for Null {
    fn limits(&self) -> BlockLimits {
        BlockLimits { can_discard: true, can_write_zeroes: true, can_unmap_zeroes: true, ..BlockLimits::default() }
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
        self.length.store(bytes, Ordering::Relaxed);
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

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        Ok(Rc::new(NullChannel { context: context.clone(), latency: self.latency, read_zeroes: self.read_zeroes }))
    }
}

struct NullChannel {
    context: AioContext,
    latency: Duration,
    read_zeroes: bool,
}

impl NullChannel {
    #[inline(never)]
    fn answer_zeroes(&self, iov: &[IoVec]) -> BlockFuture {
        iovec::fill(iov, 0);
        self.answer()
    }

    #[inline]
    fn answer(&self) -> BlockFuture {
        if self.latency.is_zero() { BlockFuture::ready(Ok(())) } else { self.answer_late() }
    }

    #[cold]
    fn answer_late(&self) -> BlockFuture {
        let sleep = self.context.sleep(self.latency);
        BlockFuture::boxed(async move {
            sleep.await;
            Ok(())
        })
    }
}

impl IoChannel for NullChannel {
    fn preadv(&self, _: u64, iov: &[IoVec]) -> BlockFuture {
        if self.read_zeroes { self.answer_zeroes(iov) } else { self.answer() }
    }

    fn pwritev(&self, _: u64, _: &[IoVec], _: WriteFlags) -> BlockFuture {
        self.answer()
    }

    fn flush(&self) -> BlockFuture {
        self.answer()
    }

    fn pdiscard(&self, _: u64, _: u64) -> BlockFuture {
        self.answer()
    }

    fn pwrite_zeroes(&self, _: u64, _: u64, _: WriteFlags) -> BlockFuture {
        self.answer()
    }

    fn block_status(&self, _: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        let status = BlockStatus { bytes, zero: self.read_zeroes, allocated: true, ..BlockStatus::default() };
        Box::pin(std::future::ready(Ok(status)))
    }
}
