//! CachedReads: reads that the page cache answers at once, without the kernel's ring or a worker thread. It owns when that
//! is tried; what it does not answer, the channel does.

use std::cell::Cell;
use std::os::fd::RawFd;

use super::AT_ONCE_MAX;
use crate::iovec::{IoVec, total_len};
use crate::sys;

/// The most reads that go by without a trial, after trials in vain: what they cost is then lost in the reads themselves.
const GAP_MAX: u32 = 63;

/// One channel's trials: always while they succeed, less and less often while they do not.
#[derive(Default)]
pub(super) struct CachedReads {
    /// Reads to let go by before the next trial.
    left: Cell<u32>,
    /// How many that will be after the next trial in vain.
    gap: Cell<u32>,
}

impl CachedReads {
    /// Reads if all of it is in the page cache. False: it is not, or it was not tried; some of it may have been read.
    pub(super) fn read(&self, fd: RawFd, offset: u64, iov: &[IoVec]) -> bool {
        let bytes = total_len(iov);
        if bytes > AT_ONCE_MAX.into() || !self.is_due() {
            return false;
        }
        let all = sys::preadv_cached(fd, iov, offset).is_ok_and(|read| read as u64 == bytes);
        self.learn(all);
        all
    }

    fn is_due(&self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        left == 0
    }

    fn learn(&self, found: bool) {
        let gap = if found { 0 } else { (2 * self.gap.get() + 1).min(GAP_MAX) };
        self.gap.set(gap);
        self.left.set(gap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trials_in_vain_become_rare_and_one_success_brings_them_back() {
        let trials = CachedReads::default();
        let mut tried = 0;
        for _ in 0..6400 {
            if trials.is_due() {
                tried += 1;
                trials.learn(false);
            }
        }
        assert!((100..=110).contains(&tried), "{tried} of 6400");
        while !trials.is_due() {}
        trials.learn(true);
        for _ in 0..100 {
            assert!(trials.is_due());
            trials.learn(true);
        }
    }
}
