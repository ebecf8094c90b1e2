//! Cancelling: a request that somebody no longer wants. One that waits, for the end of a drained section or for a limit, is
//! given up; one that the medium has goes on to its end, since its buffers are in use until then. Either way it completes
//! once.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::request::{Completed, Submitted};
use crate::error::{BlockError, BlockResult};

/// What a cancelled request that never reached the medium answers.
const CANCELLED: BlockError = BlockError::Host(libc::ECANCELED);

#[derive(Default)]
struct Wish {
    cancelled: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// Cancels a request, from anywhere on its iothread.
pub struct Canceller(Rc<Wish>);

impl Canceller {
    /// Says that nobody wants the request any more. It completes nevertheless, and may succeed.
    pub fn cancel(self) {
        self.0.cancelled.set(true);
        if let Some(waker) = self.0.waker.take() {
            waker.wake();
        }
    }
}

/// A request that can be cancelled. It must be polled to its end.
pub struct Cancellable {
    request: Completed,
    wish: Rc<Wish>,
}

impl Submitted {
    /// The request, and what cancels it.
    pub fn cancellable(self) -> (Cancellable, Canceller) {
        let wish = Rc::<Wish>::default();
        (Cancellable { request: self.into_future(), wish: wish.clone() }, Canceller(wish))
    }
}

impl Future for Cancellable {
    type Output = BlockResult;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<BlockResult> {
        if self.wish.cancelled.get() && self.request.give_up() {
            return Poll::Ready(Err(CANCELLED));
        }
        self.wish.waker.replace(Some(cx.waker().clone()));
        Pin::new(&mut self.request).poll(cx)
    }
}
