//! RangeLocks: the overlap tracker of a node. A padded write reads, changes and writes back more than was asked, so it
//! excludes every overlapping write; ordinary writes only exclude padded ones. First come, first served.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// The ranges of one node that are being written, over all threads.
#[derive(Default)]
pub(crate) struct RangeLocks {
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    /// In order of arrival.
    list: Vec<Entry>,
    next_number: u64,
}

struct Entry {
    number: u64,
    start: u64,
    end: u64,
    exclusive: bool,
    /// Set while it waits for an earlier one.
    waker: Option<Waker>,
}

impl RangeLocks {
    /// Waits until no earlier entry that overlaps `start..end` conflicts. Two that are not `exclusive` never conflict.
    pub(crate) fn lock(self: &Arc<Self>, start: u64, end: u64, exclusive: bool) -> LockRange {
        LockRange { locks: self.clone(), start, end, exclusive, number: None }
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&self, number: u64) {
        let mut entries = self.entries();
        entries.list.retain(|entry| entry.number != number);
        // Each looks again for itself; there are few, as only padded writes make anyone wait.
        let waiting: Vec<Waker> = entries.list.iter_mut().filter_map(|entry| entry.waker.take()).collect();
        drop(entries);
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// See [`RangeLocks::lock`].
pub(crate) struct LockRange {
    locks: Arc<RangeLocks>,
    start: u64,
    end: u64,
    exclusive: bool,
    number: Option<u64>,
}

impl Future for LockRange {
    type Output = RangeGuard;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RangeGuard> {
        let locks = self.locks.clone();
        let mut entries = locks.entries();
        let (start, end, exclusive) = (self.start, self.end, self.exclusive);
        let number = *self.number.get_or_insert_with(|| {
            let number = entries.next_number;
            entries.next_number += 1;
            entries.list.push(Entry { number, start, end, exclusive, waker: None });
            number
        });
        let blocked = entries
            .list
            .iter()
            .take_while(|earlier| earlier.number != number)
            .any(|earlier| (earlier.exclusive || exclusive) && earlier.start < end && start < earlier.end);
        if blocked {
            if let Some(entry) = entries.list.iter_mut().find(|entry| entry.number == number) {
                entry.waker = Some(cx.waker().clone());
            }
            return Poll::Pending;
        }
        drop(entries);
        self.number = None;
        Poll::Ready(RangeGuard { locks, number })
    }
}

impl Drop for LockRange {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.locks.release(number);
        }
    }
}

/// Holds the range until dropped.
pub(crate) struct RangeGuard {
    locks: Arc<RangeLocks>,
    number: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.locks.release(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(lock: &mut LockRange) -> Option<RangeGuard> {
        match Pin::new(lock).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_padded_write_excludes_overlapping_writes_and_no_others() {
        let locks = Arc::new(RangeLocks::default());
        let plain = poll(&mut locks.lock(0, 512, false)).expect("nothing is held");
        assert!(poll(&mut locks.lock(256, 512, false)).is_some(), "plain writes may overlap");
        let mut padded = locks.lock(0, 4096, true);
        assert!(poll(&mut padded).is_none(), "an earlier write is still running");
        let mut later = locks.lock(512, 1024, false);
        assert!(poll(&mut later).is_none(), "it would overtake the padded write that waits");
        assert!(poll(&mut locks.lock(4096, 8192, true)).is_some(), "it does not overlap");
        drop(plain);
        let held = poll(&mut padded).expect("the earlier write has ended");
        assert!(poll(&mut later).is_none());
        drop(held);
        assert!(poll(&mut later).is_some());
    }

    #[test]
    fn giving_up_waiting_lets_later_ones_go() {
        let locks = Arc::new(RangeLocks::default());
        let _plain = poll(&mut locks.lock(0, 512, false)).expect("nothing is held");
        let mut padded = locks.lock(0, 4096, true);
        assert!(poll(&mut padded).is_none());
        drop(padded);
        assert!(poll(&mut locks.lock(0, 512, false)).is_some());
    }
}
