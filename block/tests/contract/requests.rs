//! Rows: admission, order of steps, completion, cancel, plug, request merging, limits of a request's way.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use blockport_block::aio::AioContext;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::throttle::{Limited, Rate, ThrottleLimits};
use blockport_block::{BackendChannel, BlockBackend, BlockError, BlockResult, Graph, RequestKind, Submitted};

use crate::helpers::{DEADLINE, add};
use crate::testing::{TempDir, channel, context, join_all, opened, user, writer};

const BLOCK: u64 = 4096;

/// A drive whose requests come from this thread.
struct Drive {
    _graph: Graph,
    backend: Arc<BlockBackend>,
    channel: Rc<BackendChannel>,
    context: AioContext,
    /// What the requests under way read and write.
    buffers: RefCell<Vec<AlignedBuffer>>,
}

impl Drive {
    fn new(options: &str) -> Self {
        Self::over(options, context())
    }

    /// The same on the loop that this thread has already.
    fn over(options: &str, context: AioContext) -> Self {
        let graph = Graph::default();
        let node = add(&graph, &format!("{options},node-name=disk"));
        let backend = BlockBackend::with_root("d", node, writer()).expect("nobody objects");
        let channel = backend.channel(&context).expect("the node is active");
        Self { _graph: graph, backend, channel, context, buffers: RefCell::default() }
    }

    fn start(&self, kind: RequestKind, block: u64, byte: u8) -> Submitted {
        let mut buffer = AlignedBuffer::new(BLOCK as usize, BLOCK as usize);
        buffer.fill_from(&[byte; BLOCK as usize]);
        let iov = buffer.iov();
        self.buffers.borrow_mut().push(buffer);
        match kind {
            RequestKind::Read => self.channel.preadv(block * BLOCK, &[iov]),
            RequestKind::Write => self.channel.pwritev(block * BLOCK, &[iov]),
            RequestKind::Flush => self.channel.flush(),
            RequestKind::Discard => self.channel.pdiscard(block * BLOCK, BLOCK),
            RequestKind::WriteZeroes => self.channel.pwrite_zeroes(block * BLOCK, BLOCK, false),
        }
    }

    /// Starts writes of the bytes 1, 2, … to these blocks.
    fn writes(&self, blocks: &[u64]) -> Vec<Submitted> {
        (1..).zip(blocks).map(|(byte, block)| self.start(RequestKind::Write, *block, byte)).collect()
    }

    fn finish(&self, requests: Vec<Submitted>) -> Vec<BlockResult> {
        let requests: Vec<_> = requests.into_iter().map(IntoFuture::into_future).collect();
        self.context.run_until(join_all(requests))
    }

    /// The first byte of each block.
    fn content(&self, blocks: std::ops::Range<u64>) -> Vec<u8> {
        let buffer = AlignedBuffer::new(((blocks.end - blocks.start) * BLOCK) as usize, BLOCK as usize);
        let read = self.channel.preadv(blocks.start * BLOCK, &[buffer.iov()]).into_future();
        assert_eq!(self.context.run_until(read), Ok(()));
        buffer.to_vec().chunks(BLOCK as usize).map(|block| block[0]).collect()
    }

    fn merged(&self, kind: RequestKind) -> u64 {
        self.backend.statistics().of(kind).merged
    }
}

fn on_file() -> (TempDir, Drive) {
    on_file_over(context())
}

fn on_file_over(context: AioContext) -> (TempDir, Drive) {
    let place = TempDir::on_disk();
    let drive = Drive::over(&format!("file,filename={}", place.file("image", 1 << 20)), context);
    (place, drive)
}

/// Runs the loop until something holds that need not wake it.
#[track_caller]
fn wait_for(drive: &Drive, holds: impl Fn() -> bool) {
    let end = std::time::Instant::now() + DEADLINE;
    while !holds() {
        assert!(std::time::Instant::now() < end);
        let pause = drive.context.sleep(std::time::Duration::from_millis(1));
        drive.context.run_until(pause);
    }
}

/// One block in a thousand seconds.
fn standstill() -> ThrottleLimits {
    let mut limits = ThrottleLimits::default();
    limits.set_rate(Limited::IopsTotal, Rate { average: 1, ..Rate::default() });
    limits.iops_size = 4;
    limits
}

