//! Shaping: brings a request that a driver cannot take as it is into pieces that it can. It splits what is too long,
//! copies through a buffer of our own what is not aligned, and reads, changes and writes back what covers blocks only
//! in part. Only the slow path comes here; `child.rs` decides that.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::task::{Poll, Waker};

use crate::aio::AioContext;
use crate::child::ChildChannel;
use crate::driver::WriteFlags;
use crate::error::{BlockError, BlockResult};
use crate::iovec::{self, AlignedBuffer, IoVec};

/// The most bytes that one request bounces at a time, so that memory stays bounded; a multiple of every alignment.
const BOUNCE_MAX: u64 = 1 << 20;

/// The most bytes that all requests of one channel bounce at a time; who comes later waits. A guest could otherwise
/// make us allocate as much as it can have in flight.
const BOUNCE_TOTAL_MAX: u64 = 16 << 20;

/// How many zeroes are written at a time; a multiple of every alignment.
const ZEROES_BYTES: usize = 256 << 10;

/// The bytes that the requests of one channel bounce at the moment.
#[derive(Default)]
pub(crate) struct BounceBudget {
    in_use: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

/// A buffer of our own, within the budget until it is dropped.
pub(crate) struct Bounce<'a> {
    budget: &'a BounceBudget,
    buffer: AlignedBuffer,
}

impl BounceBudget {
    /// `len` zero bytes, once the budget has room for them.
    pub(crate) async fn buffer(&self, len: u64, align: u32) -> Bounce<'_> {
        std::future::poll_fn(|cx| {
            // One always fits, however large its blocks are.
            if self.in_use.get() > 0 && self.in_use.get() + len > BOUNCE_TOTAL_MAX {
                self.waiting.borrow_mut().push(cx.waker().clone());
                return Poll::Pending;
            }
            self.in_use.set(self.in_use.get() + len);
            Poll::Ready(())
        })
        .await;
        Bounce { budget: self, buffer: AlignedBuffer::new(len as usize, align as usize) }
    }
}

impl Bounce<'_> {
    /// A piece of the buffer, for requests that end before it is dropped.
    pub(crate) fn part(&self, start: usize, len: usize) -> IoVec {
        self.buffer.iov().part(start, len)
    }
}

impl Drop for Bounce<'_> {
    fn drop(&mut self) {
        self.budget.in_use.set(self.budget.in_use.get() - self.buffer.len() as u64);
        self.budget.waiting.take().into_iter().for_each(Waker::wake);
    }
}

/// How one piece of a request reaches the driver.
enum Piece {
    /// As it is.
    Direct(Vec<IoVec>),
    /// Through a buffer that holds these whole blocks.
    Bounced(Range<u64>),
}

/// The next piece of a transfer: of `iov` (whose first byte belongs at `offset`) what begins at `at`. Returns it with
/// its length in bytes.
fn next_piece(channel: &ChildChannel, offset: u64, iov: &[IoVec], at: u64, end: u64) -> (Piece, u64) {
    let limits = channel.limits();
    let align = u64::from(limits.request_alignment);
    let memory = limits.memory_alignment as usize;
    let most = (end - at).min(limits.transfer_max());
    if at.is_multiple_of(align) {
        let mut part = iovec::slice(iov, at - offset, most);
        part.truncate(limits.iov_max());
        // Whole blocks only, unless the rest of the transfer is to be padded anyway.
        let whole = iovec::total_len(&part) / align * align;
        let part = iovec::slice(&part, 0, whole);
        if whole > 0 && part.iter().all(|v| v.is_aligned(memory)) {
            return (Piece::Direct(part), whole);
        }
    }
    let start = at / align * align;
    let most = BOUNCE_MAX.min(limits.transfer_max()).max(align);
    let stop = end.next_multiple_of(align).min(start + most);
    (Piece::Bounced(start..stop), stop.min(end) - at)
}

async fn buffer_for<'a>(channel: &'a ChildChannel, blocks: &Range<u64>) -> Bounce<'a> {
    let limits = channel.limits();
    let align = limits.memory_alignment.max(limits.request_alignment);
    channel.bounce.buffer(blocks.end - blocks.start, align).await
}

pub(crate) async fn read(channel: &ChildChannel, offset: u64, iov: &[IoVec]) -> BlockResult {
    let end = offset + iovec::total_len(iov);
    let mut at = offset;
    while at < end {
        let (piece, bytes) = next_piece(channel, offset, iov, at, end);
        match piece {
            Piece::Direct(part) => channel.channel.preadv(at, &part).await?,
            Piece::Bounced(blocks) => {
                let bounce = buffer_for(channel, &blocks).await;
                let whole = bounce.buffer.iov();
                channel.channel.preadv(blocks.start, &[whole]).await?;
                iovec::copy(&[whole], at - blocks.start, iov, at - offset, bytes);
            }
        }
        at += bytes;
        if at < end {
            AioContext::breathe().await;
        }
    }
    Ok(())
}

