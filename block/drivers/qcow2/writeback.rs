//! Write-back: how dirty metadata reaches the disk, and how clusters become free. It owns the order:
//!
//! 1. refcount table, once the blocks that it names are stable;
//! 2. refcounts, which only ever say "in use" earlier, and "free" later, than the rest;
//! 3. a flush, so that refcounts and guest data are stable before anything points at them;
//! 4. slices of L2 tables;
//! 5. after another flush, the L1 table;
//! 6. a flush.
//!
//! What a step writes was taken when the write-back began. A cluster that nothing refers to any more is freed after step 6
//! only, and when no request that began before can be using it: its refcount goes down in memory then, and reaches the
//! disk with the next write-back. What a crash leaves behind is at worst a leak.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::cache::Dirty;
use super::channel::{CORRUPT, Channel, Started};
use super::header::incompatible;
use super::state::{Reach, Span, State, Task};
use super::tables::SECTOR_WORDS;
use crate::driver::{BlockFuture, WriteFlags};
use crate::error::BlockResult;
use crate::iovec::AlignedBuffer;

/// How many pieces of a table are written at once.
const AT_ONCE: usize = 32;
/// From how many clusters on that nobody needs any more they are freed without waiting for the guest to flush.
const UNLINKED_MAX: u64 = 1024;
/// The same in bytes, if they are so many clusters.
const UNLINKED_BYTES_MAX: u64 = 64 << 20;
const UNLINKED_MIN: u64 = 16;

/// What one write-back writes.
struct Batch {
    refcount_table: Vec<(u64, Vec<u8>)>,
    refcount_table_sectors: Vec<usize>,
    refcounts: Vec<Dirty>,
    slices: Vec<Dirty>,
    l1: Vec<(u64, Vec<u8>)>,
    l1_sectors: Vec<usize>,
    unlinked: Vec<Span>,
}

/// The sectors of a table, as they stand on disk, with their places.
fn sectors(table: &[u64], offset: u64, numbers: &[usize]) -> Vec<(u64, Vec<u8>)> {
    let sector = |number: &usize| {
        let words = table.iter().skip(number * SECTOR_WORDS).copied().chain(std::iter::repeat(0)).take(SECTOR_WORDS);
        (offset + (number * SECTOR_WORDS * 8) as u64, words.flat_map(u64::to_be_bytes).collect())
    };
    numbers.iter().map(sector).collect()
}

impl State {
    fn take_batch(&mut self) -> Batch {
        // Lazy refcounts wait until there is no room for more of them.
        let lazy = self.lazy && !self.refcounts.is_clogged();
        let refcount_table_sectors: Vec<usize> = match lazy {
            true => Vec::new(),
            false => std::mem::take(&mut self.refcount_table_dirty).into_iter().collect(),
        };
        let l1_sectors: Vec<usize> = std::mem::take(&mut self.l1_dirty).into_iter().collect();
        Batch {
            refcount_table: sectors(&self.refcount_table, self.header.refcount_table_offset, &refcount_table_sectors),
            refcount_table_sectors,
            refcounts: if lazy { Vec::new() } else { self.refcounts.take_dirty() },
            slices: self.slices.take_dirty(),
            l1: sectors(&self.l1, self.header.l1_offset, &l1_sectors),
            l1_sectors,
            unlinked: std::mem::take(&mut self.unlinked),
        }
    }

    /// Ends a write-back: nothing of the batch was written for sure if it failed.
    fn end_batch(&mut self, batch: Batch, written: bool) {
        if written {
            let epoch = self.epoch;
            self.retired.extend(batch.unlinked.into_iter().map(|span| (epoch, span)));
        } else {
            self.refcount_table_dirty.extend(batch.refcount_table_sectors);
            self.l1_dirty.extend(batch.l1_sectors);
            batch.refcounts.into_iter().for_each(|piece| self.refcounts.put_back(piece));
            batch.slices.into_iter().for_each(|piece| self.slices.put_back(piece));
            self.unlinked.extend(batch.unlinked);
        }
        self.refcounts.end_write_back();
        self.slices.end_write_back();
    }

