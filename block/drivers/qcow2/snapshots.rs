//! Snapshots: internal ones, taken, applied and deleted. It owns the order in which refcounts, marks and tables reach the
//! disk; how their table is coded is `snapshot_table.rs`'s. With no request in flight.

use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Qcow2;
use super::channel::Channel;
use super::directories::Region;
use super::geometry::{COPIED, Cluster, Entry};
use super::header::SNAPSHOTS_MAX;
use super::refcounts::OVERFLOW;
use super::snapshot_table::{Snapshot, TABLE_BYTES_MAX, encode};
use super::state::Reach;
use crate::aio::AioContext;
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};

/// The most bytes of a name that we give.
const NAME_BYTES_MAX: usize = 255;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique; digits, if we made it.
    pub id: String,
    /// Need not be unique.
    pub name: String,
    /// The size of its disk in bytes.
    pub disk_bytes: u64,
    /// The size of the machine's state that was saved with it, in bytes; 0: none.
    pub vm_state_bytes: u64,
    /// When it was taken: seconds since 1970, and nanoseconds.
    pub date_sec: u32,
    /// Nanoseconds, below 10^9.
    pub date_nsec: u32,
    /// How long the machine had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// How many instructions the machine had executed, if it counted them.
    pub icount: Option<u64>,
}

impl Qcow2 {
    pub(super) fn snapshots(&self) -> OpenResult<Vec<SnapshotInfo>> {
        let size = self.image.size.load(Ordering::Relaxed);
        self.blocking(async move |channel| {
            let header = channel.image.lock().header.clone();
            let (list, _) = channel.read_snapshots(&header).await?;
            Ok(list.iter().map(|snapshot| snapshot.info(size)).collect())
        })
    }

    pub(super) fn snapshot_create(&self, name: &str) -> OpenResult<SnapshotInfo> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(OpenError(format!("the name of a snapshot has 1 to {NAME_BYTES_MAX} bytes")));
        }
        if self.image.geometry.data_file {
            return Err(OpenError::new("an image with an external data file cannot have snapshots"));
        }
        let name = name.to_owned();
        self.offline(async move |channel| channel.snapshot_create(&name).await)
    }

    pub(super) fn snapshot_apply(&self, snapshot: &str) -> OpenResult {
        let wanted = snapshot.to_owned();
        self.offline(async move |channel| channel.snapshot_apply(&wanted).await)?;
        self.mark_all_in_bitmaps();
        Ok(())
    }

    pub(super) fn snapshot_delete(&self, snapshot: &str) -> OpenResult {
        let wanted = snapshot.to_owned();
        self.offline(async move |channel| channel.snapshot_delete(&wanted).await)
    }

    pub(super) fn snapshot_load(&self, snapshot: &str) -> OpenResult {
        if self.image.writable {
            return Err(OpenError::new("a snapshot can be shown only by a node that is open for reading only"));
        }
        let wanted = snapshot.to_owned();
        self.blocking(async move |channel| channel.snapshot_load(&wanted).await)
    }
}

/// Whether a reference more, or one less, is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Up,
    Down,
}

fn failed(error: BlockError) -> OpenError {
    match error {
        OVERFLOW => OpenError::new("the refcounts are too narrow for one more use of a cluster"),
        error => OpenError(error.to_string()),
    }
}

impl Channel {
    /// The list, the place of one in it, and where the table lies.
    async fn find_snapshot(&self, wanted: &str) -> OpenResult<(Vec<Snapshot>, usize, Region)> {
        let header = self.image.lock().header.clone();
        let (list, table) = self.read_snapshots(&header).await?;
        let by_id = list.iter().position(|snapshot| snapshot.has_id(wanted));
        let found = by_id.or_else(|| list.iter().position(|snapshot| snapshot.is_called(wanted)));
        let at = found.ok_or_else(|| OpenError(format!("there is no snapshot \"{wanted}\"")))?;
        Ok((list, at, table))
    }

