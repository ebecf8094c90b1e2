//! Resize: growing and shrinking the disk, drained. It owns the order: what must be there when the header says the new
//! size is stable before, and what is no longer needed goes afterwards.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::channel::Channel;
use super::clear::Clear;
use super::header::{HeaderSector, L1_BYTES_MAX};
use super::state::{Reach, Span, State, Task};
use super::tables::add_region;
use crate::driver::WriteFlags;
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::node::SECTOR;

/// How many runs of clusters are looked at for one that holds a larger L1 table.
const RUNS_MAX: usize = 4096;

impl Channel {
    /// Changes the size of the disk to `bytes`.
    ///
    /// # Errors
    /// The format cannot hold it, or I/O failed; the size is what it was.
    pub(super) async fn resize(self: &Rc<Self>, bytes: u64) -> OpenResult {
        let old = self.image.size.load(Ordering::Relaxed);
        let (snapshots, l1_bytes) = {
            let state = self.image.lock();
            (state.header.snapshots, state.header.l1_entries_for(bytes).saturating_mul(8))
        };
        if !bytes.is_multiple_of(SECTOR) {
            return Err(OpenError(format!("{bytes} bytes are no whole number of sectors of 512 bytes")));
        }
        if snapshots > 0 && !self.image.geometry.v3 {
            return Err(OpenError::new("an image of version 2 that has snapshots cannot be resized"));
        }
        if l1_bytes > L1_BYTES_MAX {
            let cluster = self.image.geometry.cluster_size();
            return Err(OpenError(format!(
                "{bytes} bytes are more than an image in clusters of {cluster} bytes can have"
            )));
        }
        let done = match bytes {
            more if more > old => self.grow(old, more).await,
            less if less < old => self.shrink(old, less).await,
            _ => Ok(()),
        };
        done.map_err(|e| OpenError(format!("it cannot be resized to {bytes} bytes: {e}")))
    }

    async fn grow(self: &Rc<Self>, old: u64, new: u64) -> BlockResult {
        let entries = self.image.lock().header.l1_entries_for(new);
        if entries > self.image.lock().l1.len() as u64 {
            self.grow_l1(entries).await?;
        }
        // What the backing file has there, or was left of a larger disk in the last cluster, must not show.
        let cluster_end = old.next_multiple_of(self.image.geometry.cluster_size());
        let end = new.min(cluster_end.max(self.backing_length()));
        if end > old && !self.image.geometry.raw_data {
            self.write_zeroes(old, end - old, WriteFlags::default()).await?;
        }
        self.flush().await?;
        self.write_size(new).await
    }

    async fn shrink(self: &Rc<Self>, old: u64, new: u64) -> BlockResult {
        let geometry = self.image.geometry;
        let size = geometry.cluster_size();
        let (first, end) = (new.next_multiple_of(size), old.next_multiple_of(size));
        if first < end {
            self.clear_range(first, end, Clear::Drop).await?;
            let tables = new.div_ceil(geometry.table_span())..end.div_ceil(geometry.table_span());
            for index in tables {
                self.attempt(|state| state.drop_table(index)).await?;
            }
        }
        self.flush().await?;
        self.write_size(new).await?;
        self.flush().await
    }

