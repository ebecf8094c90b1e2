//! Accounting: what a backend has done, counted per iothread without any shared cache line being written by two.

use std::ops::Add;
use std::sync::atomic::{AtomicU64, Ordering};

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
}

const KINDS: usize = RequestKind::ALL.len();

/// The counters of one iothread's channel; written by that thread only, read by any. On cache lines of their own.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Accounting([Counters; KINDS]);

#[derive(Default)]
struct Counters {
    bytes: AtomicU64,
    operations: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
}

/// Adds without a locked instruction: there is one writer.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl Accounting {
    #[inline]
    pub(crate) fn done(&self, kind: RequestKind, bytes: u64, ok: bool) {
        let counters = &self.0[kind as usize];
        if ok {
            add(&counters.bytes, bytes);
            add(&counters.operations, 1);
        } else {
            add(&counters.failed, 1);
        }
    }

    /// Takes a failure back: the request is kept, and done again later.
    pub(crate) fn not_failed(&self, kind: RequestKind) {
        add(&self.0[kind as usize].failed, 1u64.wrapping_neg());
    }

    pub(crate) fn invalid(&self, kind: RequestKind) {
        add(&self.0[kind as usize].invalid, 1);
    }

    pub(crate) fn read(&self) -> Statistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics(std::array::from_fn(|kind| {
            let from = &self.0[kind];
            KindStatistics {
                bytes: get(&from.bytes),
                operations: get(&from.operations),
                failed: get(&from.failed),
                invalid: get(&from.invalid),
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
}

impl Statistics {
    /// The figures of one kind.
    pub fn of(&self, kind: RequestKind) -> KindStatistics {
        self.0[kind as usize]
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
                bytes: a.bytes + b.bytes,
                operations: a.operations + b.operations,
                failed: a.failed + b.failed,
                invalid: a.invalid + b.invalid,
            }
        }))
    }
}
