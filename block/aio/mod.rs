//! AioContext: the event loop of one iothread. It owns the order of a turn: reap completions, poll virtqueues, run
//! ready tasks, then enter the kernel **once**, to submit and to wait; the engine knows how. It knows nothing of block
//! drivers.
//!
//! An [`AioContext`] never leaves its thread; other threads reach it through its [`AioRemote`].

mod engine;
mod figures;
mod iothread;
mod mailbox;
mod operation;
mod poll;
mod signal;
mod supervision;
mod task;
mod threads;
mod timer;
mod uring;
mod workers;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::Poll;
use std::time::{Duration, Instant};

pub use engine::AioEngine;
pub use figures::LoopFigures;
pub use iothread::{Iothread, is_iothread};
pub use mailbox::{AioRemote, Answer};
pub use operation::{Completion, Operation, RingOp};
pub use poll::{Heat, PollSettings, Poller};
pub use signal::{Signal, Watch};
pub use supervision::Supervised;
pub use timer::Sleep;

use engine::Engine;
use figures::Counters;
use mailbox::{Mailbox, Message};
use operation::Operations;
use poll::AdaptivePolling;
use supervision::Supervision;
use task::Tasks;
use timer::Timers;

/// Something to be done once at the end of the turn in which [`AioContext::at_turn_end`] was called, before the
/// kernel is entered: publishing a batch of used descriptors, for one.
pub trait TurnEnd {
    /// Called once for each registration.
    fn turn_end(&self);
}

/// A loop that is always busy looks for what hangs when this mask of its busy turns is 0.
const BUSY_TURNS_UNWATCHED: u64 = (1 << 16) - 1;

/// Reserves `count` numbers for [`AioContext::set_local`], unique in the process; the first is returned.
pub fn reserve_locals(count: u64) -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(count, Ordering::Relaxed)
}

/// What [`nanoseconds`] counts from: its first call.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The monotonic clock as one number, the same for all threads; never 0.
pub fn nanoseconds() -> u64 {
    let elapsed = EPOCH.elapsed();
    // A u64 holds centuries of nanoseconds.
    (elapsed.as_secs() * 1_000_000_000 + u64::from(elapsed.subsec_nanos())).max(1)
}

/// What a loop is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AioSettings {
    /// What carries its operations out.
    pub engine: AioEngine,
    /// How it polls before it sleeps.
    pub polling: PollSettings,
}

impl From<PollSettings> for AioSettings {
    fn from(polling: PollSettings) -> Self {
        Self { polling, ..Self::default() }
    }
}

/// The event loop of one thread. Cloning it gives another handle on the same loop.
#[derive(Clone)]
pub struct AioContext(Rc<Inner>);

struct Inner {
    engine: Engine,
    operations: Operations,
    tasks: Tasks,
    timers: Timers,
    mailbox: Arc<Mailbox>,
    /// The messages taken out of it; kept for its room.
    mail: RefCell<Vec<Message>>,
    polling: AdaptivePolling,
    supervision: Supervision,
    /// The queues to look at in each turn: those that were kicked since the loop last slept.
    hot: RefCell<Vec<Rc<dyn Poller>>>,
    /// How many turns had something to do.
    busy_turns: Cell<u64>,
    turn_end: RefCell<Vec<Rc<dyn TurnEnd>>>,
    /// Objects of this thread that messages from other threads find by number.
    locals: RefCell<HashMap<u64, Weak<dyn Any>>>,
    /// Those of them that nobody else need hold.
    kept: RefCell<HashMap<u64, Rc<dyn Any>>>,
    /// The time of this turn, once somebody has asked for it; else 0.
    turn_nanoseconds: Cell<u64>,
    stopping: Cell<bool>,
}

impl AioContext {
    /// Makes the loop of the calling thread.
    ///
    /// # Errors
    /// The engine is missing, forbidden or out of resources; the error says which.
    pub fn new(settings: impl Into<AioSettings>) -> io::Result<Self> {
        let AioSettings { engine, polling } = settings.into();
        let mailbox = Arc::new(Mailbox::new()?);
        let figures = mailbox.figures().clone();
        let context = Self(Rc::new(Inner {
            engine: Engine::new(engine, &mailbox)?,
            operations: Operations::default(),
            tasks: Tasks::default(),
            timers: Timers::default(),
            mailbox,
            mail: RefCell::default(),
            polling: AdaptivePolling::new(polling, figures),
            supervision: Supervision::default(),
            hot: RefCell::default(),
            busy_turns: Cell::new(0),
            turn_end: RefCell::default(),
            locals: RefCell::default(),
            kept: RefCell::default(),
            turn_nanoseconds: Cell::new(0),
            stopping: Cell::new(false),
        }));
        task::set_current(&context);
        Ok(context)
    }

    /// The handle for other threads.
    pub fn remote(&self) -> AioRemote {
        AioRemote::new(self.0.mailbox.clone())
    }

