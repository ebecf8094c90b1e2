//! Mapping: where on the host the bytes of a range of the disk are. It owns the walk over L2 entries; it changes nothing.

use super::geometry::{COPIED, Cluster, OFFSET_MASK};
use super::state::{Attempt, State};

/// What a run of bytes of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Not here: in the backing file, or zero without one.
    Unallocated,
    Zero,
    /// At `host` in the file or external data file; `copied`: nobody else uses it.
    Data {
        host: u64,
        copied: bool,
    },
    /// A part of a compressed cluster, from `skip` on once it is decompressed.
    Compressed {
        offset: u64,
        bytes: u64,
        skip: u64,
    },
}

/// So many bytes of one kind, with the host's bytes in one piece too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub kind: Kind,
    pub bytes: u64,
}

impl Kind {
    /// Whether `next`, `bytes` further on, goes on with the same.
    fn goes_on(self, next: Self, bytes: u64) -> bool {
        match (self, next) {
            (Self::Unallocated, Self::Unallocated) | (Self::Zero, Self::Zero) => true,
            (Self::Data { host, copied }, Self::Data { host: next, copied: same }) => {
                host + bytes == next && copied == same
            }
            _ => false,
        }
    }
}

/// Bytes that are in one piece in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub host: u64,
    /// Nobody else uses them.
    pub copied: bool,
    /// Where in the cache their slice is.
    pub slot: usize,
}

impl State {
    /// Where a range is that lies in one cluster, has its place, and whose mapping is in memory: what most requests ask.
    /// `None` says nothing; [`State::run`] knows.
    #[inline]
    pub(super) fn place(&mut self, offset: u64, bytes: u64) -> Option<Place> {
        let geometry = &self.geometry;
        let inside = offset & (geometry.cluster_size() - 1);
        if geometry.extended || geometry.data_file || inside + bytes > geometry.cluster_size() {
            return None;
        }
        let at = geometry.word_of(offset);
        let places = OFFSET_MASK & !(geometry.cluster_size() - 1);
        let slot = self.slices.find(geometry.slice_number(offset))?;
        let word = *self.slices.words(slot).get(at)?;
        // No other flag is set, and no reserved bit.
        let standard = word & !(places | COPIED) == 0 && word & places != 0;
        standard.then_some(Place { host: (word & places) + inside, copied: word & COPIED != 0, slot })
    }

    /// The run that begins at `offset`: at least 1 byte, at most `bytes`, which is not 0.
    pub(super) fn run(&mut self, offset: u64, bytes: u64) -> Attempt<Run> {
        let geometry = self.geometry;
        let Some(slot) = self.slice(offset)? else {
            let table_end = (offset / geometry.table_span() + 1).saturating_mul(geometry.table_span());
            return Ok(Run { kind: Kind::Unallocated, bytes: bytes.min(table_end - offset) });
        };
        let end = offset.saturating_add(bytes).min(geometry.slice_end(offset));
        let mut found: Option<Kind> = None;
        let mut at = offset;
        while at < end {
            let start = geometry.cluster_start(at);
            let cluster = geometry.decode(self.entry(slot, at), start)?;
            let (kind, stop) = match cluster {
                Cluster::Compressed { offset, bytes } => {
                    (Kind::Compressed { offset, bytes, skip: at - start }, geometry.cluster_end(at))
                }
                Cluster::Standard { host, copied, allocated, zero } => {
                    let subcluster = (at - start) >> geometry.subcluster_bits();
                    let bit = 1 << subcluster;
                    let (kind, mask) = match host {
                        Some(host) if allocated & bit != 0 => {
                            (Kind::Data { host: host + (at - start), copied }, allocated)
                        }
                        _ if zero & bit != 0 => (Kind::Zero, zero),
                        _ => (Kind::Unallocated, !(allocated | zero)),
                    };
                    let same = u64::from((mask >> subcluster).trailing_ones().min(geometry.subclusters()));
                    (kind, start + ((subcluster + same) * geometry.subcluster_size()).min(geometry.cluster_size()))
                }
            };
            match found {
                None => found = Some(kind),
                Some(first) if first.goes_on(kind, at - offset) => {}
                Some(_) => break,
            }
            at = stop.min(end);
        }
        Ok(Run { kind: found.unwrap_or(Kind::Unallocated), bytes: at - offset })
    }

    /// Whether a range reads as zeroes, for sure; `backing` is the length of the backing file, 0 without one.
    pub(super) fn reads_zero(&mut self, offset: u64, bytes: u64, backing: u64) -> Attempt<bool> {
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let run = self.run(at, end - at)?;
            match run.kind {
                Kind::Zero => {}
                Kind::Unallocated if at >= backing => {}
                _ => return Ok(false),
            }
            at += run.bytes;
        }
        Ok(true)
    }
}
