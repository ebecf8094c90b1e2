//! Check: whether what an image says of itself is true. It owns the count of all references, from the header down, and
//! their comparison with the refcounts; it changes nothing (`repair.rs` does). With no request in flight.
//!
//! Time and memory are bounded by the tables that are there: a table that many name is read once, and counted that often.

use super::cache::NumberMap;
use super::channel::Channel;
use super::directories::Region;
use super::geometry::{COPIED, Cluster, Entry};
use super::header::Header;
use crate::aio::AioContext;
use crate::error::{BlockResult, OpenError, OpenResult};

/// How much a check puts right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing; the image need not be writable.
    Nothing,
    /// Leaks, if there are no errors.
    Leaks,
    /// All that can be.
    All,
}

/// What a check has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// Clusters that are used more often than their refcount says, entries that cannot be, wrong marks.
    pub errors: u64,
    /// Clusters that are used less often than their refcount says, which only costs space.
    pub leaks: u64,
    /// Errors that a repair has put right.
    pub errors_fixed: u64,
    /// Leaks that a repair has put right.
    pub leaks_fixed: u64,
    /// Where the last used cluster ends, in bytes.
    pub image_end: u64,
    /// Clusters of the disk, in all.
    pub total_clusters: u64,
    /// Of them, those that have a place in the image.
    pub allocated_clusters: u64,
    /// Of these, the compressed ones.
    pub compressed_clusters: u64,
    /// Of these, those that do not lie behind the one before.
    pub fragmented_clusters: u64,
}

/// Counters for clusters, by number, that take memory only where something is.
#[derive(Default)]
pub(super) struct Counts(NumberMap<Box<[u64; PAGE]>>);

/// Counters of a page: few, as a hostile image names clusters far apart.
const PAGE: usize = 16;

impl Counts {
    fn add(&mut self, cluster: u64, times: u64) {
        let page = self.0.entry(cluster / PAGE as u64).or_insert_with(|| Box::new([0; PAGE]));
        let count = &mut page[(cluster % PAGE as u64) as usize];
        *count = count.saturating_add(times);
    }

    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.0.get(&(cluster / PAGE as u64)).map_or(0, |page| page[(cluster % PAGE as u64) as usize])
    }

    pub(super) fn add_region(&mut self, region: Region, cluster_bits: u32) {
        if region.bytes > 0 {
            let clusters = region.offset >> cluster_bits..=(region.offset + region.bytes - 1) >> cluster_bits;
            clusters.for_each(|cluster| self.add(cluster, 1));
        }
    }

    /// All clusters that are counted, in order.
    pub(super) fn used(&self) -> Vec<u64> {
        let mut pages: Vec<u64> = self.0.keys().copied().collect();
        pages.sort_unstable();
        let clusters = pages.iter().flat_map(|page| page * PAGE as u64..(page + 1) * PAGE as u64);
        clusters.filter(|cluster| self.get(*cluster) > 0).collect()
    }
}

/// Everything that refers to a cluster, counted.
pub(super) struct References {
    pub counts: Counts,
    /// What cannot be, and cannot be counted either.
    pub bad_entries: u64,
    pub report: CheckReport,
    /// The active L1 table as it is on disk.
    pub l1: Vec<u64>,
}

impl Channel {
    /// Compares the refcounts with what they should be.
    ///
    /// # Errors
    /// Something could not be read.
    pub(super) async fn check(&self) -> OpenResult<CheckReport> {
        let unreadable = |e| OpenError(format!("the image cannot be checked: {e}"));
        let header = self.image.lock().header.clone();
        let table_bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let table = self.read_words(header.refcount_table_offset, table_bytes).await.map_err(unreadable)?;
        let mut references = self.count_references(&header).await?;
        let region = Region { offset: header.refcount_table_offset, bytes: table_bytes };
        references.counts.add_region(region, header.cluster_bits);
        let mut blocks = Vec::new();
        for entry in &table {
            let block = self.image.geometry.refcount_block(*entry);
            references.bad_entries += u64::from(block.is_err());
            let block = block.unwrap_or(None);
            if let Some(block) = block {
                references.counts.add(block >> header.cluster_bits, 1);
            }
            blocks.push(block);
        }
        let refcounts = self.read_refcounts(&blocks, &mut references).await.map_err(unreadable)?;
        self.check_copied(&header, &mut references, &refcounts).await.map_err(unreadable)?;
        let mut report = references.report;
        report.errors += references.bad_entries;
        Ok(report)
    }

    /// Counts all references but those of the refcount structure to itself.
    pub(super) async fn count_references(&self, header: &Header) -> OpenResult<References> {
        let (bits, cluster) = (header.cluster_bits, self.image.geometry.cluster_size());
        let unreadable = |e| OpenError(format!("the image cannot be checked: {e}"));
        let mut counts = Counts::default();
        counts.add(0, 1);
        let (snapshots, table) = self.read_snapshots(header).await?;
        counts.add_region(table, bits);
        if let Some((offset, bytes)) = header.encryption {
            counts.add_region(Region { offset, bytes }, bits);
        }
        if let Some(bitmaps) = header.bitmaps.filter(|_| header.has_valid_bitmaps()) {
            let regions = self.read_bitmap_regions(bitmaps, cluster).await?;
            for (index, region) in regions.iter().enumerate() {
                counts.add_region(*region, bits);
                if index > 0 {
                    self.count_bitmap(*region, &mut counts).await.map_err(unreadable)?;
                }
            }
        }
        let mut tables: NumberMap<u64> = NumberMap::default();
        let mut bad_entries = 0;
        let l1_bytes = u64::from(header.l1_entries) * 8;
        let l1 = self.read_words(header.l1_offset, l1_bytes).await.map_err(unreadable)?;
        counts.add_region(Region { offset: header.l1_offset, bytes: l1_bytes }, bits);
        let mut add_tables = |l1: &[u64]| {
            for entry in l1 {
                match self.image.geometry.l2_table(*entry) {
                    Ok(Some(table)) => *tables.entry(table).or_default() += 1,
                    Ok(None) => {}
                    Err(_) => bad_entries += 1,
                }
            }
        };
        add_tables(&l1);
        for snapshot in &snapshots {
            let l1 = snapshot.l1();
            counts.add_region(l1, bits);
            add_tables(&self.read_words(l1.offset, l1.bytes).await.map_err(unreadable)?);
        }
        let size = self.image.size.load(std::sync::atomic::Ordering::Relaxed);
        let report = CheckReport { total_clusters: size.div_ceil(cluster), ..CheckReport::default() };
        let mut references = References { counts, bad_entries, report, l1 };
        let mut tables: Vec<(u64, u64)> = tables.into_iter().collect();
        tables.sort_unstable();
        for (table, times) in tables {
            self.count_table(table, times, &mut references).await.map_err(unreadable)?;
        }
        Ok(references)
    }

