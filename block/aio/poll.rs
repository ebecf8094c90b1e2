//! Adaptive polling: how long the loop spins before it sleeps, with QEMU's three settings and their meaning.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A queue that the loop looks at in each turn while it is hot, that is, from a kick until the loop sleeps.
pub trait Poller {
    /// Serves what is there, at most one batch; kicks stay off meanwhile. Returns whether there was anything.
    fn poll(self: Rc<Self>) -> bool;
    /// Turns kicks on again and looks once more. True when there is work, and then the queue stays hot.
    fn arm(&self) -> bool;
    /// Whether it has ended for good, and the loop may forget it.
    fn is_gone(&self) -> bool;
    /// The loop's own mark for "is in the hot list".
    fn hot_flag(&self) -> &Cell<bool>;
}

/// How the loop polls before it sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PollSettings {
    /// The longest spin, in nanoseconds. 0: never spin.
    pub poll_max_ns: u64,
    /// The factor by which the spin grows when a longer one would have caught the event. 0: 2.
    pub poll_grow: u64,
    /// The divisor by which it shrinks when even the longest would not have. 0: back to no spin at once.
    pub poll_shrink: u64,
}

impl Default for PollSettings {
    /// QEMU's defaults for an iothread.
    fn default() -> Self {
        Self { poll_max_ns: 32_768, poll_grow: 0, poll_shrink: 0 }
    }
}

/// The first spin, in nanoseconds, when growing from 0.
const POLL_START_NS: u64 = 4_000;

pub(super) struct AdaptivePolling {
    settings: Cell<PollSettings>,
    /// The present length of a spin.
    spin_ns: Cell<u64>,
    /// When the present spin began; `None` while there is progress.
    since: Cell<Option<Instant>>,
}

impl AdaptivePolling {
    pub(super) fn new(settings: PollSettings) -> Self {
        Self { settings: Cell::new(settings), spin_ns: Cell::new(0), since: Cell::new(None) }
    }

    pub(super) fn set(&self, settings: PollSettings) {
        self.settings.set(settings);
        self.spin_ns.set(0);
    }

    /// Whether to look again rather than sleep, after a turn with or without `progress`. Without a hot queue there is
    /// nothing to look at but completions.
    pub(super) fn keep_polling(&self, no_queue: bool, progress: bool) -> bool {
        let spin_ns = self.spin_ns.get();
        if progress {
            self.since.set(None);
        }
        if spin_ns == 0 || no_queue {
            return false;
        }
        if progress {
            return true;
        }
        let now = Instant::now();
        match self.since.get() {
            None => {
                self.since.set(Some(now));
                true
            }
            Some(since) => now.duration_since(since) < Duration::from_nanos(spin_ns),
        }
    }

    /// The start of a sleep; `None` when nobody will ask how long it was.
    pub(super) fn before_sleep(&self) -> Option<Instant> {
        let since = self.since.take();
        (self.settings.get().poll_max_ns > 0).then(|| since.unwrap_or_else(Instant::now))
    }

    /// Adapts the spin to how long the event took to come, the spin before the sleep included.
    pub(super) fn after_sleep(&self, before: Option<Instant>) {
        let Some(before) = before else { return };
        let settings = self.settings.get();
        let waited_ns = u64::try_from(before.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let spin_ns = self.spin_ns.get();
        self.spin_ns.set(if waited_ns <= spin_ns {
            spin_ns
        } else if waited_ns > settings.poll_max_ns {
            // A divisor of 0 means: from the start.
            spin_ns.checked_div(settings.poll_shrink).unwrap_or(0)
        } else {
            let grow = if settings.poll_grow == 0 { 2 } else { settings.poll_grow };
            let grown = if spin_ns == 0 { POLL_START_NS } else { spin_ns.saturating_mul(grow) };
            grown.min(settings.poll_max_ns)
        });
    }
}