    async fn snapshot_create(&self, name: &str) -> OpenResult<SnapshotInfo> {
        let header = self.image.lock().header.clone();
        let (mut list, table) = self.read_snapshots(&header).await?;
        if list.len() >= SNAPSHOTS_MAX as usize {
            return Err(OpenError(format!("there are {SNAPSHOTS_MAX} snapshots, and no more are possible")));
        }
        let l1 = self.image.lock().l1.clone();
        let run = self.take_run((l1.len() as u64 * 8).div_ceil(self.image.geometry.cluster_size()).max(1)).await;
        let run = run.map_err(failed)?;
        let l1_offset = run.first << self.image.geometry.cluster_bits;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let ids = list.iter().filter_map(|snapshot| String::from_utf8_lossy(&snapshot.id).parse::<u64>().ok());
        let id = ids.max().unwrap_or(0).saturating_add(1);
        let snapshot = Snapshot {
            id: id.to_string().into_bytes(),
            name: name.as_bytes().to_vec(),
            l1_offset,
            l1_entries: header.l1_entries,
            date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            date_nsec: now.subsec_nanos(),
            vm_clock_nsec: 0,
            vm_state_short: 0,
            // No state of a machine; the disk's size; no count of instructions.
            extra: [0u64, header.size, u64::MAX].iter().flat_map(|number| number.to_be_bytes()).collect(),
        };
        let info = snapshot.info(header.size);
        list.push(snapshot);
        // The counts first: once the snapshot is there, nothing that it shows may be written in place.
        if let Err(error) = self.count_l1(&l1, Step::Up).await {
            self.give_back(run).await;
            return Err(failed(error));
        }
        let linked = match self.unmark_and_copy_l1(&l1, l1_offset).await {
            Ok(()) => self.write_snapshot_table(&list, table).await,
            Err(error) => Err(failed(error)),
        };
        if linked.is_err() && !self.image.is_broken() {
            self.give_back(run).await;
            let undone = match self.count_l1(&l1, Step::Down).await {
                Ok(()) => self.mark_copied().await,
                error => error,
            };
            if let Err(error) = undone {
                tracing::warn!("node \"{}\": the counts of a snapshot are left behind: {error}", self.image.name);
            }
        }
        linked.map(|()| info)
    }

    async fn unmark_and_copy_l1(&self, l1: &[u64], offset: u64) -> BlockResult {
        self.write_back(Reach::Disk).await?;
        self.mark_copied().await?;
        self.write_l1_copy(l1, l1.len() as u64, offset).await
    }

    /// Writes a copy of an L1 table, in which nothing is marked as copied, with `entries` entries.
    async fn write_l1_copy(&self, l1: &[u64], entries: u64, offset: u64) -> BlockResult {
        let mut bytes: Vec<u8> = l1.iter().flat_map(|entry| (entry & !COPIED).to_be_bytes()).collect();
        let whole = (entries.max(1) * 8).next_multiple_of(self.image.geometry.cluster_size());
        bytes.resize(usize::try_from(whole).unwrap_or(usize::MAX), 0);
        self.extend_file(offset + whole).await;
        self.write_bytes(offset, &bytes).await?;
        self.flush_files().await
    }

