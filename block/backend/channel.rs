//! BackendChannel: a BlockBackend's half on one iothread, where requests start. It owns the gate in front of the medium,
//! what is in flight, and a request's way into it; it changes nothing but its own copies.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use super::BlockBackend;
use super::plug::Plugged;
use super::request::{Parked, Request, State, Submitted};
use super::requests::{Entry, Requests};
use super::throttling::Gate;
use crate::accounting::{Accounting, Histograms, RequestKind};
use crate::aio::{self, AioContext};
use crate::child::ChildChannel;
use crate::driver::{BlockFuture, WriteFlags};
use crate::error::BlockError;
use crate::iovec::{self, IoVec};
use crate::merging::Piece;
use crate::on_error::OnError;
use crate::throttle::ThrottleChannel;

/// A BlockBackend's half on one iothread: where requests start.
pub struct BackendChannel {
    root: RefCell<Option<Rc<ChildChannel>>>,
    pub(super) in_flight: Cell<u64>,
    pub(super) quiesced: Cell<bool>,
    /// Quiesced, in a throttle group or plugged: requests ask [`BackendChannel::gate`] before they start.
    gated: Cell<bool>,
    pub(super) plugged: Plugged,
    pub(super) throttle: RefCell<Option<ThrottleChannel>>,
    pub(super) parked: RefCell<Vec<Waker>>,
    idle: RefCell<Vec<Waker>>,
    pub(super) accounting: Arc<Accounting>,
    /// How many requests of each kind were ready at once and are not published yet.
    ready: [Cell<u32>; RequestKind::ALL.len()],
    histograms: RefCell<Histograms>,
    /// Those under way.
    pub(super) requests: RefCell<Requests>,
    pub(super) on_error: Arc<OnError>,
    pub(super) label: String,
    /// How a write is done at present, copied here so that it reads no line that others share.
    write_flags: Cell<WriteFlags>,
    /// The number of the medium; a request that was parked for another one does not reach this one.
    pub(super) medium: Cell<u64>,
    /// The other half of a graph that is being changed; see `rebuild.rs`.
    pub(super) prepared: RefCell<Option<Option<Rc<ChildChannel>>>>,
    /// The drained section in which, or after which, the channel was made.
    epoch: u64,
    pub(super) context: AioContext,
}

impl BackendChannel {
    pub(super) fn new(
        context: &AioContext,
        backend: &BlockBackend,
        root: Option<Rc<ChildChannel>>,
        accounting: Arc<Accounting>,
    ) -> Rc<Self> {
        let throttle = super::lock(&backend.throttle).as_ref().map(|member| ThrottleChannel::new(member, context));
        let channel = Rc::new(Self {
            root: RefCell::new(root),
            in_flight: Cell::new(0),
            quiesced: Cell::new(backend.is_quiesced()),
            gated: Cell::new(false),
            plugged: Plugged::default(),
            throttle: RefCell::new(throttle),
            parked: RefCell::default(),
            idle: RefCell::default(),
            ready: Default::default(),
            histograms: RefCell::new(accounting.histograms()),
            requests: RefCell::default(),
            accounting,
            on_error: backend.on_error.clone(),
            label: backend.label.clone(),
            write_flags: Cell::new(backend.write_flags()),
            medium: Cell::new(backend.medium.load(Ordering::Acquire)),
            prepared: RefCell::default(),
            epoch: backend.quiesce_epoch.load(Ordering::Acquire),
            context: context.clone(),
        });
        channel.set_gated();
        let supervised: std::rc::Weak<Self> = Rc::downgrade(&channel);
        context.supervise(supervised);
        channel
    }

    pub(super) fn set_gated(&self) {
        self.gated.set(self.quiesced.get() || self.throttle.borrow().is_some() || self.plugged.is_on());
    }

    /// What errors, logs and events call the backend: the id of its device.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The iothread's context.
    pub fn context(&self) -> &AioContext {
        &self.context
    }

