//! The io_uring of one AioContext. It owns every operation from submission to completion, with its buffers' addresses;
//! it decides nothing about when to enter the kernel beyond a full submission queue.
#![allow(unsafe_code)] // The submission queue takes raw addresses; each block says why they stay valid.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use slab::Slab;
use vmm_sys_util::eventfd::EventFd;

use super::AioContext;
use crate::driver::{BlockFuture, RingOwner};
use crate::iovec::{IoVec, total_len};

/// Entries of the submission queue: more than one turn submits; a full queue is handed over early.
const SUBMISSION_ENTRIES: u32 = 512;
/// Entries of the completion queue. More completions than this at once are kept by the kernel until we enter.
const COMPLETION_ENTRIES: u32 = 8192;

/// The kinds of completion, in the top bits of `user_data`; the rest is a slot.
const KIND_OPERATION: u64 = 0;
const KIND_WATCH: u64 = 1;
const KIND_MAILBOX: u64 = 2;
const KIND_IGNORE: u64 = 3;
const KIND_SIGNAL: u64 = 4;
const KIND_SHIFT: u32 = 60;

/// What a signal writes: an eventfd counts it.
static ONE: u64 = 1;

/// One operation for the kernel. Offsets and lengths are in bytes. Buffers must stay valid until it completes, which
/// the makers of [`IoVec`]s promise.
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

/// What the kernel answered, with the operation it answers.
#[derive(Debug, Clone, Copy)]
pub struct Completion<'a> {
    /// Bytes transferred (0 for operations without data), or minus an errno.
    pub result: i32,
    /// As submitted.
    pub operation: Operation<'a>,
}

/// An operation with its addresses copied out, so that it can outlive the caller's borrow.
struct Record {
    operation: Operation<'static>,
    iov: Vec<IoVec>,
    state: State,
}

enum State {
    Pending(Option<Waker>),
    Done(i32),
}

struct WatchRecord {
    /// Open until the last completion has come.
    fd: Arc<OwnedFd>,
    /// `None` once the watch is dropped.
    handler: Option<Rc<dyn Fn()>>,
    /// The last completion has come. The slot is free when the watch is dropped too, not before: both still know it.
    ended: bool,
}

pub(super) struct Uring {
    ring: RefCell<IoUring>,
    records: RefCell<Slab<Record>>,
    /// Buffers of iovecs of completed operations, to be used again: no allocation per request.
    spare: RefCell<Vec<Vec<IoVec>>>,
    watches: RefCell<Slab<WatchRecord>>,
    /// Those whose write has not completed.
    signals: RefCell<Slab<Rc<Signal>>>,
    reaped: RefCell<Vec<(u64, i32, u32)>>,
    in_flight: Cell<usize>,
    mailbox_fd: Cell<RawFd>,
}

