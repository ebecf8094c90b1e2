//! Channel: an image's half on one AioContext. It owns how attempts on the shared state are brought to their end: what
//! one needs is done, by one task over all iothreads while the others wait, and then it is tried again.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use super::decompress::Decompressor;
use super::header::incompatible;
use super::state::{Attempt, Image, Need, Pins, State, Stop, Task};
use crate::child::ChildChannel;
use crate::driver::{BlockFuture, WriteFlags};
use crate::error::{BlockError, BlockResult};
use crate::event::{self, BlockEvent};
use crate::iovec::AlignedBuffer;
use crate::shaping::BounceBudget;

/// What metadata is aligned to in memory, for direct I/O.
const BUFFER_ALIGNMENT: usize = 4096;

/// What a request fails with when the image turns out to be corrupt.
pub(super) const CORRUPT: BlockError = BlockError::Host(libc::EIO);

/// An image's half on one AioContext.
pub(super) struct Channel {
    pub image: Arc<Image>,
    /// The file with the metadata.
    pub file: Rc<ChildChannel>,
    /// Where guest data is: the same, or the external data file.
    pub data: Rc<ChildChannel>,
    pub backing: Option<Rc<ChildChannel>>,
    pub pins: Pins,
    /// Bounds the memory for copying up.
    pub copy_up: BounceBudget,
    /// Bounds the memory for decompression.
    pub inflation: BounceBudget,
    pub decompressor: Decompressor,
}

impl Channel {
    pub(super) fn new(
        image: &Arc<Image>,
        file: Rc<ChildChannel>,
        data: Option<Rc<ChildChannel>>,
        backing: Option<Rc<ChildChannel>>,
    ) -> Rc<Self> {
        let (pins, compression) = {
            let mut state = image.lock();
            (state.add_channel(), state.header.compression)
        };
        Rc::new(Self {
            image: image.clone(),
            data: data.unwrap_or_else(|| file.clone()),
            file,
            backing,
            pins,
            copy_up: BounceBudget::default(),
            inflation: BounceBudget::default(),
            decompressor: Decompressor::new(compression),
        })
    }

    /// How far the backing file reaches, in bytes; 0 without one.
    pub(super) fn backing_length(&self) -> u64 {
        self.backing.as_ref().map_or(0, |backing| backing.length())
    }

    /// Makes an attempt until it succeeds, doing what it needs in between. It changes nothing unless it succeeds.
    pub(super) async fn attempt<T>(&self, mut attempt: impl FnMut(&mut State) -> Attempt<T>) -> BlockResult<T> {
        loop {
            if self.image.is_broken() {
                return Err(CORRUPT);
            }
            let stop = match attempt(&mut self.image.lock()) {
                Ok(value) => return Ok(value),
                Err(stop) => stop,
            };
            match stop {
                Stop::Need(need) => self.satisfy(need).await?,
                Stop::Corrupt(why) => return Err(self.corrupted(why).await),
                Stop::Fail(error) => return Err(error),
            }
        }
    }

