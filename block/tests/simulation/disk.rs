//! The simulated disk: a block driver that holds what is stable and what is only in its cache. Requests complete in an
//! order that the seed chooses, may fail, and leave behind what a disk may leave behind when the power fails. It knows
//! nothing of who asks or why.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use blockport_block::aio::AioContext;
use blockport_block::driver::{BlockDriver, BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use blockport_block::iovec::{self, IoVec};
use blockport_block::{BlockError, BlockLimits, BlockResult, Child, OpenResult, Permissions};

use crate::random::Random;

/// The unit in which the disk writes whole or not at all, in bytes.
pub const SECTOR: usize = 512;

/// What a disk promises and does not keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    None,
    /// A flush answers well and makes nothing stable.
    FlushDoesNothing,
    /// A write that must be stable stays in the cache.
    StableWriteIsNot,
    /// One write in a while is answered well and forgotten.
    WriteIsLost,
}

/// How the disk behaves.
#[derive(Debug, Clone, Copy)]
pub struct Behaviour {
    pub alignment: u32,
    /// The longest transfer, 0 for any.
    pub max_transfer: u32,
    /// One in so many requests fails; 0: none.
    pub failures: u64,
    pub lie: Lie,
}

/// A write that is not stable yet: where, and what.
type Written = (usize, Vec<u8>);

/// A request under way.
struct Pending {
    number: u64,
    kind: Kind,
    waker: Option<Waker>,
}

enum Kind {
    Read,
    Write(Written, bool),
    /// How many of the cached writes it makes stable: those completed before it came.
    Flush(u64),
}

pub struct State {
    behaviour: Behaviour,
    random: Random,
    stable: Vec<u8>,
    /// What reads see: what is stable with all cached writes on top.
    seen: Vec<u8>,
    /// Cached writes, in the order of their completion, each with its number.
    cached: Vec<(u64, Written)>,
    next_cached: u64,
    pending: Vec<Pending>,
    /// Answers that nobody has taken.
    answers: Vec<(u64, BlockResult)>,
    next_request: u64,
}

/// The disk, shared by the driver and the simulation.
#[derive(Clone)]
pub struct Disk(Arc<Mutex<State>>);