impl Uring {
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(COMPLETION_ENTRIES)
            .dontfork()
            .build(SUBMISSION_ENTRIES)
            .map_err(explain)?;
        Ok(Self {
            ring: RefCell::new(ring),
            records: RefCell::default(),
            spare: RefCell::default(),
            watches: RefCell::default(),
            signals: RefCell::default(),
            reaped: RefCell::default(),
            in_flight: Cell::new(0),
            mailbox_fd: Cell::new(-1),
        })
    }

    pub(super) fn operations_in_flight(&self) -> usize {
        self.in_flight.get()
    }

    pub(super) fn submit(&self, context: &AioContext, operation: Operation<'_>, owner: Rc<dyn RingOwner>) -> RingOp {
        let mut iov = self.spare.borrow_mut().pop().unwrap_or_default();
        iov.clear();
        if let Operation::Read { iov: from, .. } | Operation::Write { iov: from, .. } = operation {
            iov.extend_from_slice(from);
        }
        let entry = entry_for(&operation, &iov);
        let record = Record { operation: detach(operation), iov, state: State::Pending(None) };
        let slot = self.records.borrow_mut().insert(record);
        self.in_flight.set(self.in_flight.get() + 1);
        self.push(entry.user_data(user_data(KIND_OPERATION, slot)));
        RingOp { context: context.clone(), owner, slot, done: false }
    }

    /// Puts one entry into the submission queue; hands the queue over first when it is full.
    fn push(&self, entry: squeue::Entry) {
        let mut ring = self.ring.borrow_mut();
        loop {
            // SAFETY: the addresses in `entry` are those of a Record's iovec buffer and of IoVecs: the first lives in
            // its slot until the completion, the others by the promise of `IoVec::new`; descriptors are kept open by
            // the operation's owner, the watch's record or
            // the signal.
            if unsafe { ring.submission().push(&entry) }.is_ok() {
                return;
            }
            if let Err(error) = ring.submit()
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
            {
                panic!("io_uring refuses submissions: {error}");
            }
        }
    }

    pub(super) fn watch_mailbox(&self, event: &EventFd) {
        self.mailbox_fd.set(event.as_raw_fd());
        self.arm_mailbox();
    }

    fn arm_mailbox(&self) {
        self.push(poll_entry(self.mailbox_fd.get()).user_data(user_data(KIND_MAILBOX, 0)));
    }

    pub(super) fn watch(&self, context: &AioContext, fd: Arc<OwnedFd>, handler: Rc<dyn Fn()>) -> Watch {
        let entry = poll_entry(fd.as_raw_fd());
        let slot = self.watches.borrow_mut().insert(WatchRecord { fd, handler: Some(handler), ended: false });
        self.push(entry.user_data(user_data(KIND_WATCH, slot)));
        Watch { context: context.clone(), slot }
    }

    /// Takes what has completed and wakes those who wait for it. Returns whether there was anything.
    pub(super) fn reap(&self) -> bool {
        let mut reaped = self.reaped.take();
        reaped.extend(self.ring.borrow_mut().completion().map(|e| (e.user_data(), e.result(), e.flags())));
        let any = !reaped.is_empty();
        for (data, result, flags) in reaped.drain(..) {
            let slot = (data & ((1 << KIND_SHIFT) - 1)) as usize;
            match data >> KIND_SHIFT {
                KIND_OPERATION => self.operation_done(slot, result),
                KIND_WATCH => self.watch_fired(slot, result, cqueue::more(flags)),
                KIND_SIGNAL => self.signal_done(slot, result),
                KIND_MAILBOX if !cqueue::more(flags) => self.arm_mailbox(),
                _ => {}
            }
        }
        self.reaped.replace(reaped);
        any
    }

    fn operation_done(&self, slot: usize, result: i32) {
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

    fn watch_fired(&self, slot: usize, result: i32, more: bool) {
        let (handler, arm) = {
            let mut watches = self.watches.borrow_mut();
            let Some(watch) = watches.get_mut(slot) else { return };
            let handler = watch.handler.clone();
            // A multishot that a full completion queue ended must be armed again, and the ring looked at, as kicks may
            // have been missed. A descriptor that cannot be polled answers with an error, for ever.
            let arm = (!more && handler.is_some() && result >= 0).then(|| watch.fd.as_raw_fd());
            watch.ended = !more && arm.is_none();
            if watch.ended && handler.is_none() {
                watches.remove(slot);
            }
            (handler, arm)
        };
        if let Some(fd) = arm {
            self.push(poll_entry(fd).user_data(user_data(KIND_WATCH, slot)));
        }
        if let Some(handler) = handler {
            handler();
        }
    }

    fn unwatch(&self, slot: usize) {
        let ended = {
            let mut watches = self.watches.borrow_mut();
            let Some(watch) = watches.get_mut(slot) else { return };
            let handler = watch.handler.take();
            let ended = watch.ended;
            if ended {
                watches.remove(slot);
            }
            drop(watches);
            // Its drop may reach back here.
            drop(handler);
            ended
        };
        if !ended {
            let entry = opcode::PollRemove::new(user_data(KIND_WATCH, slot)).build();
            self.push(entry.user_data(user_data(KIND_IGNORE, 0)));
        }
    }

    pub(super) fn signal(&self, signal: &Rc<Signal>) {
        match signal.state.get() {
            SignalState::Idle => {
                signal.state.set(SignalState::Sent);
                let slot = self.signals.borrow_mut().insert(signal.clone());
                self.push(signal_entry(signal).user_data(user_data(KIND_SIGNAL, slot)));
            }
            SignalState::Sent | SignalState::SentAndWanted => signal.state.set(SignalState::SentAndWanted),
        }
    }

    fn signal_done(&self, slot: usize, result: i32) {
        let Some(signal) = self.signals.borrow_mut().try_remove(slot) else { return };
        let wanted = signal.state.replace(SignalState::Idle) == SignalState::SentAndWanted;
        // A descriptor that fails once will fail again; one whose counter is full has signalled often enough.
        if wanted && result >= 0 {
            self.signal(&signal);
        }
    }

    /// Hands over what was submitted and runs what the kernel has deferred, without waiting; no system call when there
    /// is neither.
    pub(super) fn enter_nowait(&self) {
        let mut ring = self.ring.borrow_mut();
        let needed = {
            let queue = ring.submission();
            !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
        };
        if needed {
            tolerate(ring.submit());
        }
    }

    /// Hands over what was submitted and waits for a completion or the timeout.
    pub(super) fn enter_wait(&self, timeout: Option<Duration>) {
        let ring = self.ring.borrow_mut();
        let result = match timeout {
            None => ring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        tolerate(result);
    }

    /// Takes the result of a finished operation and its slot.
    fn finish(&self, slot: usize) -> Option<(Record, i32)> {
        let mut records = self.records.borrow_mut();
        let result = match records.get(slot)?.state {
            State::Done(result) => result,
            State::Pending(_) => return None,
        };
        Some((records.remove(slot), result))
    }
}

/// A pause of the kernel is no error: an interrupted wait, a timeout, or a completion queue to be emptied first.
fn tolerate(result: io::Result<usize>) {
    if let Err(error) = result
        && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY))
    {
        panic!("io_uring_enter failed: {error}");
    }
}