    /// Whether so many clusters wait to be freed that nobody should wait for the guest's next flush.
    pub(super) fn has_much_to_free(&self) -> bool {
        let retired = self.retired.iter().map(|(_, span)| span.count);
        let count = self.unlinked.iter().map(|span| span.count).chain(retired).sum::<u64>();
        count >= UNLINKED_MAX || (count >= UNLINKED_MIN && count << self.geometry.cluster_bits >= UNLINKED_BYTES_MAX)
    }
}

impl Channel {
    /// Brings everything that was written and linked before this call to the disk, or to the file; calls that come while
    /// one is under way share the next. [`Reach::Memory`]: makes clean what is dirty, or waits while somebody else does.
    pub(super) async fn write_back(&self, reach: Reach) -> BlockResult {
        let flush = reach == Reach::Disk;
        let before = self.image.lock().write_backs;
        loop {
            {
                let state = self.image.lock();
                let done = if flush { state.write_back_on_disk } else { state.write_back_in_file };
                if done > before && reach > Reach::Memory {
                    return Ok(());
                }
            }
            let Some(claim) = self.claim(Task::WriteBack).await else {
                if reach > Reach::Memory {
                    continue;
                }
                return Ok(());
            };
            self.begin_lazy().await?;
            let (number, batch) = {
                let mut state = self.image.lock();
                state.write_backs += 1;
                (state.write_backs, state.take_batch())
            };
            // A shared one must do for those who want a flush as well.
            let result = self.write_batch(&batch, flush).await;
            let mut state = self.image.lock();
            let flushed = result.is_ok() && (flush || !batch.unlinked.is_empty());
            state.unsynced = !flushed;
            state.end_batch(batch, result.is_ok());
            if result.is_ok() {
                state.write_back_in_file = number;
                if flush {
                    state.write_back_on_disk = number;
                }
            }
            drop(state);
            drop(claim);
            return result;
        }
    }

    /// Marks the image as dirty, stable, before anything is written whose refcounts are not.
    async fn begin_lazy(&self) -> BlockResult {
        if !self.image.lazy.load(Ordering::Relaxed) || self.image.lock().lazy {
            return Ok(());
        }
        self.set_dirty_bit(true).await?;
        self.image.lock().lazy = true;
        Ok(())
    }

    /// Writes the refcounts that were put off, and takes the mark away. Drained.
    pub(super) async fn end_lazy(&self) -> BlockResult {
        if !std::mem::take(&mut self.image.lock().lazy) {
            return Ok(());
        }
        let lazy = self.image.lazy.swap(false, Ordering::Relaxed);
        let written = self.write_back(Reach::Disk).await;
        self.image.lazy.store(lazy, Ordering::Relaxed);
        match written {
            Ok(()) => self.set_dirty_bit(false).await,
            Err(error) => {
                self.image.lock().lazy = true;
                Err(error)
            }
        }
    }

    async fn set_dirty_bit(&self, dirty: bool) -> BlockResult {
        let bits = {
            let header = &self.image.lock().header;
            if dirty { header.incompatible | incompatible::DIRTY } else { header.incompatible & !incompatible::DIRTY }
        };
        self.change_header(|sector| sector.set_incompatible(bits)).await?;
        self.image.lock().header.incompatible = bits;
        Ok(())
    }

    async fn write_batch(&self, batch: &Batch, flush: bool) -> BlockResult {
        if !batch.refcount_table.is_empty() {
            self.file.flush().await?;
            self.write_all(&batch.refcount_table).await?;
        }
        self.write_pieces(&batch.refcounts).await?;
        if !batch.slices.is_empty() || !batch.l1.is_empty() {
            self.flush_files().await?;
            self.write_pieces(&batch.slices).await?;
        }
        if !batch.l1.is_empty() {
            self.file.flush().await?;
            self.write_all(&batch.l1).await?;
        }
        match flush || !batch.unlinked.is_empty() {
            true => self.flush_files().await,
            false => Ok(()),
        }
    }

