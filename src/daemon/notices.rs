//! Notices: how other threads tell the main thread that something happened.
//!
//! This file owns the queue and its eventfd. It never acts on a notice.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use blockport_block::OpenResult;
use blockport_block::event::BlockEvent;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::Signal;

/// How many events wait for the main thread.
const EVENTS_MAX: usize = 1024;

/// What happened.
#[derive(Debug)]
pub enum Notice {
    /// The daemon was told to end.
    Signal(Signal),
    /// The block layer has an event.
    Event(BlockEvent),
    /// The export of that number can be used by nobody any more: its last connection has closed.
    ExportEnded(u64),
    /// The export of that number wants its medium active, or inactive, and waits for the answer.
    SetActive { number: u64, active: bool, answer: Sender<OpenResult> },
}

struct Shared {
    queue: Mutex<VecDeque<Notice>>,
    event: EventFd,
}

/// The main thread's end.
pub struct Notices(Arc<Shared>);

/// Another thread's end.
#[derive(Clone)]
pub struct Notifier(Arc<Shared>);

impl Notices {
    /// An empty queue.
    ///
    /// # Errors
    /// There are too few descriptors.
    pub fn new() -> nix::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Shared { queue: Mutex::default(), event })))
    }

    /// The end for another thread.
    pub fn notifier(&self) -> Notifier {
        Notifier(self.0.clone())
    }

    /// Takes what there is.
    pub fn take(&self) -> VecDeque<Notice> {
        // The count says nothing that the queue does not.
        let _ = self.0.event.read();
        std::mem::take(&mut self.0.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

impl Notifier {
    /// Tells the main thread.
    ///
    /// Events beyond what the queue holds are dropped: they come from devices, which do not wait for the main thread.
    pub fn send(&self, notice: Notice) {
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(notice, Notice::Event(_)) && queue.len() >= EVENTS_MAX {
            return;
        }
        queue.push_back(notice);
        drop(queue);
        // It can only fail when the count is full, and then the main thread is about to look anyway.
        let _ = self.0.event.write(1);
    }
}
