//! Clear: zeroing and discarding, by what the tables say rather than by writing. It owns which clusters may lose their
//! place and what they read as afterwards.

use std::rc::Rc;

use super::channel::Channel;
use super::geometry::Cluster;
use super::state::{Attempt, State, Stop};
use crate::driver::WriteFlags;
use crate::error::{BlockError, BlockResult};
use crate::iovec::AlignedBuffer;

/// What is to become of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Clear {
    /// They read as zeroes; `unmap`: and lose their place.
    Zero { unmap: bool },
    /// Their content no longer matters; they lose their place, and show nothing older than what they had.
    Discard,
    /// They go, past the end of the disk.
    Drop,
}

/// How many bytes of zeroes are written at a time where the tables cannot say it.
const ZEROES_BYTES: u64 = 256 << 10;

impl State {
    /// Clears from `offset` on, as many bytes as one slice maps, at most to `end`: both are at a subcluster's start, or
    /// `end` is the end of the disk. Returns where it ended. `backing` is the length of the backing file, 0 without one.
    pub(super) fn clear(&mut self, offset: u64, end: u64, how: Clear, backing: u64) -> Attempt<u64> {
        let geometry = self.geometry;
        let start = geometry.cluster_start(offset);
        let end = self.allocations.room(start, end)?;
        if self.table(offset)?.is_none() && self.is_clear(Cluster::UNALLOCATED, how, offset >= backing) {
            let table_end = (offset / geometry.table_span() + 1).saturating_mul(geometry.table_span());
            return Ok(end.min(table_end));
        }
        let slot = self.own_slice(offset)?;
        let end = end.min(geometry.slice_end(offset));
        let mut at = offset;
        while at < end {
            let stop = geometry.cluster_end(at).min(end);
            let cluster = geometry.decode(self.entry(slot, at), geometry.cluster_start(at))?;
            if !self.is_clear(cluster, how, at >= backing) {
                match self.clear_cluster(slot, at, stop, cluster, how, at < backing) {
                    // What comes before it is done.
                    Err(Stop::Fail(BlockError::NotSupported)) if at > offset => return Ok(at),
                    done => done?,
                }
            }
            at = stop;
        }
        Ok(end)
    }

    /// Whether there is nothing to be done.
    fn is_clear(&self, cluster: Cluster, how: Clear, past_backing: bool) -> bool {
        let Cluster::Standard { host, allocated, zero, .. } = cluster else { return false };
        let keeps_place = host.is_none() || how == Clear::Zero { unmap: false };
        let nothing = allocated == 0 && zero == 0 && host.is_none();
        match how {
            // There is no place to be given back.
            Clear::Drop | Clear::Discard if nothing => true,
            Clear::Drop => false,
            Clear::Zero { .. } | Clear::Discard => {
                (nothing && past_backing) || (allocated == 0 && zero == self.geometry.all() && keeps_place)
            }
        }
    }

    fn clear_cluster(
        &mut self,
        slot: usize,
        at: u64,
        stop: u64,
        cluster: Cluster,
        how: Clear,
        over_backing: bool,
    ) -> Attempt<()> {
        let geometry = self.geometry;
        let mask = geometry.mask(at, stop);
        let whole = mask == geometry.all();
        if !geometry.v3 && how != Clear::Drop {
            // Without a zero flag, the only zeroes are those of a cluster that is not there, with nothing behind it.
            return match how {
                Clear::Discard if over_backing => Ok(()),
                Clear::Zero { unmap: false } => Err(Stop::Fail(BlockError::NotSupported)),
                _ if over_backing => Err(Stop::Fail(BlockError::NotSupported)),
                _ => self.drop_cluster(slot, at, cluster, 0),
            };
        }
        match (cluster, how) {
            (_, Clear::Drop) => self.drop_cluster(slot, at, cluster, 0),
            // Its place stays: because it is asked for, or because other subclusters are there.
            (Cluster::Standard { host, copied: true, allocated, zero }, Clear::Zero { unmap: false }) => {
                self.set_entry(slot, at, geometry.encode(host, true, allocated & !mask, zero | mask));
                Ok(())
            }
            (Cluster::Standard { host, copied, allocated, zero }, _) if !whole => {
                self.set_entry(slot, at, geometry.encode(host, copied, allocated & !mask, zero | mask));
                Ok(())
            }
            (Cluster::Compressed { .. }, _) if !whole => Err(Stop::Fail(BlockError::NotSupported)),
            (cluster, _) => self.drop_cluster(slot, at, cluster, geometry.all()),
        }
    }

