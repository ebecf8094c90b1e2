//! Histogram: how many requests took how long, in intervals that the user sets. Counted like everything else: by one
//! thread for each backend and iothread, and summed when somebody asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::add;
use crate::error::{OpenError, OpenResult};

/// The most boundaries of a histogram.
pub const BOUNDARIES_MAX: usize = 256;

/// One iothread's part of a histogram.
#[derive(Debug)]
pub(crate) struct Histogram {
    /// In nanoseconds, rising.
    boundaries: Arc<[u64]>,
    /// One more than boundaries: below the first, from each to the next, from the last on.
    bins: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
}

impl Histogram {
    pub(crate) fn new(boundaries: &Arc<[u64]>) -> Self {
        let bins = (0..=boundaries.len()).map(|_| AtomicU64::new(0)).collect();
        Self { boundaries: boundaries.clone(), bins, sum_ns: AtomicU64::new(0) }
    }

    pub(crate) fn record(&self, latency_ns: u64, count: u64) {
        let bin = self.boundaries.partition_point(|boundary| *boundary <= latency_ns);
        if let Some(bin) = self.bins.get(bin) {
            add(bin, count);
        }
        add(&self.sum_ns, latency_ns.saturating_mul(count));
    }

    pub(crate) fn read(&self) -> LatencyHistogram {
        let bins = self.bins.iter().map(|bin| bin.load(Ordering::Relaxed)).collect();
        let sum_ns = self.sum_ns.load(Ordering::Relaxed);
        LatencyHistogram { boundaries: self.boundaries.to_vec(), bins, sum_ns }
    }
}

/// How many requests took how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatencyHistogram {
    /// In nanoseconds, rising.
    pub boundaries: Vec<u64>,
    /// One more than boundaries: how many took less than the first, from each to less than the next, the last or more.
    pub bins: Vec<u64>,
    /// How long all of them took together, in nanoseconds.
    pub sum_ns: u64,
}

impl LatencyHistogram {
    /// The same with another iothread's part; one with other boundaries, set meanwhile, does not count.
    pub(crate) fn and(mut self, other: &Self) -> Self {
        if self.boundaries == other.boundaries {
            self.bins.iter_mut().zip(&other.bins).for_each(|(sum, more)| *sum += more);
            self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        }
        self
    }
}

/// # Errors
/// They do not rise, or there are none or too many of them.
pub(crate) fn check_boundaries(boundaries: &[u64]) -> OpenResult {
    if boundaries.is_empty() || boundaries.len() > BOUNDARIES_MAX {
        return Err(OpenError(format!("boundaries must be from 1 to {BOUNDARIES_MAX} numbers")));
    }
    if boundaries[0] == 0 || boundaries.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(OpenError::new("boundaries must rise, from above 0 on"));
    }
    Ok(())
}
