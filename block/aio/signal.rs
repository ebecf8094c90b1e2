//! Signal: a descriptor of somebody else's that is signalled, and Watch: one that is watched. They own what both engines
//! agree on; how a signal is sent, and a descriptor watched, is the engine's.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use super::AioContext;

/// What a signal writes: an eventfd counts it.
pub(super) static ONE: u64 = 1;

/// A descriptor, as a rule an eventfd of somebody else's, that is signalled by adding one to it; see
/// [`AioContext::signal`]. At most one write of it is under way, and one that blocks blocks nobody here.
pub struct Signal {
    fd: Arc<OwnedFd>,
    state: Cell<State>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    /// A write is under way.
    Sent,
    /// And another is to follow it.
    SentAndWanted,
}

impl Signal {
    /// Wraps a descriptor. A write is cheapest if it is non-blocking.
    pub fn new(fd: Arc<OwnedFd>) -> Rc<Self> {
        Rc::new(Self { fd, state: Cell::new(State::Idle) })
    }

    pub(super) fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Asks for a signal. True: send one now; false: one under way will be followed by another.
    pub(super) fn want(&self) -> bool {
        match self.state.get() {
            State::Idle => {
                self.state.set(State::Sent);
                true
            }
            State::Sent | State::SentAndWanted => {
                self.state.set(State::SentAndWanted);
                false
            }
        }
    }

    /// Notes that the write has ended with this result. True: another is wanted. A descriptor that fails once will fail
    /// again; one whose counter is full has signalled often enough.
    pub(super) fn sent(&self, result: i32) -> bool {
        self.state.replace(State::Idle) == State::SentAndWanted && result >= 0
    }
}

/// Watches a descriptor until dropped; see [`AioContext::watch`].
pub struct Watch {
    context: AioContext,
    slot: usize,
}

impl Watch {
    pub(super) fn new(context: AioContext, slot: usize) -> Self {
        Self { context, slot }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.context.0.engine.unwatch(self.slot);
    }
}
