//! State: an image's metadata in memory, behind one mutex that is held for moments only, never across I/O. It owns what
//! is cached, what is under way, and what an *attempt* is: a change of the state that either happens as a whole or says
//! what has to be done first.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use super::allocation::InFlightAllocations;
use super::bitmaps::Bitmaps;
use super::cache::{Cache, NumberSet};
use super::compress::Tail;
use super::data::PayloadCipher;
use super::decompress::Inflated;
use super::geometry::{COPIED, Corrupt, Entry, Geometry};
use super::header::{Header, HeaderSector};
use crate::driver::{InFlight, WriteFlags};
use crate::error::BlockError;

/// What has to be done before an attempt can succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// A slice of an L2 table in memory, by its number on the disk.
    Slice(u64),
    /// Refcounts in memory, by the number of their unit.
    Refcounts(u64),
    /// An L2 table of our own for this L1 entry.
    Table(u64),
    /// A refcount block for this entry of the refcount table.
    RefcountBlock(u64),
    /// The end of another request's allocation.
    Allocation(u64),
}

/// Why an attempt did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Do this, then try again.
    Need(Need),
    /// The metadata cannot be right.
    Corrupt(Corrupt),
    /// It will never succeed.
    Fail(BlockError),
}

impl From<Corrupt> for Stop {
    fn from(why: Corrupt) -> Self {
        Self::Corrupt(why)
    }
}

/// The result of an attempt.
pub(super) type Attempt<T> = Result<T, Stop>;

/// Work on the metadata that only one at a time does; others wait for its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    Load(Need),
    /// Any change of the refcount table.
    RefcountTable,
    /// Making the file longer.
    Extend,
    /// Decompressing what begins there.
    Inflate(u64),
    /// Packing compressed clusters and writing them.
    Pack,
    /// Changing the header.
    Header,
    WriteBack,
    Reap,
}

/// Host clusters, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub first: u64,
    pub count: u64,
}

/// What all channels of an image share.
pub(super) struct Image {
    /// The node's name, for messages.
    pub name: String,
    pub geometry: Geometry,
    pub writable: bool,
    /// Opened to be repaired, and for nothing else until that is done.
    pub for_repair: AtomicBool,
    /// What nobody needs any more is discarded in the file.
    pub pass_discards: bool,
    /// Refcounts may be written late.
    pub lazy: AtomicBool,
    /// The size of the disk in bytes.
    pub size: AtomicU64,
    /// Corruption was found: nothing is read or written until the image is opened again.
    pub broken: AtomicBool,
    /// Of an encrypted image.
    pub cipher: Option<Arc<dyn PayloadCipher>>,
    /// Writes are to be marked in bitmaps.
    pub tracking: AtomicBool,
    pub bitmaps: Mutex<Bitmaps>,
    pub state: Mutex<State>,
}

/// See the file's head.
pub(super) struct State {
    pub geometry: Geometry,
    pub header: Header,
    pub header_sector: HeaderSector,
    pub l1: Vec<u64>,
    /// Sectors of the L1 table, in the file, that are to be written.
    pub l1_dirty: BTreeSet<usize>,
    pub refcount_table: Vec<u64>,
    /// The same of the refcount table.
    pub refcount_table_dirty: BTreeSet<usize>,
    /// Slices of L2 tables, by their number on the disk.
    pub slices: Cache,
    /// Units of refcounts, by number.
    pub refcounts: Cache,
    /// The clusters that hold metadata: no data is ever written there.
    pub metadata: NumberSet,
    pub allocations: InFlightAllocations,
    /// No cluster below this is free, as far as we know.
    pub free_hint: u64,
    /// From this cluster on, the file reads as zeroes: it ended before it when it was opened, and nothing was allocated
    /// there since.
    pub zero_from: u64,
    /// How long the file is at least, in bytes.
    pub file_end: u64,
    /// It was made longer ahead of its use.
    pub extended: bool,
    /// Where the next compressed cluster goes.
    pub tail: Tail,
    pub inflated: Inflated,
    /// Clusters that nothing refers to any more, in memory. On disk something may, until the next write-back.
    pub unlinked: Vec<Span>,
    /// Clusters that nothing on disk refers to any more. Requests that began before may still use them.
    pub retired: Vec<(u64, Span)>,
    /// Counts the generations of requests, see `State::collect`.
    pub epoch: u64,
    pub channels: Vec<Pins>,
    /// Work under way, with those who wait for its end.
    pub busy: Vec<(Task, Vec<Waker>)>,
    /// Something was written back, and the file has not been flushed since.
    pub unsynced: bool,
    /// The image is marked as dirty, and refcounts are written when there is no other way, or at the end.
    pub lazy: bool,
    /// How many write-backs have begun, and which was the last to reach the file, and the disk.
    pub write_backs: u64,
    pub write_back_in_file: u64,
    pub write_back_on_disk: u64,
}

/// How far metadata has come, or is to come: to memory of this process, to the file, where it outlives the process, or to
/// the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reach {
    Memory,
    File,
    Disk,
}

impl From<WriteFlags> for Reach {
    /// How far the map must have come before such a write completes.
    fn from(flags: WriteFlags) -> Self {
        match (flags.fua, flags.kept) {
            (true, _) => Self::Disk,
            (false, true) => Self::File,
            (false, false) => Self::Memory,
        }
    }
}

/// One channel's requests in flight, by the parity of the epoch they began in.
#[derive(Clone, Default)]
pub(super) struct Pins([Arc<InFlight>; 2]);

impl Pins {
    fn count(&self, epoch: u64) -> usize {
        // One of them is the state's, one the channel's.
        Arc::strong_count(&self.0[(epoch & 1) as usize])
    }

