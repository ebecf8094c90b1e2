//! A virtqueue at work on its iothread: it pops batches, starts requests, collects what completes, publishes once a
//! turn and calls the guest. It owns the started ring from start to stop; the session decides when these are.

mod bench;
mod figures;
mod handover;
mod kept;
mod logging;
mod workers;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use blockport_block::aio::{AioContext, Heat, Poller, Signal, TurnEnd, Watch};
use blockport_block::event::{self, BlockEvent};
use blockport_block::{BackendChannel, BlockError};

use crate::device_stop::DeviceStop;
use crate::guest_memory::GuestMemory;
use crate::virtio_blk::{self, DeviceModel, Failed, Pending, Started};
use crate::virtqueue::{Chain, RingError, VirtQueue};

#[doc(hidden)]
pub use bench::start_for_bench;
pub(crate) use figures::Counters;
pub use figures::QueueFigures;
pub(crate) use handover::Halted;
use workers::IdleWorkers;

/// The most chains popped in one go, so that one queue cannot hold its iothread.
const BATCH_MAX: usize = 128;
/// How often a ring whose front-end gave no kick descriptor is looked at.
const POLLING_MODE_INTERVAL: Duration = Duration::from_micros(100);
/// The most buffers of requests in flight, 16 bytes each: a guest could otherwise have a ring's length of them in every
/// entry of the ring. One request is always let through.
const BUFFERS_IN_FLIGHT_MAX: usize = 1 << 18;
/// Chains with room for more buffers than this are not kept.
const SPARE_BUFFERS_MAX: usize = 1024;
/// How often one queue logs failed requests, at most.
const ERROR_LOG_INTERVAL: Duration = Duration::from_secs(1);

/// What a queue tells the guest and the front-end with.
#[derive(Default)]
pub(crate) struct Notifiers {
    /// Signalled to call the guest; `None`: the front-end polls.
    pub(crate) call: Option<Arc<OwnedFd>>,
    /// Signalled when the ring turns out to be broken.
    pub(crate) error: Option<Arc<OwnedFd>>,
}

/// What a queue is started with.
pub(crate) struct QueueSetup {
    /// "export \"e0\", queue 3", for the log.
    pub(crate) name: String,
    /// Its number, from 0.
    pub(crate) index: u16,
    pub(crate) ring: VirtQueue,
    pub(crate) device: Arc<DeviceModel>,
    pub(crate) device_stop: Arc<DeviceStop>,
    /// `None`: the front-end does not kick.
    pub(crate) kick: Option<Arc<OwnedFd>>,
    pub(crate) notifiers: Notifiers,
    pub(crate) enabled: bool,
    /// The length of the ring, in entries.
    pub(crate) size: u16,
    /// Where it counts what it does.
    pub(crate) figures: Arc<Counters>,
}

/// Chains whose buffers are used again: no allocation per request.
#[derive(Default)]
struct SpareChains(RefCell<Vec<Chain>>);

impl SpareChains {
    fn take(&self) -> Option<Chain> {
        self.0.borrow_mut().pop()
    }

    fn give(&self, mut chain: Chain) {
        chain.memory = None;
        // A few long chains must not make all of them keep their length in memory.
        if chain.iov.capacity() <= SPARE_BUFFERS_MAX {
            self.0.borrow_mut().push(chain);
        }
    }
}

