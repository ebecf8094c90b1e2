//! The filter `blkverify`: two nodes that should be the same disk. Writes go to both, reads come from both and are
//! compared; where they differ, the request fails and the log says where. It finds out which node is wrong for nobody.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use super::{DriverKind, DriverRow};
use crate::aio::AioContext;
use crate::child::{Child, ChildChannel};
use crate::driver::{BlockDriver, BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::iovec::{self, IoVec};
use crate::limits::BlockLimits;
use crate::options::Options;
use crate::permissions::Permissions;
use crate::ranges::RangeLocks;
use crate::shaping::BounceBudget;

pub(super) const ROW: DriverRow = DriverRow {
    name: "blkverify",
    kind: DriverKind::Filter,
    summary: "a filter that compares two nodes which should be the same disk, for tests",
    options: &[("test", "the node to be verified"), ("raw", "the node that it is compared with, of the same size")],
    open,
};

/// The most bytes in one request: data goes through memory of our own, which a guest cannot change between the two.
const TRANSFER_MAX: u32 = 1 << 20;
/// Of that memory; fits every node.
const MEMORY_ALIGNMENT: u32 = 4096;

struct Blkverify {
    name: String,
    /// The one to be verified, and the one it is compared with.
    children: [Arc<Child>; 2],
    /// Keeps reads from seeing a write that has reached one node only.
    ranges: Arc<RangeLocks>,
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let children = [context.child(options, "test")?, context.child(options, "raw")?];
    let driver = Blkverify { name: context.node.name.clone(), children, ranges: Arc::default() };
    driver.compare_lengths()?;
    Ok(Box::new(driver))
}

impl Blkverify {
    fn compare_lengths(&self) -> OpenResult {
        let [test, raw] = self.children.each_ref().map(|child| child.node().length());
        if test != raw {
            let name = &self.name;
            return Err(OpenError(format!("node \"{name}\": \"test\" has {test} bytes, \"raw\" has {raw}")));
        }
        Ok(())
    }
}

impl BlockDriver for Blkverify {
    fn limits(&self) -> BlockLimits {
        let [test, raw] = self.children.each_ref().map(|child| BlockLimits::of_filter(&child.node()));
        BlockLimits {
            read_only: test.read_only || raw.read_only,
            request_alignment: test.request_alignment.max(raw.request_alignment),
            max_transfer: TRANSFER_MAX,
            // What is read after a discard is anybody's guess, and need not be the same.
            can_discard: false,
            can_unmap_zeroes: test.can_unmap_zeroes || raw.can_unmap_zeroes,
            ..raw
        }
    }

    fn length(&self) -> u64 {
        self.children[1].node().length()
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn child_permissions(&self, own: Permissions) -> Permissions {
        own
    }

    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }

    fn resize(&self, bytes: u64) -> OpenResult {
        let [test, raw] = self.children.each_ref().map(|child| child.node());
        let before = test.length();
        test.resize(bytes)?;
        raw.resize(bytes).inspect_err(|_| {
            if let Err(error) = test.resize(before) {
                tracing::error!("node \"{}\": \"test\" keeps its new size: {error}", self.name);
            }
        })
    }

    fn activate(&self) -> OpenResult {
        self.compare_lengths()
    }

    fn inactivate(&self) -> OpenResult {
        Ok(())
    }

    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        let [test, raw] = &self.children;
        Ok(Rc::new(Channel(Rc::new(Inner {
            name: self.name.clone(),
            test: test.channel(context)?,
            raw: raw.channel(context)?,
            ranges: self.ranges.clone(),
            budget: BounceBudget::default(),
        }))))
    }
}

struct Channel(Rc<Inner>);

struct Inner {
    name: String,
    test: Rc<ChildChannel>,
    raw: Rc<ChildChannel>,
    ranges: Arc<RangeLocks>,
    budget: BounceBudget,
}

