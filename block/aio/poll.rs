//! Adaptive polling: how long the loop spins before it sleeps, with QEMU's three settings and their meaning, and when it
//! gives up spinning because it does not pay. It never looks at a queue itself.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::figures::Counters;

/// A queue that the loop looks at in each turn while it is hot: from a kick until the loop sleeps, or has looked in vain
/// for long while others kept it busy.
pub trait Poller {
    /// Serves what is there, at most one batch; kicks stay off meanwhile. Returns whether there was anything.
    fn poll(self: Rc<Self>) -> bool;
    /// Turns kicks on again and looks once more. True when there is work, and then the queue stays hot.
    fn arm(&self) -> bool;
    /// What the loop notes of it.
    fn heat(&self) -> &Heat;
}

/// What the loop notes of a [`Poller`].
#[derive(Debug, Default)]
pub struct Heat {
    /// Whether it is in the hot list.
    pub(super) is_hot: Cell<bool>,
    /// The number of the last busy turn in which it had something, or became hot.
    pub(super) found_at: Cell<u64>,
}

/// A queue that had nothing in so many busy turns is left to its kicks: they take longer than the loop would have spun
/// for it alone, and a look in vain is paid for by the queues that have work.
const LOOKS_IN_VAIN_MAX: u64 = 64;

impl Heat {
    /// Whether looking is no longer worth it in busy turn number `turn`.
    #[inline]
    pub(super) fn is_cold(&self, turn: u64) -> bool {
        turn - self.found_at.get() > LOOKS_IN_VAIN_MAX
    }
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
/// A spinning loop that did not read the clock for so long was not running: somebody else had the CPU.
const STOLEN: Duration = Duration::from_micros(50);

pub(super) struct AdaptivePolling {
    settings: Cell<PollSettings>,
    /// The present length of a spin.
    spin_ns: Cell<u64>,
    /// When the present spin began; `None` while there is progress.
    since: Cell<Option<Instant>>,
    /// When it last read the clock.
    seen: Cell<Option<Instant>>,
    /// The CPU was taken away during it.
    stolen: Cell<bool>,
    worth: Worth,
    figures: Arc<Counters>,
    now: fn() -> Instant,
}

impl AdaptivePolling {
    pub(super) fn new(settings: PollSettings, figures: Arc<Counters>) -> Self {
        Self { figures, ..Self::with_clock(settings, Instant::now) }
    }

    fn with_clock(settings: PollSettings, now: fn() -> Instant) -> Self {
        Self {
            settings: Cell::new(settings),
            spin_ns: Cell::new(0),
            since: Cell::new(None),
            seen: Cell::new(None),
            stolen: Cell::new(false),
            worth: Worth::default(),
            figures: Arc::default(),
            now,
        }
    }

    pub(super) fn set(&self, settings: PollSettings) {
        self.settings.set(settings);
        self.spin_ns.set(0);
        self.worth.reset();
    }

    /// Whether to look again rather than sleep, after a turn with or without `progress`. Without a hot queue there is
    /// nothing to look at but completions.
    pub(super) fn keep_polling(&self, no_queue: bool, progress: bool) -> bool {
        if progress && self.since.take().is_some() {
            self.look_at_clock();
            self.spun(!self.stolen.take());
        }
        let spin_ns = self.spin_ns.get();
        if spin_ns == 0 || no_queue {
            return false;
        }
        if progress {
            return true;
        }
        match self.since.get() {
            None => {
                self.seen.set(None);
                self.since.set(Some(self.look_at_clock()));
                true
            }
            Some(since) => self.look_at_clock().duration_since(since) < Duration::from_nanos(spin_ns),
        }
    }

    /// The time, with a mark if this thread was kept from looking for too long.
    fn look_at_clock(&self) -> Instant {
        let now = (self.now)();
        if self.seen.replace(Some(now)).is_some_and(|seen| now.duration_since(seen) > STOLEN) {
            self.stolen.set(true);
        }
        now
    }

    /// Learns from a spin that has ended.
    fn spun(&self, caught: bool) {
        let counter = if caught { &self.figures.polls_caught } else { &self.figures.polls_in_vain };
        Counters::count(counter);
        if caught {
            self.worth.caught();
        } else if self.worth.missed(&self.settings.get()) {
            self.spin_ns.set(0);
        }
    }

