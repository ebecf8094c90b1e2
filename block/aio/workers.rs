//! The worker threads of the process: they carry out what blocks, for every AioContext without io_uring. This file owns
//! the threads and how many there are; what an operation's answer means it does not know.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::mailbox::{Mailbox, Message};
use super::operation::Operation;
use crate::iovec::IoVec;
use crate::sys;

/// The most operations under way at once, over all disks; the rest wait for their turn.
const WORKERS_MAX: usize = 64;

/// What a thread is to do.
pub(super) enum Work {
    /// An operation on a file, with its pieces.
    Operation { operation: Operation<'static>, iov: Vec<IoVec> },
    /// A signal: a write that whoever else has the descriptor can make wait for ever.
    Signal(Arc<OwnedFd>),
}

/// Work, and who waits for its end.
pub(super) struct Job {
    pub(super) slot: usize,
    pub(super) work: Work,
    pub(super) home: Arc<Mailbox>,
}

/// Threads that take jobs in the order in which they came.
pub(super) struct Lane {
    name: &'static str,
    /// The most threads.
    most: usize,
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

static WORKERS: Lane = Lane::new("aio-worker", WORKERS_MAX);
/// Each descriptor has at most one write under way, so there are never more threads than descriptors to signal. A
/// smaller bound would let one front-end take them all, by making its descriptors wait.
static CALLERS: Lane = Lane::new("aio-call", usize::MAX);

/// The threads for operations.
pub(super) fn workers() -> &'static Lane {
    &WORKERS
}

/// The threads for signals.
pub(super) fn callers() -> &'static Lane {
    &CALLERS
}

impl Lane {
    const fn new(name: &'static str, most: usize) -> Self {
        let state = State { jobs: VecDeque::new(), threads: 0, idle: 0 };
        Self { name, most, state: Mutex::new(state), work: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that there is a thread, so that whatever is handed over later is done at some time.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(super) fn ensure_one(&'static self) -> io::Result<()> {
        let mut state = self.state();
        if state.threads == 0 { self.spawn(&mut state) } else { Ok(()) }
    }

    /// Takes all jobs over.
    pub(super) fn take(&'static self, jobs: &mut Vec<Job>) {
        let mut state = self.state();
        let count = jobs.len();
        state.jobs.extend(jobs.drain(..));
        while state.idle < state.jobs.len() && state.threads < self.most {
            // With fewer threads it takes longer.
            if self.spawn(&mut state).is_err() {
                break;
            }
        }
        let wake = count.min(state.idle);
        drop(state);
        for _ in 0..wake {
            self.work.notify_one();
        }
    }

    /// Starts one more thread, which counts as idle until it takes its first job.
    fn spawn(&'static self, state: &mut State) -> io::Result<()> {
        let name = format!("{}-{}", self.name, state.threads);
        std::thread::Builder::new().name(name).spawn(|| self.run())?;
        state.threads += 1;
        state.idle += 1;
        Ok(())
    }

    fn run(&self) -> ! {
        let _abort = AbortOnPanic;
        // Every disk's worker, wherever the iothread is bound that happened to need one more.
        sys::run_anywhere();
        let mut state = self.state();
        loop {
            let Some(job) = state.jobs.pop_front() else {
                // No job, no CPU: it waits without a limit.
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.idle -= 1;
            drop(state);
            let (message, home) = job.perform();
            // Idle first: who gets the answer may have more to do at once, and needs no other thread for it.
            self.state().idle += 1;
            // A loop that has gone waits for nothing.
            home.post(message);
            state = self.state();
        }
    }
}

/// A thread that panics, which is a bug, would leave a request of some disk hanging, while nothing shows it.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        std::process::abort();
    }
}

impl Job {
    /// Does the work. Returns the answer and whom to give it to.
    fn perform(self) -> (Message, Arc<Mailbox>) {
        let slot = self.slot;
        let message = match self.work {
            Work::Operation { operation, iov } => {
                Message::Operation { slot, result: perform(operation.attach(&iov)), iov }
            }
            Work::Signal(fd) => Message::Signal { slot, result: answer(sys::add_one(&fd).map(|()| 0)) },
        };
        (message, self.home)
    }
}

/// Carries one operation out; the answer is as the kernel gives it to io_uring.
fn perform(operation: Operation<'_>) -> i32 {
    answer(match operation {
        Operation::Read { fd, offset, iov } => sys::preadv(fd, iov, offset),
        Operation::Write { fd, offset, iov, fua } => sys::pwritev(fd, iov, offset, fua),
        Operation::Fdatasync { fd } => sys::fdatasync(fd).map(|()| 0),
        Operation::Fallocate { fd, mode, offset, bytes } => sys::fallocate(fd, mode, offset, bytes).map(|()| 0),
    })
}

fn answer(result: io::Result<usize>) -> i32 {
    match result {
        // The kernel transfers less than 2 GiB at once.
        Ok(bytes) => i32::try_from(bytes).unwrap_or(i32::MAX),
        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
    }
}
