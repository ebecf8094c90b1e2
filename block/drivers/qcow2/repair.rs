//! Repair: refcounts made anew from what refers to clusters, and the marks that follow from them. It owns where the new
//! structure lies (behind everything that is in use) and when it comes into force: the header names it last, so that a
//! crash on the way leaves the image as it was. With no request in flight.

use super::channel::Channel;
use super::check::{CheckReport, Counts};
use super::geometry::{COPIED, Cluster, Entry, Geometry};
use super::header::{HOST_OFFSET_END, Header, incompatible};
use crate::aio::AioContext;
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};

/// The most bytes of a refcount table.
const TABLE_BYTES_MAX: u64 = 8 << 20;

/// A new refcount structure: which blocks there are, and where.
struct Layout {
    /// The entries of the table for which there are blocks, in order.
    blocks: Vec<u64>,
    /// The cluster of the first block; the others and the table follow.
    first: u64,
    table_clusters: u64,
}

impl Layout {
    /// Room for the counts of all used clusters, and for those of the structure itself.
    /// It lies at `from` or behind: the old one is in force until the header names this.
    fn new(used: &[u64], from: u64, per_block: u64, cluster: u64) -> Option<Self> {
        let first = used.last().map_or(0, |last| last + 1).max(from);
        let mut needed: Vec<u64> = used.iter().map(|cluster| cluster / per_block).collect();
        needed.dedup();
        let mut own = 1;
        loop {
            let end = first.checked_add(own)?;
            let mut blocks = needed.clone();
            blocks.extend(first / per_block..=(end - 1) / per_block);
            blocks.dedup();
            let table_clusters = ((blocks.last()? + 1) * 8).div_ceil(cluster);
            let size = blocks.len() as u64 + table_clusters;
            if size <= own {
                return (table_clusters * cluster <= TABLE_BYTES_MAX).then_some(Self { blocks, first, table_clusters });
            }
            own = size;
        }
    }

    fn clusters(&self) -> std::ops::Range<u64> {
        self.first..self.first + self.blocks.len() as u64 + self.table_clusters
    }
}

impl Channel {
    /// Checks, and repairs what is wrong: refcounts and marks. What cannot be, in tables, stays, and so does then the
    /// mark that the image is corrupt.
    ///
    /// # Errors
    /// I/O failed, or the format has no room for what is needed.
    pub(super) async fn repair(&self) -> OpenResult<CheckReport> {
        let before = self.check().await?;
        let header = self.image.lock().header.clone();
        let marked = header.incompatible & (incompatible::CORRUPT | incompatible::DIRTY) != 0;
        if before.errors == 0 && before.leaks == 0 && !marked {
            return Ok(before);
        }
        let failed = |e: BlockError| OpenError(format!("the image cannot be repaired: {e}"));
        if before.errors > 0 || before.leaks > 0 {
            self.rebuild_refcounts(&header).await?;
        }
        let after = self.check().await?;
        let fixed = CheckReport {
            errors_fixed: before.errors.saturating_sub(after.errors),
            leaks_fixed: before.leaks.saturating_sub(after.leaks),
            ..after
        };
        if after.errors == 0 && marked {
            let bits = header.incompatible & !(incompatible::CORRUPT | incompatible::DIRTY);
            {
                let mut state = self.image.lock();
                state.header.incompatible = bits;
                state.header_sector.set_incompatible(bits);
            }
            self.write_header().await.map_err(failed)?;
        }
        Ok(fixed)
    }

    async fn rebuild_refcounts(&self, header: &Header) -> OpenResult {
        let failed = |e: BlockError| OpenError(format!("the image cannot be repaired: {e}"));
        let references = self.count_references(header).await?;
        self.fix_copied(&references.l1, header, &references.counts).await.map_err(failed)?;
        let geometry = self.image.geometry;
        let (offset, clusters) = self.write_refcounts(geometry, header, &references.counts).await?;
        self.change_header(|sector| sector.set_refcount_table(offset, clusters)).await.map_err(failed)?;
        let mut state = self.image.lock();
        state.header.refcount_table_offset = offset;
        state.header.refcount_table_clusters = clusters;
        Ok(())
    }