fn user_data(kind: u64, slot: usize) -> u64 {
    kind << KIND_SHIFT | slot as u64
}

fn poll_entry(fd: RawFd) -> squeue::Entry {
    opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).multi(true).build()
}

fn signal_entry(signal: &Signal) -> squeue::Entry {
    // At the file's own position, which an eventfd does not have; the value lives for ever.
    opcode::Write::new(Fd(signal.fd.as_raw_fd()), (&raw const ONE).cast(), 8).offset(u64::MAX).build()
}

/// The operation without its borrow; the iovecs are in the record's own buffer.
fn detach(operation: Operation<'_>) -> Operation<'static> {
    match operation {
        Operation::Read { fd, offset, .. } => Operation::Read { fd, offset, iov: &[] },
        Operation::Write { fd, offset, fua, .. } => Operation::Write { fd, offset, iov: &[], fua },
        Operation::Fdatasync { fd } => Operation::Fdatasync { fd },
        Operation::Fallocate { fd, mode, offset, bytes } => Operation::Fallocate { fd, mode, offset, bytes },
    }
}

/// The submission queue entry of an operation; `iov` is the copy that stays where it is until the completion.
fn entry_for(operation: &Operation<'_>, iov: &[IoVec]) -> squeue::Entry {
    // IoVec is transparent over libc::iovec, and the edge keeps `iov` within IOV_MAX.
    let (array, count) = (iov.as_ptr().cast::<libc::iovec>(), iov.len() as u32);
    // One buffer that fits goes without the array.
    let single = match iov {
        [one] => u32::try_from(one.len()).ok().map(|len| (one.base(), len)),
        _ => None,
    };
    match *operation {
        Operation::Read { fd, offset, .. } => match single {
            Some((base, len)) => opcode::Read::new(Fd(fd), base, len).offset(offset).build(),
            None => opcode::Readv::new(Fd(fd), array, count).offset(offset).build(),
        },
        Operation::Write { fd, offset, fua, .. } => {
            let flags = if fua { libc::RWF_DSYNC } else { 0 };
            match single {
                Some((base, len)) => {
                    opcode::Write::new(Fd(fd), base.cast_const(), len).offset(offset).rw_flags(flags).build()
                }
                None => opcode::Writev::new(Fd(fd), array, count).offset(offset).rw_flags(flags).build(),
            }
        }
        Operation::Fdatasync { fd } => opcode::Fsync::new(Fd(fd)).flags(io_uring::types::FsyncFlags::DATASYNC).build(),
        Operation::Fallocate { fd, mode, offset, bytes } => {
            opcode::Fallocate::new(Fd(fd), bytes).offset(offset).mode(mode).build()
        }
    }
}

/// An operation in the kernel. Part of a [`BlockFuture`]; when the kernel has answered, the owner says what follows.
///
/// It must not be dropped before that: the kernel would go on using the buffers. Dropping it early aborts the process.
pub struct RingOp {
    context: AioContext,
    owner: Rc<dyn RingOwner>,
    slot: usize,
    done: bool,
}

impl Future for RingOp {
    /// What follows: usually ready, or a retry of the rest.
    type Output = BlockFuture;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<BlockFuture> {
        let this = &mut *self;
        let uring = &this.context.0.uring;
        let Some((mut record, result)) = uring.finish(this.slot) else {
            if let Some(Record { state: State::Pending(waker), .. }) = uring.records.borrow_mut().get_mut(this.slot) {
                *waker = Some(cx.waker().clone());
            }
            return Poll::Pending;
        };
        this.done = true;
        let operation = match record.operation {
            Operation::Read { fd, offset, .. } => Operation::Read { fd, offset, iov: &record.iov },
            Operation::Write { fd, offset, fua, .. } => Operation::Write { fd, offset, iov: &record.iov, fua },
            other => other,
        };
        let next = this.owner.clone().complete(&Completion { result, operation });
        record.iov.clear();
        uring.spare.borrow_mut().push(record.iov);
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

impl Completion<'_> {
    /// The bytes the operation asked to transfer; 0 for operations without data.
    pub fn bytes(&self) -> u64 {
        match self.operation {
            Operation::Read { iov, .. } | Operation::Write { iov, .. } => total_len(iov),
            Operation::Fdatasync { .. } | Operation::Fallocate { .. } => 0,
        }
    }
}

/// Watches a descriptor until dropped; see [`AioContext::watch`].
pub struct Watch {
    context: AioContext,
    slot: usize,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.context.0.uring.unwatch(self.slot);
    }
}

/// A descriptor, as a rule an eventfd of somebody else's, that is signalled by adding one to it; see
/// [`AioContext::signal`]. At most one write of it is in the kernel, and one that blocks blocks nobody here.
pub struct Signal {
    fd: Arc<OwnedFd>,
    state: Cell<SignalState>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SignalState {
    Idle,
    /// A write is in the kernel.
    Sent,
    /// And another is to follow it.
    SentAndWanted,
}

impl Signal {
    /// Wraps a descriptor. A write is cheapest if it is non-blocking.
    pub fn new(fd: Arc<OwnedFd>) -> Rc<Self> {
        Rc::new(Self { fd, state: Cell::new(SignalState::Idle) })
    }
}

/// Says why there is no io_uring.
fn explain(error: io::Error) -> io::Error {
    let why = match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring".to_owned(),
        Some(libc::EPERM) => match std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled") {
            Ok(value) if value.trim() != "0" => {
                format!("io_uring is forbidden on this machine: kernel.io_uring_disabled is {}", value.trim())
            }
            _ => "io_uring is forbidden to this process (by a container's or service's seccomp policy?)".to_owned(),
        },
        Some(libc::EINVAL) => "this kernel's io_uring is too old: 6.1 or newer is needed".to_owned(),
        Some(libc::ENOMEM) => {
            "the limit on locked memory (ulimit -l) or the memory is too low for an io_uring".to_owned()
        }
        Some(libc::EMFILE | libc::ENFILE) => "too many open files (ulimit -n)".to_owned(),
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{why} ({error})"))
}
