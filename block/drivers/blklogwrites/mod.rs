//! The filter `blklogwrites`: writes every change of a disk into a log as well, from which replay tools make the disk as
//! it was at any flush. `log.rs` owns the log's format; this file owns what is logged, and when.
//!
//! A write is logged when it has completed, and completes for the guest when it is logged. A flush takes its place in the
//! log when it begins: what completes while it runs stands behind it, as the flush promises nothing about that.

mod log;

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use self::log::{Data, End, EntryFlags, Log};
use super::{DriverKind, DriverRow};
use crate::aio::{AioContext, Answer, Iothread, PollSettings};
use crate::child::{Child, ChildChannel};
use crate::driver::{BlockDriver, BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockResult, OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::iovec::{self, IoVec};
use crate::limits::BlockLimits;
use crate::options::Options;
use crate::permissions::Permissions;
use crate::ranges::{LockRange, RangeLocks};
use crate::shaping::BounceBudget;

pub(super) const ROW: DriverRow = DriverRow {
    name: "blklogwrites",
    kind: DriverKind::Filter,
    summary: "a filter that logs all writes for replay tools (the format of dm-log-writes), for tests",
    options: &[
        ("file", "the node that requests are passed on to"),
        ("log", "the node that the log is written to"),
        ("log-sector-size", "the unit of writes in bytes, a power of two from 512 to 4M, default 512"),
        ("log-append", "on: goes on with the log that is there; off (default): begins a new one"),
        ("log-super-update-interval", "entries after which the log counts them at the latest, default 4096"),
    ],
    open,
};

/// The most bytes in one request: data goes through memory of our own, so that disk and log get the same.
const TRANSFER_MAX: u32 = 1 << 20;
/// Of that memory; fits every node.
const MEMORY_ALIGNMENT: u32 = 4096;

struct Blklogwrites {
    name: String,
    /// The disk, and the log.
    children: [Arc<Child>; 2],
    append: bool,
    shared: Arc<Shared>,
    /// The end of the log has been found, or it is new.
    has_begun: AtomicBool,
}

struct Shared {
    log: Log,
    /// One entry at a time: whoever writes one holds the only byte of this.
    turn: Arc<RangeLocks>,
}

impl Shared {
    fn turn(&self) -> LockRange {
        self.turn.lock(0, 1, true)
    }
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let sector_size = options.take_size("log-sector-size").map_err(OpenError::new)?.unwrap_or(512);
    if !(sector_size.is_power_of_two() && (512..=4 << 20).contains(&sector_size)) {
        let expected = "a power of two from 512 to 4M";
        return Err(OpenError::new(options.invalid("log-sector-size", sector_size, expected)));
    }
    let append = options.take_bool("log-append").map_err(OpenError::new)?.unwrap_or(false);
    let interval = options.take_u64_in("log-super-update-interval", 1..=u64::MAX).map_err(OpenError::new)?;
    let children = [context.filtered_child(options, "file")?, context.growing_child(options, "log", 1)?];
    let log = Log::new(sector_size, interval.unwrap_or(4096));
    Ok(Box::new(Blklogwrites {
        name: context.node.name.clone(),
        children,
        append,
        shared: Arc::new(Shared { log, turn: Arc::default() }),
        has_begun: AtomicBool::new(false),
    }))
}

impl Blklogwrites {
    /// Reads the log that is there, on a loop of its own.
    fn find_end(&self) -> OpenResult<End> {
        let refuse = |why: String| OpenError(format!("node \"{}\": \"log\": {why}", self.name));
        let iothread = Iothread::start("log", PollSettings::default()).map_err(|e| refuse(e.to_string()))?;
        let (log, shared) = (self.children[1].clone(), self.shared.clone());
        let found =
            iothread.remote().call(move |context, answer: Answer<Result<End, String>>| match log.channel(context) {
                Ok(channel) => context.spawn(async move { answer.give(shared.log.find_end(&channel).await) }),
                Err(error) => answer.give(Err(error.0)),
            });
        found.unwrap_or_else(|| Err("its loop has ended".to_owned())).map_err(refuse)
    }
}

impl BlockDriver for Blklogwrites {
    fn limits(&self) -> BlockLimits {
        let [file, log] = self.children.each_ref().map(|child| BlockLimits::of_filter(&child.node()));
        BlockLimits {
            read_only: file.read_only || log.read_only,
            request_alignment: self.shared.log.sector_size as u32,
            max_transfer: TRANSFER_MAX.max(self.shared.log.sector_size as u32),
            ..file
        }
    }

    fn length(&self) -> u64 {
        // The tail that fills no whole sector of the log is not shown: there would be no way to log a write to it.
        let length = self.children[0].node().length();
        length - length % self.shared.log.sector_size
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
        self.children[0].node().resize(bytes)
    }

    fn activate(&self) -> OpenResult {
        if self.has_begun.load(Ordering::Relaxed) {
            return Ok(());
        }
        if self.append {
            self.shared.log.set_end(self.find_end()?);
        }
        self.has_begun.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn inactivate(&self) -> OpenResult {
        Ok(())
    }

    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        let [file, log] = &self.children;
        let (file, log) = (file.channel(context)?, log.channel(context)?);
        let logs = !self.limits().read_only;
        let (shared, budget) = (self.shared.clone(), BounceBudget::default());
        Ok(Rc::new(Channel(Rc::new(Inner { file, log, logs, shared, budget }))))
    }
}

struct Channel(Rc<Inner>);

struct Inner {
    file: Rc<ChildChannel>,
    log: Rc<ChildChannel>,
    /// There is something to be logged: not on a disk that is only read.
    logs: bool,
    shared: Arc<Shared>,
    budget: BounceBudget,
}

impl Inner {
    async fn log(&self, flags: EntryFlags, offset: u64, bytes: u64, data: Data) -> BlockResult {
        let _turn = self.shared.turn().await;
        self.shared.log.append(&self.log, flags, offset, bytes, data).await
    }

    async fn write(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockResult {
        let bytes = iovec::total_len(iov);
        let bounce = self.budget.buffer(bytes, MEMORY_ALIGNMENT).await;
        let data = bounce.part(0, bytes as usize);
        iovec::copy(iov, 0, &[data], 0, bytes);
        self.file.pwritev(offset, &[data], flags).await?;
        self.log(entry_flags(flags), offset, bytes, Data::Bytes(data)).await
    }

    async fn flush(&self) -> BlockResult {
        let _turn = self.shared.turn().await;
        self.file.flush().await?;
        self.shared.log.append(&self.log, EntryFlags::FLUSH, 0, 0, Data::None).await
    }
}

fn entry_flags(flags: WriteFlags) -> EntryFlags {
    if flags.fua { EntryFlags::FUA } else { EntryFlags::NONE }
}

impl Channel {
    fn run<F: Future<Output = BlockResult> + 'static>(&self, work: impl FnOnce(Rc<Inner>) -> F) -> BlockFuture {
        BlockFuture::boxed(work(self.0.clone()))
    }
}

impl IoChannel for Channel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        self.0.file.preadv(offset, iov)
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        let iov = iov.to_vec();
        self.run(move |this| async move { this.write(offset, &iov, flags).await })
    }

    fn flush(&self) -> BlockFuture {
        match self.0.logs {
            true => self.run(|this| async move { this.flush().await }),
            false => self.0.file.flush(),
        }
    }

    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture {
        self.run(move |this| async move {
            this.file.pdiscard(offset, bytes).await?;
            this.log(EntryFlags::DISCARD, offset, bytes, Data::None).await
        })
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        self.run(move |this| async move {
            this.file.pwrite_zeroes(offset, bytes, flags).await?;
            this.log(entry_flags(flags), offset, bytes, Data::Zeroes).await
        })
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        self.0.file.block_status(offset, bytes)
    }
}
