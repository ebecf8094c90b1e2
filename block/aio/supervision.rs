//! Supervision: has those who wait for something look from time to time how long they do, as long as anybody waits. It owns
//! when they look; a loop where nobody waits sleeps as long as it likes.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use super::nanoseconds;

/// How often they look.
const INTERVAL: Duration = Duration::from_secs(5);

/// Someone who waits for something at times.
pub trait Supervised {
    /// Looks how long things take. `now` is of [`nanoseconds`]. It must not wait.
    fn look(&self, now: u64);
}

/// The supervision of one loop.
#[derive(Default)]
pub(super) struct Supervision {
    /// What is waited for at this moment.
    waits: Cell<usize>,
    next_look: Cell<u64>,
    all: RefCell<Vec<Weak<dyn Supervised>>>,
}

impl Supervision {
    pub(super) fn add(&self, one: Weak<dyn Supervised>) {
        let mut all = self.all.borrow_mut();
        all.retain(|one| one.strong_count() > 0);
        all.push(one);
    }

    #[inline]
    pub(super) fn wait_begins(&self) {
        self.waits.set(self.waits.get() + 1);
    }

    #[inline]
    pub(super) fn wait_ends(&self) {
        self.waits.set(self.waits.get() - 1);
    }

    /// The longest that the loop may sleep: what it would, or less.
    pub(super) fn limit(&self, sleep: Option<Duration>) -> Option<Duration> {
        match (self.waits.get(), sleep) {
            (0, sleep) => sleep,
            (_, sleep) => Some(sleep.map_or(INTERVAL, |sleep| sleep.min(INTERVAL))),
        }
    }

    /// Looks, if it is time to.
    pub(super) fn look(&self) {
        if self.waits.get() == 0 {
            return;
        }
        let now = nanoseconds();
        if now < self.next_look.get() {
            return;
        }
        self.next_look.set(now.saturating_add(INTERVAL.as_nanos() as u64));
        let all: Vec<Rc<dyn Supervised>> = self.all.borrow().iter().filter_map(Weak::upgrade).collect();
        all.iter().for_each(|one| one.look(now));
    }
}
