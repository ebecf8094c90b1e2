//! Throttling: a group of members (backends, or nodes of the driver `throttle`) that share limits, which may change at
//! any time. It owns who waits and what wakes them; `throttle/meter.rs` is the algorithm, `throttle/line.rs` the order.
//!
//! A request that must wait does so on its own iothread, by a timer of that. Only the one that goes next has a timer;
//! whoever finds that others may go, too, wakes them. One lock for each group is held for as long as that takes.

mod limits;
mod line;
mod meter;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use slab::Slab;

use crate::aio::{self, AioContext, Sleep};
use crate::error::{OpenError, OpenResult};
pub use limits::{Limited, RATE_MAX, Rate, ThrottleLimits};
use line::{Line, MemberId, Next};
pub use meter::Direction;
use meter::{Allowance, Nanoseconds};

#[cfg(test)]
mod tests;

/// A request that waits, by its place among all that wait.
type Ticket = usize;

/// Limits that its members share, and the requests that wait for their turn.
pub struct ThrottleGroup {
    name: String,
    /// Nothing is limited, so that requests need not even ask.
    unlimited: AtomicBool,
    members: AtomicU32,
    /// Made for a backend, and gone with its last member.
    temporary: AtomicBool,
    state: Mutex<State>,
}

struct State {
    line: Line<Ticket>,
    waiters: Slab<Waiter>,
    /// Whose timer wakes the group, and when.
    timer: Option<(Ticket, Nanoseconds)>,
}

struct Waiter {
    waker: Option<Waker>,
    /// It has left the line and may go.
    goes: bool,
}

/// What a request that waits is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Go,
    /// Until somebody wakes it.
    Wait,
    /// The same, with a timer that wakes it then at the latest.
    WaitUntil(Nanoseconds),
}

impl ThrottleGroup {
    /// A group of its own, in no register.
    ///
    /// # Errors
    /// The limits contradict each other.
    pub fn new(name: &str, limits: ThrottleLimits) -> OpenResult<Arc<Self>> {
        let line = Line::new();
        let group = Self {
            name: name.to_owned(),
            unlimited: AtomicBool::new(true),
            members: AtomicU32::new(0),
            temporary: AtomicBool::new(false),
            state: Mutex::new(State { line, waiters: Slab::new(), timer: None }),
        };
        group.set_limits(limits)?;
        Ok(Arc::new(group))
    }

    /// What users call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The limits as they are.
    pub fn limits(&self) -> ThrottleLimits {
        *self.state().line.limits()
    }

