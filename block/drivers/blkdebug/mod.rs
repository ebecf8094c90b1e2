//! The filter `blkdebug`: makes requests fail, wait or stop half-way by rule, and lets its node demand what it is told
//! to. What does not meet the demands is refused, never mended: the edge should have seen to it. Requests that no rule
//! concerns are passed on as they are; `rules.rs` says which those are.
//!
//! Rules are written as in QEMU, with one difference: a rule concerns the requests that raise its event, and no later
//! ones; there is no rule that lies in wait after its event. Delays and short transfers are our own.

mod rules;

use std::rc::Rc;
use std::sync::Arc;

use self::rules::{IoType, Rules, Verdict};
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
    name: "blkdebug",
    kind: DriverKind::Filter,
    summary: "a filter that makes requests fail or wait by rule, for tests",
    options: &[
        ("image", "the node that requests are passed on to"),
        (
            "inject-error.N.event",
            "which requests fail: read_aio, write_aio, pwritev, pwritev_zero, pdiscard, flush_to_os, flush_to_disk, \
             block_status, none (any)",
        ),
        ("inject-error.N.iotype", "only this kind: read, write, write-zeroes, discard, flush, block-status"),
        ("inject-error.N.errno", "how they fail, default 5 (EIO)"),
        ("inject-error.N.sector", "only those that cover this sector of 512 bytes; -1 (default): all"),
        ("inject-error.N.state", "only in this state; 0 (default): in all"),
        ("inject-error.N.once", "on: only the first of them; default off"),
        ("inject-error.N.immediately", "on: fail when submitted; off (default): a little later"),
        ("set-state.N.event", "the requests that change the state, which is 1 at first"),
        ("set-state.N.state", "only from this state; 0 (default): from all"),
        ("set-state.N.new_state", "the state afterwards"),
        ("delay.N.iotype", "the requests that wait before they are passed on; sector, state and once as above"),
        ("delay.N.ns", "how long, in nanoseconds"),
        ("short.N.iotype", "read or write: those that fail after a part; sector, state, once and errno as above"),
        ("short.N.bytes", "how many bytes are transferred before"),
        ("align", "the unit of reads and writes in bytes, a power of two, at most 1M; 0 (default): the image's"),
        ("max-transfer", "the longest read or write in bytes, a multiple of align; 0 (default): no limit"),
        ("opt-write-zero", "shorter write-zeroes are not supported; bytes, a multiple of align; 0 (default): none"),
        ("max-write-zero", "the longest write-zeroes in bytes, a multiple of align; 0 (default): no limit"),
        ("opt-discard", "shorter discards have no effect; bytes, a multiple of align; 0 (default): none"),
        ("max-discard", "the longest discard in bytes, a multiple of align; 0 (default): no limit"),
    ],
    open,
};

/// The largest `align` in bytes; the edge pads in pieces of this size at most.
const ALIGN_MAX: u64 = 1 << 20;

struct Blkdebug {
    image: [Arc<Child>; 1],
    rules: Arc<Rules>,
    demands: Demands,
}

/// What the node asks for beyond its image; bytes, 0: nothing.
#[derive(Debug, Clone, Copy)]
struct Demands {
    align: u32,
    max_transfer: u32,
    opt_write_zero: u32,
    max_write_zero: u32,
    opt_discard: u32,
    max_discard: u32,
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let rules = Rules::take(options).map_err(OpenError::new)?;
    let demands = Demands::take(options).map_err(OpenError::new)?;
    options.take_unsupported(&["config", "take-child-perms", "unshare-child-perms"]).map_err(OpenError::new)?;
    let image = context.filtered_child(options, "image")?;
    Ok(Box::new(Blkdebug { image: [image], rules: Arc::new(rules), demands }))
}

impl Demands {
    fn take(options: &mut Options) -> crate::options::Result<Self> {
        let align = options.take_size("align")?.unwrap_or(0);
        if align != 0 && !(align.is_power_of_two() && align <= ALIGN_MAX) {
            return Err(options.invalid("align", align, "0 or a power of two up to 1M"));
        }
        let mut take = |key: &str| {
            let value = options.take_size(key)?.unwrap_or(0);
            u32::try_from(value)
                .ok()
                .filter(|value| value.is_multiple_of(align.max(1) as u32))
                .ok_or_else(|| options.invalid(key, value, "a multiple of align below 4G"))
        };
        Ok(Self {
            max_transfer: take("max-transfer")?,
            opt_write_zero: take("opt-write-zero")?,
            max_write_zero: take("max-write-zero")?,
            opt_discard: take("opt-discard")?,
            max_discard: take("max-discard")?,
            align: align as u32,
        })
    }
}

impl BlockDriver for Blkdebug {
    fn limits(&self) -> BlockLimits {
        let image = self.image[0].node();
        let limits = image.limits();
        let own = &self.demands;
        BlockLimits {
            read_only: image.is_read_only(),
            // Without a demand of ours, the image's own edge gives requests their shape.
            request_alignment: if own.align == 0 { limits.request_alignment.min(SECTOR as u32) } else { own.align },
            memory_alignment: 1,
            max_transfer: own.max_transfer,
            max_iov: 0,
            can_discard: limits.can_discard && image.options().discard,
            discard_alignment: if own.opt_discard == 0 { limits.discard_alignment } else { own.opt_discard },
            max_discard: u64::from(own.max_discard),
            // The image's edge can always do it, if need be by writing.
            can_write_zeroes: true,
            max_write_zeroes: u64::from(own.max_write_zero),
            ..limits
        }
    }