    /// Starts a task; it first runs later in this turn.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.0.tasks.spawn(Box::pin(future), &self.0.mailbox);
    }

    /// The name of the engine that it runs on: `io_uring` or `threads`.
    pub fn engine(&self) -> &'static str {
        self.0.engine.name()
    }

    /// Hands one operation over with this turn's batch. The answer comes to `owner` (see [`RingOp`]).
    pub fn submit(&self, operation: Operation<'_>, owner: Rc<dyn crate::driver::RingOwner>) -> RingOp {
        let slot = self.0.operations.begin(operation);
        self.0.engine.submit(slot, &self.0.operations);
        RingOp::new(self.clone(), owner, slot)
    }

    /// Calls `handler` whenever `fd` becomes readable, until the [`Watch`] is dropped. The descriptor is never read;
    /// it must be of a kind that can be waited for, as eventfds, pipes and sockets are, and files and disks are not.
    pub fn watch(&self, fd: Arc<OwnedFd>, handler: Rc<dyn Fn()>) -> Watch {
        Watch::new(self.clone(), self.0.engine.watch(fd, handler))
    }

    /// Adds one to a descriptor with this turn's batch, without ever waiting for it.
    pub fn signal(&self, signal: &Rc<Signal>) {
        self.0.engine.signal(signal);
    }

    /// Hands over what was submitted so far now, rather than at the end of the turn.
    pub fn submit_now(&self) {
        self.0.engine.enter_nowait();
    }

    /// Lets everything else that is ready run first, for work that would hold the loop too long in one go.
    pub async fn breathe() {
        let mut breathed = false;
        std::future::poll_fn(|cx| {
            if std::mem::replace(&mut breathed, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// Completes after `duration`.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        Sleep::new(self.clone(), Instant::now() + duration)
    }

    /// Completes at that moment of [`nanoseconds`].
    pub fn sleep_until(&self, moment: u64) -> Sleep {
        Sleep::new(self.clone(), *EPOCH + Duration::from_nanos(moment))
    }

    /// What [`nanoseconds`] was at some moment of this turn: the clock is read once a turn, however often this is asked.
    #[inline]
    pub fn turn_nanoseconds(&self) -> u64 {
        match self.0.turn_nanoseconds.get() {
            0 => self.read_turn_nanoseconds(),
            time => time,
        }
    }

    #[cold]
    fn read_turn_nanoseconds(&self) -> u64 {
        self.0.turn_nanoseconds.set(nanoseconds());
        self.0.turn_nanoseconds.get()
    }

    /// Adds a queue to those looked at in each turn until the loop sleeps. Adding one twice does nothing.
    pub fn make_hot(&self, poller: Rc<dyn Poller>) {
        if !poller.heat().is_hot.replace(true) {
            poller.heat().found_at.set(self.0.busy_turns.get());
            self.0.hot.borrow_mut().push(poller);
        }
    }

    /// Has `end` called at the end of this turn; the caller sees to it that it registers once a turn.
    pub fn at_turn_end(&self, end: Rc<dyn TurnEnd>) {
        self.0.turn_end.borrow_mut().push(end);
    }

    /// Makes an object of this thread known under `id`; it is forgotten when it is dropped.
    pub fn set_local(&self, id: u64, object: Weak<dyn Any>) {
        let mut locals = self.0.locals.borrow_mut();
        locals.retain(|_, object| object.strong_count() > 0);
        locals.insert(id, object);
    }

    /// The object known under `id`, if it still lives and is a `T`.
    pub fn local<T: 'static>(&self, id: u64) -> Option<Rc<T>> {
        self.0.locals.borrow().get(&id)?.upgrade()?.downcast().ok()
    }

    /// Has someone look from time to time, as long as anything is waited for, how long that takes.
    pub(crate) fn supervise(&self, one: Weak<dyn Supervised>) {
        self.0.supervision.add(one);
    }

    /// Something is waited for.
    #[inline]
    pub(crate) fn wait_begins(&self) {
        self.0.supervision.wait_begins();
    }

    /// It has come.
    #[inline]
    pub(crate) fn wait_ends(&self) {
        self.0.supervision.wait_ends();
    }

    /// Keeps an object of this thread until [`AioContext::release_local`], or the end of its iothread.
    pub fn keep_local(&self, id: u64, object: Rc<dyn Any>) {
        self.0.kept.borrow_mut().insert(id, object);
    }

    /// Ends [`AioContext::keep_local`].
    pub fn release_local(&self, id: u64) {
        let object = self.0.kept.borrow_mut().remove(&id);
        // Its drop may reach back here.
        drop(object);
    }

    fn release_all(&self) {
        let objects = self.0.kept.take();
        drop(objects);
    }

    /// How the loop polls; may be changed at any time.
    pub fn set_poll_settings(&self, settings: PollSettings) {
        self.0.polling.set(settings);
    }

    /// Leaves [`AioContext::run`] at the end of this turn.
    pub fn stop(&self) {
        self.0.stopping.set(true);
    }

    /// Runs the loop until [`AioContext::stop`].
    pub fn run(&self) {
        while !self.0.stopping.get() {
            self.turn();
        }
        self.0.stopping.set(false);
    }

    /// Runs the loop until `future` is ready, and returns what it gave. For tools and tests; an iothread is in
    /// [`AioContext::run`].
    pub fn run_until<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let slot = Rc::new(RefCell::new(None));
        let (result, context) = (slot.clone(), self.clone());
        self.spawn(async move {
            *result.borrow_mut() = Some(future.await);
            context.stop();
        });
        loop {
            self.run();
            if let Some(value) = slot.borrow_mut().take() {
                return value;
            }
        }
    }

    /// One turn of the loop: what [`AioContext::run`] repeats.
    pub fn turn(&self) {
        let this = &*self.0;
        this.turn_nanoseconds.set(0);
        let mut progress = this.engine.reap(&this.operations);
        progress |= self.run_mailbox();
        progress |= this.timers.fire();
        progress |= self.poll_hot();
        // After the queues, so that the tasks which they hand requests to wait for them when the kernel is entered.
        progress |= this.tasks.run_ready();
        self.run_turn_end();
        this.busy_turns.set(this.busy_turns.get() + u64::from(progress));
        // A loop that sleeps looks then; one that has no time to sleep looks now and then.
        if this.busy_turns.get() & BUSY_TURNS_UNWATCHED == 0 {
            this.supervision.look();
        }

        let look_again = this.polling.keep_polling(this.hot.borrow().is_empty(), progress);
        if look_again || this.tasks.any_ready() || this.stopping.get() {
            this.engine.enter_nowait();
            if !progress {
                std::hint::spin_loop();
            }
        } else if !(self.ready_to_sleep() && self.sleep_in_kernel()) {
            this.engine.enter_nowait();
        }
    }

    /// Polls the hot queues once. Returns whether any had work.
    fn poll_hot(&self) -> bool {
        let turn = self.0.busy_turns.get();
        let (mut progress, mut any_cold) = (false, false);
        // By index and with a clone: serving a queue may make another one hot.
        let mut at = 0;
        loop {
            let Some(poller) = self.0.hot.borrow().get(at).cloned() else { break };
            if poller.clone().poll() {
                poller.heat().found_at.set(turn);
                progress = true;
            }
            any_cold |= poller.heat().is_cold(turn);
            at += 1;
        }
        if any_cold {
            self.0.hot.borrow_mut().retain(|poller| !poller.heat().is_cold(turn) || stays_hot(&**poller, turn));
        }
        progress
    }

    fn run_turn_end(&self) {
        loop {
            let Some(end) = self.0.turn_end.borrow_mut().pop() else { break };
            end.turn_end();
        }
    }

    fn run_mailbox(&self) -> bool {
        let this = &*self.0;
        if !this.mailbox.has_mail() {
            return false;
        }
        let mut mail = this.mail.take();
        this.mailbox.take(&mut mail);
        let any = !mail.is_empty();
        for message in mail.drain(..) {
            match message {
                Message::Run(run) => run(self),
                Message::Wake(task) => this.tasks.make_ready(task),
                Message::Operation { slot, result, iov } => this.operations.done_elsewhere(slot, result, iov),
                Message::Signal { slot, result } => this.engine.signal_done(slot, result),
            }
        }
        this.mail.replace(mail);
        any
    }

    /// Turns the guests' kicks back on and looks at each queue once more. Returns false when there was work after all.
    fn ready_to_sleep(&self) -> bool {
        let turn = self.0.busy_turns.get();
        let mut hot = self.0.hot.borrow_mut();
        hot.retain(|poller| stays_hot(&**poller, turn));
        hot.is_empty()
    }

    /// Hands over what the turn submitted and sleeps, in one entry. Returns false when a message has come after all.
    fn sleep_in_kernel(&self) -> bool {
        let this = &*self.0;
        if !this.mailbox.prepare_to_sleep() {
            return false;
        }
        let timeout = this.timers.next().map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = this.supervision.limit(timeout);
        let before = this.polling.before_sleep();
        Counters::count(&this.mailbox.figures().sleeps);
        this.engine.enter_wait(timeout);
        this.polling.after_sleep(before);
        this.mailbox.woke();
        this.supervision.look();
        true
    }

    /// How many operations are under way; for tests.
    pub fn operations_in_flight(&self) -> usize {
        self.0.operations.in_flight()
    }
}

/// Turns a queue's kicks back on and looks at it once more. False, and it is hot no longer, when there is no work.
fn stays_hot(poller: &dyn Poller, turn: u64) -> bool {
    let stays = poller.arm();
    poller.heat().is_hot.set(stays);
    poller.heat().found_at.set(turn);
    stays
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

#[cfg(test)]
pub(crate) mod tests;