impl Disk {
    pub fn new(behaviour: Behaviour, content: Vec<u8>, random: Random) -> Self {
        Self(Arc::new(Mutex::new(State {
            behaviour,
            random,
            seen: content.clone(),
            stable: content,
            cached: Vec::new(),
            next_cached: 0,
            pending: Vec::new(),
            answers: Vec::new(),
            next_request: 0,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes one of the requests under way. False when there is none.
    pub fn step(&self) -> bool {
        let waker = {
            let mut state = self.state();
            if state.pending.is_empty() {
                return false;
            }
            let count = state.pending.len() as u64;
            let which = state.random.below(count) as usize;
            let request = state.pending.swap_remove(which);
            let result = state.complete(request.kind);
            state.answers.push((request.number, result));
            request.waker
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// The power fails: what a new power-up finds. Cached writes, and those under way, are there in part and in any
    /// order.
    pub fn after_power_failure(&self) -> Vec<u8> {
        let mut state = self.state();
        let mut content = state.stable.clone();
        let mut left: Vec<Written> = state.cached.iter().map(|(_, written)| written.clone()).collect();
        let under_way = state.pending.iter().filter_map(|request| match &request.kind {
            Kind::Write(written, _) => Some(written.clone()),
            Kind::Read | Kind::Flush(_) => None,
        });
        left.extend(under_way.collect::<Vec<_>>());
        while !left.is_empty() {
            let which = state.random.below(left.len() as u64) as usize;
            let written = left.swap_remove(which);
            state.tear(&mut content, &written);
        }
        content
    }
}

impl State {
    /// Puts any of a write's sectors down.
    fn tear(&mut self, content: &mut [u8], (offset, data): &Written) {
        let all = self.random.one_in(3);
        for (sector, bytes) in data.chunks(SECTOR).enumerate() {
            if all || self.random.one_in(2) {
                let at = offset + sector * SECTOR;
                content[at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
    }

    fn complete(&mut self, kind: Kind) -> BlockResult {
        let failures = self.behaviour.failures;
        let fails = failures > 0 && self.random.one_in(failures);
        match kind {
            Kind::Read => {
                if fails {
                    Err(BlockError::from_errno(libc::EIO))
                } else {
                    Ok(())
                }
            }
            Kind::Write(written, _) if fails => {
                // Some of it may have arrived.
                let mut content = std::mem::take(&mut self.seen);
                let before = content.clone();
                self.tear(&mut content, &written);
                let parts = content.chunks(SECTOR).zip(before.chunks(SECTOR)).enumerate();
                let changed = parts
                    .filter(|(_, (new, old))| new != old)
                    .map(|(sector, (new, _))| (sector * SECTOR, new.to_vec()));
                let changed: Vec<Written> = changed.collect();
                for written in changed {
                    self.cached.push((self.next_cached, written));
                    self.next_cached += 1;
                }
                self.seen = content;
                Err(BlockError::from_errno(libc::EIO))
            }
            Kind::Write((offset, data), fua) => {
                if self.behaviour.lie == Lie::WriteIsLost && self.random.one_in(20) {
                    return Ok(());
                }
                self.seen[offset..offset + data.len()].copy_from_slice(&data);
                if fua && self.behaviour.lie != Lie::StableWriteIsNot {
                    // Older writes to the same place must not come back over it.
                    for (_, cached) in &mut self.cached {
                        overwrite(cached, offset, &data);
                    }
                    self.stable[offset..offset + data.len()].copy_from_slice(&data);
                } else {
                    self.cached.push((self.next_cached, (offset, data)));
                    self.next_cached += 1;
                }
                Ok(())
            }
            Kind::Flush(_) if fails => Err(BlockError::from_errno(libc::EIO)),
            Kind::Flush(upto) => {
                if self.behaviour.lie == Lie::FlushDoesNothing {
                    return Ok(());
                }
                let (flushed, left) =
                    std::mem::take(&mut self.cached).into_iter().partition(|(number, _)| *number < upto);
                self.cached = left;
                let flushed: Vec<(u64, Written)> = flushed;
                for (_, (offset, data)) in flushed {
                    self.stable[offset..offset + data.len()].copy_from_slice(&data);
                }
                Ok(())
            }
        }
    }
}

/// Gives an older write the bytes of a newer one where they overlap.
fn overwrite((offset, data): &mut Written, newer: usize, bytes: &[u8]) {
    let (start, end) = (newer.max(*offset), (newer + bytes.len()).min(*offset + data.len()));
    if start < end {
        data[start - *offset..end - *offset].copy_from_slice(&bytes[start - newer..end - newer]);
    }
}

/// The driver over it.
pub struct SimulatedDisk {
    disk: Disk,
    active: AtomicBool,
}

impl SimulatedDisk {
    pub fn new(disk: Disk) -> Self {
        Self { disk, active: AtomicBool::new(false) }
    }
}

impl BlockDriver for SimulatedDisk {
    fn limits(&self) -> BlockLimits {
        let behaviour = self.disk.state().behaviour;
        BlockLimits {
            request_alignment: behaviour.alignment,
            max_transfer: behaviour.max_transfer,
            ..BlockLimits::default()
        }
    }

    fn length(&self) -> u64 {
        self.disk.state().stable.len() as u64
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
        let mut state = self.disk.state();
        let bytes = bytes as usize;
        state.stable.resize(bytes, 0);
        state.seen.resize(bytes, 0);
        Ok(())
    }

    fn activate(&self) -> OpenResult {
        self.active.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn inactivate(&self) -> OpenResult {
        self.active.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, _: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        Ok(Rc::new(Channel(self.disk.clone())))
    }
}

struct Channel(Disk);

impl Channel {
    fn start(&self, kind: Kind) -> u64 {
        let mut state = self.0.state();
        let number = state.next_request;
        state.next_request += 1;
        state.pending.push(Pending { number, kind, waker: None });
        number
    }

    fn finish(&self, number: u64) -> impl Future<Output = BlockResult> + use<> {
        let disk = self.0.clone();
        poll_fn(move |cx| {
            let mut state = disk.state();
            if let Some(at) = state.answers.iter().position(|(answered, _)| *answered == number) {
                return Poll::Ready(state.answers.swap_remove(at).1);
            }
            if let Some(request) = state.pending.iter_mut().find(|request| request.number == number) {
                request.waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
    }

    fn write(&self, offset: u64, data: Vec<u8>, fua: bool) -> BlockFuture {
        let number = self.start(Kind::Write((offset as usize, data), fua));
        BlockFuture::boxed(self.finish(number))
    }
}

impl IoChannel for Channel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        let number = self.start(Kind::Read);
        let (disk, iov, done) = (self.0.clone(), RefCell::new(iov.to_vec()), self.finish(number));
        BlockFuture::boxed(async move {
            done.await?;
            let iov = iov.into_inner();
            let state = disk.state();
            let end = (offset as usize + iovec::total_len(&iov) as usize).min(state.seen.len());
            iovec::fill(&iov, 0);
            iovec::fill_from(&iov, &state.seen[(offset as usize).min(end)..end]);
            Ok(())
        })
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        let mut data = vec![0; iovec::total_len(iov) as usize];
        iovec::copy_to(iov, &mut data);
        self.write(offset, data, flags.fua)
    }

    fn flush(&self) -> BlockFuture {
        let upto = self.0.state().next_cached;
        let number = self.start(Kind::Flush(upto));
        BlockFuture::boxed(self.finish(number))
    }

    fn pdiscard(&self, _: u64, _: u64) -> BlockFuture {
        BlockFuture::ready(Ok(()))
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        self.write(offset, vec![0; bytes as usize], flags.fua)
    }

    fn block_status(&self, _: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        Box::pin(std::future::ready(Ok(BlockStatus { bytes, zero: false, allocated: true, ..BlockStatus::default() })))
    }
}