#[test]
fn what_lies_out_of_range_is_refused_with_the_size_of_the_moment_in_which_the_drain_ends() {
    let drive = Drive::new("memory,size=1M");
    let node = drive.backend.root().expect("a medium");
    for (offset, bytes) in [(1 << 20, 512), ((1 << 20) - 512, 1024), (u64::MAX - 511, 512), (u64::MAX, 1)] {
        let refused = drive.finish(vec![drive.channel.pwrite_zeroes(offset, bytes, false)]);
        assert_eq!(refused, [Err(BlockError::OutOfRange)], "{bytes} at {offset}");
    }
    drive.backend.drain_begin();
    let (shrinks, grows) = (drive.start(RequestKind::Write, 100, 1), drive.start(RequestKind::Write, 500, 1));
    let sizes = [300 * BLOCK, 50 * BLOCK, 600 * BLOCK];
    sizes.iter().for_each(|size| node.block_resize(*size).expect("memory takes any size"));
    drive.backend.drain_end();
    assert_eq!(drive.finish(vec![shrinks, grows]), [Ok(()), Ok(())], "only the last size counts");
    drive.backend.drain_begin();
    let late = drive.start(RequestKind::Read, 100, 0);
    node.block_resize(50 * BLOCK).expect("memory takes any size");
    drive.backend.drain_end();
    assert_eq!(drive.finish(vec![late]), [Err(BlockError::OutOfRange)]);
}

#[test]
fn a_request_waits_for_the_drain_then_its_range_is_checked_then_it_waits_for_limits_then_it_is_made_stable() {
    let place = TempDir::on_disk();
    let drive = Drive::new(&format!("file,filename={}", place.file("image", 1 << 20)));
    let groups = drive._graph.throttle_groups();
    drive.backend.set_io_limits(groups, None, standstill()).expect("sound");
    assert_eq!(drive.finish(vec![drive.start(RequestKind::Write, 0, 1)]), [Ok(())], "the first goes at once");
    // The range comes before the limit: what lies outside does not wait for it, and takes nothing of it.
    let outside = drive.start(RequestKind::Read, 1 << 20, 0);
    assert!(matches!(outside, Submitted::Done(Err(BlockError::OutOfRange))));
    // The drain comes before the limit: what is parked is in no line.
    drive.backend.drain_begin();
    let parked = drive.start(RequestKind::Write, 1, 2);
    let waiting = || drive.backend.throttle_group().expect("in one").waiting();
    assert_eq!((waiting(), drive.backend.in_flight()), (0, 1), "under way, and not in flight: the drain has ended");
    drive.backend.drain_end();
    let parked = parked.into_future();
    let done = Rc::new(Cell::new(None));
    let end = done.clone();
    drive.context.spawn(async move { end.set(Some(parked.await)) });
    wait_for(&drive, || waiting() == 1);
    assert_eq!(done.get(), None, "now it waits for its turn");
    // The write cache comes last: it goes off while the request waits, and the write is stable.
    drive.backend.set_write_cache(false);
    drive.backend.set_io_limits(groups, None, ThrottleLimits::default()).expect("always");
    wait_for(&drive, || done.get().is_some());
    assert_eq!(done.get(), Some(Ok(())));
    assert_eq!(drive.backend.in_flight(), 0);
}

#[test]
fn a_request_completes_on_the_context_that_it_was_submitted_on_and_before_a_drain_ends() {
    let drive = Drive::new("null-co,size=1M,latency-ns=5000000");
    let (thread, order) = (std::thread::current().id(), Rc::new(RefCell::new(Vec::new())));
    let requests = [drive.start(RequestKind::Write, 0, 1), drive.start(RequestKind::Read, 1, 1)];
    for request in requests {
        let order = order.clone();
        drive.context.spawn(async move {
            assert_eq!(request.await, Ok(()));
            assert_eq!(std::thread::current().id(), thread);
            order.borrow_mut().push("completed");
        });
    }
    // From elsewhere, as the control side does.
    let backend = drive.backend.clone();
    let control = std::thread::spawn(move || {
        backend.drain_begin();
        backend.drain_end();
    });
    wait_for(&drive, || control.is_finished());
    control.join().expect("no panic");
    order.borrow_mut().push("drained");
    assert_eq!(order.take(), ["completed", "completed", "drained"]);
    // What needs no waiting is complete when the verb returns.
    let at_once = Drive::over("memory,size=1M", drive.context.clone());
    assert!(matches!(at_once.start(RequestKind::Write, 0, 1), Submitted::Done(Ok(()))));
}