    /// Writes new blocks and their table, in the widths of `geometry`, stable, for the header to name. Returns where the
    /// table is, and its clusters.
    pub(super) async fn write_refcounts(
        &self,
        geometry: Geometry,
        header: &Header,
        counts: &Counts,
    ) -> OpenResult<(u64, u32)> {
        let failed = |e: BlockError| OpenError(format!("the refcounts cannot be written: {e}"));
        let used = counts.used();
        if let Some(cluster) = used.iter().find(|cluster| counts.get(**cluster) > geometry.refcount_max()) {
            let offset = cluster << geometry.cluster_bits;
            return Err(OpenError(format!("the refcount at {offset:#x} is too large")));
        }
        let (size, per_block) = (geometry.cluster_size(), geometry.refcounts_per_block());
        let from = self.end_of_refcounts(header).await.map_err(failed)?;
        let layout = Layout::new(&used, from, per_block, size)
            .filter(|layout| layout.clusters().end <= HOST_OFFSET_END >> geometry.cluster_bits)
            .ok_or_else(|| OpenError::new("there is no room for the refcounts"))?;
        let own = layout.clusters();
        let mut table = vec![0u64; (layout.table_clusters * size / 8) as usize];
        for (number, block) in (layout.first..).zip(&layout.blocks) {
            let mut words = vec![0u64; (size / 8) as usize];
            for index in 0..per_block {
                let cluster = block * per_block + index;
                let count = counts.get(cluster) + u64::from(own.contains(&cluster));
                if count > 0 {
                    let (at, word) = geometry.with_refcount(&words, index, count);
                    words[at] = word;
                }
            }
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            self.write_bytes(number << geometry.cluster_bits, &bytes).await.map_err(failed)?;
            if let Some(entry) = table.get_mut(*block as usize) {
                *entry = number << geometry.cluster_bits;
            }
            AioContext::breathe().await;
        }
        let offset = (layout.first + layout.blocks.len() as u64) << geometry.cluster_bits;
        let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.write_bytes(offset, &bytes).await.map_err(failed)?;
        self.file.flush().await.map_err(failed)?;
        // At most 8 MiB in clusters of 512 bytes or more.
        Ok((offset, layout.table_clusters as u32))
    }

    /// Behind which cluster nothing of the refcount structure lies that is in force, as far as it lies in the file.
    async fn end_of_refcounts(&self, header: &Header) -> BlockResult<u64> {
        let geometry = self.image.geometry;
        let bits = geometry.cluster_bits;
        let file_end = self.file.length().div_ceil(geometry.cluster_size());
        let bytes = u64::from(header.refcount_table_clusters) << bits;
        let table = self.read_words(header.refcount_table_offset, bytes).await?;
        let blocks = table.iter().filter_map(|entry| geometry.refcount_block(*entry).unwrap_or(None));
        let ends = blocks.map(|block| (block >> bits) + 1).filter(|end| *end <= file_end);
        let own = (header.refcount_table_offset >> bits) + u64::from(header.refcount_table_clusters);
        Ok(ends.chain([own]).max().unwrap_or(0))
    }

    /// Marks what is used once as copied in the active tables, and nothing else.
    async fn fix_copied(&self, l1: &[u64], header: &Header, counts: &Counts) -> BlockResult {
        let geometry = self.image.geometry;
        let bits = geometry.cluster_bits;
        let marked = |word: u64, offset: u64| match counts.get(offset >> bits) {
            1 => word | COPIED,
            _ => word & !COPIED,
        };
        let mut fixed = l1.to_vec();
        for entry in &mut fixed {
            let Ok(Some(table)) = geometry.l2_table(*entry) else { continue };
            *entry = marked(*entry, table);
            if geometry.data_file {
                continue;
            }
            let old = self.read_words(table, geometry.cluster_size()).await?;
            let mut words = old.clone();
            for words in words.chunks_exact_mut(geometry.entry_words()) {
                let entry = Entry { word: words[0], bitmap: words.get(1).copied().unwrap_or(0) };
                if let Ok(Cluster::Standard { host: Some(host), .. }) = geometry.decode(entry, 0) {
                    words[0] = marked(entry.word, host);
                }
            }
            if words != old {
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
                self.write_bytes(table, &bytes).await?;
            }
            AioContext::breathe().await;
        }
        if fixed != l1 {
            let mut bytes: Vec<u8> = fixed.iter().flat_map(|word| word.to_be_bytes()).collect();
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            self.write_bytes(header.l1_offset, &bytes).await?;
        }
        Ok(())
    }
}