    fn length(&self) -> u64 {
        // The tail that fills no whole unit is not shown: there would be no way to write it.
        let length = self.image[0].node().length();
        length - length % u64::from(self.demands.align.max(1))
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.image
    }

    fn child_permissions(&self, own: Permissions) -> Permissions {
        own
    }

    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }

    fn resize(&self, bytes: u64) -> OpenResult {
        self.image[0].node().resize(bytes)
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
        Ok(Rc::new(BlkdebugChannel {
            image: self.image[0].channel(context)?,
            rules: self.rules.clone(),
            demands: self.demands,
            context: context.clone(),
        }))
    }
}

struct BlkdebugChannel {
    image: Rc<ChildChannel>,
    rules: Arc<Rules>,
    demands: Demands,
    context: AioContext,
}

impl BlkdebugChannel {
    /// Whether a transfer meets the node's demands.
    fn check(&self, offset: u64, bytes: u64) -> BlockResult {
        let own = &self.demands;
        if !(offset | bytes).is_multiple_of(u64::from(own.align.max(1))) {
            return Err(BlockError::Invalid("not aligned as blkdebug was told to ask for"));
        }
        if own.max_transfer != 0 && bytes > u64::from(own.max_transfer) {
            return Err(BlockError::Invalid("longer than blkdebug was told to take"));
        }
        Ok(())
    }

    /// Does to a request what was judged; `go` passes its first so many bytes on.
    fn carry_out(&self, verdict: Verdict, bytes: u64, go: impl FnOnce(u64) -> BlockFuture + 'static) -> BlockFuture {
        match verdict.fault {
            Some(fault) if fault.immediately && verdict.delay.is_zero() => BlockFuture::ready(Err(fault.error)),
            fault => {
                let wait = wait(&self.context, verdict);
                BlockFuture::boxed(async move {
                    wait.await;
                    let Some(fault) = fault else { return go(bytes).await };
                    if fault.transferred > 0 {
                        go(fault.transferred.min(bytes)).await?;
                    }
                    Err(fault.error)
                })
            }
        }
    }
}

/// Waits as long as was judged; where nothing was said, until the loop comes by once more.
fn wait(context: &AioContext, verdict: Verdict) -> impl Future<Output = ()> + use<> {
    let sleep = (!verdict.delay.is_zero()).then(|| context.sleep(verdict.delay));
    async move {
        match sleep {
            Some(sleep) => sleep.await,
            None => {
                let mut waited = false;
                std::future::poll_fn(|cx| {
                    if std::mem::replace(&mut waited, true) {
                        return std::task::Poll::Ready(());
                    }
                    cx.waker().wake_by_ref();
                    std::task::Poll::Pending
                })
                .await;
            }
        }
    }
}

impl IoChannel for BlkdebugChannel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        let bytes = iovec::total_len(iov);
        if let Err(error) = self.check(offset, bytes) {
            return BlockFuture::ready(Err(error));
        }
        let Some(verdict) = self.rules.judge(IoType::Read, offset, bytes) else {
            return self.image.preadv(offset, iov);
        };
        let (image, iov) = (self.image.clone(), iov.to_vec());
        self.carry_out(verdict, bytes, move |bytes| image.preadv(offset, &iovec::slice(&iov, 0, bytes)))
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        let bytes = iovec::total_len(iov);
        if let Err(error) = self.check(offset, bytes) {
            return BlockFuture::ready(Err(error));
        }
        let Some(verdict) = self.rules.judge(IoType::Write, offset, bytes) else {
            return self.image.pwritev(offset, iov, flags);
        };
        let (image, iov) = (self.image.clone(), iov.to_vec());
        self.carry_out(verdict, bytes, move |bytes| image.pwritev(offset, &iovec::slice(&iov, 0, bytes), flags))
    }

    fn flush(&self) -> BlockFuture {
        let Some(verdict) = self.rules.judge(IoType::Flush, 0, 0) else { return self.image.flush() };
        let image = self.image.clone();
        self.carry_out(verdict, 0, move |_| image.flush())
    }

    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture {
        if bytes < u64::from(self.demands.opt_discard) {
            return BlockFuture::ready(Err(BlockError::NotSupported));
        }
        let Some(verdict) = self.rules.judge(IoType::Discard, offset, bytes) else {
            return self.image.pdiscard(offset, bytes);
        };
        let image = self.image.clone();
        self.carry_out(verdict, bytes, move |bytes| image.pdiscard(offset, bytes))
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        if bytes < u64::from(self.demands.opt_write_zero) {
            return BlockFuture::ready(Err(BlockError::NotSupported));
        }
        let Some(verdict) = self.rules.judge(IoType::WriteZeroes, offset, bytes) else {
            return self.image.pwrite_zeroes(offset, bytes, flags);
        };
        let image = self.image.clone();
        self.carry_out(verdict, bytes, move |bytes| image.pwrite_zeroes(offset, bytes, flags))
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        let Some(verdict) = self.rules.judge(IoType::BlockStatus, offset, bytes) else {
            return self.image.block_status(offset, bytes);
        };
        let (image, wait) = (self.image.clone(), wait(&self.context, verdict));
        Box::pin(async move {
            wait.await;
            match verdict.fault {
                Some(fault) => Err(fault.error),
                None => image.block_status(offset, bytes).await,
            }
        })
    }
}
