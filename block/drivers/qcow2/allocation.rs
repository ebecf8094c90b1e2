//! Allocation: writes to clusters that are not there yet. It owns the list of allocations in flight, over all iothreads,
//! and the two ends of each: the plan, and the link that makes its data visible. Between the two the data is written,
//! with no lock held; a request waits only for an allocation that covers the cluster it needs.

use std::sync::Arc;
use std::task::Waker;

use super::geometry::{COPIED, Cluster};
use super::mapping::{Kind, Place};
use super::state::{Attempt, Need, Pins, Reach, Span, State, Stop};
use crate::driver::InFlight;

/// The most bytes that one allocation covers, but for one cluster.
const PLAN_BYTES_MAX: u64 = 2 << 20;

/// The allocations that are not linked yet.
#[derive(Default)]
pub(super) struct InFlightAllocations {
    list: Vec<Allocation>,
    next_id: u64,
}

struct Allocation {
    id: u64,
    /// On the disk, in whole clusters.
    start: u64,
    end: u64,
    waiting: Vec<Waker>,
}

impl InFlightAllocations {
    pub(super) fn add(&mut self, start: u64, end: u64) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.list.push(Allocation { id, start, end, waiting: Vec::new() });
        id
    }

    /// Ends one; those who wait for it are to be woken.
    pub(super) fn remove(&mut self, id: u64) -> Vec<Waker> {
        match self.list.iter().position(|allocation| allocation.id == id) {
            Some(at) => self.list.swap_remove(at).waiting,
            None => Vec::new(),
        }
    }

    /// Has `waker` called at the end of one. False: it has ended.
    pub(super) fn wait(&mut self, id: u64, waker: &Waker) -> bool {
        let found = self.list.iter_mut().find(|allocation| allocation.id == id);
        if let Some(allocation) = found {
            allocation.waiting.push(waker.clone());
            return true;
        }
        false
    }

    /// Up to where from `start`, a cluster's, no allocation is in flight; at most `end`. A need where one covers `start`.
    pub(super) fn room(&self, start: u64, end: u64) -> Attempt<u64> {
        let mut room = end;
        for allocation in self.list.iter().filter(|allocation| allocation.end > start && allocation.start < end) {
            if allocation.start <= start {
                return Err(Stop::Need(Need::Allocation(allocation.id)));
            }
            room = room.min(allocation.start);
        }
        Ok(room)
    }
}

/// Where a piece of a write goes.
pub(super) enum WritePlan {
    /// To the cluster that is there. The pin is held until the write has ended.
    InPlace { host: u64, bytes: u64, pin: Arc<InFlight> },
    /// To clusters that are linked afterwards.
    Allocate(Plan),
}

/// An allocation in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub id: u64,
    /// What becomes allocated on the disk, the request's own bytes and what is copied up around them.
    pub start: u64,
    pub end: u64,
    /// Where the request's own bytes end.
    pub data_end: u64,
    /// Where `start` goes in the file.
    pub host: u64,
    /// The clusters that were taken for it; `None` where it goes to clusters that the disk had already.
    pub taken: Option<Span>,
    /// All of `host` reads as zeroes so far.
    pub zeroed: bool,
}

impl State {
    /// Where all of a write goes, if that is in place and in one piece, and whether the mapping is as stable as the file.
    /// `None` where more is to be done, or found out.
    pub(super) fn plan_in_place(
        &mut self,
        offset: u64,
        bytes: u64,
        pins: &Pins,
    ) -> Option<(u64, Arc<InFlight>, Reach)> {
        if let Some(Place { host, copied: true, slot }) = self.place(offset, bytes)
            && self.check_overlap(host, bytes).is_ok()
        {
            return Some((host, self.pin(pins), self.reach(slot)));
        }
        let run = self.run(offset, bytes).ok()?;
        match run.kind {
            Kind::Data { host, copied: true } if run.bytes == bytes && self.check_overlap(host, bytes).is_ok() => {
                let slot = self.slice(offset).ok().flatten();
                Some((host, self.pin(pins), slot.map_or(Reach::Memory, |slot| self.reach(slot))))
            }
            _ => None,
        }
    }

    /// Decides on the first piece of a write of `bytes`, not 0, at `offset`.
    pub(super) fn plan_write(&mut self, offset: u64, bytes: u64, pins: &Pins) -> Attempt<WritePlan> {
        let run = self.run(offset, bytes)?;
        if let Kind::Data { host, copied: true } = run.kind {
            self.check_overlap(host, run.bytes)?;
            return Ok(WritePlan::InPlace { host, bytes: run.bytes, pin: self.pin(pins) });
        }
        let geometry = self.geometry;
        let start = geometry.cluster_start(offset);
        let end = self.allocations.room(start, offset + bytes)?;
        let end = end.min(geometry.slice_end(offset));
        let slot = self.own_slice(offset)?;
        let first = geometry.decode(self.entry(slot, offset), start)?;
        if let Cluster::Standard { host: Some(host), copied: true, allocated, .. } = first {
            return self.plan_in_cluster(offset, end, host, allocated).map(WritePlan::Allocate);
        }
        self.plan_clusters(offset, end, slot).map(WritePlan::Allocate)
    }