    /// Reads `iov`'s length in bytes from `offset`.
    #[inline]
    pub fn preadv(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> Submitted {
        let bytes = iovec::total_len(iov);
        self.start(RequestKind::Read, offset, bytes, iov, move |root, iov, _| root.preadv(offset, iov))
    }

    /// Writes `iov`'s length in bytes at `offset`; stable when it completes if the write cache is off.
    #[inline]
    pub fn pwritev(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> Submitted {
        let bytes = iovec::total_len(iov);
        self.start(RequestKind::Write, offset, bytes, iov, move |root, iov, flags| root.pwritev(offset, iov, flags))
    }

    /// Everything that completed before this is stable when it completes.
    pub fn flush(self: &Rc<Self>) -> Submitted {
        self.start(RequestKind::Flush, 0, 0, &[], |root, _, _| root.flush())
    }

    /// Tells that the content of a range no longer matters.
    pub fn pdiscard(self: &Rc<Self>, offset: u64, bytes: u64) -> Submitted {
        self.start(RequestKind::Discard, offset, bytes, &[], move |root, _, _| root.pdiscard(offset, bytes))
    }

    /// Makes a range read as zeroes; `may_unmap`: the space may be given back.
    pub fn pwrite_zeroes(self: &Rc<Self>, offset: u64, bytes: u64, may_unmap: bool) -> Submitted {
        self.start(RequestKind::WriteZeroes, offset, bytes, &[], move |root, _, flags| {
            root.pwrite_zeroes(offset, bytes, WriteFlags { may_unmap, ..flags })
        })
    }

    /// Counts a request that was refused before it got here.
    pub fn account_invalid(&self, kind: RequestKind) {
        self.accounting.invalid(kind);
    }

    /// The one way in: parked while quiesced, held back by limits, else to the root, counted from here to its
    /// completion. What is complete at once was never in flight.
    #[inline(always)]
    fn start(
        self: &Rc<Self>,
        kind: RequestKind,
        offset: u64,
        bytes: u64,
        iov: &[IoVec],
        go: impl FnOnce(&Rc<ChildChannel>, &[IoVec], WriteFlags) -> BlockFuture + 'static,
    ) -> Submitted {
        if self.gated.get() {
            match self.gate(kind, offset, bytes) {
                Gate::Open if !self.plugged.is_on() => {}
                gate => {
                    let piece = Piece { kind, offset, bytes, buffers: iov.len() };
                    let pieces = iov.to_vec();
                    let parked: Parked = Box::new(move |root, flags| go(root, &pieces, flags));
                    let state = match gate {
                        Gate::Open => self.hold(piece, iov, parked),
                        gate => self.held_back(gate, (self.medium.get(), parked)),
                    };
                    return self.pending(kind, offset, bytes, state);
                }
            }
        }
        let future = match &*self.root.borrow() {
            Some(root) => go(root, iov, self.write_flags.get()),
            None => BlockFuture::ready(Err(BlockError::NoMedium)),
        };
        match future.try_ready() {
            Ok(result) => {
                self.accounting.done(kind, bytes, result.is_ok());
                if result.is_ok() {
                    let ready = &self.ready[kind as usize];
                    ready.set(ready.get() + 1);
                }
                Submitted::Done(result)
            }
            Err(future) => {
                self.in_flight.set(self.in_flight.get() + 1);
                self.pending(kind, offset, bytes, State::Running(future))
            }
        }
    }

    /// The state of a request that may not go on at once; one that a limit holds back is in flight.
    pub(super) fn held_back(&self, gate: Gate, parked: (u64, Parked)) -> State {
        match gate {
            Gate::Open | Gate::Quiesced => State::Parked(Some(parked)),
            Gate::Limited(turn) => {
                self.in_flight.set(self.in_flight.get() + 1);
                State::Limited(turn, Some(parked))
            }
        }
    }

    /// Whether the medium answers such a request with an error at once, so that no limit need hold it back.
    pub(super) fn refuses(&self, kind: RequestKind, offset: u64, bytes: u64) -> bool {
        match &*self.root.borrow() {
            Some(root) => root.check(kind, offset, bytes).is_err(),
            None => true,
        }
    }

    /// Starts a request that was held up. The range is checked now, with the size and the write cache of this moment.
    pub(super) fn go_on(&self, parked: Option<(u64, Parked)>) -> BlockFuture {
        match (&*self.root.borrow(), parked) {
            (Some(root), Some((medium, parked))) if medium == self.medium.get() => parked(root, self.write_flags.get()),
            _ => BlockFuture::ready(Err(BlockError::NoMedium)),
        }
    }

    /// Holds a request until the plug is pulled.
    fn hold(&self, piece: Piece, iov: &[IoVec], parked: Parked) -> State {
        self.in_flight.set(self.in_flight.get() + 1);
        State::Held(self.add_held(piece, iov, parked))
    }

    fn pending(self: &Rc<Self>, kind: RequestKind, offset: u64, bytes: u64, state: State) -> Submitted {
        self.accounting.begins();
        self.context.wait_begins();
        let started = self.context.turn_nanoseconds();
        let entry = Entry::new(kind, offset, bytes, started, state.waits_for());
        let place = self.requests.borrow_mut().add(entry);
        Submitted::Pending(Request { channel: self.clone(), kind, offset, bytes, started, place, state })
    }

    /// A batch of requests is about to start: what is ready at once will have taken from now on.
    #[inline]
    pub fn batch_begins(&self) {
        self.context.turn_nanoseconds();
    }

    /// What was ready at once has been published.
    #[inline]
    pub fn batch_published(&self) {
        if self.ready.iter().any(|ready| ready.get() > 0) {
            let now = aio::nanoseconds();
            let latency = now.saturating_sub(self.context.turn_nanoseconds());
            for kind in RequestKind::ALL {
                let count = self.ready[kind as usize].take();
                if count > 0 {
                    self.took(kind, latency, u64::from(count), now);
                }
            }
        }
    }

    pub(super) fn took(&self, kind: RequestKind, latency_ns: u64, count: u64, now: u64) {
        self.accounting.took(kind, latency_ns, count, now);
        if let Some(histogram) = &self.histograms.borrow()[kind as usize] {
            histogram.record(latency_ns, count);
        }
    }

    pub(super) fn take_histograms(&self) {
        self.histograms.replace(self.accounting.histograms());
    }

    pub(super) fn finished(&self) {
        self.in_flight.set(self.in_flight.get() - 1);
        if self.in_flight.get() == 0 {
            self.idle.take().into_iter().for_each(Waker::wake);
        }
    }

    pub(super) fn root(&self) -> Option<Rc<ChildChannel>> {
        self.root.borrow().clone()
    }

    /// How a write is done at present.
    pub(super) fn write_flags(&self) -> WriteFlags {
        self.write_flags.get()
    }

    pub(super) fn set_root(&self, root: Option<Rc<ChildChannel>>) {
        self.root.replace(root);
    }

    /// The node of the medium.
    pub(super) fn node_name(&self) -> Option<String> {
        self.root.borrow().as_ref().map(|root| root.node().name().to_owned())
    }

    pub(super) fn set_medium(&self, medium: u64) {
        self.medium.set(medium);
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight.get()
    }

    /// A flush that does not wait for the end of the drained section; `None` without a medium.
    pub(super) fn flush_drained(&self) -> Option<BlockFuture> {
        self.root.borrow().as_ref().map(|root| root.flush())
    }

    pub(super) fn set_write_flags(&self, flags: WriteFlags) {
        self.write_flags.set(flags);
    }

    pub(super) fn quiesce(&self) {
        self.quiesced.set(true);
        self.set_gated();
        // Whoever waits for what is in flight waits for this too.
        self.let_go();
    }

    pub(super) fn resume(&self) {
        self.quiesced.set(false);
        self.set_gated();
        self.parked.take().into_iter().for_each(Waker::wake);
    }

    /// Waits until nothing is in flight.
    pub(super) async fn idle(&self) {
        std::future::poll_fn(|cx| {
            if self.in_flight.get() == 0 {
                return Poll::Ready(());
            }
            self.idle.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