    /// Changes the limits, for those that wait, too.
    ///
    /// # Errors
    /// They contradict each other; nothing has changed.
    pub fn set_limits(&self, limits: ThrottleLimits) -> OpenResult {
        limits.check().map_err(|error| OpenError(format!("throttle group \"{}\": {error}", self.name)))?;
        let now = aio::nanoseconds();
        let mut state = self.state();
        self.unlimited.store(limits.is_unlimited(), Ordering::Relaxed);
        state.line.set_limits(limits, now);
        let mut wake = Vec::new();
        state.schedule(now, &mut wake);
        drop(state);
        wake.into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// How many backends and nodes are in it.
    pub fn members(&self) -> u32 {
        self.members.load(Ordering::Relaxed)
    }

    /// How many requests wait at the moment.
    pub fn waiting(&self) -> usize {
        self.state().line.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Lets everybody go whose turn it is; `wake` gets those to be woken when the lock is free.
    fn schedule(&mut self, now: Nanoseconds, wake: &mut Vec<Waker>) {
        loop {
            match self.line.next(now) {
                Next::Goes(ticket) => self.let_go(ticket, wake),
                Next::NotBefore(at, ticket) => {
                    if self.timer.replace((ticket, at)) != Some((ticket, at)) {
                        wake.extend(self.waiters.get_mut(ticket).and_then(|waiter| waiter.waker.take()));
                    }
                    return;
                }
                Next::Nobody => {
                    self.timer = None;
                    return;
                }
            }
        }
    }

    fn let_go(&mut self, ticket: Ticket, wake: &mut Vec<Waker>) {
        if let Some(waiter) = self.waiters.get_mut(ticket) {
            waiter.goes = true;
            wake.extend(waiter.waker.take());
        }
    }

    fn verdict(&self, ticket: Ticket) -> Verdict {
        match (self.waiters.get(ticket), self.timer) {
            (Some(waiter), _) if waiter.goes => Verdict::Go,
            (Some(_), Some((holder, at))) if holder == ticket => Verdict::WaitUntil(at),
            (Some(_), _) => Verdict::Wait,
            (None, _) => Verdict::Go,
        }
    }
}

/// One backend or node in a group; requests of several iothreads go through it.
pub struct ThrottleMember {
    group: Arc<ThrottleGroup>,
    id: MemberId,
    /// How many reasons there are to let requests go at once: drains, and rings that stop.
    exempt: AtomicU32,
}

impl ThrottleMember {
    /// Joins a group.
    pub fn new(group: Arc<ThrottleGroup>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        group.members.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { group, id: NEXT.fetch_add(1, Ordering::Relaxed), exempt: AtomicU32::new(0) })
    }

    /// The group.
    pub fn group(&self) -> &Arc<ThrottleGroup> {
        &self.group
    }

    /// Has all requests go at once, those that wait first, until [`ThrottleMember::exempt_end`]. They are counted: what
    /// went too early is made up for afterwards. Nests. Any thread.
    pub fn exempt_begin(&self) {
        self.exempt.fetch_add(1, Ordering::SeqCst);
        let now = aio::nanoseconds();
        let mut wake = Vec::new();
        let mut state = self.group.state();
        for ticket in state.line.release(self.id, now) {
            state.let_go(ticket, &mut wake);
        }
        // One of them may have had the timer.
        state.schedule(now, &mut wake);
        drop(state);
        wake.into_iter().for_each(Waker::wake);
    }

    /// Ends one [`ThrottleMember::exempt_begin`].
    pub fn exempt_end(&self) {
        self.exempt.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for ThrottleMember {
    fn drop(&mut self) {
        self.group.members.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A member's half on one iothread: where requests ask.
pub struct ThrottleChannel {
    member: Arc<ThrottleMember>,
    context: AioContext,
    /// What may go without asking, and the turn of the loop in which that holds.
    allowance: Cell<Allowance>,
    turn: Cell<Nanoseconds>,
    /// What went so and is not counted yet, by [`Direction`]: operations, bytes.
    uncounted: [Cell<(u64, u64)>; 2],
}

impl ThrottleChannel {
    /// The half of `member` on the iothread of `context`.
    pub fn new(member: &Arc<ThrottleMember>, context: &AioContext) -> Self {
        Self {
            member: member.clone(),
            context: context.clone(),
            allowance: Cell::default(),
            turn: Cell::new(0),
            uncounted: Default::default(),
        }
    }

    /// Asks whether a request may go. `None`: it may, and is counted; else it waits until the future is ready.
    #[inline]
    pub fn admit(&self, direction: Direction, bytes: u64) -> Option<Throttled> {
        let goes = self.member.group.unlimited.load(Ordering::Relaxed)
            || self.goes_unasked(direction, bytes)
            || self.goes_at_once(direction, bytes);
        if goes { None } else { Some(self.line_up(direction, bytes)) }
    }

    /// Far from the limits one lock a turn is enough.
    #[inline]
    fn goes_unasked(&self, direction: Direction, bytes: u64) -> bool {
        let Allowance { operations, bytes: left, operation_bytes } = self.allowance.get();
        if self.turn.get() != self.context.turn_nanoseconds() || operations == 0 || bytes > left.min(operation_bytes) {
            return false;
        }
        self.allowance.set(Allowance { operations: operations - 1, bytes: left - bytes, operation_bytes });
        let (operations, sum) = self.uncounted[direction as usize].get();
        self.uncounted[direction as usize].set((operations + 1, sum + bytes));
        true
    }

    fn goes_at_once(&self, direction: Direction, bytes: u64) -> bool {
        let now = self.context.turn_nanoseconds();
        let mut state = self.member.group.state();
        self.count(&mut state, now);
        let goes = state.line.passes(direction, bytes, now);
        self.allowance.set(state.line.allowance());
        self.turn.set(now);
        goes
    }

    fn count(&self, state: &mut State, now: Nanoseconds) {
        for direction in [Direction::Read, Direction::Write] {
            let (operations, bytes) = self.uncounted[direction as usize].take();
            if operations > 0 {
                state.line.pour_many(direction, operations, bytes, now);
            }
        }
    }

    #[cold]
    fn line_up(&self, direction: Direction, bytes: u64) -> Throttled {
        let mut state = self.member.group.state();
        // Under the lock, so that whoever begins an exemption finds us in the line, or we find it begun.
        let goes = self.member.exempt.load(Ordering::SeqCst) > 0;
        let ticket = state.waiters.insert(Waiter { waker: None, goes });
        if goes {
            state.line.pour(direction, bytes, self.context.turn_nanoseconds());
        } else {
            state.line.add(self.member.id, direction, bytes, ticket);
        }
        Throttled { member: self.member.clone(), context: self.context.clone(), ticket, timer: None }
    }
}

impl Drop for ThrottleChannel {
    fn drop(&mut self) {
        self.count(&mut self.member.group.state(), aio::nanoseconds());
    }
}

/// A request that waits for its turn.
pub struct Throttled {
    member: Arc<ThrottleMember>,
    context: AioContext,
    ticket: Ticket,
    timer: Option<(Nanoseconds, Sleep)>,
}

impl Future for Throttled {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let group = &this.member.group;
        loop {
            let now = aio::nanoseconds();
            let mut wake = Vec::new();
            let mut state = group.state();
            if let Some(waiter) = state.waiters.get_mut(this.ticket) {
                waiter.waker = None;
            }
            state.schedule(now, &mut wake);
            let verdict = state.verdict(this.ticket);
            if let Some(waiter) = state.waiters.get_mut(this.ticket).filter(|_| verdict != Verdict::Go) {
                waiter.waker = Some(cx.waker().clone());
            }
            drop(state);
            wake.into_iter().for_each(Waker::wake);
            let at = match verdict {
                Verdict::Go => return Poll::Ready(()),
                Verdict::Wait => {
                    this.timer = None;
                    return Poll::Pending;
                }
                Verdict::WaitUntil(at) => at,
            };
            let timer = match this.timer.take() {
                Some((set, timer)) if set == at => timer,
                _ => this.context.sleep_until(at),
            };
            let (_, timer) = this.timer.insert((at, timer));
            std::task::ready!(Pin::new(timer).poll(cx));
            this.timer = None;
        }
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        let group = &self.member.group;
        let mut wake = Vec::new();
        let mut state = group.state();
        if state.waiters.try_remove(self.ticket).is_some_and(|waiter| !waiter.goes) {
            // It went away before its turn; the timer may have been its.
            state.line.remove(self.ticket);
            state.schedule(aio::nanoseconds(), &mut wake);
        }
        drop(state);
        wake.into_iter().for_each(Waker::wake);
    }
}

/// The groups of a process, by name.
#[derive(Default)]
pub struct ThrottleGroups(Mutex<BTreeMap<String, Arc<ThrottleGroup>>>);

impl ThrottleGroups {
    fn groups(&self) -> MutexGuard<'_, BTreeMap<String, Arc<ThrottleGroup>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group of that name.
    pub fn find(&self, name: &str) -> Option<Arc<ThrottleGroup>> {
        self.groups().get(name).cloned()
    }

    /// The names of all that are objects; what was made for a backend is none.
    pub fn names(&self) -> Vec<String> {
        let groups = self.groups();
        let objects = groups.iter().filter(|(_, group)| !group.temporary.load(Ordering::Relaxed));
        objects.map(|(name, _)| name.clone()).collect()
    }

    /// Makes a group.
    ///
    /// # Errors
    /// The name is taken, or the limits contradict each other.
    pub fn create(&self, name: &str, limits: ThrottleLimits) -> OpenResult<Arc<ThrottleGroup>> {
        let mut groups = self.groups();
        if groups.contains_key(name) {
            return Err(OpenError(format!("throttle group \"{name}\" exists already")));
        }
        let group = ThrottleGroup::new(name, limits)?;
        groups.insert(name.to_owned(), group.clone());
        Ok(group)
    }

    /// Gives a group these limits, made first if there is none of that name. One that is made here goes with its last
    /// member.
    pub(crate) fn find_or_create(&self, name: &str, limits: ThrottleLimits) -> OpenResult<Arc<ThrottleGroup>> {
        let mut groups = self.groups();
        if let Some(group) = groups.get(name) {
            group.set_limits(limits)?;
            return Ok(group.clone());
        }
        let group = ThrottleGroup::new(name, limits)?;
        group.temporary.store(true, Ordering::Relaxed);
        groups.insert(name.to_owned(), group.clone());
        Ok(group)
    }

    /// Forgets the groups that were made for backends and have no member any more.
    pub(crate) fn forget_unused(&self) {
        self.groups().retain(|_, group| group.members() > 0 || !group.temporary.load(Ordering::Relaxed));
    }

    /// Forgets a group that nobody uses.
    ///
    /// # Errors
    /// There is none of that name, or it has members.
    pub fn remove(&self, name: &str) -> OpenResult {
        let mut groups = self.groups();
        match groups.get(name).map(|group| group.members()) {
            None => Err(OpenError(format!("there is no throttle group \"{name}\""))),
            Some(0) => {
                groups.remove(name);
                Ok(())
            }
            Some(members) => Err(OpenError(format!("throttle group \"{name}\" is in use, by {members}"))),
        }
    }
}
