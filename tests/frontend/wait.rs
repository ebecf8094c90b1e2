//! Waiting: every wait of the tests has a deadline, and none is a sleep.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// How long anything may take that ought to happen at once. Long, because the machine may be busy; it is only spent in a
/// failing test.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Waits until `fd` is readable or its other end is gone; false when `timeout` passes first.
pub fn readable(fd: impl AsFd, timeout: Duration) -> bool {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).expect("a timeout of seconds");
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// Waits until `condition` holds, giving the CPU away between two looks; for states that nothing announces.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "waited {DEADLINE:?} in vain: {what}");
        std::thread::yield_now();
    }
}

/// Tells threads of a test to end; they also end when the test fails.
#[derive(Debug, Default)]
pub struct Stop(AtomicBool);

impl Stop {
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Sets it at the latest when the guard goes out of scope.
    pub fn guard(&self) -> StopGuard<'_> {
        StopGuard(self)
    }
}

/// See [`Stop::guard`].
#[derive(Debug)]
pub struct StopGuard<'a>(&'a Stop);

impl Drop for StopGuard<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// An event counter shared with the back-end.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    pub fn new() -> Self {
        Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd"))
    }

    pub fn signal(&self) {
        rustix::io::write(&self.0, &1u64.to_ne_bytes()).expect("write to an eventfd");
    }

    /// How often it was signalled since the last look.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(rustix::io::Errno::AGAIN) => 0,
            Err(error) => panic!("read from an eventfd: {error}"),
        }
    }

    /// Waits for a signal and takes it; 0 when `timeout` passes first.
    pub fn wait(&self, timeout: Duration) -> u64 {
        if readable(&self.0, timeout) { self.take() } else { 0 }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
