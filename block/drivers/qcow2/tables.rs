//! Tables: loading slices of L2 tables and units of refcounts, and new L2 tables. It owns what is read into the caches;
//! each is done by one task at a time, see `Channel::satisfy`.

use super::cache::NumberSet;
use super::channel::Channel;
use super::geometry::COPIED;
use super::state::{Attempt, Reach, Span, State};
use crate::driver::WriteFlags;
use crate::error::BlockResult;

/// Words in a sector of a table.
pub(super) const SECTOR_WORDS: usize = 64;

impl State {
    /// Where a slice lies in the file; `None` where there is no table.
    fn slice_place(&self, number: u64) -> Attempt<Option<u64>> {
        let table = self.table(number.saturating_mul(self.geometry.slice_span()))?;
        let inside = number % self.geometry.slices_per_table() * self.geometry.slice_bytes();
        Ok(table.map(|table| table + inside))
    }

    /// Where a unit of refcounts lies in the file.
    fn unit_place(&self, number: u64) -> Attempt<Option<u64>> {
        let first = number * self.geometry.refcounts_per_unit();
        let inside = first % self.geometry.refcounts_per_block() / self.geometry.refcounts_per_unit();
        Ok(self.block_of(first)?.map(|block| block + inside * self.geometry.unit_bytes()))
    }

    /// Puts a new table into an L1 entry.
    fn set_table(&mut self, index: u64, table: u64, old: Option<u64>) {
        let Ok(at) = usize::try_from(index) else { return };
        if let Some(entry) = self.l1.get_mut(at) {
            *entry = table | COPIED;
            self.l1_dirty.insert(at / SECTOR_WORDS);
        }
        let bits = self.geometry.cluster_bits;
        self.metadata.insert(table >> bits);
        if let Some(old) = old {
            self.unlink_span(Span { first: old >> bits, count: 1 });
        }
        // They are copies of the old table's slices, at other places; none was ever changed.
        let slices = self.geometry.slices_per_table();
        (index * slices..(index + 1) * slices).for_each(|number| self.slices.remove(number));
    }
}

impl Channel {
    pub(super) async fn load_slice(&self, number: u64) -> BlockResult {
        self.make_room().await?;
        let geometry = self.image.geometry;
        let Some(place) = self.attempt(|state| state.slice_place(number)).await? else { return Ok(()) };
        let words = self.read_words(place, geometry.slice_bytes()).await?;
        let mut state = self.image.lock();
        // The table may have been copied meanwhile, and its slice lie elsewhere now.
        if state.slice_place(number) == Ok(Some(place)) {
            state.slices.insert(number, place, words);
        }
        Ok(())
    }

    pub(super) async fn load_refcounts(&self, number: u64) -> BlockResult {
        self.make_room().await?;
        let Some(place) = self.attempt(|state| state.unit_place(number)).await? else { return Ok(()) };
        let words = self.read_words(place, self.image.geometry.unit_bytes()).await?;
        self.image.lock().refcounts.insert(number, place, words);
        Ok(())
    }

    /// Writes back before caches that are mostly dirty take more in.
    async fn make_room(&self) -> BlockResult {
        let clogged = {
            let state = self.image.lock();
            state.slices.is_clogged() || state.refcounts.is_clogged()
        };
        // Within a write-back, which loads refcounts at its end, there is room.
        match clogged {
            true => self.write_back(Reach::Memory).await,
            false => Ok(()),
        }
    }

    /// Gives an L1 entry a table of its own: an empty one, or a copy of the one that it shares.
    pub(super) async fn make_table(&self, index: u64) -> BlockResult {
        let geometry = self.image.geometry;
        let offset = index.saturating_mul(geometry.table_span());
        let done =
            |state: &State| usize::try_from(index).is_ok_and(|at| state.l1.get(at).is_some_and(|e| e & COPIED != 0));
        if done(&self.image.lock()) {
            return Ok(());
        }
        let old = self.attempt(|state| state.table(offset)).await?;
        let taken = self.attempt(|state| state.allocate(1)).await?;
        let table = taken.span.first << geometry.cluster_bits;
        self.extend_file(table + geometry.cluster_size()).await;
        if let Err(error) = self.fill_table(table, old).await {
            self.give_back(taken.span).await;
            return Err(error);
        }
        self.image.lock().set_table(index, table, old);
        Ok(())
    }

    async fn fill_table(&self, table: u64, old: Option<u64>) -> BlockResult {
        let size = self.image.geometry.cluster_size();
        match old {
            Some(old) => {
                let content = self.read_bytes(old, size).await?;
                self.write_bytes(table, &content).await
            }
            // Also where the file ends before it, and so reads as zeroes: who checks an image wants its tables to be there.
            None => self.file.pwrite_zeroes(table, size, WriteFlags::default()).await,
        }
    }

    /// Frees clusters that were taken and never linked.
    pub(super) async fn give_back(&self, span: Span) {
        for cluster in span.first..span.first + span.count {
            if let Err(error) = self.attempt(|state| state.decrease(cluster)).await {
                // They are lost until the image is checked, which is harmless.
                tracing::warn!("node \"{}\": cluster {cluster:#x} leaks: {error}", self.image.name);
                return;
            }
        }
    }
}

/// Adds the clusters of a region of the file. False: one of them was there already.
pub(super) fn add_region(metadata: &mut NumberSet, offset: u64, bytes: u64, cluster_bits: u32) -> bool {
    if bytes == 0 {
        return true;
    }
    let mut clusters = offset >> cluster_bits..=(offset + bytes - 1) >> cluster_bits;
    clusters.all(|cluster| metadata.insert(cluster))
}
