//! DeviceStop: an export that stops over an error, and goes on. It owns how many requests its queues keep for later, and
//! so whether it is stopped; the queues own the requests. A stopped device pops nothing, on no queue.

use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockport_block::aio::{AioContext, AioRemote};

use crate::queue::Queue;

/// What the queues of one export share about it.
pub(crate) struct DeviceStop {
    /// Where the queues are found, whether they are started or not.
    queues: Vec<(AioRemote, u64)>,
    /// How long requests are kept; `None`: for ever.
    timeout: Option<Duration>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Requests that are kept, over all queues. The device is stopped as long as there are any.
    kept: usize,
    stopped: bool,
    /// Counts how often somebody wanted the device to go on.
    epoch: u64,
    /// The epoch in which the last timer was set.
    timer_epoch: Option<u64>,
}

impl DeviceStop {
    pub(crate) fn new(queues: Vec<(AioRemote, u64)>, timeout: Option<Duration>) -> Arc<Self> {
        Arc::new(Self { queues, timeout, state: Mutex::default() })
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.state().stopped
    }

    /// A queue keeps a request: the device stops.
    pub(crate) fn keep(self: &Arc<Self>, context: &AioContext) {
        let mut state = self.state();
        state.kept += 1;
        if !std::mem::replace(&mut state.stopped, true) {
            self.each_queue(|queue| queue.follow_device());
        }
        let epoch = state.epoch;
        if let Some(timeout) = self.timeout
            && state.timer_epoch.replace(epoch) != Some(epoch)
        {
            let (this, timer) = (self.clone(), context.clone());
            context.spawn(async move {
                timer.sleep(timeout).await;
                this.timed_out(epoch);
            });
        }
    }

    /// A queue keeps so many requests no longer. With the last one the device goes on.
    pub(crate) fn release(&self, count: usize) {
        let mut state = self.state();
        state.kept = state.kept.saturating_sub(count);
        if state.kept == 0 && std::mem::replace(&mut state.stopped, false) {
            self.each_queue(|queue| queue.follow_device());
        }
    }

    /// Has all kept requests done again.
    pub(crate) fn resume(&self) {
        self.state().epoch += 1;
        self.each_queue(|queue| queue.retry_kept());
    }

    /// Has all kept requests answered with an error.
    pub(crate) fn give_up(&self) {
        self.state().epoch += 1;
        self.each_queue(|queue| queue.give_kept_up());
    }

    fn timed_out(&self, epoch: u64) {
        if self.state().epoch == epoch {
            self.give_up();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn each_queue(&self, run: impl Fn(&Rc<Queue>) + Copy + Send + 'static) {
        for (remote, number) in &self.queues {
            let number = *number;
            remote.post(move |context| {
                if let Some(queue) = context.local::<Queue>(number) {
                    run(&queue);
                }
            });
        }
    }
}