#[test]
fn a_cancelled_request_completes_once_given_up_where_it_waits_and_whole_where_it_runs() {
    const CANCELLED: BlockResult = Err(BlockError::Host(libc::ECANCELED));
    let drive = Drive::new("memory,size=1M");
    let failed = || drive.backend.statistics().of(RequestKind::Write).failed;
    // Parked.
    drive.backend.drain_begin();
    let (parked, cancel) = drive.start(RequestKind::Write, 0, 1).cancellable();
    let (other, _) = drive.start(RequestKind::Write, 1, 2).cancellable();
    cancel.cancel();
    assert_eq!(drive.context.run_until(parked), CANCELLED);
    drive.backend.drain_end();
    assert_eq!(drive.context.run_until(other), Ok(()));
    assert_eq!((drive.content(0..2), failed(), drive.backend.in_flight()), (vec![0, 2], 1, 0));
    // In a throttle's line, by a task that waits already.
    drive.backend.set_io_limits(drive._graph.throttle_groups(), None, standstill()).expect("sound");
    assert_eq!(drive.finish(vec![drive.start(RequestKind::Write, 2, 3)]), [Ok(())]);
    let (limited, cancel) = drive.start(RequestKind::Write, 3, 4).cancellable();
    drive.context.spawn(async move { cancel.cancel() });
    assert_eq!(drive.context.run_until(limited), CANCELLED);
    assert_eq!(drive.backend.throttle_group().expect("in one").waiting(), 0);
    drive.backend.set_io_limits(drive._graph.throttle_groups(), None, ThrottleLimits::default()).expect("always");
    // A drain has nothing to wait for.
    drive.backend.drain_begin();
    drive.backend.drain_end();
    // At the medium, and complete already.
    let (_place, disk) = on_file_over(drive.context.clone());
    let (running, cancel) = disk.start(RequestKind::Write, 0, 5).cancellable();
    cancel.cancel();
    assert_eq!(disk.context.run_until(running), Ok(()));
    assert_eq!(disk.content(0..1), [5]);
    let (complete, cancel) = drive.start(RequestKind::Write, 4, 6).cancellable();
    cancel.cancel();
    assert_eq!(drive.context.run_until(complete), Ok(()));
}

#[test]
fn requests_of_one_plug_reach_the_kernel_together_and_plugs_nest() {
    let (_place, drive) = on_file();
    let under_way = || drive.context.operations_in_flight();
    let outer = drive.channel.plug();
    let mut requests = drive.writes(&[0, 10]);
    let inner = drive.channel.plug();
    requests.extend(drive.writes(&[20, 30]));
    drop(inner);
    // Not even who hands over early hands over one of them.
    drive.context.submit_now();
    assert_eq!((under_way(), drive.backend.in_flight()), (0, 4));
    drop(outer);
    assert_eq!(under_way(), 4, "all in one batch");
    requests.extend(drive.writes(&[40]));
    assert_eq!(under_way(), 5, "nothing is held any more");
    assert_eq!(drive.finish(requests), [Ok(()); 5]);
}

#[test]
fn a_plug_that_is_forgotten_ends_with_the_turn() {
    let (_place, drive) = on_file();
    let plug = drive.channel.plug();
    let request = drive.start(RequestKind::Write, 0, 1);
    assert_eq!(drive.context.operations_in_flight(), 0);
    assert_eq!(drive.finish(vec![request]), [Ok(())], "it is not held for ever");
    // The old plug has no say in a new one.
    let new = drive.channel.plug();
    let request = drive.start(RequestKind::Write, 1, 2);
    drop(plug);
    assert_eq!(drive.context.operations_in_flight(), 0);
    drop(new);
    assert_eq!(drive.context.operations_in_flight(), 1);
    assert_eq!(drive.finish(vec![request]), [Ok(())]);
}

#[test]
fn a_drain_lets_what_is_plugged_go() {
    let (_place, drive) = on_file();
    let plug = drive.channel.plug();
    let requests = drive.writes(&[0, 1, 2]);
    let backend = drive.backend.clone();
    let drains = std::thread::spawn(move || {
        backend.drain_begin();
        backend.drain_end();
    });
    assert_eq!(drive.finish(requests), [Ok(()); 3]);
    wait_for(&drive, || drains.is_finished());
    drains.join().expect("no panic");
    drop(plug);
    assert_eq!(drive.content(0..3), [1, 2, 3]);
}

#[test]
fn neighbours_in_a_batch_become_one_request_of_32_at_most_and_are_counted() {
    let (_place, drive) = on_file();
    let plug = drive.channel.plug();
    let writes = drive.writes(&(0..40).collect::<Vec<_>>());
    drop(plug);
    assert_eq!(drive.context.operations_in_flight(), 2, "32 and 8");
    assert_eq!(drive.finish(writes), [Ok(()); 40]);
    assert_eq!(drive.content(0..40), (1..=40).collect::<Vec<u8>>());
    let plug = drive.channel.plug();
    let first = drive.buffers.borrow().len();
    let reads: Vec<_> = [3, 4, 5, 9].map(|block| drive.start(RequestKind::Read, block, 0)).into();
    drop(plug);
    assert_eq!(drive.finish(reads), [Ok(()); 4]);
    let read: Vec<u8> = drive.buffers.borrow()[first..].iter().map(|buffer| buffer.to_vec()[0]).collect();
    assert_eq!(read, [4, 5, 6, 10], "each in its own buffer");
    let statistics = drive.backend.statistics();
    let (reads, writes) = (statistics.of(RequestKind::Read), statistics.of(RequestKind::Write));
    assert_eq!((writes.operations, writes.merged, writes.bytes), (40, 38, 40 * BLOCK));
    assert_eq!((reads.operations, reads.merged), (4 + 1, 2), "with the one that looked");
    assert_eq!(drive.backend.in_flight(), 0);
}

