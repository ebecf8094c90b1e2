//! The engine on io_uring: the ring of one AioContext. It owns the ring and what each of its entries points at until the
//! completion; it decides nothing about when to enter the kernel beyond a full submission queue.
#![allow(unsafe_code)] // The submission queue takes raw addresses; each block says why they stay valid.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use slab::Slab;
use vmm_sys_util::eventfd::EventFd;

use super::operation::{Operation, Operations};
use super::signal::{ONE, Signal};
use crate::iovec::IoVec;

/// Entries of the submission queue: more than one turn submits; a full queue is handed over early.
const SUBMISSION_ENTRIES: u32 = 512;
/// Entries of the completion queue. More completions than this at once are kept by the kernel until we enter.
const COMPLETION_ENTRIES: u32 = 8192;

/// The kinds of completion, in the top bits of `user_data`; the rest is a slot.
const KIND_OPERATION: u64 = 0;
const KIND_WATCH: u64 = 1;
const KIND_MAILBOX: u64 = 2;
const KIND_UNWATCH: u64 = 3;
const KIND_SIGNAL: u64 = 4;
const KIND_SHIFT: u32 = 60;

/// All that a ring of ours ever does. The kernel refuses the rest (EACCES), so that whoever gets hold of a ring has no
/// way around what system calls are forbidden: to open a file or make a socket, for example.
const OPCODES: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];

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
    watches: RefCell<Slab<WatchRecord>>,
    /// Those whose write has not completed.
    signals: RefCell<Slab<Rc<Signal>>>,
    reaped: RefCell<Vec<(u64, i32, u32)>>,
    mailbox_fd: Cell<RawFd>,
}

impl Uring {
    /// A ring that also watches the mailbox's event, which must outlive it.
    pub(super) fn new(mailbox: &EventFd) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(COMPLETION_ENTRIES)
            .dontfork()
            .setup_r_disabled()
            .build(SUBMISSION_ENTRIES)?;
        restrict(&ring)?;
        let this = Self {
            ring: RefCell::new(ring),
            watches: RefCell::default(),
            signals: RefCell::default(),
            reaped: RefCell::default(),
            mailbox_fd: Cell::new(mailbox.as_raw_fd()),
        };
        this.arm_mailbox();
        Ok(this)
    }

    /// Submits an operation that has begun.
    pub(super) fn submit(&self, slot: usize, operations: &Operations) {
        let entry = operations.show(slot, entry_for);
        self.push(entry.user_data(user_data(KIND_OPERATION, slot)));
    }

    /// Puts one entry into the submission queue; hands the queue over first when it is full.
    fn push(&self, entry: squeue::Entry) {
        let mut ring = self.ring.borrow_mut();
        loop {
            // SAFETY: the addresses in `entry` are those of the array in an operation's slot and of IoVecs: the first stays
            // until the completion, the others by the promise of `IoVec::new`; descriptors are kept open by the
            // operation's owner, the watch's record or the signal.
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

    fn arm_mailbox(&self) {
        self.push(poll_entry(self.mailbox_fd.get()).user_data(user_data(KIND_MAILBOX, 0)));
    }

    /// Watches a descriptor; the slot is for [`Uring::unwatch`].
    pub(super) fn watch(&self, fd: Arc<OwnedFd>, handler: Rc<dyn Fn()>) -> usize {
        let entry = poll_entry(fd.as_raw_fd());
        let slot = self.watches.borrow_mut().insert(WatchRecord { fd, handler: Some(handler), ended: false });
        self.push(entry.user_data(user_data(KIND_WATCH, slot)));
        slot
    }

    /// Takes what has completed and wakes those who wait for it. Returns whether there was anything.
    pub(super) fn reap(&self, operations: &Operations) -> bool {
        let mut reaped = self.reaped.take();
        reaped.extend(self.ring.borrow_mut().completion().map(|e| (e.user_data(), e.result(), e.flags())));
        let any = !reaped.is_empty();
        for (data, result, flags) in reaped.drain(..) {
            let slot = (data & ((1 << KIND_SHIFT) - 1)) as usize;
            match data >> KIND_SHIFT {
                KIND_OPERATION => operations.done(slot, result),
                KIND_WATCH => self.watch_fired(slot, result, cqueue::more(flags)),
                KIND_SIGNAL => self.signal_done(slot, result),
                KIND_UNWATCH => self.unwatch_done(slot, result),
                KIND_MAILBOX if !cqueue::more(flags) => self.arm_mailbox(),
                _ => {}
            }
        }
        self.reaped.replace(reaped);
        any
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

    pub(super) fn unwatch(&self, slot: usize) {
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
            self.disarm(slot);
        }
    }

    fn disarm(&self, slot: usize) {
        let entry = opcode::PollRemove::new(user_data(KIND_WATCH, slot)).build();
        self.push(entry.user_data(user_data(KIND_UNWATCH, slot)));
    }

    /// A poll that fired in that moment is not removed but armed again, so that it has to be removed again. After all
    /// other results its last completion has come, or is on its way.
    fn unwatch_done(&self, slot: usize, result: i32) {
        let is_dropped = self.watches.borrow().get(slot).is_some_and(|watch| watch.handler.is_none());
        if result == -libc::EALREADY && is_dropped {
            self.disarm(slot);
        }
    }

    pub(super) fn signal(&self, signal: &Rc<Signal>) {
        if signal.want() {
            let slot = self.signals.borrow_mut().insert(signal.clone());
            self.push(signal_entry(signal).user_data(user_data(KIND_SIGNAL, slot)));
        }
    }

    fn signal_done(&self, slot: usize, result: i32) {
        let Some(signal) = self.signals.borrow_mut().try_remove(slot) else { return };
        if signal.sent(result) {
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
}

/// A pause of the kernel is no error: an interrupted wait, a timeout, or a completion queue to be emptied first.
fn tolerate(result: io::Result<usize>) {
    if let Err(error) = result
        && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY))
    {
        panic!("io_uring_enter failed: {error}");
    }
}

/// Limits a ring that is disabled as yet to [`OPCODES`], and enables it.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let submitter = ring.submitter();
    submitter.register_restrictions(&mut OPCODES.map(Restriction::sqe_op))?;
    submitter.register_enable_rings()
}

