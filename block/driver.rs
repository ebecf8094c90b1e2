//! The seam between the block layer and block drivers: [`BlockDriver`], [`IoChannel`], [`BlockFuture`].
//! It owns the contract; it contains no driver.
//!
//! # Writing a driver
//!
//! Copy `drivers/null.rs`, add a `mod` line and a row to `drivers/mod.rs`; the conformance suite runs it from then on.
//! A driver may be small and trusting: every request has come through a checked door (`child.rs`), so its range lies
//! inside the node, is aligned to `request_alignment`, its buffers to `memory_alignment`, it is no longer than the
//! limits allow, and no padded write overlaps it. Reads and writes are never empty. Where the size is no multiple of
//! `request_alignment`, a padded request ends with the last block, and so behind the end of the node.

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::aio::{AioContext, Completion, RingOp};
use crate::child::Child;
use crate::error::{BlockResult, OpenResult};
use crate::iovec::IoVec;
use crate::limits::BlockLimits;
use crate::permissions::Permissions;

/// How a write, or a write-zeroes, is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteFlags {
    /// Force unit access: the bytes are stable before the request completes.
    pub fua: bool,
    /// It outlives this process: should that be killed, another one that opens the node finds it. What the kernel has, be
    /// it in a cache, does; a map that is in memory only does not.
    pub kept: bool,
    /// Write-zeroes only: the space may be given back.
    pub may_unmap: bool,
    /// Write-zeroes only: fail with [`crate::BlockError::NotSupported`] rather than write zeroes the slow way.
    pub no_fallback: bool,
    /// Write only: store it compressed. Whole clusters (`BlockLimits::cluster_size`), or up to the end of the node; what
    /// does not get smaller is stored as it is. [`crate::BlockError::NotSupported`] where `can_compress` is false.
    pub compressed: bool,
}

/// What [`IoChannel::block_status`] says of the bytes from the asked offset on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockStatus {
    /// For how many bytes this holds; at least 1 and at most what was asked.
    pub bytes: u64,
    /// Reading it gives zeroes, for sure.
    pub zero: bool,
    /// This node, not one behind it, stores these bytes or knows that they are zero.
    pub allocated: bool,
    /// Where in the file they are, all in one piece and as they are read; `None` where there is no such place, or where it
    /// is not known.
    pub place: Option<u64>,
    /// They are stored compressed.
    pub compressed: bool,
}

/// A future of the block layer that is not on the fast path.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// An opened block driver: what all iothreads share of a node. Its methods are called from the control thread, with no
/// request in flight where they say so.
pub trait BlockDriver: Any + Send + Sync {
    /// What the node can do. Asked after opening and after every change.
    fn limits(&self) -> BlockLimits;

    /// The size in bytes, at any moment. A size that is no multiple of 512 is rounded up by the node; the driver's
    /// reads past its end then give zeroes.
    fn length(&self) -> u64;

    /// The edges to the nodes it stands on, in order; none for a protocol driver.
    fn children(&self) -> &[Arc<Child>];

    /// What the driver needs of its children when its own users hold `own`; drivers without children are never asked.
    fn child_permissions(&self, own: Permissions) -> Permissions;

    /// The permissions that all users of the node together hold and share have changed; take or drop locks.
    ///
    /// # Errors
    /// Another process holds what is asked. Nothing has changed then.
    fn set_permissions(&self, permissions: Permissions) -> OpenResult;

    /// Changes the size. Called with no request in flight.
    ///
    /// # Errors
    /// The driver cannot, or the host refuses.
    fn resize(&self, bytes: u64) -> OpenResult;

    /// Takes locks, write access and cached metadata. Called once after opening, and after each `inactivate`.
    ///
    /// # Errors
    /// Something is in the way; the node stays inactive.
    fn activate(&self) -> OpenResult;

    /// Writes back and drops cached metadata, then locks and write access. Called drained and flushed.
    ///
    /// # Errors
    /// Something could not be written back; the node stays active.
    fn inactivate(&self) -> OpenResult;

    /// Somebody waits for all requests of the node to end: what is held back goes at once, and nothing is held back
    /// until `drained_end`. Nests; a node's own before its children's. Any thread but an iothread.
    fn drained_begin(&self);

