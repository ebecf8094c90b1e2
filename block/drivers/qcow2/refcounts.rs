//! Refcounts: how often each host cluster is used. It owns the search for free clusters and every change of a count;
//! making room for counts that have no block yet is `growth.rs`'s.

use super::header::HOST_OFFSET_END;
use super::state::{Attempt, Need, Span, State, Stop};
use crate::error::BlockError;

/// A refcount is as large as it can be.
pub(super) const OVERFLOW: BlockError = BlockError::Host(libc::EOVERFLOW);

/// Clusters that were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Taken {
    pub span: Span,
    /// They read as zeroes, all of them.
    pub zeroed: bool,
}

impl State {
    /// The slot of the unit that counts `cluster`, and which of its counts that is; `None` where there is no block.
    fn unit(&mut self, cluster: u64) -> Attempt<Option<(usize, u64)>> {
        let per_unit = self.geometry.refcounts_per_unit();
        let (number, index) = (cluster / per_unit, cluster % per_unit);
        if let Some(slot) = self.refcounts.find(number) {
            return Ok(Some((slot, index)));
        }
        match self.block_of(cluster)? {
            None => Ok(None),
            Some(_) => Err(Stop::Need(Need::Refcounts(number))),
        }
    }

    /// The offset of the refcount block that counts `cluster`.
    pub(super) fn block_of(&self, cluster: u64) -> Attempt<Option<u64>> {
        let index = usize::try_from(cluster / self.geometry.refcounts_per_block()).unwrap_or(usize::MAX);
        let entry = self.refcount_table.get(index).copied().unwrap_or(0);
        Ok(self.geometry.refcount_block(entry)?)
    }

    pub(super) fn refcount(&mut self, cluster: u64) -> Attempt<u64> {
        Ok(match self.unit(cluster)? {
            None => 0,
            Some((slot, index)) => self.geometry.refcount(self.refcounts.words(slot), index),
        })
    }

    fn set_refcount(&mut self, slot: usize, index: u64, value: u64) {
        let (at, word) = self.geometry.with_refcount(self.refcounts.words(slot), index, value);
        self.refcounts.set(slot, at, word);
    }

    /// One use less of a cluster. The count is what it was where this fails.
    pub(super) fn decrease(&mut self, cluster: u64) -> Attempt<()> {
        let Some((slot, index)) = self.unit(cluster)? else {
            return Err(Stop::Corrupt("a cluster without a refcount was in use"));
        };
        let old = self.geometry.refcount(self.refcounts.words(slot), index);
        let Some(new) = old.checked_sub(1) else {
            return Err(Stop::Corrupt("a cluster whose refcount is 0 was in use"));
        };
        self.set_refcount(slot, index, new);
        if new == 0 {
            self.free_hint = self.free_hint.min(cluster);
            self.metadata.remove(&cluster);
            self.tail.leave(cluster, self.geometry.cluster_bits);
        }
        Ok(())
    }

    /// One use more of a cluster that is in use. The count is what it was where this fails.
    pub(super) fn increase(&mut self, cluster: u64) -> Attempt<()> {
        let Some((slot, index)) = self.unit(cluster)? else {
            return Err(Stop::Corrupt("a cluster without a refcount was in use"));
        };
        match self.geometry.refcount(self.refcounts.words(slot), index) {
            0 => Err(Stop::Corrupt("a cluster whose refcount is 0 was in use")),
            most if most == self.geometry.refcount_max() => Err(Stop::Fail(OVERFLOW)),
            count => {
                self.set_refcount(slot, index, count + 1);
                Ok(())
            }
        }
    }

    /// Takes up to `count` free clusters in one piece, at least 1, whose count is 1 then.
    pub(super) fn allocate(&mut self, count: u64) -> Attempt<Taken> {
        let geometry = self.geometry;
        let per_unit = geometry.refcounts_per_unit();
        loop {
            let first = self.free_hint;
            if first >= HOST_OFFSET_END >> geometry.cluster_bits {
                return Err(Stop::Fail(BlockError::NoSpace));
            }
            let Some((slot, index)) = self.unit(first)? else {
                return Err(Stop::Need(Need::RefcountBlock(first / geometry.refcounts_per_block())));
            };
            let words = self.refcounts.words(slot);
            let Some(free) = (index..per_unit).find(|index| geometry.refcount(words, *index) == 0) else {
                self.free_hint = first - index + per_unit;
                continue;
            };
            let most = per_unit.min(free.saturating_add(count.max(1)));
            let end = (free..most).find(|index| geometry.refcount(words, *index) != 0).unwrap_or(most);
            let span = Span { first: first - index + free, count: end - free };
            if (span.first..span.first + span.count).any(|cluster| self.metadata.contains(&cluster)) {
                return Err(Stop::Corrupt("a cluster that holds metadata has the refcount 0"));
            }
            (free..end).for_each(|index| self.set_refcount(slot, index, 1));
            self.free_hint = span.first + span.count;
            let zeroed = self.taken(span);
            return Ok(Taken { span, zeroed });
        }
    }

    /// Notes that clusters are in use; says whether all of them read as zeroes.
    pub(super) fn taken(&mut self, span: Span) -> bool {
        let zeroed = span.first >= self.zero_from;
        self.zero_from = self.zero_from.max(span.first + span.count);
        zeroed
    }

    /// Notes that a standard cluster of guest data is no longer referred to.
    pub(super) fn unlink(&mut self, host: u64) {
        if !self.geometry.data_file {
            self.unlink_span(Span { first: host >> self.geometry.cluster_bits, count: 1 });
        }
    }

    /// Notes that clusters are no longer referred to, by one use each.
    pub(super) fn unlink_span(&mut self, span: Span) {
        match self.unlinked.last_mut() {
            Some(last) if last.first + last.count == span.first => last.count += span.count,
            _ => self.unlinked.push(span),
        }
    }

    /// The same of a compressed cluster, which may lie in two and share them with others.
    pub(super) fn unlink_compressed(&mut self, offset: u64, bytes: u64) {
        let bits = self.geometry.cluster_bits;
        let (first, last) = (offset >> bits, (offset + bytes - 1) >> bits);
        self.inflated.forget(offset);
        self.unlink_span(Span { first, count: last - first + 1 });
    }
}
