//! QueueFigures: what one virtqueue of an export has done over all its starts, counted by its iothread, a batch at a time,
//! and read by any thread. It decides nothing.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The counters of one queue, on cache lines of their own: one thread writes them at a time.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    requests: AtomicU64,
    batches: AtomicU64,
    kicks: AtomicU64,
    calls: AtomicU64,
    in_flight: AtomicU64,
    /// 0: it is not started.
    size: AtomicU32,
}

/// What a queue has done, and how it stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueFigures {
    /// Requests taken out of the ring.
    pub requests: u64,
    /// How many times some were there when it was looked at.
    pub batches: u64,
    /// How often the front-end or the guest kicked it.
    pub kicks: u64,
    /// How often it called the guest.
    pub calls: u64,
    /// Requests taken and not yet returned, as of its last turn.
    pub in_flight: u64,
    /// The length of its ring in entries; 0 while it is not started.
    pub size: u32,
}

impl QueueFigures {
    /// How many batches were found by looking, without a kick for them.
    pub fn polled_batches(&self) -> u64 {
        self.batches.saturating_sub(self.kicks)
    }
}

/// Adds without a locked instruction: there is one writer.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl Counters {
    #[inline]
    pub(super) fn popped(&self, requests: usize) {
        add(&self.requests, requests as u64);
        add(&self.batches, 1);
    }

    pub(super) fn kicked(&self) {
        add(&self.kicks, 1);
    }

    #[inline]
    pub(super) fn called(&self) {
        add(&self.calls, 1);
    }

    #[inline]
    pub(super) fn set_in_flight(&self, requests: usize) {
        self.in_flight.store(requests as u64, Ordering::Relaxed);
    }

    pub(super) fn set_size(&self, entries: u32) {
        self.size.store(entries, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> QueueFigures {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueFigures {
            requests: get(&self.requests),
            batches: get(&self.batches),
            kicks: get(&self.kicks),
            calls: get(&self.calls),
            in_flight: get(&self.in_flight),
            size: self.size.load(Ordering::Relaxed),
        }
    }
}