/// A started virtqueue. It keeps itself alive until it is stopped.
pub struct Queue {
    name: String,
    index: u16,
    context: AioContext,
    ring: RefCell<VirtQueue>,
    channel: Rc<BackendChannel>,
    device: Arc<DeviceModel>,
    call: RefCell<Option<Rc<Signal>>>,
    error: RefCell<Option<Rc<Signal>>>,
    kick: RefCell<Option<Watch>>,
    enabled: Cell<bool>,
    /// Pops nothing, for as long as somebody waits for what is in flight.
    stopping: Cell<bool>,
    /// The same for good.
    ending: Cell<bool>,
    broken: Cell<bool>,
    /// Pops nothing, as the device has stopped over an error.
    held: Cell<bool>,
    device_stop: Arc<DeviceStop>,
    /// Failed requests that wait for the device to go on, in the order in which they failed. They are in flight.
    kept: RefCell<VecDeque<Failed>>,
    in_flight: Cell<usize>,
    /// The buffers of the requests in flight, and whether too many of them keep others in the ring.
    buffers_in_flight: Cell<usize>,
    held_back: Cell<bool>,
    /// Whether `turn_end` is registered for this turn.
    dirty: Cell<bool>,
    heat: Heat,
    spare: SpareChains,
    /// Requests handed to a worker task that has not run yet, and the workers that wait for one.
    handed: RefCell<VecDeque<Pending>>,
    idle_workers: IdleWorkers,
    /// Set at the end of a stop: nothing will be served again.
    ended: Cell<bool>,
    /// Whether a task looks at the ring from time to time, as nobody kicks.
    polls: Cell<bool>,
    drained: RefCell<Vec<Waker>>,
    last_error_log: Cell<Option<std::time::Instant>>,
    errors_not_logged: Cell<u64>,
    figures: Arc<Counters>,
}

impl Queue {
    /// Starts the queue on its iothread: calls the guest once and looks at the ring once, whatever it says.
    pub(crate) fn start(setup: QueueSetup, context: &AioContext, channel: Rc<BackendChannel>) -> Rc<Self> {
        let queue = Rc::new(Self {
            name: setup.name,
            index: setup.index,
            context: context.clone(),
            ring: RefCell::new(setup.ring),
            channel,
            device: setup.device,
            call: RefCell::new(setup.notifiers.call.map(Signal::new)),
            error: RefCell::new(setup.notifiers.error.map(Signal::new)),
            kick: RefCell::new(None),
            enabled: Cell::new(setup.enabled),
            stopping: Cell::new(false),
            ending: Cell::new(false),
            broken: Cell::new(false),
            held: Cell::new(setup.device_stop.is_stopped()),
            device_stop: setup.device_stop,
            kept: RefCell::default(),
            in_flight: Cell::new(0),
            buffers_in_flight: Cell::new(0),
            held_back: Cell::new(false),
            dirty: Cell::new(false),
            heat: Heat::default(),
            spare: SpareChains::default(),
            handed: RefCell::default(),
            idle_workers: IdleWorkers::default(),
            ended: Cell::new(false),
            polls: Cell::new(false),
            drained: RefCell::default(),
            last_error_log: Cell::new(None),
            errors_not_logged: Cell::new(0),
            figures: setup.figures,
        });
        queue.figures.set_size(setup.size.into());
        queue.call_guest();
        queue.set_kick(setup.kick);
        queue
    }

    /// Watches another kick descriptor, or polls if there is none, and looks at the ring once.
    pub(crate) fn set_kick(self: &Rc<Self>, kick: Option<Arc<OwnedFd>>) {
        let queue = self.clone();
        let watch = kick.map(|fd| self.context.watch(fd, Rc::new(move || queue.kicked())));
        if watch.is_none() && !self.polls.replace(true) {
            let queue = self.clone();
            self.context.spawn(async move {
                while !queue.ended.get() && queue.kick.borrow().is_none() {
                    queue.look();
                    queue.context.sleep(POLLING_MODE_INTERVAL).await;
                }
                queue.polls.set(false);
            });
        }
        self.kick.replace(watch);
        self.look();
    }

