//! Operations: what an AioContext has under way in the kernel or on a worker thread. It owns each from its submission to
//! its completion, with the addresses it uses; which engine carries it out it does not know.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use slab::Slab;

use super::AioContext;
use crate::driver::{BlockFuture, RingOwner};
use crate::iovec::{IoVec, total_len};

/// One operation on a file. Offsets and lengths are in bytes. Buffers must stay valid until it completes, which the
/// makers of [`IoVec`]s promise; the descriptor is kept open by the operation's owner.
#[derive(Debug, Clone, Copy)]
pub enum Operation<'a> {
    /// preadv(2).
    Read {
        /// The file.
        fd: RawFd,
        /// Where to read.
        offset: u64,
        /// Where to put it.
        iov: &'a [IoVec],
    },
    /// pwritev2(2).
    Write {
        /// The file.
        fd: RawFd,
        /// Where to write.
        offset: u64,
        /// What to write.
        iov: &'a [IoVec],
        /// RWF_DSYNC: stable before it completes.
        fua: bool,
    },
    /// fdatasync(2).
    Fdatasync {
        /// The file.
        fd: RawFd,
    },
    /// fallocate(2).
    Fallocate {
        /// The file.
        fd: RawFd,
        /// FALLOC_FL_*.
        mode: i32,
        /// The first byte.
        offset: u64,
        /// How many bytes.
        bytes: u64,
    },
}

impl Operation<'_> {
    /// The operation without its borrow; its pieces are kept elsewhere.
    fn detach(self) -> Operation<'static> {
        match self {
            Self::Read { fd, offset, .. } => Operation::Read { fd, offset, iov: &[] },
            Self::Write { fd, offset, fua, .. } => Operation::Write { fd, offset, iov: &[], fua },
            Self::Fdatasync { fd } => Operation::Fdatasync { fd },
            Self::Fallocate { fd, mode, offset, bytes } => Operation::Fallocate { fd, mode, offset, bytes },
        }
    }

    /// The operation with these pieces.
    pub(super) fn attach(self, pieces: &[IoVec]) -> Operation<'_> {
        match self {
            Self::Read { fd, offset, .. } => Operation::Read { fd, offset, iov: pieces },
            Self::Write { fd, offset, fua, .. } => Operation::Write { fd, offset, iov: pieces, fua },
            Self::Fdatasync { fd } => Operation::Fdatasync { fd },
            Self::Fallocate { fd, mode, offset, bytes } => Operation::Fallocate { fd, mode, offset, bytes },
        }
    }
}

/// What the kernel answered, with the operation it answers.
#[derive(Debug, Clone, Copy)]
pub struct Completion<'a> {
    /// Bytes transferred (0 for operations without data), or minus an errno.
    pub result: i32,
    /// As submitted.
    pub operation: Operation<'a>,
}

impl Completion<'_> {
    /// The bytes the operation asked to transfer; 0 for operations without data.
    pub fn bytes(&self) -> u64 {
        match self.operation {
            Operation::Read { iov, .. } | Operation::Write { iov, .. } => total_len(iov),
            Operation::Fdatasync { .. } | Operation::Fallocate { .. } => 0,
        }
    }
}

/// An operation with its pieces copied out, so that it can outlive the caller's borrow.
struct Record {
    operation: Operation<'static>,
    /// Where it is until the completion, unless an engine has taken it along.
    iov: Vec<IoVec>,
    state: State,
}

enum State {
    Pending(Option<Waker>),
    Done(i32),
}

/// The operations of one AioContext, by slot.
#[derive(Default)]
pub(super) struct Operations {
    records: RefCell<Slab<Record>>,
    /// Buffers of pieces of completed operations, to be used again: no allocation per request.
    spare: RefCell<Vec<Vec<IoVec>>>,
    in_flight: Cell<usize>,
}

impl Operations {
    /// Takes an operation over; its slot names it until it is finished.
    pub(super) fn begin(&self, operation: Operation<'_>) -> usize {
        let mut iov = self.spare.borrow_mut().pop().unwrap_or_default();
        iov.clear();
        if let Operation::Read { iov: from, .. } | Operation::Write { iov: from, .. } = operation {
            iov.extend_from_slice(from);
        }
        self.in_flight.set(self.in_flight.get() + 1);
        let record = Record { operation: operation.detach(), iov, state: State::Pending(None) };
        self.records.borrow_mut().insert(record)
    }

    /// Shows an operation that is under way, its pieces where they stay until it is done.
    ///
    /// # Panics
    /// If it is not under way.
    pub(super) fn show<R>(&self, slot: usize, to: impl FnOnce(Operation<'_>) -> R) -> R {
        let records = self.records.borrow();
        let record = &records[slot];
        to(record.operation.attach(&record.iov))
    }

    /// Lends an operation that is under way with its pieces, until [`Operations::done_elsewhere`].
    ///
    /// # Panics
    /// If it is not under way.
    pub(super) fn lend(&self, slot: usize) -> (Operation<'static>, Vec<IoVec>) {
        let record = &mut self.records.borrow_mut()[slot];
        (record.operation, std::mem::take(&mut record.iov))
    }

    /// Notes the result of an operation whose pieces were lent.
    pub(super) fn done_elsewhere(&self, slot: usize, result: i32, iov: Vec<IoVec>) {
        if let Some(record) = self.records.borrow_mut().get_mut(slot) {
            record.iov = iov;
        }
        self.done(slot, result);
    }

    /// Notes the result and wakes who waits for it.
    pub(super) fn done(&self, slot: usize, result: i32) {
        self.in_flight.set(self.in_flight.get() - 1);
        let waker = match self.records.borrow_mut().get_mut(slot) {
            Some(record) => match std::mem::replace(&mut record.state, State::Done(result)) {
                State::Pending(waker) => waker,
                State::Done(_) => None,
            },
            None => None,
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    /// Takes a finished operation and its result; else remembers whom to wake.
    fn finish(&self, slot: usize, cx: &Context<'_>) -> Option<(Record, i32)> {
        let mut records = self.records.borrow_mut();
        match &mut records.get_mut(slot)?.state {
            State::Done(result) => {
                let result = *result;
                Some((records.remove(slot), result))
            }
            State::Pending(waker) => {
                *waker = Some(cx.waker().clone());
                None
            }
        }
    }
}

/// An operation under way. Part of a [`BlockFuture`]; when the kernel has answered, the owner says what follows.
///
/// It must not be dropped before that: the kernel would go on using the buffers. Dropping it early aborts the process.
pub struct RingOp {
    context: AioContext,
    owner: Rc<dyn RingOwner>,
    slot: usize,
    done: bool,
}

impl RingOp {
    pub(super) fn new(context: AioContext, owner: Rc<dyn RingOwner>, slot: usize) -> Self {
        Self { context, owner, slot, done: false }
    }
}

impl Future for RingOp {
    /// What follows: usually ready, or a retry of the rest.
    type Output = BlockFuture;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<BlockFuture> {
        let this = &mut *self;
        let operations = &this.context.0.operations;
        let Some((mut record, result)) = operations.finish(this.slot, cx) else { return Poll::Pending };
        this.done = true;
        let operation = record.operation.attach(&record.iov);
        let next = this.owner.clone().complete(&Completion { result, operation });
        record.iov.clear();
        operations.spare.borrow_mut().push(record.iov);
        Poll::Ready(next)
    }
}

impl Drop for RingOp {
    fn drop(&mut self) {
        if !self.done {
            eprintln!("blockport: a request was dropped while the kernel works on its buffers; stopping here");
            std::process::abort();
        }
    }
}