    /// The slot of the slice that maps `offset`, in a table that nobody else uses.
    pub(super) fn own_slice(&mut self, offset: u64) -> Attempt<usize> {
        let index = offset / self.geometry.table_span();
        let entry = usize::try_from(index).ok().and_then(|index| self.l1.get(index)).copied().unwrap_or(0);
        if entry & COPIED == 0 {
            return Err(Stop::Need(Need::Table(index)));
        }
        match self.slice(offset)? {
            Some(slot) => Ok(slot),
            None => Err(Stop::Corrupt("an L1 entry is marked as copied and names no table")),
        }
    }

    /// A plan for subclusters that are not allocated, in a cluster that has its place.
    fn plan_in_cluster(&mut self, offset: u64, end: u64, host: u64, allocated: u32) -> Attempt<Plan> {
        let geometry = self.geometry;
        let (start, size) = (geometry.cluster_start(offset), geometry.subcluster_size());
        let end = end.min(geometry.cluster_end(offset));
        let from = offset / size * size;
        // Subclusters that are allocated may be written in place meanwhile, so none of them is a part of this.
        let mut to = from;
        while to < end && allocated & geometry.mask(to, to + 1) == 0 {
            to += size;
        }
        let host = host + (from - start);
        self.check_overlap(host, to - from)?;
        let id = self.allocations.add(start, geometry.cluster_end(offset));
        Ok(Plan { id, start: from, end: to, data_end: end.min(to), host, taken: None, zeroed: false })
    }

    /// A plan for new clusters.
    fn plan_clusters(&mut self, offset: u64, end: u64, slot: usize) -> Attempt<Plan> {
        let geometry = self.geometry;
        let (start, size) = (geometry.cluster_start(offset), geometry.cluster_size());
        let most = end.min(start + PLAN_BYTES_MAX.max(size));
        let mut count = 0;
        while start + count * size < most {
            let at = start + count * size;
            match geometry.decode(self.entry(slot, at), at)? {
                Cluster::Standard { host: Some(_), copied: true, .. } => break,
                _ => count += 1,
            }
        }
        let (host, taken, zeroed) = if geometry.data_file {
            (start, None, false)
        } else {
            let taken = self.allocate(count)?;
            count = taken.span.count;
            (taken.span.first << geometry.cluster_bits, Some(taken.span), taken.zeroed)
        };
        let end = end.min(start + count * size);
        // What is around the request's bytes is copied up in whole clusters if any of it is data, else in subclusters.
        let last = geometry.cluster_start(end - 1);
        let is_free = |cluster| matches!(cluster, Ok(Cluster::Standard { allocated: 0, .. }));
        let unit = |state: &Self, at| match is_free(geometry.decode(state.entry(slot, at), at)) {
            true => geometry.subcluster_size(),
            false => size,
        };
        let (head_unit, tail_unit) = (unit(self, start), unit(self, last));
        let from = offset / head_unit * head_unit;
        let to = end.next_multiple_of(tail_unit);
        let id = self.allocations.add(start, start + count * size);
        Ok(Plan { id, start: from, end: to, data_end: end, host: host + (from - start), taken, zeroed })
    }

    /// Makes an allocation's data visible, once it is written. Does not end the allocation.
    pub(super) fn link(&mut self, plan: &Plan) -> Attempt<()> {
        let geometry = self.geometry;
        let slot = self.own_slice(plan.start)?;
        let mut at = geometry.cluster_start(plan.start);
        let host = plan.host - (plan.start - at);
        let first = at;
        while at < plan.end {
            let mask = geometry.mask(at.max(plan.start), geometry.cluster_end(at).min(plan.end));
            let target = host + (at - first);
            let old = geometry.decode(self.entry(slot, at), at)?;
            let entry = match old {
                Cluster::Standard { host: Some(host), copied: true, allocated, zero } => {
                    geometry.encode(Some(host), true, allocated | mask, zero & !mask)
                }
                Cluster::Standard { host, zero, .. } => {
                    if let Some(host) = host {
                        self.unlink(host);
                    }
                    geometry.encode(Some(target), true, mask, zero & !mask)
                }
                Cluster::Compressed { offset, bytes } => {
                    self.unlink_compressed(offset, bytes);
                    geometry.encode(Some(target), true, mask, 0)
                }
            };
            self.set_entry(slot, at, entry);
            at += geometry.cluster_size();
        }
        Ok(())
    }
}
