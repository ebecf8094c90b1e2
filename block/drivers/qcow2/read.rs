//! Reads: from the file, the backing file or nowhere, run by run. It owns the fast path, a run in one piece that is
//! handed straight to the child, and the slow one, which is boxed; and what block status says.

use std::rc::Rc;

use super::channel::{CORRUPT, Channel, Started};
use super::decompress::copy_out;
use super::mapping::{Kind, Run};
use super::state::State;
use crate::aio::AioContext;
use crate::driver::{BlockFuture, BlockStatus};
use crate::error::{BlockError, BlockResult};
use crate::iovec::{self, IoVec};

/// How many compressed clusters one request reads at once.
const AT_ONCE: usize = 32;

impl Channel {
    /// Starts a read. Boxed only where it takes more than one step.
    pub(super) fn start_read(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> BlockFuture {
        if self.image.is_broken() {
            return BlockFuture::ready(Err(CORRUPT));
        }
        let bytes = iovec::total_len(iov);
        let found = {
            let mut state = self.image.lock();
            if let Some(place) = state.place(offset, bytes) {
                let pin = state.pin(&self.pins);
                drop(state);
                return self.read_data(place.host, iov, pin);
            }
            let run = state.run(offset, bytes);
            if let Ok(Run { kind: Kind::Compressed { offset, bytes: packed, skip }, bytes: run }) = run
                && run == bytes
                && let Some(content) = state.inflated.find(offset, packed)
            {
                drop(state);
                copy_out(&content, skip, iov);
                return BlockFuture::ready(Ok(()));
            }
            match run {
                Ok(Run { kind: Kind::Data { host, .. }, bytes: run }) if run == bytes => {
                    Some((host, state.pin(&self.pins)))
                }
                _ => None,
            }
        };
        if let Some((host, pin)) = found {
            return self.read_data(host, iov, pin);
        }
        let (this, iov) = (self.clone(), iov.to_vec());
        BlockFuture::boxed(async move { this.read(offset, &iov).await })
    }

    /// Reads `iov`'s length in bytes from `offset`, wherever they are.
    pub(super) async fn read(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> BlockResult {
        let mut started = Started::default();
        let result = self.read_runs(offset, iov, &mut started).await;
        // What was started is brought to its end, whatever happened to the rest.
        started.finish().await.and(result)
    }

    async fn read_runs(self: &Rc<Self>, offset: u64, iov: &[IoVec], started: &mut Started) -> BlockResult {
        let end = offset + iovec::total_len(iov);
        let mut at = offset;
        while at < end {
            let plan = |state: &mut State| {
                let run = state.run(at, end - at)?;
                Ok((run, state.pin(&self.pins), state.inflated.changes))
            };
            let (run, pin, changes) = self.attempt(plan).await?;
            let part = iovec::slice(iov, at - offset, run.bytes);
            match run.kind {
                Kind::Zero => iovec::fill(&part, 0),
                Kind::Data { host, .. } => started.push(self.read_data(host, &part, pin))?,
                Kind::Unallocated => self.read_backing(at, run.bytes, &part, started)?,
                Kind::Compressed { offset, bytes, skip } => {
                    let this = self.clone();
                    started.push(BlockFuture::boxed(async move {
                        let result = this.read_compressed((offset, bytes), skip, &part, changes).await;
                        drop(pin);
                        result
                    }))?;
                    if started.len() >= AT_ONCE {
                        started.settle().await?;
                    }
                }
            }
            at += run.bytes;
            if at < end {
                AioContext::breathe().await;
            }
        }
        Ok(())
    }

    /// Reads what is not in this image: from the backing file as far as it reaches, zeroes behind it.
    fn read_backing(&self, offset: u64, bytes: u64, iov: &[IoVec], started: &mut Started) -> BlockResult {
        let there = self.backing_length().saturating_sub(offset).min(bytes);
        if there < bytes {
            iovec::fill(&iovec::slice(iov, there, bytes - there), 0);
        }
        match &self.backing {
            Some(backing) if there > 0 => started.push(backing.preadv(offset, &iovec::slice(iov, 0, there))),
            _ => Ok(()),
        }
    }

    /// What the `bytes` from `offset` on are.
    pub(super) async fn status(&self, offset: u64, bytes: u64) -> BlockResult<BlockStatus> {
        let end = offset + bytes;
        let mut at = offset;
        let mut found: Option<Class> = None;
        // Neighbours of one kind are told as one, up to a bound, so that a question takes no time without end.
        while at < end && at - offset < STATUS_BYTES_MAX {
            let run = self.attempt(|state| state.run(at, end - at)).await?;
            let class = Class::of(run.kind, at >= self.backing_length());
            match found {
                Some(first) if !first.goes_on(class, at - offset) => break,
                Some(_) => {}
                None => found = Some(class),
            }
            // A run that the backing file ends in is two.
            let boundary = self.backing_length();
            let stop = at + run.bytes;
            let split = run.kind == Kind::Unallocated && at < boundary && boundary < stop;
            at = if split { boundary } else { stop };
        }
        let bytes = at - offset;
        match (found, &self.backing) {
            (Some(Class::Backing), Some(backing)) => {
                let behind = backing.block_status(offset, bytes).await?;
                let bytes = behind.bytes.min(bytes);
                Ok(BlockStatus { bytes, zero: behind.zero, ..BlockStatus::default() })
            }
            (Some(Class::Nothing), _) => Ok(BlockStatus { bytes, zero: true, ..BlockStatus::default() }),
            (Some(Class::Zero), _) => Ok(BlockStatus { bytes, zero: true, allocated: true, ..BlockStatus::default() }),
            (Some(Class::Data(place)), _) => {
                Ok(BlockStatus { bytes, allocated: true, place: Some(place), ..BlockStatus::default() })
            }
            (Some(Class::Compressed), _) => {
                Ok(BlockStatus { bytes, allocated: true, compressed: true, ..BlockStatus::default() })
            }
            (Some(Class::Backing), None) => Ok(BlockStatus { bytes, allocated: true, ..BlockStatus::default() }),
            (None, _) => Err(BlockError::OutOfRange),
        }
    }
}

/// The most bytes that one question about the status looks at.
const STATUS_BYTES_MAX: u64 = 1 << 30;

/// What block status tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// At this place, and so on in one piece.
    Data(u64),
    Compressed,
    Zero,
    /// In the backing file.
    Backing,
    /// Nowhere, and so zero.
    Nothing,
}

impl Class {
    fn of(kind: Kind, past_backing: bool) -> Self {
        match kind {
            Kind::Data { host, .. } => Self::Data(host),
            Kind::Compressed { .. } => Self::Compressed,
            Kind::Zero => Self::Zero,
            Kind::Unallocated if past_backing => Self::Nothing,
            Kind::Unallocated => Self::Backing,
        }
    }

    /// Whether `next`, `bytes` further on, goes on with the same.
    fn goes_on(self, next: Self, bytes: u64) -> bool {
        match (self, next) {
            (Self::Data(place), Self::Data(next)) => place.checked_add(bytes) == Some(next),
            (first, next) => first == next,
        }
    }
}