    async fn count_table(&self, table: u64, times: u64, references: &mut References) -> BlockResult {
        let geometry = self.image.geometry;
        let bits = geometry.cluster_bits;
        references.counts.add(table >> bits, times);
        let words = self.read_words(table, geometry.cluster_size()).await?;
        // Clusters of an external data file lie where the guest has them, which depends on the L1 entry.
        let decoded = |entry: Entry| {
            let there = if geometry.data_file { entry.word & super::geometry::OFFSET_MASK } else { 0 };
            geometry.decode(entry, there)
        };
        let mut before = None;
        for words in words.chunks_exact(geometry.entry_words()) {
            let entry = Entry { word: words[0], bitmap: words.get(1).copied().unwrap_or(0) };
            match decoded(entry) {
                Ok(Cluster::Standard { host: Some(host), .. }) => {
                    references.report.allocated_clusters += 1;
                    references.report.fragmented_clusters += u64::from(before.is_some_and(|end| end != host));
                    before = Some(host + geometry.cluster_size());
                    if !geometry.data_file {
                        references.counts.add(host >> bits, times);
                    }
                }
                Ok(Cluster::Standard { host: None, .. }) => {}
                Ok(Cluster::Compressed { offset, bytes }) => {
                    references.report.allocated_clusters += 1;
                    references.report.compressed_clusters += 1;
                    references.report.fragmented_clusters += 1;
                    let clusters = offset >> bits..=(offset + bytes - 1) >> bits;
                    clusters.for_each(|cluster| references.counts.add(cluster, times));
                }
                Err(_) => references.bad_entries += 1,
            }
        }
        AioContext::breathe().await;
        Ok(())
    }

    /// Counts what a bitmap's table names.
    async fn count_bitmap(&self, table: Region, counts: &mut Counts) -> BlockResult {
        for entry in self.read_words(table.offset, table.bytes).await? {
            let offset = entry & super::geometry::OFFSET_MASK;
            if offset != 0 {
                counts.add(offset >> self.image.geometry.cluster_bits, 1);
            }
        }
        Ok(())
    }

    /// Reads all refcounts and compares them. Returns those that are not 0.
    async fn read_refcounts(&self, blocks: &[Option<u64>], references: &mut References) -> BlockResult<Counts> {
        let geometry = self.image.geometry;
        let per_block = geometry.refcounts_per_block();
        let mut found = Counts::default();
        let mut last = 0;
        for (first, block) in (0..).step_by(per_block as usize).zip(blocks) {
            let Some(block) = block else { continue };
            let words = self.read_words(*block, geometry.cluster_size()).await?;
            for (at, _) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                let per_word = 64 / u64::from(geometry.refcount_bits());
                for index in at as u64 * per_word..(at as u64 + 1) * per_word {
                    let refcount = geometry.refcount(&words, index);
                    if refcount > 0 {
                        found.add(first + index, refcount);
                        last = last.max(first + index + 1);
                        references.report.leaks += u64::from(refcount > references.counts.get(first + index));
                    }
                }
            }
            AioContext::breathe().await;
        }
        for cluster in references.counts.used() {
            last = last.max(cluster + 1);
            references.report.errors += u64::from(references.counts.get(cluster) > found.get(cluster));
        }
        references.report.image_end = last << geometry.cluster_bits;
        Ok(found)
    }

    /// Counts the marks that contradict the refcounts: a cluster is marked as copied exactly if its refcount is 1.
    async fn check_copied(&self, header: &Header, references: &mut References, refcounts: &Counts) -> BlockResult {
        let geometry = self.image.geometry;
        let bits = header.cluster_bits;
        let is_once = |offset: u64| refcounts.get(offset >> bits) == 1;
        let l1 = std::mem::take(&mut references.l1);
        for entry in &l1 {
            let Ok(Some(table)) = geometry.l2_table(*entry) else { continue };
            references.report.errors += u64::from(is_once(table) != (entry & COPIED != 0));
            if geometry.data_file {
                continue;
            }
            let words = self.read_words(table, geometry.cluster_size()).await?;
            for words in words.chunks_exact(geometry.entry_words()) {
                let entry = Entry { word: words[0], bitmap: words.get(1).copied().unwrap_or(0) };
                if let Ok(Cluster::Standard { host: Some(host), copied, .. }) = geometry.decode(entry, 0) {
                    references.report.errors += u64::from(is_once(host) != copied);
                }
            }
            AioContext::breathe().await;
        }
        references.l1 = l1;
        Ok(())
    }
}
