//! A queue that another process goes on with: it takes nothing more, and what it has taken is done. It stays as it is, so
//! that it can go on by itself if the other does not.

use std::rc::Rc;

use super::Queue;

/// Where a queue stands that takes nothing more.
pub(crate) struct Halted {
    /// As GET_VRING_BASE answers it.
    pub(crate) base: u32,
    /// Requests that failed and are kept, as the device has stopped over an error.
    pub(crate) kept: usize,
    /// Whether the ring has lied.
    pub(crate) broken: bool,
}

impl Queue {
    /// Returns when nothing is in flight but what is kept, the guest has been shown everything, and guest memory is not
    /// touched any more. [`Queue::resume`] goes on.
    pub(crate) async fn halt(self: Rc<Self>) -> Halted {
        self.pause().await;
        let broken = self.broken.get();
        if !broken {
            // Whoever goes on must find kicks wanted.
            self.ring.borrow_mut().enable_kicks();
        }
        self.publish();
        self.context.submit_now();
        Halted { base: self.ring.borrow().base(), kept: self.kept.borrow().len(), broken: self.broken.get() }
    }

    /// The ring is known to lie.
    pub(crate) fn set_broken(&self) {
        self.broken.set(true);
    }
}