    /// Calls the guest by another descriptor from now on, once right away: the old one may have swallowed a call.
    pub(crate) fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        self.call.replace(call.map(Signal::new));
        self.call_guest();
    }

    pub(crate) fn set_error(&self, error: Option<Arc<OwnedFd>>) {
        self.error.replace(error.map(Signal::new));
    }

    /// A disabled queue pops nothing; what was popped before is completed.
    pub(crate) fn set_enabled(self: &Rc<Self>, enabled: bool) {
        self.enabled.set(enabled);
        if enabled {
            self.look();
        }
    }

    /// Goes over to another memory table. If it lacks something of the old one, drain first.
    pub(crate) fn set_memory(&self, memory: Arc<GuestMemory>) {
        let result = self.ring.borrow_mut().set_memory(memory);
        if let Err(error) = result {
            self.break_ring(error);
        }
    }

    /// Pops nothing until [`Queue::resume`], and returns when nothing is in flight but what is kept.
    pub(crate) async fn pause(&self) {
        self.stopping.set(true);
        self.drained().await;
    }

    pub(crate) fn resume(self: &Rc<Self>) {
        self.stopping.set(false);
        self.look();
    }

    /// Requests popped and not yet completed.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    /// Stops the queue: afterwards nothing is in flight and guest memory is not touched. Returns where the ring stands,
    /// as GET_VRING_BASE answers it.
    pub async fn stop(self: Rc<Self>) -> u32 {
        self.stopping.set(true);
        self.ending.set(true);
        self.kick.replace(None);
        self.give_kept_up();
        self.drained().await;
        if !self.broken.get() {
            // Whoever starts the ring again, another back-end perhaps, must find kicks wanted.
            self.ring.borrow_mut().enable_kicks();
        }
        self.publish();
        // The last call goes out before the stop is answered.
        self.context.submit_now();
        self.ended.set(true);
        self.figures.set_size(0);
        while let Some(worker) = self.idle_workers.take() {
            worker.wake();
        }
        self.ring.borrow().base()
    }

    async fn drained(&self) {
        std::future::poll_fn(|cx| {
            if self.is_drained() {
                return Poll::Ready(());
            }
            self.drained.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn is_drained(&self) -> bool {
        self.in_flight.get() == self.kept.borrow().len()
    }

    fn wake_if_drained(&self) {
        if self.is_drained() {
            self.drained.take().into_iter().for_each(Waker::wake);
        }
    }

    fn kicked(self: &Rc<Self>) {
        self.figures.kicked();
        self.look();
    }

    /// Has the loop look at the ring in this turn and those that follow.
    pub fn look(self: &Rc<Self>) {
        self.context.make_hot(self.clone());
    }

    fn serves(&self) -> bool {
        self.enabled.get() && !self.stopping.get() && !self.broken.get() && !self.held.get()
    }

    /// Whether a batch may be there. Kicks are off from here on: the loop looks by itself.
    #[inline]
    fn has_more(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        ring.suppress_kicks();
        // A packed ring of lost memory is all zeroes, in which nothing is available.
        ring.has_more() || ring.is_lost()
    }

    /// Pops and starts up to a batch of requests. Returns whether there was any.
    fn serve_batch(self: &Rc<Self>) -> bool {
        let mut chain = self.spare.take().unwrap_or_default();
        let mut popped = 0;
        let mut ring = self.ring.borrow_mut();
        let error = loop {
            if popped == BATCH_MAX {
                break None;
            }
            if self.buffers_in_flight.get() > BUFFERS_IN_FLIGHT_MAX {
                self.held_back.set(true);
                break None;
            }
            match ring.pop(&mut chain) {
                Ok(true) => {
                    if popped == 0 {
                        self.channel.batch_begins();
                    }
                    popped += 1;
                }
                // A packed ring of lost memory is all zeroes, in which nothing is available.
                Ok(false) => break ring.is_lost().then_some(RingError::MemoryLost),
                Err(error) => break Some(error),
            }
            match virtio_blk::start(&mut chain, &self.device, &self.channel) {
                Started::Done { written } => ring.complete(&chain, written),
                Started::Pending(pending) => {
                    self.hand_over(pending);
                    chain = self.spare.take().unwrap_or_default();
                }
                Started::Failed(failed) => {
                    // What becomes of it may need the ring.
                    drop(ring);
                    self.judge_popped(failed);
                    chain = self.spare.take().unwrap_or_default();
                    ring = self.ring.borrow_mut();
                }
            }
        };
        drop(ring);
        self.spare.give(chain);
        if popped > 0 {
            self.figures.popped(popped);
            self.mark_dirty();
        }
        if let Some(error) = error {
            self.break_ring(error);
        }
        popped > 0
    }

    /// Returns a request that was in flight to the guest.
    fn end(self: &Rc<Self>, chain: Chain, written: u32) {
        self.ring.borrow_mut().complete(&chain, written);
        self.spare.give(chain);
        self.mark_dirty();
        self.in_flight.set(self.in_flight.get() - 1);
        self.wake_if_drained();
    }

    fn mark_dirty(self: &Rc<Self>) {
        if !self.dirty.replace(true) {
            self.context.at_turn_end(self.clone());
        }
    }

    /// Gives a request that did not complete at once to a worker task: an idle one, or a new one.
    fn hand_over(self: &Rc<Self>, pending: Pending) {
        self.in_flight.set(self.in_flight.get() + 1);
        self.buffers_in_flight.set(self.buffers_in_flight.get() + pending.buffers());
        self.handed.borrow_mut().push_back(pending);
        match self.idle_workers.take() {
            Some(worker) => worker.wake(),
            None => {
                let number = self.idle_workers.hire();
                self.context.spawn(self.clone().work(number));
            }
        }
    }

    /// A worker: completes one request after the other until the queue has stopped. There are as many as requests were
    /// ever in flight at once.
    async fn work(self: Rc<Self>, number: usize) {
        while let Some(pending) = self.next_request(number).await {
            let buffers = pending.buffers();
            let result = pending.await;
            self.buffers_in_flight.set(self.buffers_in_flight.get() - buffers);
            if self.held_back.take() {
                self.look();
            }
            match result {
                Ok((chain, written)) => self.end(chain, written),
                Err(failed) => match self.judge(failed) {
                    Some((chain, written)) => self.end(chain, written),
                    None => self.wake_if_drained(),
                },
            }
        }
    }

    async fn next_request(&self, number: usize) -> Option<Pending> {
        std::future::poll_fn(|cx| {
            if let Some(pending) = self.handed.borrow_mut().pop_front() {
                self.idle_workers.set_busy(number);
                return Poll::Ready(Some(pending));
            }
            if self.ended.get() {
                return Poll::Ready(None);
            }
            self.idle_workers.set_idle(number, cx.waker());
            Poll::Pending
        })
        .await
    }

    /// Shows the guest what was completed in this turn, and calls it if it wants to be called.
    fn publish(&self) {
        self.dirty.set(false);
        // Of memory that was lost in this turn, nothing is worth showing.
        let lost = self.ring.borrow().is_lost();
        if lost {
            self.break_ring(RingError::MemoryLost);
        } else if self.ring.borrow_mut().publish() {
            self.call_guest();
        }
        self.figures.set_in_flight(self.in_flight.get());
        self.channel.batch_published();
    }

    fn call_guest(&self) {
        if let Some(call) = &*self.call.borrow() {
            self.figures.called();
            self.context.signal(call);
        }
    }

    /// The ring lies: this queue serves nothing more until it is stopped and started again.
    fn break_ring(&self, error: RingError) {
        if self.broken.replace(true) {
            return;
        }
        tracing::error!("{}: broken: {error}", self.name);
        let (device, reason) = (self.channel.label().to_owned(), error.to_string());
        event::emit(BlockEvent::QueueBroken { device, queue: self.index, reason });
        if let Some(notifier) = &*self.error.borrow() {
            self.context.signal(notifier);
        }
    }

    /// Logs the cause of a failed request, at most once in an interval.
    #[cold]
    fn log_cause(&self, error: BlockError) {
        if matches!(error, BlockError::OutOfRange | BlockError::ReadOnly) {
            // The guest's own doing; it is told, and counted.
            return;
        }
        let now = std::time::Instant::now();
        if self.last_error_log.get().is_some_and(|last| now.duration_since(last) < ERROR_LOG_INTERVAL) {
            self.errors_not_logged.set(self.errors_not_logged.get() + 1);
            return;
        }
        self.last_error_log.set(Some(now));
        match self.errors_not_logged.take() {
            0 => tracing::warn!("{}: a request failed: {error}", self.name),
            more => tracing::warn!("{}: a request failed: {error} (and {more} before it)", self.name),
        }
    }
}

impl Poller for Queue {
    fn poll(self: Rc<Self>) -> bool {
        self.serves() && self.has_more() && self.serve_batch()
    }

    fn arm(&self) -> bool {
        // Once the queue is stopped, the ring may be anything; a broken one is not looked at again.
        if self.stopping.get() || self.broken.get() {
            return false;
        }
        let more = self.ring.borrow_mut().enable_kicks();
        more && self.serves()
    }

    fn heat(&self) -> &Heat {
        &self.heat
    }
}

impl TurnEnd for Queue {
    fn turn_end(&self) {
        self.publish();
    }
}

#[cfg(test)]
mod tests;
