//! The write threshold of a node: whoever manages the host's space is told once when a write goes past it, and can then
//! make more room before it runs out. It holds up nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Node;
use crate::event::{self, BlockEvent};

/// A threshold in bytes from the node's start; `u64::MAX`: there is none.
pub(super) struct Threshold(AtomicU64);

impl Default for Threshold {
    fn default() -> Self {
        Self(AtomicU64::new(u64::MAX))
    }
}

impl Node {
    /// Has a write that ends after `bytes` from the node's start raise an event, once. `None`: no write does.
    pub fn set_write_threshold(&self, bytes: Option<u64>) {
        self.threshold.0.store(bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The threshold, unless it was passed or never set.
    pub fn write_threshold(&self) -> Option<u64> {
        Some(self.threshold.0.load(Ordering::Relaxed)).filter(|threshold| *threshold != u64::MAX)
    }

    /// Looks at a write that is to end there.
    #[inline]
    pub(crate) fn check_write_threshold(&self, end: u64) {
        let threshold = self.threshold.0.load(Ordering::Relaxed);
        if end > threshold {
            self.threshold_passed(threshold, end - threshold);
        }
    }

    #[cold]
    fn threshold_passed(&self, write_threshold: u64, amount_exceeded: u64) {
        // Whoever takes it away tells of it, of all iothreads that pass it at once.
        let taken = self.threshold.0.compare_exchange(write_threshold, u64::MAX, Ordering::Relaxed, Ordering::Relaxed);
        if taken.is_ok() {
            event::emit(BlockEvent::WriteThreshold {
                node_name: self.name().to_owned(),
                amount_exceeded,
                write_threshold,
            });
        }
    }
}
