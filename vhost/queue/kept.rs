//! Failed requests of a queue: what the error policy makes of them, and those that are kept until the device goes on.
//! Nothing here runs as long as requests succeed.

use std::rc::Rc;

use blockport_block::ErrorAction;

use super::Queue;
use crate::virtio_blk::{Failed, Started};
use crate::virtqueue::Chain;

#[cfg(test)]
mod tests;

impl Queue {
    /// Decides what becomes of a request that failed. `None`: it is kept; it still counts as in flight.
    #[cold]
    pub(super) fn judge(&self, mut failed: Failed) -> Option<(Chain, u32)> {
        self.log_cause(failed.error());
        // A ring that ends keeps nothing: whoever waits for its end must not wait for room on the host.
        let may_stop = !self.ending.get();
        match self.channel.error_action(failed.kind(), failed.error(), may_stop) {
            ErrorAction::Report => Some(failed.report()),
            ErrorAction::Ignore => Some(failed.ignore()),
            ErrorAction::Stop => {
                // The front-end may change its memory meanwhile; the request's buffers are in this one.
                failed.hold(self.ring.borrow().memory());
                self.kept.borrow_mut().push_back(failed);
                self.held.set(true);
                self.device_stop.keep(&self.context);
                None
            }
        }
    }

    /// The same for one that failed at once, when it was popped, or done again.
    #[cold]
    pub(super) fn judge_popped(self: &Rc<Self>, failed: Failed) {
        self.in_flight.set(self.in_flight.get() + 1);
        match self.judge(failed) {
            Some((chain, written)) => self.end(chain, written),
            None => self.wake_if_drained(),
        }
    }

    /// The device has stopped, or goes on.
    pub(crate) fn follow_device(self: &Rc<Self>) {
        self.held.set(self.device_stop.is_stopped());
        if !self.held.get() {
            self.look();
        }
    }

    /// Does what was kept once more, in order.
    pub(crate) fn retry_kept(self: &Rc<Self>) {
        let kept = self.kept.take();
        let count = kept.len();
        for failed in kept {
            // It was in flight all the time; starting it counts it again.
            self.in_flight.set(self.in_flight.get() - 1);
            let mut chain = Chain::default();
            match failed.retry(&mut chain, &self.device, &self.channel) {
                Started::Done { written } => {
                    self.in_flight.set(self.in_flight.get() + 1);
                    self.end(chain, written);
                }
                Started::Pending(pending) => self.hand_over(pending),
                Started::Failed(failed) => self.judge_popped(failed),
            }
        }
        self.device_stop.release(count);
    }

    /// Leaves what is kept in the in-flight region, for whoever starts the ring again. Only with one, before a stop.
    pub(crate) fn leave_kept(&self) {
        let count = self.kept.take().len();
        self.in_flight.set(self.in_flight.get() - count);
        self.device_stop.release(count);
    }

    /// Answers what was kept with an error.
    pub(crate) fn give_kept_up(self: &Rc<Self>) {
        let kept = self.kept.take();
        let count = kept.len();
        for failed in kept {
            self.channel.account_given_up(failed.kind());
            let (chain, written) = failed.report();
            self.end(chain, written);
        }
        self.device_stop.release(count);
    }
}