    /// The start of a sleep; `None` when nobody will ask how long it was.
    pub(super) fn before_sleep(&self) -> Option<Instant> {
        let since = self.since.take();
        if since.is_some() {
            self.stolen.set(false);
            self.spun(false);
        }
        if self.settings.get().poll_max_ns == 0 || self.worth.rests() {
            return None;
        }
        Some(since.unwrap_or_else(self.now))
    }

    /// Adapts the spin to how long the event took to come, the spin before the sleep included.
    pub(super) fn after_sleep(&self, before: Option<Instant>) {
        let Some(before) = before else { return };
        let settings = self.settings.get();
        let waited_ns = u64::try_from((self.now)().duration_since(before).as_nanos()).unwrap_or(u64::MAX);
        let spin_ns = self.spin_ns.get();
        self.spin_ns.set(if waited_ns <= spin_ns {
            spin_ns
        } else if waited_ns > settings.poll_max_ns {
            // A divisor of 0 means: from the start.
            spin_ns.checked_div(settings.poll_shrink).unwrap_or(0)
        } else {
            let grow = if settings.poll_grow == 0 { 2 } else { settings.poll_grow };
            let mut grown = if spin_ns == 0 { POLL_START_NS } else { spin_ns.saturating_mul(grow) };
            // As often as it takes: where events come now a little earlier and now a little later than the longest spin,
            // it would begin anew with each late one, and never be long enough for the others.
            while grow > 1 && grown < waited_ns {
                grown = grown.saturating_mul(grow);
            }
            grown.min(settings.poll_max_ns)
        });
    }
}

/// The first rest, in sleeps, and the longest.
const REST_MIN: u32 = 16;
const REST_MAX: u32 = 4096;
/// How many spins in vain are nothing yet, beside those that find the right length.
const PATIENCE: u32 = 4;
/// For how many in vain one makes up that caught something. Where the sender needs the CPU, none ever does; where the
/// event is late at times, each saves a wake-up on either side, which takes longer than most spins.
const CAUGHT_MAKES_UP: u32 = 8;

/// Whether spinning pays. It does not where the event comes only because the loop went to sleep at last: where whoever
/// sends it needs this CPU. Then each spin, however long, is in vain, and holds the sender up. So after too many in vain
/// the loop rests from spinning for a number of sleeps, longer each time, until a trial succeeds again.
struct Worth {
    /// Spins in vain that nothing has made up for.
    in_vain: Cell<u32>,
    /// Sleeps left of the present rest.
    rest: Cell<u32>,
    next_rest: Cell<u32>,
}

impl Default for Worth {
    fn default() -> Self {
        Self { in_vain: Cell::new(0), rest: Cell::new(0), next_rest: Cell::new(REST_MIN) }
    }
}

impl Worth {
    fn reset(&self) {
        self.in_vain.set(0);
        self.rest.set(0);
        self.next_rest.set(REST_MIN);
    }

    fn caught(&self) {
        self.in_vain.set(self.in_vain.get().saturating_sub(CAUGHT_MAKES_UP));
        if self.in_vain.get() == 0 {
            self.next_rest.set(REST_MIN);
        }
    }

    /// Notes a spin in vain. True: that was one too many, and a rest begins.
    fn missed(&self, settings: &PollSettings) -> bool {
        // From the first length to the longest it takes so many.
        let growth = (settings.poll_max_ns / POLL_START_NS).checked_ilog2().unwrap_or(0);
        let in_vain = self.in_vain.get() + 1;
        if in_vain < growth + PATIENCE {
            self.in_vain.set(in_vain);
            return false;
        }
        self.in_vain.set(0);
        self.rest.set(self.next_rest.get());
        self.next_rest.set((2 * self.next_rest.get()).min(REST_MAX));
        true
    }

    /// Whether the sleep that begins belongs to a rest.
    fn rests(&self) -> bool {
        let rest = self.rest.get();
        self.rest.set(rest.saturating_sub(1));
        rest > 0
    }
}

#[cfg(test)]
mod tests;
