//! Load: an image's tables when the node is activated. It owns what is read then, what is refused, and the list of all
//! clusters that hold metadata; it leaves L2 tables and refcounts to be read when they are needed.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::allocation::InFlightAllocations;
use super::cache::{Cache, NumberSet};
use super::channel::Channel;
use super::compress::Tail;
use super::decompress::Inflated;
use super::directories::Region;
use super::geometry::Geometry;
use super::header::{self, Header, HeaderSector, incompatible};
use super::state::State;
use super::tables::add_region;
use crate::child::ChildChannel;
use crate::error::{BlockResult, OpenError, OpenResult};
use crate::iovec::AlignedBuffer;

/// How much metadata is kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CacheSizes {
    /// In bytes.
    pub l2: u64,
    /// In bytes.
    pub refcounts: u64,
}

/// Reads the header and checks it. Returns its cluster too.
pub(super) async fn read_header(file: &std::rc::Rc<ChildChannel>) -> OpenResult<(Header, Vec<u8>)> {
    let unreadable = |e| OpenError(format!("the header cannot be read: {e}"));
    let read = async |bytes: usize| -> BlockResult<Vec<u8>> {
        let buffer = AlignedBuffer::new(bytes, 4096);
        file.preadv(0, &[buffer.iov()]).await?;
        Ok(buffer.to_vec())
    };
    let start = read(header::HEADER_SECTOR).await.map_err(unreadable)?;
    let cluster = read(header::cluster_size(&start)?).await.map_err(unreadable)?;
    Ok((Header::parse(&cluster)?, cluster))
}

impl State {
    /// Of an image whose tables are not in memory.
    pub(super) fn unloaded(geometry: Geometry, header: Header, sector: HeaderSector, caches: CacheSizes) -> Self {
        let pieces = |bytes: u64, piece: u64| usize::try_from(bytes / piece).unwrap_or(usize::MAX).max(MIN_PIECES);
        Self {
            geometry,
            header,
            header_sector: sector,
            l1: Vec::new(),
            l1_dirty: BTreeSet::new(),
            refcount_table: Vec::new(),
            refcount_table_dirty: BTreeSet::new(),
            slices: Cache::new(pieces(caches.l2, geometry.slice_bytes())),
            refcounts: Cache::new(pieces(caches.refcounts, geometry.unit_bytes())),
            metadata: NumberSet::default(),
            allocations: InFlightAllocations::default(),
            free_hint: 0,
            zero_from: u64::MAX,
            file_end: u64::MAX,
            extended: false,
            tail: Tail::default(),
            inflated: Inflated::default(),
            unlinked: Vec::new(),
            retired: Vec::new(),
            epoch: 0,
            channels: Vec::new(),
            busy: Vec::new(),
            unsynced: false,
            lazy: false,
            write_backs: 0,
            write_back_in_file: 0,
            write_back_on_disk: 0,
        }
    }
}

/// The fewest pieces of each kind that are kept.
const MIN_PIECES: usize = 4;

impl Channel {
    /// Reads the image's tables and checks them as far as a writer relies on them.
    pub(super) async fn load(&self, caches: CacheSizes) -> OpenResult {
        let (mut header, mut cluster) = read_header(&self.file).await?;
        if self.image.writable
            && header.incompatible & (incompatible::DIRTY | incompatible::CORRUPT) == incompatible::DIRTY
        {
            self.repair_dirty(header, &cluster).await?;
            (header, cluster) = read_header(&self.file).await?;
        }
        let expected = self.image.geometry;
        let geometry = Geometry::new(&header, expected.slice_bytes());
        if geometry != expected {
            return Err(OpenError::new("the image is another one than the one that was opened"));
        }
        let sector = HeaderSector::new(&cluster);
        let mut state = State::unloaded(geometry, header, sector, caches);
        let header = state.header.clone();
        let unreadable = |what: &str, e| OpenError(format!("{what} cannot be read: {e}"));
        let l1 = self.read_words(header.l1_offset, u64::from(header.l1_entries) * 8).await;
        state.l1 = l1.map_err(|e| unreadable("the L1 table", e))?;
        let for_repair = self.image.for_repair.load(Ordering::Relaxed);
        if self.image.writable && !for_repair {
            self.load_for_writing(&mut state, &header).await?;
        }
        self.image.size.store(header.size, Ordering::Relaxed);
        self.image.broken.store(for_repair, Ordering::Relaxed);
        let mut current = self.image.lock();
        // Channels may outlive an activation.
        state.channels = std::mem::take(&mut current.channels);
        *current = state;
        Ok(())
    }

