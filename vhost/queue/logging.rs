//! A queue whose guest is migrated: it hands the front-end's log to its ring, which notes in it what is written.

use super::Queue;
use crate::dirty_log::RingLog;

impl Queue {
    /// Logs what is written into guest memory from now on, or no longer. Requests that are in flight count.
    pub(crate) fn set_log(&self, log: Option<RingLog>) {
        self.ring.borrow_mut().set_log(log);
    }
}
