//! IdleWorkers: which of a queue's worker tasks wait for a request, so that the next one wakes exactly one of them.

use std::cell::RefCell;
use std::task::Waker;

/// The worker tasks that wait for a request.
#[derive(Default)]
pub(super) struct IdleWorkers {
    /// In the order in which they began to wait; those that were woken by something else stand here still.
    waiting: RefCell<Vec<(usize, Waker)>>,
    /// Whether each worker waits.
    idle: RefCell<Vec<bool>>,
}

impl IdleWorkers {
    /// The number of a new worker.
    pub(super) fn hire(&self) -> usize {
        let mut idle = self.idle.borrow_mut();
        idle.push(false);
        idle.len() - 1
    }

    pub(super) fn take(&self) -> Option<Waker> {
        loop {
            let (number, waker) = self.waiting.borrow_mut().pop()?;
            if std::mem::replace(&mut self.idle.borrow_mut()[number], false) {
                return Some(waker);
            }
        }
    }

    pub(super) fn set_busy(&self, number: usize) {
        self.idle.borrow_mut()[number] = false;
    }

    pub(super) fn set_idle(&self, number: usize, waker: &Waker) {
        if !std::mem::replace(&mut self.idle.borrow_mut()[number], true) {
            self.waiting.borrow_mut().push((number, waker.clone()));
        }
    }
}
