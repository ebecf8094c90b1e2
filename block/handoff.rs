//! Hand-offs: the protocols by which one thread tells another that there is something to do, without a lock and without
//! waking it for nothing. This file owns their memory order, and no more: `tests/races` tries every interleaving of it.

use crate::sync::{AtomicBool, Ordering, fence};

/// Store, full fence, look again. Of two threads that do this, each looking at what the other one stores, at least one sees
/// the other's store.
#[inline]
pub fn store_then_look<T>(store: impl FnOnce(), look: impl FnOnce() -> T) -> T {
    store();
    fence(Ordering::SeqCst);
    look()
}

/// One who takes what others leave, and sleeps when there is nothing.
#[derive(Debug)]
pub(crate) struct Sleeper {
    /// Set after something was left, cleared before it is taken.
    pending: AtomicBool,
    /// Whether it sleeps, or is about to, and needs waking.
    sleeping: AtomicBool,
}

impl Sleeper {
    pub(crate) fn new() -> Self {
        Self { pending: AtomicBool::new(false), sleeping: AtomicBool::new(false) }
    }

    /// Something was left, behind a lock. True: wake the sleeper.
    pub(crate) fn must_be_woken(&self) -> bool {
        let sleeps =
            store_then_look(|| self.pending.store(true, Ordering::Release), || self.sleeping.load(Ordering::Relaxed));
        // Of several that see it asleep, one wakes it.
        sleeps && self.sleeping.swap(false, Ordering::AcqRel)
    }

    /// Whether there may be something to take.
    pub(crate) fn has_something(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    /// What was left is about to be taken, behind the lock.
    pub(crate) fn takes(&self) {
        self.pending.store(false, Ordering::Relaxed);
    }

    /// It is about to sleep. False: there is something, and it must not.
    ///
    /// An exchange would not be needed: a waker's comes before this store, or sees it. But loom does not know that nothing
    /// comes between the store that an exchange reads and its own, and reports a wake-up lost; before a sleep it costs
    /// nothing.
    pub(crate) fn may_sleep(&self) -> bool {
        let announce = || {
            self.sleeping.swap(true, Ordering::AcqRel);
        };
        let pending = store_then_look(announce, || self.pending.load(Ordering::Acquire));
        if pending {
            self.sleeping.store(false, Ordering::Relaxed);
        }
        !pending
    }

    pub(crate) fn woke(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }
}

/// Whether a task waits for its turn already, so that of many who wake it one hands it over.
#[derive(Debug)]
pub(crate) struct Scheduled(AtomicBool);

impl Scheduled {
    pub(crate) fn new() -> Self {
        // A task runs at least once.
        Self(AtomicBool::new(true))
    }

    /// What the task waits for has happened. True: hand it over.
    pub(crate) fn wants_turn(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// The task is about to look. An exchange, not a store: what those did who found it scheduled already must be seen by
    /// the look that follows.
    pub(crate) fn turn_begins(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }
}