    async fn snapshot_apply(&self, wanted: &str) -> OpenResult {
        let (list, at, _) = self.find_snapshot(wanted).await?;
        let Some(snapshot) = list.get(at) else { return Err(OpenError::new("there is no such snapshot")) };
        let geometry = self.image.geometry;
        let old = self.image.lock().header.clone();
        let size = snapshot.disk_bytes(old.size);
        let entries = old.l1_entries_for(size).max(snapshot.l1_entries.into()).max(1);
        if size > i64::MAX as u64 || entries * 8 > super::header::L1_BYTES_MAX {
            return Err(OpenError::new("the disk of the snapshot is too large"));
        }
        let l1 = self.read_words(snapshot.l1_offset, snapshot.l1().bytes).await.map_err(failed)?;
        let run = self.take_run((entries * 8).div_ceil(geometry.cluster_size())).await.map_err(failed)?;
        if let Err(error) = self.count_l1(&l1, Step::Up).await {
            self.give_back(run).await;
            return Err(failed(error));
        }
        let offset = run.first << geometry.cluster_bits;
        let written = match self.write_back(Reach::Disk).await {
            Ok(()) => self.write_l1_copy(&l1, entries, offset).await,
            error => error,
        };
        let switched = match written {
            Ok(()) => {
                self.change_header(|sector| {
                    // At most 2^22 entries.
                    sector.set_l1(entries as u32, offset);
                    sector.set_size(size);
                })
                .await
            }
            error => error,
        };
        if let Err(error) = switched {
            if !self.image.is_broken() {
                self.give_back(run).await;
                if let Err(error) = self.count_l1(&l1, Step::Down).await {
                    tracing::warn!("node \"{}\": the counts of a snapshot are left behind: {error}", self.image.name);
                }
            }
            return Err(failed(error));
        }
        let before = {
            let mut state = self.image.lock();
            state.header.l1_entries = entries as u32;
            state.header.l1_offset = offset;
            state.header.size = size;
            let mut new = l1;
            new.resize(usize::try_from(entries).unwrap_or(usize::MAX), 0);
            new.iter_mut().for_each(|entry| *entry &= !COPIED);
            state.l1_dirty.clear();
            std::mem::replace(&mut state.l1, new)
        };
        self.image.size.store(size, Ordering::Relaxed);
        let freed = match self.count_l1(&before, Step::Down).await {
            Ok(()) => self.mark_copied().await,
            error => error,
        };
        self.free_region(Region { offset: old.l1_offset, bytes: u64::from(old.l1_entries) * 8 }).await;
        freed.map_err(|e| OpenError(format!("it was applied, and what the disk had before is not given up: {e}")))
    }

    async fn snapshot_delete(&self, wanted: &str) -> OpenResult {
        let (mut list, at, table) = self.find_snapshot(wanted).await?;
        let snapshot = list.remove(at);
        let l1 = self.read_words(snapshot.l1_offset, snapshot.l1().bytes).await.map_err(failed)?;
        self.write_snapshot_table(&list, table).await?;
        let freed = match self.count_l1(&l1, Step::Down).await {
            Ok(()) => self.mark_copied().await,
            error => error,
        };
        self.free_region(snapshot.l1()).await;
        freed.map_err(|e| OpenError(format!("it was deleted, and its space is not given up: {e}")))
    }

    async fn snapshot_load(&self, wanted: &str) -> OpenResult {
        let (list, at, _) = self.find_snapshot(wanted).await?;
        let Some(snapshot) = list.get(at) else { return Err(OpenError::new("there is no such snapshot")) };
        let l1 = self.read_words(snapshot.l1_offset, snapshot.l1().bytes).await.map_err(failed)?;
        let mut state = self.image.lock();
        let size = snapshot.disk_bytes(state.header.size);
        if state.header.l1_entries_for(size) > l1.len() as u64 {
            return Err(OpenError::new("the L1 table of the snapshot is too small for its disk"));
        }
        state.l1 = l1;
        state.slices.clear();
        self.image.size.store(size, Ordering::Relaxed);
        Ok(())
    }

    /// Writes the table to a new place and has the header name it; then gives up the old one.
    async fn write_snapshot_table(&self, list: &[Snapshot], old: Region) -> OpenResult {
        let geometry = self.image.geometry;
        let table = encode(list);
        if table.len() as u64 > TABLE_BYTES_MAX {
            return Err(OpenError::new("the snapshot table would be too large: 64 MiB is the most"));
        }
        let clusters = (table.len() as u64).div_ceil(geometry.cluster_size());
        let run = match clusters {
            0 => None,
            clusters => Some(self.take_run(clusters).await.map_err(failed)?),
        };
        let offset = run.map_or(0, |run| run.first << geometry.cluster_bits);
        // At most 65,536.
        let count = list.len() as u32;
        let written = async {
            self.write_back(Reach::Disk).await?;
            if run.is_some() {
                self.extend_file(offset + clusters * geometry.cluster_size()).await;
                self.write_bytes(offset, &table).await?;
                self.file.flush().await?;
            }
            self.change_header(|sector| sector.set_snapshots(count, offset)).await
        };
        if let Err(error) = written.await {
            if let Some(run) = run.filter(|_| !self.image.is_broken()) {
                self.give_back(run).await;
            }
            return Err(failed(error));
        }
        {
            let mut state = self.image.lock();
            state.header.snapshots = count;
            state.header.snapshots_offset = offset;
        }
        self.free_region(old).await;
        Ok(())
    }

