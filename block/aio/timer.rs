//! The timers of an AioContext. It owns the deadlines; the loop turns the next one into the timeout of its sleep.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use super::AioContext;

#[derive(Default)]
pub(super) struct Timers {
    /// By deadline, and by number among equals.
    waiting: RefCell<BTreeMap<(Instant, u64), Waker>>,
    next_number: Cell<u64>,
}

impl Timers {
    pub(super) fn next(&self) -> Option<Instant> {
        self.waiting.borrow().first_key_value().map(|((at, _), _)| *at)
    }

    /// Wakes what is due; reads the clock only when something waits.
    pub(super) fn fire(&self) -> bool {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.is_empty() {
            return false;
        }
        let now = Instant::now();
        let mut any = false;
        while let Some(first) = waiting.first_entry() {
            if first.key().0 > now {
                break;
            }
            first.remove().wake();
            any = true;
        }
        any
    }
}

/// Completes at its deadline; see [`AioContext::sleep`].
pub struct Sleep {
    context: AioContext,
    at: Instant,
    number: Option<u64>,
}

impl Sleep {
    pub(super) fn new(context: AioContext, at: Instant) -> Self {
        Self { context, at, number: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        let context = self.context.clone();
        let timers = &context.0.timers;
        let number = *self.number.get_or_insert_with(|| {
            let number = timers.next_number.get();
            timers.next_number.set(number + 1);
            number
        });
        timers.waiting.borrow_mut().insert((self.at, number), cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.context.0.timers.waiting.borrow_mut().remove(&(self.at, number));
        }
    }
}
