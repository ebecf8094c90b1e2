//! The tasks of an AioContext: local futures and their wakers. It owns the ready list; it never sleeps.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

use slab::Slab;

use super::mailbox::{Mailbox, Message};
use super::{AioContext, Inner};
use crate::driver::BoxFuture;
use crate::handoff::Scheduled;

thread_local! {
    /// The thread's context, so that a waker called here skips the mailbox.
    static CURRENT: RefCell<Weak<Inner>> = const { RefCell::new(Weak::new()) };
}

pub(super) fn set_current(context: &AioContext) {
    CURRENT.with(|current| *current.borrow_mut() = Rc::downgrade(&context.0));
}

/// The thread's context, if that mailbox is its.
pub(super) fn current(mailbox: &Arc<Mailbox>) -> Option<AioContext> {
    let current = CURRENT.with(|current| current.borrow().upgrade());
    current.filter(|inner| Arc::ptr_eq(&inner.mailbox, mailbox)).map(AioContext)
}

/// What a waker knows of its task.
pub(super) struct TaskHeader {
    slot: usize,
    scheduled: Scheduled,
    mailbox: Arc<Mailbox>,
}

impl Wake for TaskHeader {
    fn wake(self: Arc<Self>) {
        if !self.scheduled.wants_turn() {
            return;
        }
        let elsewhere = CURRENT.with(|current| match current.borrow().upgrade() {
            Some(inner) if Arc::ptr_eq(&inner.mailbox, &self.mailbox) => {
                inner.tasks.ready.borrow_mut().push_back(self);
                None
            }
            _ => Some(self),
        });
        if let Some(header) = elsewhere {
            let mailbox = header.mailbox.clone();
            mailbox.post(Message::Wake(header));
        }
    }
}

struct Task {
    /// `None` while it runs.
    future: Option<BoxFuture<()>>,
    header: Arc<TaskHeader>,
    waker: Waker,
}

#[derive(Default)]
pub(super) struct Tasks {
    tasks: RefCell<Slab<Task>>,
    ready: RefCell<VecDeque<Arc<TaskHeader>>>,
    /// How many tasks the next turn runs, if some were left over by the last; else 0.
    limit: Cell<usize>,
}

impl Tasks {
    pub(super) fn spawn(&self, future: BoxFuture<()>, mailbox: &Arc<Mailbox>) {
        let mut tasks = self.tasks.borrow_mut();
        let entry = tasks.vacant_entry();
        let header = Arc::new(TaskHeader { slot: entry.key(), scheduled: Scheduled::new(), mailbox: mailbox.clone() });
        let waker = Waker::from(header.clone());
        entry.insert(Task { future: Some(future), header: header.clone(), waker });
        self.ready.borrow_mut().push_back(header);
    }

    pub(super) fn make_ready(&self, header: Arc<TaskHeader>) {
        self.ready.borrow_mut().push_back(header);
    }

    pub(super) fn any_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    /// Runs ready tasks, few at first: after a burst of completions the guest should see the first one, and the device
    /// get the next request, before the last one is dealt with. As long as some are left over, each turn runs twice as
    /// many as the one before, so that a long list costs few turns. A task that wakes itself cannot hold the loop.
    pub(super) fn run_ready(&self) -> bool {
        let limit = self.limit.get().max(1);
        let mut left = limit;
        while left > 0 {
            let Some(header) = self.ready.borrow_mut().pop_front() else { break };
            self.run(&header);
            left -= 1;
        }
        self.limit.set(if self.any_ready() { limit.saturating_mul(2) } else { 0 });
        left < limit
    }

    fn run(&self, header: &Arc<TaskHeader>) {
        let Some((mut future, waker)) = self.take(header) else { return };
        header.scheduled.turn_begins();
        let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut tasks = self.tasks.borrow_mut();
        if done {
            tasks.remove(header.slot);
            drop(tasks);
            // The future's own drop may spawn or wake.
            drop(future);
        } else if let Some(task) = tasks.get_mut(header.slot) {
            task.future = Some(future);
            task.waker = waker;
        }
    }

    /// Takes the task's future out to run it; `None` when the task has ended.
    fn take(&self, header: &Arc<TaskHeader>) -> Option<(BoxFuture<()>, Waker)> {
        let mut tasks = self.tasks.borrow_mut();
        let task = tasks.get_mut(header.slot).filter(|task| Arc::ptr_eq(&task.header, header))?;
        let future = task.future.take()?;
        Some((future, std::mem::replace(&mut task.waker, Waker::noop().clone())))
    }
}
