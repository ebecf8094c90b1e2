//! Accounting: what a backend has done and how long it took, counted per iothread without any shared cache line being
//! written by two.
//!
//! The clock is read once when a batch of requests is popped and once when what was ready at once is published, or when
//! others complete: a turn of the loop is the unit in which latencies are told.

mod histogram;

use std::ops::Add;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub use histogram::{BOUNDARIES_MAX, LatencyHistogram};
pub(crate) use histogram::{Histogram, check_boundaries};

/// The kinds of request that are counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Write-zeroes.
    WriteZeroes,
}

impl RequestKind {
    /// Every kind, in the order of [`Statistics`].
    pub const ALL: [Self; 5] = [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes];

    /// For people and programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
        }
    }
}

const KINDS: usize = RequestKind::ALL.len();

/// The counters of one iothread's channel; written by that thread only, read by any. On cache lines of their own.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Accounting {
    kinds: [Counters; KINDS],
    /// Requests under way.
    under_way: AtomicU64,
    /// When the last request was completed, as [`crate::aio::nanoseconds`] has it; 0: none was.
    last_ns: AtomicU64,
    /// Made by the control side, written by the iothread.
    histograms: Mutex<Histograms>,
}

/// The histograms of one iothread, by kind; `None` where nobody asked for one.
pub(crate) type Histograms = [Option<Arc<Histogram>>; KINDS];

#[derive(Default)]
struct Counters {
    bytes: AtomicU64,
    operations: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    merged: AtomicU64,
    time_ns: AtomicU64,
}

/// Adds without a locked instruction: there is one writer.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl Accounting {
    #[inline]
    pub(crate) fn done(&self, kind: RequestKind, bytes: u64, ok: bool) {
        let counters = &self.kinds[kind as usize];
        if ok {
            add(&counters.bytes, bytes);
            add(&counters.operations, 1);
        } else {
            add(&counters.failed, 1);
        }
    }

    /// Takes a failure back: the request is kept, and done again later.
    pub(crate) fn not_failed(&self, kind: RequestKind) {
        add(&self.kinds[kind as usize].failed, 1u64.wrapping_neg());
    }

    pub(crate) fn invalid(&self, kind: RequestKind) {
        add(&self.kinds[kind as usize].invalid, 1);
    }

    /// Notes that so many requests went to the medium as part of another one.
    pub(crate) fn merged(&self, kind: RequestKind, count: usize) {
        add(&self.kinds[kind as usize].merged, count as u64);
    }

    /// Notes how long `count` requests took, and that the last of them was completed at `now`.
    pub(crate) fn took(&self, kind: RequestKind, latency_ns: u64, count: u64, now: u64) {
        add(&self.kinds[kind as usize].time_ns, latency_ns.saturating_mul(count));
        self.last_ns.store(now, Ordering::Relaxed);
    }

    pub(crate) fn begins(&self) {
        add(&self.under_way, 1);
    }

    pub(crate) fn ends(&self) {
        add(&self.under_way, 1u64.wrapping_neg());
    }

    pub(crate) fn under_way(&self) -> u64 {
        self.under_way.load(Ordering::Relaxed)
    }

    pub(crate) fn last_ns(&self) -> u64 {
        self.last_ns.load(Ordering::Relaxed)
    }

    pub(crate) fn histograms(&self) -> Histograms {
        self.histograms.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn histogram(&self, kind: RequestKind) -> Option<Arc<Histogram>> {
        self.histograms()[kind as usize].clone()
    }

    pub(crate) fn set_histogram(&self, kind: RequestKind, histogram: Option<Histogram>) {
        let mut histograms = self.histograms.lock().unwrap_or_else(PoisonError::into_inner);
        histograms[kind as usize] = histogram.map(Arc::new);
    }

    pub(crate) fn read(&self) -> Statistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics(std::array::from_fn(|kind| {
            let from = &self.kinds[kind];
            KindStatistics {
                bytes: get(&from.bytes),
                operations: get(&from.operations),
                failed: get(&from.failed),
                invalid: get(&from.invalid),
                merged: get(&from.merged),
                total_time_ns: get(&from.time_ns),
            }
        }))
    }
}

/// What has been done, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics([KindStatistics; KINDS]);

/// What has been done of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KindStatistics {
    /// Bytes of the operations that succeeded.
    pub bytes: u64,
    /// Operations that succeeded.
    pub operations: u64,
    /// Operations that failed in the block layer.
    pub failed: u64,
    /// Requests refused before they reached the block layer.
    pub invalid: u64,
    /// Operations that went to the medium as part of another one.
    pub merged: u64,
    /// How long all operations that succeeded took together, in nanoseconds.
    pub total_time_ns: u64,
}

impl Statistics {
    /// The figures of one kind.
    pub fn of(&self, kind: RequestKind) -> KindStatistics {
        self.0[kind as usize]
    }

    /// As numbers, to be told to another process: of each kind, in the order of [`RequestKind::ALL`], the fields of
    /// [`KindStatistics`].
    pub fn to_numbers(&self) -> Vec<[u64; 6]> {
        let numbers = |kind: &KindStatistics| {
            [kind.bytes, kind.operations, kind.failed, kind.invalid, kind.total_time_ns, kind.merged]
        };
        self.0.iter().map(numbers).collect()
    }

    /// From such numbers; what is not there is 0.
    pub fn from_numbers(numbers: &[[u64; 6]]) -> Self {
        Self(std::array::from_fn(|kind| {
            let [bytes, operations, failed, invalid, total_time_ns, merged] =
                numbers.get(kind).copied().unwrap_or_default();
            KindStatistics { bytes, operations, failed, invalid, merged, total_time_ns }
        }))
    }

    /// Requests that failed or were refused, of all kinds.
    pub fn failed(&self) -> u64 {
        self.0.iter().map(|kind| kind.failed + kind.invalid).sum()
    }
}

impl Add for Statistics {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|kind| {
            let (a, b) = (self.0[kind], other.0[kind]);
            KindStatistics {
                bytes: a.bytes.wrapping_add(b.bytes),
                operations: a.operations.wrapping_add(b.operations),
                failed: a.failed.wrapping_add(b.failed),
                invalid: a.invalid.wrapping_add(b.invalid),
                merged: a.merged.wrapping_add(b.merged),
                total_time_ns: a.total_time_ns.wrapping_add(b.total_time_ns),
            }
        }))
    }
}