    /// Has the header say the new size.
    async fn write_size(&self, bytes: u64) -> BlockResult {
        self.change_header(|sector| sector.set_size(bytes)).await?;
        self.image.lock().header.size = bytes;
        self.image.size.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Writes the header's sector, stable.
    pub(super) async fn write_header(&self) -> BlockResult {
        let sector = self.image.lock().header_sector.bytes().to_vec();
        self.write_bytes(0, &sector).await?;
        self.file.flush().await
    }

    /// Has the header say something else, stable. Where that fails it says what it said before, for sure: it is written
    /// again, as the failed write may have reached the disk. If not even that is possible, the image is not used any more,
    /// since whatever the header names from now on might be wrong.
    pub(super) async fn change_header(&self, edit: impl FnOnce(&mut HeaderSector)) -> BlockResult {
        let _claim = loop {
            if let Some(claim) = self.claim(Task::Header).await {
                break claim;
            }
        };
        let before = {
            let mut state = self.image.lock();
            let before = state.header_sector.clone();
            edit(&mut state.header_sector);
            before
        };
        let Err(error) = self.write_header().await else { return Ok(()) };
        self.image.lock().header_sector = before;
        if let Err(again) = self.write_header().await {
            self.image.broken.store(true, Ordering::Relaxed);
            let name = &self.image.name;
            tracing::error!(
                "node \"{name}\": the header cannot be written ({error}, then {again}); it is not used any more"
            );
        }
        Err(error)
    }

    /// Moves the L1 table to where it has room for `entries`.
    async fn grow_l1(&self, entries: u64) -> BlockResult {
        let geometry = self.image.geometry;
        let clusters = (entries * 8).div_ceil(geometry.cluster_size());
        let span = self.take_run(clusters).await?;
        let offset = span.first << geometry.cluster_bits;
        // The table's own refcounts, and what it points at, are stable before the header names it.
        let moved = match self.write_back(Reach::Disk).await {
            Ok(()) => self.write_l1(offset, entries).await,
            error => error,
        };
        if moved.is_err() && !self.image.is_broken() {
            self.give_back(span).await;
        }
        moved
    }

    async fn write_l1(&self, offset: u64, entries: u64) -> BlockResult {
        let geometry = self.image.geometry;
        let mut table = self.image.lock().l1.clone();
        let (old_offset, old_bytes) = (self.image.lock().header.l1_offset, table.len() as u64 * 8);
        table.resize(entries as usize, 0);
        let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(geometry.cluster_size() as usize), 0);
        self.extend_file(offset + bytes.len() as u64).await;
        self.write_bytes(offset, &bytes).await?;
        self.file.flush().await?;
        // At most 2^22 entries.
        self.change_header(|sector| sector.set_l1(entries as u32, offset)).await?;
        let mut state = self.image.lock();
        state.header.l1_entries = entries as u32;
        state.header.l1_offset = offset;
        state.l1 = table;
        state.l1_dirty.clear();
        add_region(&mut state.metadata, offset, entries * 8, geometry.cluster_bits);
        let count = old_bytes.div_ceil(geometry.cluster_size());
        if count > 0 {
            state.unlink_span(Span { first: old_offset >> geometry.cluster_bits, count });
        }
        Ok(())
    }

    /// Takes `count` clusters in one piece.
    pub(super) async fn take_run(&self, count: u64) -> BlockResult<Span> {
        let mut short = Vec::new();
        let mut run: Option<Span> = None;
        let result = loop {
            let missing = count - run.map_or(0, |run| run.count);
            if missing == 0 {
                break run.ok_or(BlockError::NoSpace);
            }
            if short.len() >= RUNS_MAX {
                break Err(BlockError::NoSpace);
            }
            let taken = match self.attempt(|state| state.allocate(missing)).await {
                Ok(taken) => taken.span,
                Err(error) => break Err(error),
            };
            run = match run {
                Some(run) if run.first + run.count == taken.first => {
                    Some(Span { count: run.count + taken.count, ..run })
                }
                other => {
                    short.extend(other);
                    Some(taken)
                }
            };
        };
        if result.is_err() {
            short.extend(run);
        }
        for span in short {
            self.give_back(span).await;
        }
        result
    }
}

impl State {
    /// Takes an L2 table that maps nothing out of the L1 table.
    fn drop_table(&mut self, index: u64) -> super::state::Attempt<()> {
        let Some(table) = self.table(index.saturating_mul(self.geometry.table_span()))? else { return Ok(()) };
        let Ok(at) = usize::try_from(index) else { return Ok(()) };
        if let Some(entry) = self.l1.get_mut(at) {
            *entry = 0;
            self.l1_dirty.insert(at / super::tables::SECTOR_WORDS);
        }
        let slices = self.geometry.slices_per_table();
        (index * slices..(index + 1) * slices).for_each(|number| self.slices.remove(number));
        self.unlink_span(Span { first: table >> self.geometry.cluster_bits, count: 1 });
        Ok(())
    }
}