pub(crate) async fn write(channel: &ChildChannel, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockResult {
    let align = u64::from(channel.limits().request_alignment);
    let end = offset + iovec::total_len(iov);
    let padded = !offset.is_multiple_of(align) || !end.is_multiple_of(align);
    let (start, stop) = (offset / align * align, end.next_multiple_of(align));
    let _range = match padded || channel.tracked {
        true => Some(channel.node.ranges.lock(start, stop, padded).await),
        false => None,
    };
    let mut at = offset;
    while at < end {
        let (piece, bytes) = next_piece(channel, offset, iov, at, end);
        match piece {
            Piece::Direct(part) => channel.channel.pwritev(at, &part, flags).await?,
            Piece::Bounced(blocks) => {
                let bounce = buffer_for(channel, &blocks).await;
                let whole = bounce.buffer.iov();
                let last = blocks.end - align;
                if at != blocks.start {
                    channel.channel.preadv(blocks.start, &[whole.part(0, align as usize)]).await?;
                }
                if at + bytes != blocks.end && (at == blocks.start || last != blocks.start) {
                    let tail = whole.part((last - blocks.start) as usize, align as usize);
                    channel.channel.preadv(last, &[tail]).await?;
                }
                iovec::copy(iov, at - offset, &[whole], at - blocks.start, bytes);
                channel.channel.pwritev(blocks.start, &[whole], flags).await?;
            }
        }
        at += bytes;
        if at < end {
            AioContext::breathe().await;
        }
    }
    Ok(())
}

pub(crate) async fn discard(channel: &ChildChannel, offset: u64, bytes: u64) -> BlockResult {
    let limits = *channel.limits();
    let align = u64::from(limits.request_alignment);
    // Only whole blocks: advice about a part of a block is not worth following.
    let end = (offset + bytes) / align * align;
    let mut at = offset.next_multiple_of(align);
    if at >= end {
        return Ok(());
    }
    let _range = match channel.tracked {
        true => Some(channel.node.ranges.lock(at, end, false).await),
        false => None,
    };
    let most = match limits.max_discard / align * align {
        0 => u64::MAX,
        most => most,
    };
    while at < end {
        let part = (end - at).min(most);
        match channel.channel.pdiscard(at, part).await {
            // Advisory.
            Ok(()) | Err(BlockError::NotSupported) => at += part,
            Err(error) => return Err(error),
        }
        AioContext::breathe().await;
    }
    Ok(())
}

pub(crate) async fn write_zeroes(channel: &ChildChannel, offset: u64, bytes: u64, flags: WriteFlags) -> BlockResult {
    let limits = *channel.limits();
    let align = u64::from(limits.request_alignment);
    let end = offset + bytes;
    let (first, last) = (offset.next_multiple_of(align).min(end), end / align * align);
    if !limits.can_write_zeroes || first >= last {
        return write_zeroes_slowly(channel, offset, bytes, flags).await;
    }
    write_zeroes_slowly(channel, offset, first - offset, flags).await?;
    let most = match limits.max_write_zeroes / align * align {
        0 => u64::MAX,
        most => most,
    };
    let mut at = first;
    while at < last {
        let part = (last - at).min(most);
        let range = match channel.tracked {
            true => Some(channel.node.ranges.lock(at, at + part, false).await),
            false => None,
        };
        match channel.channel.pwrite_zeroes(at, part, flags).await {
            Err(BlockError::NotSupported) => {
                drop(range);
                write_zeroes_slowly(channel, at, part, flags).await?;
            }
            result => result?,
        }
        at += part;
    }
    write_zeroes_slowly(channel, last, end - last, flags).await
}

/// Writes zeroes as data.
async fn write_zeroes_slowly(channel: &ChildChannel, offset: u64, bytes: u64, flags: WriteFlags) -> BlockResult {
    if bytes == 0 {
        return Ok(());
    }
    if flags.no_fallback {
        return Err(BlockError::NotSupported);
    }
    // One buffer for all, outside the budget: whoever holds a part of that must not wait for more of it.
    let align = channel.limits().memory_alignment.max(channel.limits().request_alignment);
    let zeroes = channel.zeroes.get_or_init(|| AlignedBuffer::new(ZEROES_BYTES, align as usize)).iov();
    let flags = WriteFlags { fua: flags.fua, kept: flags.kept, ..WriteFlags::default() };
    let mut done = 0;
    while done < bytes {
        let part = zeroes.part(0, (bytes - done).min(ZEROES_BYTES as u64) as usize);
        write(channel, offset + done, &[part], flags).await?;
        done += part.len() as u64;
    }
    Ok(())
}