    /// Ends one `drained_begin`.
    fn drained_end(&self);

    /// Makes the driver's half on one AioContext, whose thread calls this.
    ///
    /// # Errors
    /// The context lacks what the driver needs.
    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>>;
}

/// A driver's half on one AioContext. It never leaves that thread.
///
/// Every verb starts at once and returns without waiting. The memory in `iov` stays valid until the future is ready;
/// the slice itself only until the verb returns. The future must be polled to its end, never dropped before.
pub trait IoChannel {
    /// Reads `iov`'s length in bytes from `offset`.
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture;

    /// Writes `iov`'s length in bytes at `offset`.
    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture;

    /// Everything that completed before this is stable when it completes.
    fn flush(&self) -> BlockFuture;

    /// Tells that the content of a range no longer matters. Advisory; afterwards any content may be read.
    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture;

    /// Makes a range read as zeroes. `NotSupported` when the driver has no means better than writing; the edge then
    /// writes, unless `no_fallback`.
    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture;

    /// What the `bytes` from `offset` on hold; the answer may cover fewer.
    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>>;
}

/// Who submitted a [`RingOp`]: told when the kernel has answered, and says what follows.
pub trait RingOwner {
    /// Usually [`BlockFuture::ready`]; another operation for the rest of a short transfer.
    fn complete(self: Rc<Self>, completion: &Completion<'_>) -> BlockFuture;
}

/// Counts requests: each holds a clone of one `Arc` of it until it has ended.
#[derive(Debug, Default)]
pub struct InFlight;

/// A request under way: an answer, one operation in the kernel, or a boxed future. Only the last allocates.
pub struct BlockFuture(State);

enum State {
    Ready(BlockResult),
    Ring(RingOp),
    /// The same, counted by a driver above.
    Held(RingOp, Arc<InFlight>),
    Boxed(BoxFuture<BlockResult>),
    /// The answer has been taken.
    Taken,
}

impl BlockFuture {
    /// The request is done.
    #[inline]
    pub fn ready(result: BlockResult) -> Self {
        Self(State::Ready(result))
    }

    /// The request is one operation in the kernel.
    pub fn ring(operation: RingOp) -> Self {
        Self(State::Ring(operation))
    }

    /// The request takes several steps.
    pub fn boxed(future: impl Future<Output = BlockResult> + 'static) -> Self {
        Self(State::Boxed(Box::pin(future)))
    }

    /// The same request, which keeps `count` until it has ended. Allocates only if it is boxed already.
    pub fn holding(self, count: Arc<InFlight>) -> Self {
        match self.0 {
            State::Ready(_) | State::Taken => self,
            State::Ring(operation) => Self(State::Held(operation, count)),
            State::Held(..) | State::Boxed(_) => Self::boxed(async move {
                let result = self.await;
                drop(count);
                result
            }),
        }
    }

    /// The answer, where it is there already, without a poll; else the future itself.
    #[inline]
    pub fn try_ready(self) -> Result<BlockResult, Self> {
        if let State::Ready(result) = self.0 {
            // There is nothing to drop, which the compiler does not see.
            std::mem::forget(self);
            return Ok(result);
        }
        Err(self)
    }
}

impl Future for BlockFuture {
    type Output = BlockResult;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<BlockResult> {
        loop {
            match &mut self.0 {
                State::Ready(result) => {
                    let result = *result;
                    self.0 = State::Taken;
                    return Poll::Ready(result);
                }
                State::Ring(operation) => match Pin::new(operation).poll(cx) {
                    Poll::Ready(next) => *self = next,
                    Poll::Pending => return Poll::Pending,
                },
                State::Held(operation, _) => {
                    let next = std::task::ready!(Pin::new(operation).poll(cx));
                    // Rarely another operation, for the rest of a short transfer.
                    let State::Held(_, count) = std::mem::replace(&mut self.0, State::Taken) else { continue };
                    *self = next.holding(count);
                }
                State::Boxed(future) => {
                    let result = std::task::ready!(future.as_mut().poll(cx));
                    self.0 = State::Taken;
                    return Poll::Ready(result);
                }
                State::Taken => panic!("a request was polled after its end"),
            }
        }
    }
}