    async fn write_pieces(&self, pieces: &[Dirty]) -> BlockResult {
        for some in pieces.chunks(AT_ONCE) {
            let writes: Vec<(u64, Vec<u8>)> = some.iter().map(|piece| (piece.offset(), piece.bytes())).collect();
            self.write_all(&writes).await?;
        }
        Ok(())
    }

    /// Writes all at once.
    async fn write_all(&self, writes: &[(u64, Vec<u8>)]) -> BlockResult {
        let mut result = Ok(());
        for some in writes.chunks(AT_ONCE) {
            let mut started = Started::default();
            let mut buffers = Vec::with_capacity(some.len());
            for (offset, bytes) in some {
                let mut buffer = AlignedBuffer::new(bytes.len(), 4096);
                buffer.fill_from(bytes);
                let future = self.file.pwritev(*offset, &[buffer.iov()], Default::default());
                result = result.and(started.push(future));
                buffers.push(buffer);
            }
            result = started.finish().await.and(result);
            result?;
        }
        result
    }

    /// Frees what nobody uses any more. Errors leave leaks behind, and are told in the log.
    pub(super) async fn reap(&self) {
        let Some(_claim) = self.claim(Task::Reap).await else { return };
        let mut spans = self.image.lock().collect();
        spans.sort_unstable_by_key(|span| span.first);
        {
            // Nothing is put into a cluster that is about to be discarded.
            let mut state = self.image.lock();
            let bits = state.geometry.cluster_bits;
            for span in &spans {
                (span.first..span.first + span.count).for_each(|cluster| state.tail.leave(cluster, bits));
            }
        }
        for span in spans {
            if self.image.pass_discards {
                self.discard_last_uses(span).await;
            }
            self.give_back(span).await;
        }
    }

    /// Discards those clusters in the file that have one use left, which is about to end: before they can be used anew,
    /// so that it never hits their next content.
    async fn discard_last_uses(&self, span: Span) {
        let bits = self.image.geometry.cluster_bits;
        let end = span.first + span.count;
        let mut from = span.first;
        for cluster in span.first..=end {
            let last_use = cluster < end && self.attempt(|state| state.refcount(cluster)).await == Ok(1);
            if last_use {
                continue;
            }
            let (offset, bytes) = (from << bits, (cluster - from) << bits);
            if let Err(error) = self.file.pdiscard(offset, bytes).await {
                tracing::debug!("node \"{}\": {bytes} bytes were not discarded: {error}", self.image.name);
            }
            from = cluster + 1;
        }
    }

    /// Frees clusters without a flush by the guest, if many wait for it.
    pub(super) async fn free_early(&self) -> BlockResult {
        let much = self.image.lock().has_much_to_free();
        if much {
            self.write_back(Reach::Disk).await?;
            self.reap().await;
        }
        Ok(())
    }

    /// Ends a write: its map comes as far as was asked.
    pub(super) async fn settle(&self, flags: WriteFlags) -> BlockResult {
        match Reach::from(flags) {
            Reach::Disk => self.flush().await,
            Reach::File => {
                let needed = {
                    let state = self.image.lock();
                    state.is_dirty() || state.is_busy(Task::WriteBack)
                };
                if needed { self.write_back(Reach::File).await } else { Ok(()) }
            }
            Reach::Memory => Ok(()),
        }
    }

    /// What a flush by the guest does.
    pub(super) async fn flush(&self) -> BlockResult {
        if self.image.is_broken() {
            return Err(CORRUPT);
        }
        self.write_back(Reach::Disk).await?;
        self.reap().await;
        Ok(())
    }

    /// Whether a flush of the file is all that a flush of the image needs.
    pub(super) fn is_clean(&self) -> bool {
        let state = self.image.lock();
        !state.is_dirty() && !state.is_busy(Task::WriteBack)
    }

    /// Flushes the file, and the external data file if there is one, where no metadata is dirty.
    pub(super) fn flush_clean(self: &Rc<Self>) -> BlockFuture {
        if Rc::ptr_eq(&self.file, &self.data) {
            return self.file.flush();
        }
        let this = self.clone();
        BlockFuture::boxed(async move { this.flush_files().await })
    }
}