fn user_data(kind: u64, slot: usize) -> u64 {
    kind << KIND_SHIFT | slot as u64
}

fn poll_entry(fd: RawFd) -> squeue::Entry {
    opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).multi(true).build()
}

fn signal_entry(signal: &Signal) -> squeue::Entry {
    // At the file's own position, which an eventfd does not have; the value lives for ever.
    opcode::Write::new(Fd(signal.fd().as_raw_fd()), (&raw const ONE).cast(), 8).offset(u64::MAX).build()
}

/// The submission queue entry of an operation, whose pieces stay where they are until the completion.
fn entry_for(operation: Operation<'_>) -> squeue::Entry {
    match operation {
        Operation::Read { fd, offset, iov } => match one_buffer(iov) {
            Some((base, len)) => opcode::Read::new(Fd(fd), base, len).offset(offset).build(),
            None => {
                let (array, count) = kernel_iov(iov);
                opcode::Readv::new(Fd(fd), array, count).offset(offset).build()
            }
        },
        Operation::Write { fd, offset, iov, fua } => {
            let flags = if fua { libc::RWF_DSYNC } else { 0 };
            match one_buffer(iov) {
                Some((base, len)) => opcode::Write::new(Fd(fd), base, len).offset(offset).rw_flags(flags).build(),
                None => {
                    let (array, count) = kernel_iov(iov);
                    opcode::Writev::new(Fd(fd), array, count).offset(offset).rw_flags(flags).build()
                }
            }
        }
        Operation::Fdatasync { fd } => opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::DATASYNC).build(),
        Operation::Fallocate { fd, mode, offset, bytes } => {
            opcode::Fallocate::new(Fd(fd), bytes).offset(offset).mode(mode).build()
        }
    }
}

/// One buffer that fits goes without the array.
fn one_buffer(iov: &[IoVec]) -> Option<(*mut u8, u32)> {
    match iov {
        [one] => u32::try_from(one.len()).ok().map(|len| (one.base(), len)),
        _ => None,
    }
}

/// The array of a vectored operation; the edge keeps its length within IOV_MAX.
fn kernel_iov(iov: &[IoVec]) -> (*const libc::iovec, u32) {
    // IoVec is transparent over libc::iovec.
    (iov.as_ptr().cast(), iov.len() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_opens_no_file_and_makes_no_socket() {
        let event = EventFd::new(0).expect("an eventfd");
        let Ok(uring) = Uring::new(&event) else { return };
        let path = c"/dev/null";
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build().user_data(1);
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build().user_data(2);
        let mut ring = uring.ring.borrow_mut();
        for entry in [open, socket] {
            // SAFETY: the path outlives the ring.
            unsafe { ring.submission().push(&entry) }.expect("room for an entry");
        }
        ring.submit_and_wait(2).expect("submitted");
        let mut results: Vec<(u64, i32)> = ring.completion().map(|c| (c.user_data(), c.result())).collect();
        results.sort_unstable();
        assert_eq!(results, [(1, -libc::EACCES), (2, -libc::EACCES)]);
    }
}