    fn is_abandoned(&self) -> bool {
        self.0.iter().all(|pin| Arc::strong_count(pin) <= 1)
    }
}

impl Image {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}

impl State {
    /// Keeps whatever host clusters are in use now from being used anew until the pin is dropped.
    pub(super) fn pin(&self, pins: &Pins) -> Arc<InFlight> {
        pins.0[(self.epoch & 1) as usize].clone()
    }

    /// Makes a new channel's requests count.
    pub(super) fn add_channel(&mut self) -> Pins {
        self.channels.retain(|pins| !pins.is_abandoned());
        let pins = Pins::default();
        self.channels.push(pins.clone());
        pins
    }

    /// The retired clusters that no request can be using any more.
    ///
    /// A request that uses a cluster began before it was retired. Clusters are retired in an epoch; the next epoch begins
    /// only when no request of the last but one is left, as both count in the same place. So two epochs later all that
    /// could know the cluster have ended.
    pub(super) fn collect(&mut self) -> Vec<Span> {
        for _ in 0..2 {
            let next = self.epoch + 1;
            // The state and a live channel hold one each.
            let idle = self.channels.iter().all(|pins| pins.count(next) <= 2);
            // What those requests did with the clusters comes before what we do.
            fence(Ordering::Acquire);
            if idle {
                self.epoch = next;
            }
        }
        let epoch = self.epoch;
        let (free, kept) = std::mem::take(&mut self.retired).into_iter().partition(|(at, _)| at + 2 <= epoch);
        self.retired = kept;
        let free: Vec<(u64, Span)> = free;
        free.into_iter().map(|(_, span)| span).collect()
    }

    /// Whether there is anything that a write-back would write.
    pub(super) fn is_dirty(&self) -> bool {
        self.slices.any_dirty()
            || !self.l1_dirty.is_empty()
            || (!self.lazy && (self.refcounts.any_dirty() || !self.refcount_table_dirty.is_empty()))
            || !self.unlinked.is_empty()
    }

    pub(super) fn is_busy(&self, task: Task) -> bool {
        self.busy.iter().any(|(other, _)| *other == task)
    }

    /// How far what the slot's entries say has come, with all that it rests on.
    pub(super) fn reach(&self, slot: usize) -> Reach {
        let is_written = !self.slices.is_dirty(slot)
            && self.l1_dirty.is_empty()
            && (self.lazy || self.refcount_table_dirty.is_empty())
            && !self.is_busy(Task::WriteBack);
        match (is_written, self.unsynced) {
            (false, _) => Reach::Memory,
            (true, true) => Reach::File,
            (true, false) => Reach::Disk,
        }
    }

    /// The slot of the slice that maps `offset`; `None` where there is no L2 table.
    pub(super) fn slice(&mut self, offset: u64) -> Attempt<Option<usize>> {
        let number = self.geometry.slice_number(offset);
        if let Some(slot) = self.slices.find(number) {
            return Ok(Some(slot));
        }
        match self.table(offset)? {
            None => Ok(None),
            Some(_) => Err(Stop::Need(Need::Slice(number))),
        }
    }

    /// The offset of the L2 table that maps `offset` on the disk.
    pub(super) fn table(&self, offset: u64) -> Attempt<Option<u64>> {
        let index = offset / self.geometry.table_span();
        let entry = usize::try_from(index).ok().and_then(|index| self.l1.get(index));
        let entry = *entry.ok_or(Stop::Fail(BlockError::OutOfRange))?;
        let table = self.geometry.l2_table(entry)?;
        // A table that is a part of other metadata, or of the header, would be damaged by whatever we write to it.
        if table == Some(0)
            || (self.geometry.data_file && table.is_some_and(|table| table < self.geometry.cluster_size()))
        {
            return Err(Stop::Corrupt("an L2 table lies on the header"));
        }
        Ok(table)
    }

    /// Marks an L1 entry as copied, or not.
    pub(super) fn set_l1_mark(&mut self, at: usize, copied: bool) {
        let Some(entry) = self.l1.get_mut(at) else { return };
        let marked = if copied { *entry | COPIED } else { *entry & !COPIED };
        if *entry != marked {
            *entry = marked;
            self.l1_dirty.insert(at / super::tables::SECTOR_WORDS);
        }
    }

    /// The entry of the cluster at `offset`, in its slice's slot.
    pub(super) fn entry(&self, slot: usize, offset: u64) -> Entry {
        let words = self.slices.words(slot);
        let at = self.geometry.word_of(offset);
        let word = |at| words.get(at).copied().unwrap_or(0);
        Entry { word: word(at), bitmap: if self.geometry.extended { word(at + 1) } else { 0 } }
    }

    pub(super) fn set_entry(&mut self, slot: usize, offset: u64, entry: Entry) {
        let at = self.geometry.word_of(offset);
        self.slices.set(slot, at, entry.word);
        if self.geometry.extended {
            self.slices.set(slot, at + 1, entry.bitmap);
        }
    }

    /// Checks that `bytes` of guest data from `host` on hit no metadata.
    pub(super) fn check_overlap(&self, host: u64, bytes: u64) -> Result<(), Corrupt> {
        if self.geometry.data_file || bytes == 0 {
            return Ok(());
        }
        let bits = self.geometry.cluster_bits;
        let clusters = host >> bits..=(host + bytes - 1) >> bits;
        match clusters.into_iter().any(|cluster| self.metadata.contains(&cluster)) {
            true => Err("guest data would be written over metadata"),
            false => Ok(()),
        }
    }
}
