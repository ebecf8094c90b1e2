//! The mailbox of an AioContext: how other threads hand it work. It owns the wake-up protocol: an eventfd that is
//! written only while the loop sleeps.

use std::io;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::AioContext;
use super::figures::{Counters, LoopFigures};
use super::task::TaskHeader;
use crate::handoff::Sleeper;
use crate::iovec::IoVec;

pub(super) enum Message {
    Run(Box<dyn FnOnce(&AioContext) + Send>),
    Wake(Arc<TaskHeader>),
    /// A worker thread has carried an operation out, and gives its pieces back.
    Operation {
        slot: usize,
        result: i32,
        iov: Vec<IoVec>,
    },
    /// A worker thread has sent a signal.
    Signal {
        slot: usize,
        result: i32,
    },
}

pub(super) struct Mailbox {
    inbox: Mutex<Inbox>,
    /// The loop, which the eventfd wakes.
    sleeper: Sleeper,
    event: EventFd,
    /// What the loop counts, where those who reach it find it.
    figures: Arc<Counters>,
}

#[derive(Default)]
struct Inbox {
    messages: Vec<Message>,
    closed: bool,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            inbox: Mutex::default(),
            sleeper: Sleeper::new(),
            event: EventFd::new(EFD_NONBLOCK)?,
            figures: Arc::default(),
        })
    }

    pub(super) fn figures(&self) -> &Arc<Counters> {
        &self.figures
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    pub(super) fn post(&self, message: Message) -> bool {
        {
            let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            if inbox.closed {
                return false;
            }
            inbox.messages.push(message);
        }
        if self.sleeper.must_be_woken() {
            // It can only fail when the counter is full, and then the loop is awake anyway.
            let _ = self.event.write(1);
        }
        true
    }

    /// Whether there may be something to take.
    pub(super) fn has_mail(&self) -> bool {
        self.sleeper.has_something()
    }

    /// Takes all messages; `into` is empty and leaves its room to those that come next.
    pub(super) fn take(&self, into: &mut Vec<Message>) {
        self.sleeper.takes();
        std::mem::swap(&mut self.inbox.lock().unwrap_or_else(PoisonError::into_inner).messages, into);
    }

    /// Announces that the loop is about to sleep. Returns false when a message is waiting, and then it must not.
    pub(super) fn prepare_to_sleep(&self) -> bool {
        self.sleeper.may_sleep()
    }

    pub(super) fn woke(&self) {
        self.sleeper.woke();
    }

    /// Refuses and drops all messages from now on.
    pub(super) fn close(&self) {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.closed = true;
        let left = std::mem::take(&mut inbox.messages);
        drop(inbox);
        drop(left);
    }
}

/// The handle by which other threads reach an AioContext.
#[derive(Clone)]
pub struct AioRemote(Arc<Mailbox>);

impl AioRemote {
    pub(super) fn new(mailbox: Arc<Mailbox>) -> Self {
        Self(mailbox)
    }

    /// Has `run` called on the context's thread. False when the context is gone; `run` is dropped then.
    pub fn post(&self, run: impl FnOnce(&AioContext) + Send + 'static) -> bool {
        self.0.post(Message::Run(Box::new(run)))
    }

    /// Has `run` called on the context's thread and waits for its answer; `None` when the context is, or goes, away
    /// without answering. `run` may keep the [`Answer`] and give it later. On the context's own thread, as in tools and
    /// tests, `run` is called at once, and must answer at once.
    ///
    /// # Panics
    /// On the context's own thread, if there is no answer yet: waiting for it would never end.
    pub fn call<T: Send + 'static>(&self, run: impl FnOnce(&AioContext, Answer<T>) + Send + 'static) -> Option<T> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        if let Some(context) = super::task::current(&self.0) {
            run(&context, Answer(sender));
            let answered = receiver.try_recv();
            assert_ne!(answered.as_ref().err(), Some(&std::sync::mpsc::TryRecvError::Empty), "a call to itself waits");
            return answered.ok();
        }
        self.post(move |context| run(context, Answer(sender)));
        receiver.recv().ok()
    }

    /// The same as [`AioRemote::call`], but waits no longer than `time`; what was asked for may be done later still.
    /// `Ok(None)`: there will be no answer.
    ///
    /// # Errors
    /// The time is over.
    pub(crate) fn call_within<T: Send + 'static>(
        &self,
        time: Duration,
        run: impl FnOnce(&AioContext, Answer<T>) + Send + 'static,
    ) -> Result<Option<T>, ()> {
        if self.is_current() {
            return Ok(self.call(run));
        }
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.post(move |context| run(context, Answer(sender)));
        match receiver.recv_timeout(time) {
            Ok(answer) => Ok(Some(answer)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err(()),
        }
    }

    /// What the loop has done so far. Waits for nobody.
    pub fn figures(&self) -> LoopFigures {
        self.0.figures.read()
    }

    /// Refuses and drops all messages from now on.
    pub(super) fn close(&self) {
        self.0.close();
    }

    /// Whether this is the calling thread's own context.
    pub fn is_current(&self) -> bool {
        super::task::current(&self.0).is_some()
    }

    /// Whether both reach the same context.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// The place for the answer to an [`AioRemote::call`]. Dropping it unanswered answers `None`.
pub struct Answer<T>(std::sync::mpsc::SyncSender<T>);

impl<T> Answer<T> {
    /// Gives the answer.
    pub fn give(self, value: T) {
        // The caller waits for it; if it has gone, nobody misses the answer.
        let _ = self.0.send(value);
    }
}