    /// Boxed, as satisfying one need may have others.
    fn satisfy(&self, need: Need) -> Pin<Box<dyn Future<Output = BlockResult> + '_>> {
        Box::pin(async move {
            let task = match need {
                Need::Allocation(id) => {
                    self.allocation_end(id).await;
                    return Ok(());
                }
                Need::RefcountBlock(_) => Task::RefcountTable,
                Need::Slice(_) | Need::Refcounts(_) | Need::Table(_) => Task::Load(need),
            };
            // Somebody else may have done it meanwhile, or failed; the attempt finds out.
            let Some(_claim) = self.claim(task).await else { return Ok(()) };
            match need {
                Need::Slice(number) => self.load_slice(number).await,
                Need::Refcounts(number) => self.load_refcounts(number).await,
                Need::Table(index) => self.make_table(index).await,
                Need::RefcountBlock(index) => self.make_refcount_block(index).await,
                Need::Allocation(_) => Ok(()),
            }
        })
    }

    /// Makes `task` ours until the claim is dropped; `None` after somebody else's has ended.
    pub(super) async fn claim(&self, task: Task) -> Option<Claim> {
        let mut waited = false;
        poll_fn(|cx| {
            let mut state = self.image.lock();
            if let Some((_, waiting)) = state.busy.iter_mut().find(|(other, _)| *other == task) {
                waiting.push(cx.waker().clone());
                waited = true;
                return Poll::Pending;
            }
            if waited {
                return Poll::Ready(None);
            }
            state.busy.push((task, Vec::new()));
            Poll::Ready(Some(Claim { image: self.image.clone(), task }))
        })
        .await
    }

    async fn allocation_end(&self, id: u64) {
        poll_fn(|cx| match self.image.lock().allocations.wait(id, cx.waker()) {
            true => Poll::Pending,
            false => Poll::Ready(()),
        })
        .await;
    }

    /// Ends an allocation.
    pub(super) fn end_allocation(&self, id: u64) {
        let waiting = self.image.lock().allocations.remove(id);
        waiting.into_iter().for_each(std::task::Waker::wake);
    }

    /// Marks the image as corrupt, so that nobody writes to it before it is repaired, and makes the node unusable. The
    /// error is what requests fail with.
    pub(super) async fn corrupted(&self, why: &'static str) -> BlockError {
        if self.image.broken.swap(true, Ordering::Relaxed) {
            return CORRUPT;
        }
        tracing::error!("node \"{}\": the qcow2 image is corrupt: {why}; it cannot be used any more", self.image.name);
        event::emit(BlockEvent::ImageCorrupted {
            node_name: self.image.name.clone(),
            message: why.to_owned(),
            offset: None,
            size: None,
            fatal: true,
        });
        let sector = {
            let mut state = self.image.lock();
            if !self.image.writable || !state.geometry.v3 {
                return CORRUPT;
            }
            state.header.incompatible |= incompatible::CORRUPT;
            let bits = state.header.incompatible;
            state.header_sector.set_incompatible(bits);
            state.header_sector.bytes().to_vec()
        };
        let written = match self.write_bytes(0, &sector).await {
            Ok(()) => self.file.flush().await,
            error => error,
        };
        if let Err(error) = written {
            tracing::error!("node \"{}\": it could not be marked as corrupt: {error}", self.image.name);
        }
        CORRUPT
    }

    /// Reads bytes of the file; what lies past its end is zero.
    pub(super) async fn read_bytes(&self, offset: u64, bytes: u64) -> BlockResult<Vec<u8>> {
        let buffer = AlignedBuffer::new(usize::try_from(bytes).unwrap_or(usize::MAX), BUFFER_ALIGNMENT);
        self.file.preadv(offset, &[buffer.iov()]).await?;
        Ok(buffer.to_vec())
    }

    /// Reads a table's words.
    pub(super) async fn read_words(&self, offset: u64, bytes: u64) -> BlockResult<Vec<u64>> {
        let bytes = self.read_bytes(offset, bytes).await?;
        Ok(bytes.chunks_exact(8).map(|word| word.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))).collect())
    }

    /// Writes metadata.
    pub(super) async fn write_bytes(&self, offset: u64, bytes: &[u8]) -> BlockResult {
        let mut buffer = AlignedBuffer::new(bytes.len(), BUFFER_ALIGNMENT);
        buffer.fill_from(bytes);
        self.file.pwritev(offset, &[buffer.iov()], WriteFlags::default()).await
    }

    /// Flushes what was written to the file, and to the external data file if there is one.
    pub(super) async fn flush_files(&self) -> BlockResult {
        if !Rc::ptr_eq(&self.file, &self.data) {
            self.data.flush().await?;
        }
        self.file.flush().await
    }
}

/// Ends a task, and the waiting for it, when dropped.
pub(super) struct Claim {
    image: Arc<Image>,
    task: Task,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.image.lock();
        let found = state.busy.iter().position(|(task, _)| *task == self.task);
        let waiting = found.map(|at| state.busy.swap_remove(at).1);
        drop(state);
        waiting.into_iter().flatten().for_each(std::task::Waker::wake);
    }
}

/// Requests to children that run at once. All of them must be brought to their end.
#[derive(Default)]
pub(super) struct Started(Vec<BlockFuture>);

impl Started {
    /// Adds one; what is ready is not kept.
    pub(super) fn push(&mut self, future: BlockFuture) -> BlockResult {
        match future.try_ready() {
            Ok(result) => result,
            Err(future) => {
                self.0.push(future);
                Ok(())
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Waits for all; the first error is the answer.
    pub(super) async fn finish(mut self) -> BlockResult {
        self.settle().await
    }

    /// The same, and goes on with none.
    pub(super) async fn settle(&mut self) -> BlockResult {
        let mut result = Ok(());
        poll_fn(|cx| {
            self.0.retain_mut(|future| match Pin::new(future).poll(cx) {
                Poll::Ready(answer) => {
                    result = result.and(answer);
                    false
                }
                Poll::Pending => true,
            });
            if self.0.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        result
    }
}
