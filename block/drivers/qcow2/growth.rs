//! Growth: room for refcounts that have no block yet, and a longer file. It owns the order in which a new block, and a
//! larger refcount table, reach the disk: what is pointed at comes first. One task at a time does this.

use super::channel::Channel;
use super::header::HOST_OFFSET_END;
use super::state::{Span, State, Stop, Task};
use super::tables::SECTOR_WORDS;
use crate::error::{BlockError, BlockResult};

/// The most bytes of a refcount table.
const TABLE_BYTES_MAX: u64 = 8 << 20;

impl State {
    /// The place for a block that no table entry names yet: the first cluster that it counts itself, which is free, as
    /// all that it counts are.
    fn block_place(&self, index: u64) -> Result<u64, Stop> {
        let cluster = index.saturating_mul(self.geometry.refcounts_per_block());
        if index == 0 {
            return Err(Stop::Corrupt("the header's cluster has no refcount"));
        }
        if cluster >= HOST_OFFSET_END >> self.geometry.cluster_bits {
            return Err(Stop::Fail(BlockError::NoSpace));
        }
        match self.metadata.contains(&cluster) {
            true => Err(Stop::Corrupt("a cluster that holds metadata has no refcount")),
            false => Ok(cluster),
        }
    }

    /// `count` refcounts of 1, then zeroes, as the words of `blocks` whole blocks.
    fn counted_words(&self, count: u64, blocks: u64) -> Vec<u64> {
        let geometry = self.geometry;
        let mut words = vec![0; (blocks * geometry.cluster_size() / 8) as usize];
        for index in 0..count {
            let (at, word) = geometry.with_refcount(&words, index, 1);
            if let Some(place) = words.get_mut(at) {
                *place = word;
            }
        }
        words
    }
}

fn to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// The file grows by an eighth of its length, and this much at least and at most; in bytes, multiples of [`BLOCK`].
const EXTENSION_MIN: u64 = 1 << 20;
const EXTENSION_MAX: u64 = 64 << 20;
/// What is written at the new end.
const BLOCK: u64 = 4096;

impl Channel {
    /// Makes the file so long that a write up to `end` does not make it longer, and many after it do not either: file
    /// systems do writes that move a file's end one by one. What lies between stays a hole, and is cut off at the close.
    /// Every write behind the file's end comes after this, of metadata too: the block at the new end must hit nothing.
    pub(super) async fn extend_file(&self, end: u64) {
        loop {
            if end <= self.image.lock().file_end {
                return;
            }
            let Some(_claim) = self.claim(Task::Extend).await else { continue };
            let step = (end / 8).clamp(EXTENSION_MIN, EXTENSION_MAX);
            let Some(new) = end.checked_add(step).map(|new| new.next_multiple_of(EXTENSION_MIN)) else { return };
            // Where it cannot grow so far, it may still take what is to be written.
            let extended = self.write_bytes(new - BLOCK, &[0; BLOCK as usize]).await.is_ok();
            let mut state = self.image.lock();
            state.file_end = if extended { new } else { end };
            state.extended |= extended;
            return;
        }
    }

    /// Makes the block for entry `index` of the refcount table.
    pub(super) async fn make_refcount_block(&self, index: u64) -> BlockResult {
        let entries = {
            let state = self.image.lock();
            let entry = usize::try_from(index).ok().and_then(|at| state.refcount_table.get(at)).copied();
            if entry.is_some_and(|entry| entry != 0) {
                return Ok(());
            }
            state.refcount_table.len() as u64
        };
        if index >= entries {
            return self.grow_refcount_table(index).await;
        }
        let cluster = self.attempt(|state| state.block_place(index)).await?;
        let words = self.image.lock().counted_words(1, 1);
        let offset = cluster << self.image.geometry.cluster_bits;
        self.extend_file(offset + self.image.geometry.cluster_size()).await;
        self.write_bytes(offset, &to_bytes(&words)).await?;
        let mut state = self.image.lock();
        if let Some(entry) = state.refcount_table.get_mut(index as usize) {
            *entry = offset;
            state.refcount_table_dirty.insert(index as usize / SECTOR_WORDS);
            state.metadata.insert(cluster);
            state.taken(Span { first: cluster, count: 1 });
        }
        Ok(())
    }

    /// Makes a larger refcount table, with the blocks that count it. It lies behind everything that the old one counts.
    async fn grow_refcount_table(&self, index: u64) -> BlockResult {
        let geometry = self.image.geometry;
        let (size, per_block) = (geometry.cluster_size(), geometry.refcounts_per_block());
        let old: Vec<u64> = self.image.lock().refcount_table.clone();
        let entries = old.len() as u64;
        let first = entries.saturating_mul(per_block);
        // The blocks count themselves and the table, which has entries for them.
        let (mut blocks, mut table) = (1, 1);
        loop {
            let wanted = (entries + blocks).max(index + 1).max(entries + entries / 2);
            table = (wanted * 8).div_ceil(size).max(table);
            if (blocks + table) <= blocks * per_block {
                break;
            }
            blocks += 1;
        }
        let end = first.saturating_add(blocks + table);
        if table * size > TABLE_BYTES_MAX || end > HOST_OFFSET_END >> geometry.cluster_bits {
            return Err(BlockError::NoSpace);
        }
        let overlaps = {
            let state = self.image.lock();
            (first..end).any(|cluster| state.metadata.contains(&cluster))
        };
        if overlaps {
            return Err(self.corrupted("a cluster that holds metadata has no refcount").await);
        }
        let words = self.image.lock().counted_words(blocks + table, blocks);
        self.extend_file(end << geometry.cluster_bits).await;
        self.write_bytes(first << geometry.cluster_bits, &to_bytes(&words)).await?;
        let mut new = old.clone();
        new.extend((0..blocks).map(|block| (first + block) << geometry.cluster_bits));
        new.resize((table * size / 8) as usize, 0);
        let offset = (first + blocks) << geometry.cluster_bits;
        self.write_bytes(offset, &to_bytes(&new)).await?;
        self.file.flush().await?;

        // Entries of the old table change only under this task's claim, so `new` is up to date.
        self.change_header(|sector| sector.set_refcount_table(offset, table as u32)).await?;
        let mut state = self.image.lock();
        let old_offset = state.header.refcount_table_offset;
        let old_clusters = u64::from(std::mem::replace(&mut state.header.refcount_table_clusters, table as u32));
        state.header.refcount_table_offset = offset;
        state.refcount_table = new;
        state.refcount_table_dirty.clear();
        state.metadata.extend(first..end);
        state.taken(Span { first, count: end - first });
        state.unlink_span(Span { first: old_offset >> geometry.cluster_bits, count: old_clusters });
        Ok(())
    }
}