    /// Takes a cluster's place away; `zero` says which subclusters read as zeroes then.
    fn drop_cluster(&mut self, slot: usize, at: u64, cluster: Cluster, zero: u32) -> Attempt<()> {
        match cluster {
            Cluster::Standard { host, .. } => {
                if let Some(host) = host {
                    self.unlink(host);
                }
            }
            Cluster::Compressed { offset, bytes } => self.unlink_compressed(offset, bytes),
        }
        self.set_entry(slot, at, self.geometry.encode(None, false, 0, zero));
        Ok(())
    }
}

impl Channel {
    /// The subclusters that lie wholly in a range; what is past the disk's end counts as inside.
    fn whole_subclusters(&self, offset: u64, end: u64) -> (u64, u64) {
        let size = self.image.geometry.subcluster_size();
        let disk_end = self.image.size.load(std::sync::atomic::Ordering::Relaxed);
        let last = if end >= disk_end { end } else { end / size * size };
        (offset.next_multiple_of(size).min(end), last)
    }

    /// Makes a range read as zeroes.
    pub(super) async fn write_zeroes(self: &Rc<Self>, offset: u64, bytes: u64, flags: WriteFlags) -> BlockResult {
        if self.image.geometry.raw_data {
            // The external data file has to read as zeroes by itself.
            return Err(BlockError::NotSupported);
        }
        let end = offset + bytes;
        let (first, last) = self.whole_subclusters(offset, end);
        if first >= last {
            self.write_zeroes_as_data(offset, end).await?;
        } else {
            self.write_zeroes_as_data(offset, first).await?;
            self.clear_range(first, last, Clear::Zero { unmap: flags.may_unmap }).await?;
            self.write_zeroes_as_data(last, end).await?;
        }
        self.free_early().await?;
        self.settle(flags).await
    }

    /// Discards the whole clusters of a range.
    pub(super) async fn discard(self: &Rc<Self>, offset: u64, bytes: u64) -> BlockResult {
        if self.image.geometry.raw_data {
            return self.data.pdiscard(offset, bytes).await;
        }
        let (first, last) = self.whole_subclusters(offset, offset + bytes);
        if first < last {
            self.clear_range(first, last, Clear::Discard).await?;
            self.free_early().await?;
        }
        Ok(())
    }

    /// Clears whole subclusters.
    pub(super) async fn clear_range(self: &Rc<Self>, offset: u64, end: u64, how: Clear) -> BlockResult {
        let backing = self.backing_length();
        let mut at = offset;
        while at < end {
            match self.attempt(|state| state.clear(at, end, how, backing)).await {
                Ok(stop) => at = stop,
                // A discard may leave out what it cannot do; zeroes have to be there.
                Err(BlockError::NotSupported) if how == Clear::Discard => at = self.image.geometry.cluster_end(at),
                Err(BlockError::NotSupported) if how != Clear::Drop => {
                    let stop = self.image.geometry.cluster_end(at).min(end);
                    self.write_zeroes_as_data(at, stop).await?;
                    at = stop;
                }
                Err(error) => return Err(error),
            }
            crate::aio::AioContext::breathe().await;
        }
        Ok(())
    }

    /// Writes zeroes, but where there are some already.
    async fn write_zeroes_as_data(self: &Rc<Self>, offset: u64, end: u64) -> BlockResult {
        if offset >= end {
            return Ok(());
        }
        let backing = self.backing_length();
        let zeroes = AlignedBuffer::new((end - offset).min(ZEROES_BYTES) as usize, 4096);
        let mut at = offset;
        while at < end {
            let bytes = (end - at).min(ZEROES_BYTES);
            if !self.attempt(|state| state.reads_zero(at, bytes, backing)).await? {
                self.write(at, &[zeroes.iov().part(0, bytes as usize)]).await?;
            }
            at += bytes;
        }
        Ok(())
    }
}