    /// Makes the refcounts anew of an image that was not closed after writing with lazy refcounts.
    async fn repair_dirty(&self, header: Header, cluster: &[u8]) -> OpenResult {
        {
            let mut state = self.image.lock();
            state.header_sector = HeaderSector::new(cluster);
            state.header = header;
        }
        let report = self.repair().await?;
        if report.errors > 0 {
            let errors = report.errors;
            return Err(OpenError(format!(
                "it was not closed properly, and has {errors} errors that cannot be repaired"
            )));
        }
        tracing::info!("node \"{}\": it was not closed properly; its refcounts were repaired", self.image.name);
        Ok(())
    }

    async fn load_for_writing(&self, state: &mut State, header: &Header) -> OpenResult {
        if header.incompatible & incompatible::CORRUPT != 0 {
            return Err(OpenError::new(
                "it is marked as corrupt: it can be opened with read-only=on, and is to be repaired before it is written",
            ));
        }
        let cluster = state.geometry.cluster_size();
        let bytes = u64::from(header.refcount_table_clusters) * cluster;
        let table = self.read_words(header.refcount_table_offset, bytes).await;
        state.refcount_table = table.map_err(|e| OpenError(format!("the refcount table cannot be read: {e}")))?;
        let mut regions = vec![
            ("the header", Region { offset: 0, bytes: cluster }),
            ("the L1 table", Region { offset: header.l1_offset, bytes: u64::from(header.l1_entries) * 8 }),
            ("the refcount table", Region { offset: header.refcount_table_offset, bytes }),
        ];
        let (snapshots, table) = self.read_snapshots(header).await?;
        regions.push(("the snapshot table", table));
        regions.extend(snapshots.iter().map(|snapshot| ("a snapshot's L1 table", snapshot.l1())));
        regions.extend(
            header.encryption.map(|(offset, bytes)| ("the header of the encryption", Region { offset, bytes })),
        );
        if let Some(bitmaps) = header.bitmaps.filter(|_| header.has_valid_bitmaps()) {
            let found = self.read_bitmap_regions(bitmaps, cluster).await?;
            regions.extend(found.into_iter().map(|region| ("a table of bitmaps", region)));
        }
        state.protect(&regions)?;
        // It may have grown since it was opened: by a repair.
        self.file.node().refresh();
        state.file_end = self.file.length();
        state.zero_from = state.file_end.div_ceil(cluster);
        self.clear_autoclear(state, header).await
    }

    /// Clears the bits that say what we do not keep true, before the first write.
    async fn clear_autoclear(&self, state: &mut State, header: &Header) -> OpenResult {
        let kept = header.kept_autoclear();
        if kept == header.autoclear {
            return Ok(());
        }
        state.header.autoclear = kept;
        state.header_sector.set_autoclear(kept);
        let written = match self.write_bytes(0, state.header_sector.bytes()).await {
            Ok(()) => self.file.flush().await,
            error => error,
        };
        written.map_err(|e| OpenError(format!("the header cannot be written: {e}")))
    }
}

impl State {
    /// Notes which clusters hold metadata. No two tables may lie on one.
    fn protect(&mut self, regions: &[(&str, Region)]) -> OpenResult {
        let bits = self.geometry.cluster_bits;
        let corrupt = |what: &str| OpenError(format!("it is corrupt: {what} lies on other metadata"));
        for (what, region) in regions {
            if !add_region(&mut self.metadata, region.offset, region.bytes, bits) {
                return Err(corrupt(what));
            }
        }
        let blocks = self.refcount_table.iter().filter_map(|entry| self.geometry.refcount_block(*entry).transpose());
        let tables = self.l1.iter().filter_map(|entry| self.geometry.l2_table(*entry).transpose());
        for place in blocks.chain(tables) {
            let place = place.map_err(|why| OpenError(format!("it is corrupt: {why}")))?;
            if !self.metadata.insert(place >> bits) {
                return Err(corrupt("an L2 table or refcount block"));
            }
        }
        Ok(())
    }
}
