//! Request: one that did not complete at once, from there to its end. It owns what it waits for; it starts nothing that
//! `BackendChannel` did not let in.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::channel::BackendChannel;
use super::plug::Place;
use super::requests::{GIVEN_UP, WaitsFor};
use super::throttling::Gate;
use crate::accounting::RequestKind;
use crate::child::ChildChannel;
use crate::driver::{BlockFuture, WriteFlags};
use crate::error::BlockResult;
use crate::throttle::Throttled;

/// What is left of a request to be done: at the root, and how it writes.
pub(super) type Parked = Box<dyn FnOnce(&Rc<ChildChannel>, WriteFlags) -> BlockFuture>;

/// What became of a request at once. Await it where the fast path does not matter.
pub enum Submitted {
    /// It is complete and accounted.
    Done(BlockResult),
    /// It goes on.
    Pending(Request),
}

impl IntoFuture for Submitted {
    type Output = BlockResult;
    type IntoFuture = Completed;

    fn into_future(self) -> Completed {
        Completed(self)
    }
}

/// The future of a [`Submitted`] request.
pub struct Completed(Submitted);

impl Completed {
    /// Ends a request that has not reached the medium. False: it has, or has ended, and must be polled to its end.
    pub(super) fn give_up(&mut self) -> bool {
        match &mut self.0 {
            Submitted::Done(_) => false,
            Submitted::Pending(request) => request.give_up(),
        }
    }
}

impl Future for Completed {
    type Output = BlockResult;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<BlockResult> {
        match &mut self.0 {
            Submitted::Done(result) => Poll::Ready(*result),
            Submitted::Pending(request) => Pin::new(request).poll(cx),
        }
    }
}

/// A request under way at a backend. It must be polled to its end.
pub struct Request {
    pub(super) channel: Rc<BackendChannel>,
    pub(super) kind: RequestKind,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// When it was submitted, as [`crate::aio::nanoseconds`] has it.
    pub(super) started: u64,
    /// In the channel's list.
    pub(super) place: usize,
    pub(super) state: State,
}

pub(super) enum State {
    /// It has ended; the answer has been given.
    Done,
    /// Waits for the end of a drain, not counted in flight, and for the medium of that number.
    Parked(Option<(u64, Parked)>),
    /// Waits for its turn in a throttle group, in flight.
    Limited(Throttled, Option<(u64, Parked)>),
    /// Waits for the end of a plug, in flight.
    Held(Rc<Place>),
    /// In flight.
    Running(BlockFuture),
}

impl State {
    pub(super) fn waits_for(&self) -> WaitsFor {
        match self {
            Self::Parked(_) => WaitsFor::Drain,
            Self::Limited(..) => WaitsFor::Limit,
            Self::Held(_) | Self::Running(_) | Self::Done => WaitsFor::Host,
        }
    }
}

impl Request {
    fn go_over(&mut self, state: State) {
        self.channel.requests.borrow_mut().set_waits_for(self.place, state.waits_for());
        self.state = state;
    }

    /// Whether an operator has given it up while it waited.
    fn is_given_up(&self, cx: &Context<'_>) -> bool {
        self.channel.requests.borrow_mut().is_given_up(self.place, cx.waker())
    }

    fn ended(&mut self, result: BlockResult) -> Poll<BlockResult> {
        let was_in_flight = !matches!(self.state, State::Parked(_));
        self.state = State::Done;
        self.channel.requests.borrow_mut().remove(self.place);
        self.channel.accounting.done(self.kind, self.bytes, result.is_ok());
        self.channel.accounting.ends();
        self.channel.context.wait_ends();
        if was_in_flight {
            self.channel.finished();
        }
        Poll::Ready(result)
    }

    /// Ends it if it has not reached the medium.
    fn give_up(&mut self) -> bool {
        let waits = matches!(self.state, State::Parked(_) | State::Limited(..));
        if waits {
            let _ = self.ended(Err(GIVEN_UP));
        }
        waits
    }
}

impl Future for Request {
    type Output = BlockResult;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<BlockResult> {
        let this = &mut *self;
        loop {
            match &mut this.state {
                State::Done => panic!("a request was polled after its end"),
                State::Parked(parked) => {
                    if this.channel.quiesced.get() {
                        this.channel.parked.borrow_mut().push(cx.waker().clone());
                        if this.is_given_up(cx) {
                            return this.ended(Err(GIVEN_UP));
                        }
                        return Poll::Pending;
                    }
                    let parked = parked.take();
                    match (this.channel.gate(this.kind, this.offset, this.bytes), parked) {
                        (Gate::Limited(turn), Some(parked)) => {
                            let state = this.channel.held_back(Gate::Limited(turn), parked);
                            this.go_over(state);
                        }
                        (_, parked) => {
                            this.channel.in_flight.set(this.channel.in_flight.get() + 1);
                            let state = State::Running(this.channel.go_on(parked));
                            this.go_over(state);
                        }
                    }
                }
                State::Limited(turn, parked) => {
                    if Pin::new(turn).poll(cx).is_pending() {
                        if this.is_given_up(cx) {
                            return this.ended(Err(GIVEN_UP));
                        }
                        return Poll::Pending;
                    }
                    let parked = parked.take();
                    let state = State::Running(this.channel.go_on(parked));
                    this.go_over(state);
                }
                State::Held(place) => {
                    let state = State::Running(std::task::ready!(place.poll(cx)));
                    this.go_over(state);
                }
                State::Running(future) => {
                    let result = std::task::ready!(Pin::new(future).poll(cx));
                    if result.is_ok() {
                        let now = this.channel.context.turn_nanoseconds();
                        this.channel.took(this.kind, now.saturating_sub(this.started), 1, now);
                    }
                    return this.ended(result);
                }
            }
        }
    }
}