#[test]
fn merging_keeps_within_the_limits_of_the_medium() {
    let drive = Drive::new("blkdebug,max-transfer=8192,image.driver=memory,image.size=1M");
    let plug = drive.channel.plug();
    let writes = drive.writes(&[0, 1, 2, 3, 4]);
    drop(plug);
    assert_eq!(drive.finish(writes), [Ok(()); 5]);
    assert_eq!(drive.merged(RequestKind::Write), 2, "two of two and one alone");
    assert_eq!(drive.content(0..5), [1, 2, 3, 4, 5]);
}

#[test]
fn what_overlaps_keeps_its_order() {
    // On memory requests take effect in the order in which they are started.
    let drive = Drive::new("memory,size=1M");
    let plug = drive.channel.plug();
    let requests = drive.writes(&[0, 1, 3, 1, 2, 3]);
    drop(plug);
    assert_eq!(drive.finish(requests), [Ok(()); 6]);
    assert_eq!(drive.merged(RequestKind::Write), 3, "0 to 1, and 1 to 3 once more");
    assert_eq!(drive.content(0..4), [1, 4, 5, 6]);
}

#[test]
fn a_run_that_fails_is_done_again_member_by_member_so_that_each_has_its_own_outcome() {
    let fault = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.sector=16";
    for memory in ["memory,image.size=1M", "null-co,image.size=1M,image.latency-ns=1000000"] {
        let drive = Drive::new(&format!("blkdebug,{fault},image.driver={memory}"));
        let plug = drive.channel.plug();
        let writes = drive.writes(&[0, 1, 2, 3]);
        drop(plug);
        let eio = Err(BlockError::Host(libc::EIO));
        assert_eq!(drive.finish(writes), [Ok(()), Ok(()), eio, Ok(())]);
        let statistics = drive.backend.statistics().of(RequestKind::Write);
        assert_eq!((statistics.operations, statistics.failed, statistics.merged), (3, 1, 3));
        if memory.starts_with("memory") {
            assert_eq!(drive.content(0..4), [1, 2, 0, 4]);
        }
    }
    // Only one of them lies outside.
    let drive = Drive::new("memory,size=16K");
    let plug = drive.channel.plug();
    let writes = drive.writes(&[2, 3, 4]);
    drop(plug);
    assert_eq!(drive.finish(writes), [Ok(()), Ok(()), Err(BlockError::OutOfRange)]);
}

#[test]
fn with_the_write_cache_off_a_merged_write_is_stable_too() {
    let drive = Drive::new("blkdebug,image.driver=memory,image.size=1M");
    drive.backend.set_write_cache(false);
    let plug = drive.channel.plug();
    let writes = drive.writes(&[0, 1]);
    drop(plug);
    assert_eq!(drive.finish(writes), [Ok(()); 2]);
    assert_eq!(drive.merged(RequestKind::Write), 1);
}

#[test]
fn the_status_of_a_range_says_what_is_there_put_together_and_never_past_the_end() {
    // Longer than what memory looks through at once.
    const SIZE: u64 = 64 << 20;
    let (_graph, node) = opened(&format!("memory,size={SIZE}"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move {
        let zeroes = channel.extent(0, u64::MAX).await.expect("it is inside");
        assert_eq!((zeroes.bytes, zeroes.zero, zeroes.allocated), (SIZE, true, true));
        assert!(channel.block_status(0, u64::MAX).await.expect("it is inside").bytes < SIZE, "piece by piece");
        let mut data = AlignedBuffer::new(1 << 20, 4096);
        data.fill_from(&[1; 1 << 20]);
        assert_eq!(channel.pwritev(SIZE - (2 << 20), &[data.iov()], Default::default()).await, Ok(()));
        let found =
            [(0, SIZE - (2 << 20), true), (SIZE - (2 << 20), 1 << 20, false), (SIZE - (1 << 20), 1 << 20, true)];
        for (offset, bytes, zero) in found {
            let extent = channel.extent(offset, SIZE).await.expect("it is inside");
            assert_eq!((extent.bytes, extent.zero), (bytes, zero), "at {offset}");
        }
        assert_eq!(channel.extent(SIZE - 512, 4096).await.expect("it is inside").bytes, 512);
        assert_eq!(channel.extent(SIZE, 1).await, Err(BlockError::OutOfRange));
    });
}