impl Inner {
    /// The result of a request that both nodes have carried out; an error if one of them only failed.
    fn both(&self, what: &str, offset: u64, test: BlockResult, raw: BlockResult) -> BlockResult {
        match (test, raw) {
            (Ok(()), Ok(())) => Ok(()),
            (Err(_), Err(error)) => Err(error),
            (Err(error), Ok(())) => self.differs(what, offset, format_args!("only \"test\" fails: {error}")),
            (Ok(()), Err(error)) => self.differs(what, offset, format_args!("only \"raw\" fails: {error}")),
        }
    }

    fn differs(&self, what: &str, offset: u64, how: std::fmt::Arguments<'_>) -> BlockResult {
        tracing::error!("node \"{}\": {what} at offset {offset}: {how}", self.name);
        Err(BlockError::Host(libc::EIO))
    }

    async fn read(&self, offset: u64, iov: &[IoVec]) -> BlockResult {
        let bytes = iovec::total_len(iov);
        // The buffer first, as for writes: whoever holds a range must not wait for one.
        let bounce = self.budget.buffer(2 * bytes, MEMORY_ALIGNMENT).await;
        let _range = self.ranges.lock(offset, offset + bytes, false).await;
        let (test, raw) = (bounce.part(0, bytes as usize), bounce.part(bytes as usize, bytes as usize));
        let results = (self.test.preadv(offset, &[test]).await, self.raw.preadv(offset, &[raw]).await);
        self.both("a read", offset, results.0, results.1)?;
        if let Some(at) = first_difference(test, raw) {
            return self.differs("a read", offset, format_args!("the content differs at {}", offset + at));
        }
        iovec::copy(&[raw], 0, iov, 0, bytes);
        Ok(())
    }

    async fn write(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockResult {
        let bytes = iovec::total_len(iov);
        let bounce = self.budget.buffer(bytes, MEMORY_ALIGNMENT).await;
        let data = bounce.part(0, bytes as usize);
        iovec::copy(iov, 0, &[data], 0, bytes);
        let _range = self.ranges.lock(offset, offset + bytes, true).await;
        let test = self.test.pwritev(offset, &[data], flags).await;
        let raw = self.raw.pwritev(offset, &[data], flags).await;
        self.both("a write", offset, test, raw)
    }

    async fn write_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockResult {
        // Whether one of them can do it fast is no difference that counts.
        if flags.no_fallback {
            return Err(BlockError::NotSupported);
        }
        let _range = self.ranges.lock(offset, offset + bytes, true).await;
        let test = self.test.pwrite_zeroes(offset, bytes, flags).await;
        let raw = self.raw.pwrite_zeroes(offset, bytes, flags).await;
        self.both("a write of zeroes", offset, test, raw)
    }
}

impl Channel {
    fn run<F: Future<Output = BlockResult> + 'static>(&self, work: impl FnOnce(Rc<Inner>) -> F) -> BlockFuture {
        BlockFuture::boxed(work(self.0.clone()))
    }
}

impl IoChannel for Channel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        let iov = iov.to_vec();
        self.run(move |this| async move { this.read(offset, &iov).await })
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        let iov = iov.to_vec();
        self.run(move |this| async move { this.write(offset, &iov, flags).await })
    }

    fn flush(&self) -> BlockFuture {
        self.run(|this| async move {
            let (test, raw) = (this.test.flush().await, this.raw.flush().await);
            this.both("a flush", 0, test, raw)
        })
    }

    fn pdiscard(&self, _: u64, _: u64) -> BlockFuture {
        BlockFuture::ready(Err(BlockError::NotSupported))
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        self.run(move |this| async move { this.write_zeroes(offset, bytes, flags).await })
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        self.0.raw.block_status(offset, bytes)
    }
}

/// The first byte in which two buffers of the same length differ.
fn first_difference(one: IoVec, other: IoVec) -> Option<u64> {
    let (mut ones, mut others) = ([0; 4096], [0; 4096]);
    let mut at = 0;
    while at < one.len() {
        let len = ones.len().min(one.len() - at);
        iovec::copy_to(&[one.part(at, len)], &mut ones[..len]);
        iovec::copy_to(&[other.part(at, len)], &mut others[..len]);
        if let Some(found) = ones[..len].iter().zip(&others[..len]).position(|(a, b)| a != b) {
            return Some((at + found) as u64);
        }
        at += len;
    }
    None
}