    /// Gives up the clusters of a region that nothing names any more.
    pub(super) async fn free_region(&self, region: Region) {
        if region.bytes > 0 {
            let bits = self.image.geometry.cluster_bits;
            let (first, last) = (region.offset >> bits, (region.offset + region.bytes - 1) >> bits);
            self.give_back(super::state::Span { first, count: last - first + 1 }).await;
        }
    }

    /// The clusters that an L1 entry leads to, its table first, as often as they are named.
    async fn clusters_of(&self, entry: u64) -> BlockResult<Vec<u64>> {
        let geometry = self.image.geometry;
        let bits = geometry.cluster_bits;
        let table = self.attempt(|_| Ok(geometry.l2_table(entry)?)).await?;
        let Some(table) = table else { return Ok(Vec::new()) };
        let mut clusters = vec![table >> bits];
        for words in self.read_words(table, geometry.cluster_size()).await?.chunks_exact(geometry.entry_words()) {
            let &[word, ref rest @ ..] = words else { continue };
            let entry = Entry { word, bitmap: rest.first().copied().unwrap_or(0) };
            match self.attempt(|_| Ok(geometry.decode(entry, 0)?)).await? {
                Cluster::Standard { host: Some(host), .. } => clusters.push(host >> bits),
                Cluster::Standard { host: None, .. } => {}
                Cluster::Compressed { offset, bytes } => clusters.extend(offset >> bits..=(offset + bytes - 1) >> bits),
            }
        }
        Ok(clusters)
    }

    /// Counts one use more, or less, of everything that an L1 table leads to. One more: all or nothing.
    async fn count_l1(&self, l1: &[u64], step: Step) -> BlockResult {
        let mut done = 0;
        let result = self.count_some(l1, step, u64::MAX, &mut done).await;
        if result.is_err() && step == Step::Up {
            let undone = self.count_some(l1, Step::Down, done, &mut 0).await;
            if let Err(error) = undone {
                tracing::warn!("node \"{}\": clusters leak: {error}", self.image.name);
            }
        }
        result
    }

    /// The same for the first `most` clusters; `done` counts them.
    async fn count_some(&self, l1: &[u64], step: Step, most: u64, done: &mut u64) -> BlockResult {
        for entry in l1 {
            for cluster in self.clusters_of(*entry).await? {
                if *done == most {
                    return Ok(());
                }
                match step {
                    Step::Up => self.attempt(|state| state.increase(cluster)).await?,
                    Step::Down => self.attempt(|state| state.decrease(cluster)).await?,
                }
                *done += 1;
            }
            AioContext::breathe().await;
        }
        Ok(())
    }

    /// Marks what is used once as copied in the active tables, and nothing else; stable.
    async fn mark_copied(&self) -> BlockResult {
        let geometry = self.image.geometry;
        let bits = geometry.cluster_bits;
        // A mark is only ever as old as the counts that it follows from.
        self.write_back(Reach::Disk).await?;
        let l1 = self.image.lock().l1.clone();
        for (at, entry) in l1.into_iter().enumerate() {
            let Some(table) = self.attempt(|_| Ok(geometry.l2_table(entry)?)).await? else { continue };
            let old = self.read_words(table, geometry.cluster_size()).await?;
            let mut words = old.clone();
            for words in words.chunks_exact_mut(geometry.entry_words()) {
                let &mut [ref mut word, ref rest @ ..] = words else { continue };
                let entry = Entry { word: *word, bitmap: rest.first().copied().unwrap_or(0) };
                if let Ok(Cluster::Standard { host: Some(host), .. }) = geometry.decode(entry, 0) {
                    let once = self.attempt(|state| state.refcount(host >> bits)).await? == 1;
                    *word = if once { *word | COPIED } else { *word & !COPIED };
                }
            }
            if words != old {
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
                self.write_bytes(table, &bytes).await?;
            }
            let once = self.attempt(|state| state.refcount(table >> bits)).await? == 1;
            self.image.lock().set_l1_mark(at, once);
            AioContext::breathe().await;
        }
        self.write_back(Reach::Disk).await?;
        self.file.flush().await
    }
}
