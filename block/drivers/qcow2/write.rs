//! Writes: in place, or to new clusters with what is around the guest's bytes copied up. It owns the order of an
//! allocating write: copy up, write, link, end; what failed is given back.

use std::pin::Pin;
use std::rc::Rc;

use super::allocation::{Plan, WritePlan};
use super::channel::{CORRUPT, Channel, Started};
use super::state::Reach;
use crate::driver::{BlockFuture, WriteFlags};
use crate::error::BlockResult;
use crate::iovec::{self, IoVec};
use crate::shaping::Bounce;

impl Channel {
    /// Starts a write. Boxed only where it takes more than one step.
    pub(super) fn start_write(self: &Rc<Self>, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        if self.image.is_broken() {
            return BlockFuture::ready(Err(CORRUPT));
        }
        if flags.compressed {
            let (this, iov) = (self.clone(), iov.to_vec());
            return BlockFuture::boxed(async move {
                this.write_compressed(offset, &iov).await?;
                this.settle(flags).await
            });
        }
        let bytes = iovec::total_len(iov);
        let in_place = match self.image.lock().plan_in_place(offset, bytes, &self.pins) {
            // A stable write needs a stable mapping, and one that is kept, one that is.
            Some((host, pin, reach)) if reach >= Reach::from(flags) => Some((host, pin)),
            _ => None,
        };
        if let Some((host, pin)) = in_place {
            return self.write_data(host, iov, flags, Some(pin));
        }
        let (this, iov) = (self.clone(), iov.to_vec());
        BlockFuture::boxed(async move {
            this.write(offset, &iov).await?;
            this.settle(flags).await
        })
    }

    /// Writes `iov`'s length in bytes at `offset`.
    pub(super) async fn write(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> BlockResult {
        let mut started = Started::default();
        let result = self.write_pieces_of(offset, iov, &mut started).await;
        started.finish().await.and(result)?;
        // A guest that never flushes must not make the file grow for ever by what its writes replace.
        self.free_early().await
    }

    async fn write_pieces_of(self: &Rc<Self>, offset: u64, iov: &[IoVec], started: &mut Started) -> BlockResult {
        let end = offset + iovec::total_len(iov);
        let mut at = offset;
        while at < end {
            let plan = self.attempt(|state| state.plan_write(at, end - at, &self.pins)).await?;
            match plan {
                WritePlan::InPlace { host, bytes, pin } => {
                    let part = iovec::slice(iov, at - offset, bytes);
                    started.push(self.write_data(host, &part, WriteFlags::default(), Some(pin)))?;
                    at += bytes;
                }
                WritePlan::Allocate(plan) => {
                    let part = iovec::slice(iov, at - offset, plan.data_end - at);
                    let written = match self.write_new(&plan, at, &part).await {
                        Ok(()) => self.attempt(|state| state.link(&plan)).await,
                        error => error,
                    };
                    if written.is_err()
                        && let Some(span) = plan.taken
                    {
                        self.give_back(span).await;
                    }
                    self.end_allocation(plan.id);
                    written?;
                    at = plan.data_end;
                }
            }
        }
        Ok(())
    }

    /// Writes an allocation's data: the guest's at `at`, and around it what was to be read there before.
    async fn write_new(self: &Rc<Self>, plan: &Plan, at: u64, iov: &[IoVec]) -> BlockResult {
        let (head, tail) = (at - plan.start, plan.end - plan.data_end);
        if plan.taken.is_some() {
            self.extend_file(plan.host + (plan.end - plan.start)).await;
        }
        let backing = self.backing_length();
        let is_zero = |offset, bytes| self.attempt(move |state| state.reads_zero(offset, bytes, backing));
        let (head_zero, tail_zero) = (is_zero(plan.start, head).await?, is_zero(plan.data_end, tail).await?);
        // Zeroes need not be written where there are zeroes; decrypted, those would be noise.
        let zeroed = plan.zeroed && self.image.cipher.is_none();
        let head = if head_zero && zeroed { 0 } else { head };
        let tail = if tail_zero && zeroed { 0 } else { tail };
        if head == 0 && tail == 0 {
            return self.write_data(plan.host + (at - plan.start), iov, WriteFlags::default(), None).await;
        }
        // Its memory is zero where nothing is read into it.
        let around: Bounce<'_> = self.copy_up.buffer(head + tail, 4096).await;
        let (before, after) = (around.part(0, head as usize), around.part(head as usize, tail as usize));
        if head > 0 && !head_zero {
            self.read_around(plan.start, before).await?;
        }
        if tail > 0 && !tail_zero {
            self.read_around(plan.data_end, after).await?;
        }
        let mut all = Vec::with_capacity(iov.len() + 2);
        all.extend((head > 0).then_some(before));
        all.extend_from_slice(iov);
        all.extend((tail > 0).then_some(after));
        self.write_data(plan.host + (at - head - plan.start), &all, WriteFlags::default(), None).await
    }

    /// Boxed, as reading may decompress, and the futures would be large.
    fn read_around(self: &Rc<Self>, offset: u64, into: IoVec) -> Pin<Box<dyn Future<Output = BlockResult>>> {
        let this = self.clone();
        Box::pin(async move { this.read(offset, &[into]).await })
    }
}
