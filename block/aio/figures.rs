//! LoopFigures: how an event loop spends its turns, counted by its thread and read by any. It decides nothing.

use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of one loop, on cache lines of their own: others read them, one thread writes.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Counters {
    pub(super) polls_caught: AtomicU64,
    pub(super) polls_in_vain: AtomicU64,
    pub(super) sleeps: AtomicU64,
}

/// What a loop has done since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoopFigures {
    /// Spins that ended because something came.
    pub polls_caught: u64,
    /// Spins that ended with nothing.
    pub polls_in_vain: u64,
    /// How often it waited in the kernel.
    pub sleeps: u64,
}

impl Counters {
    /// Adds one without a locked instruction: there is one writer.
    pub(super) fn count(counter: &AtomicU64) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> LoopFigures {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LoopFigures {
            polls_caught: get(&self.polls_caught),
            polls_in_vain: get(&self.polls_in_vain),
            sleeps: get(&self.sleeps),
        }
    }
}
