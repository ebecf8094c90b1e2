//! The engine without io_uring: epoll to watch and to sleep, worker threads to carry operations out. It owns the half of
//! one AioContext: its watches, its signals and the batch of a turn; the workers are the process's (`workers.rs`).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::mailbox::Mailbox;
use super::operation::Operations;
use super::signal::Signal;
use super::workers::{Job, Lane, Work, callers, workers};
use crate::sys;

/// How many events are fetched at once; the rest come with the next call.
const EVENTS_MAX: usize = 64;
/// A busy loop asks epoll once in as many turns: a queue that is kicked is looked at in every turn anyway, so only the
/// first kick after a sleep waits for this.
const TURNS_BETWEEN_LOOKS: u32 = 8;
/// The event of the mailbox, which needs nothing done; watches have numbers below.
const MAILBOX: u64 = u64::MAX;

struct WatchRecord {
    /// Open until the watch is dropped. Another number for the descriptor where that one is watched already.
    fd: Arc<OwnedFd>,
    handler: Rc<dyn Fn()>,
}

pub(super) struct Threads {
    epoll: Epoll,
    mailbox: Arc<Mailbox>,
    /// By number; a number is never used again, so that an event that comes late meets nobody else.
    watches: RefCell<HashMap<usize, WatchRecord>>,
    next_watch: Cell<usize>,
    /// The watches whose descriptors became readable, to be told by [`Threads::reap`].
    fired: RefCell<Vec<u64>>,
    /// Those whose write has not ended.
    signals: RefCell<Slab<Rc<Signal>>>,
    /// What this turn hands over.
    operations: RefCell<Vec<Job>>,
    calls: RefCell<Vec<Job>>,
    turns: Cell<u32>,
}

impl Threads {
    /// # Errors
    /// No epoll instance, or not one worker thread, can be had.
    pub(super) fn new(mailbox: &Arc<Mailbox>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, mailbox.event().as_raw_fd(), readable(MAILBOX))?;
        workers().ensure_one()?;
        callers().ensure_one()?;
        Ok(Self {
            epoll,
            mailbox: mailbox.clone(),
            watches: RefCell::default(),
            next_watch: Cell::new(0),
            fired: RefCell::default(),
            signals: RefCell::default(),
            operations: RefCell::default(),
            calls: RefCell::default(),
            turns: Cell::new(0),
        })
    }

    pub(super) fn submit(&self, slot: usize, operations: &Operations) {
        let (operation, iov) = operations.lend(slot);
        let work = Work::Operation { operation, iov };
        self.operations.borrow_mut().push(Job { slot, work, home: self.mailbox.clone() });
    }

    pub(super) fn watch(&self, fd: Arc<OwnedFd>, handler: Rc<dyn Fn()>) -> usize {
        let slot = self.next_watch.get();
        self.next_watch.set(slot + 1);
        let fd = match self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), readable(slot as u64)) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => self.watch_again(fd, slot),
            Err(error) => self.unwatchable(fd, slot, &error),
            Ok(()) => fd,
        };
        self.watches.borrow_mut().insert(slot, WatchRecord { fd, handler });
        slot
    }

    /// epoll knows a descriptor by its number, once; under another number it takes it again.
    fn watch_again(&self, fd: Arc<OwnedFd>, slot: usize) -> Arc<OwnedFd> {
        let copy = match fd.try_clone() {
            Ok(copy) => Arc::new(copy),
            Err(error) => return self.unwatchable(fd, slot, &error),
        };
        match self.epoll.ctl(ControlOperation::Add, copy.as_raw_fd(), readable(slot as u64)) {
            Ok(()) => copy,
            Err(error) => self.unwatchable(copy, slot, &error),
        }
    }

    /// The host has no room for another watch: what is there now is looked at, and the log says what is missing.
    fn unwatchable(&self, fd: Arc<OwnedFd>, slot: usize, error: &io::Error) -> Arc<OwnedFd> {
        tracing::error!("descriptor {} cannot be watched: {error}", fd.as_raw_fd());
        self.fired.borrow_mut().push(slot as u64);
        fd
    }

    pub(super) fn unwatch(&self, slot: usize) {
        let watch = self.watches.borrow_mut().remove(&slot);
        if let Some(watch) = watch {
            // Others may have the open file too, so closing it would not take it out. One that never was in fails.
            let _ = self.epoll.ctl(ControlOperation::Delete, watch.fd.as_raw_fd(), EpollEvent::default());
        }
    }

    pub(super) fn signal(&self, signal: &Rc<Signal>) {
        if signal.want() {
            let slot = self.signals.borrow_mut().insert(signal.clone());
            let work = Work::Signal(signal.fd().clone());
            self.calls.borrow_mut().push(Job { slot, work, home: self.mailbox.clone() });
        }
    }

    pub(super) fn signal_done(&self, slot: usize, result: i32) {
        let Some(signal) = self.signals.borrow_mut().try_remove(slot) else { return };
        if signal.sent(result) {
            self.signal(&signal);
        }
    }

    /// Calls the handlers of what became readable. Returns whether anything did.
    pub(super) fn reap(&self) -> bool {
        if self.fired.borrow().is_empty() {
            return false;
        }
        let mut fired = self.fired.take();
        for slot in fired.drain(..) {
            // By number, and with a clone: a handler may drop any watch.
            let slot = usize::try_from(slot).unwrap_or(usize::MAX);
            let handler = self.watches.borrow().get(&slot).map(|watch| watch.handler.clone());
            if let Some(handler) = handler {
                handler();
            }
        }
        // What fired meanwhile comes first in the next turn.
        fired.append(&mut self.fired.borrow_mut());
        self.fired.replace(fired);
        true
    }

    fn hand_over(&self) {
        for (jobs, lane) in [(&self.operations, workers as fn() -> &'static Lane), (&self.calls, callers)] {
            let mut jobs = jobs.borrow_mut();
            if !jobs.is_empty() {
                lane().take(&mut jobs);
            }
        }
    }

    pub(super) fn enter_nowait(&self) {
        self.hand_over();
        let turns = self.turns.get() + 1;
        self.turns.set(turns % TURNS_BETWEEN_LOOKS);
        if turns == TURNS_BETWEEN_LOOKS {
            self.fetch(0);
        }
    }

    pub(super) fn enter_wait(&self, timeout: Option<Duration>) {
        self.hand_over();
        // What could not be watched is to be told first.
        let timeout = if self.fired.borrow().is_empty() { timeout } else { Some(Duration::ZERO) };
        match timeout {
            // What epoll waits for is a whole number of milliseconds.
            Some(timeout) => {
                if sys::wait_readable(self.epoll.as_raw_fd(), timeout) {
                    self.fetch(0);
                }
            }
            None => self.fetch(-1),
        }
    }

    /// Fetches what has become readable, waiting for at most so many milliseconds, or (-1) for ever.
    fn fetch(&self, timeout_ms: i32) {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        // It fails only when it is interrupted, and the loop comes back.
        let count = self.epoll.wait(timeout_ms, &mut events).unwrap_or(0);
        let fired = events[..count].iter().map(EpollEvent::data).filter(|slot| *slot != MAILBOX);
        self.fired.borrow_mut().extend(fired);
    }
}

/// Tells each time somebody writes, without anybody having to read: what a multishot poll does.
fn readable(slot: u64) -> EpollEvent {
    EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, slot)
}
