//! The engine of an AioContext: what carries its operations out, watches its descriptors and sleeps. It owns the choice
//! between the two that there are, and the words about an io_uring that cannot be had.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::mailbox::Mailbox;
use super::operation::Operations;
use super::signal::Signal;
use super::threads::Threads;
use super::uring::Uring;

/// Which engine an AioContext is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AioEngine {
    /// io_uring; where that cannot be had, worker threads, and the log says why.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// epoll and worker threads.
    Threads,
}

impl AioEngine {
    /// The engines by the names that users give them.
    pub const NAMES: [(&'static str, Self); 3] =
        [("auto", Self::Auto), ("io_uring", Self::IoUring), ("threads", Self::Threads)];
}

/// One of two, by a match rather than through a pointer: some of these run in every turn of the loop.
pub(super) enum Engine {
    Uring(Uring),
    Threads(Threads),
}

/// How often a ring is asked for that there is no memory for, and how long to wait in between. The kernel gives the
/// locked memory of a closed ring back a little later: without this, an iothread that takes the place of another one may
/// find none.
const RING_ATTEMPTS: u32 = 20;
const RING_PAUSE: Duration = Duration::from_millis(10);

/// Makes a ring, once there is memory for it.
fn patiently<T>(make: impl Fn() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..RING_ATTEMPTS {
        match make() {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => std::thread::sleep(RING_PAUSE),
            made => return made,
        }
    }
    make()
}

impl Engine {
    /// Makes the engine of the calling thread, which the mailbox's event wakes.
    ///
    /// # Errors
    /// It is out of reach, and no other will do; the error says why.
    pub(super) fn new(choice: AioEngine, mailbox: &Arc<Mailbox>) -> io::Result<Self> {
        let error = match choice {
            AioEngine::Threads => return Threads::new(mailbox).map(Self::Threads),
            AioEngine::IoUring | AioEngine::Auto => match patiently(|| Uring::new(mailbox.event())) {
                Ok(uring) => return Ok(Self::Uring(uring)),
                Err(error) => error,
            },
        };
        let missing = matches!(
            error.raw_os_error(),
            Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL | libc::ENOMEM | libc::EOPNOTSUPP)
        );
        let kind = error.kind();
        let why = explain(&error);
        if !missing {
            return Err(io::Error::new(kind, why));
        }
        if choice == AioEngine::IoUring {
            return Err(io::Error::new(
                kind,
                format!("{why}; aio-engine=threads does without, and auto where it must"),
            ));
        }
        let thread = std::thread::current();
        tracing::warn!("{}: {why}: worker threads do its work, which is slower", thread.name().unwrap_or("aio"));
        Threads::new(mailbox).map(Self::Threads)
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Uring(_) => "io_uring",
            Self::Threads(_) => "threads",
        }
    }

    /// Takes an operation that has begun, for the next entry into the kernel.
    #[inline]
    pub(super) fn submit(&self, slot: usize, operations: &Operations) {
        match self {
            Self::Uring(uring) => uring.submit(slot, operations),
            Self::Threads(threads) => threads.submit(slot, operations),
        }
    }

    /// See [`super::AioContext::watch`]; the slot is for [`Engine::unwatch`].
    pub(super) fn watch(&self, fd: Arc<OwnedFd>, handler: Rc<dyn Fn()>) -> usize {
        match self {
            Self::Uring(uring) => uring.watch(fd, handler),
            Self::Threads(threads) => threads.watch(fd, handler),
        }
    }

    pub(super) fn unwatch(&self, slot: usize) {
        match self {
            Self::Uring(uring) => uring.unwatch(slot),
            Self::Threads(threads) => threads.unwatch(slot),
        }
    }

    /// See [`super::AioContext::signal`].
    #[inline]
    pub(super) fn signal(&self, signal: &Rc<Signal>) {
        match self {
            Self::Uring(uring) => uring.signal(signal),
            Self::Threads(threads) => threads.signal(signal),
        }
    }

    /// Notes that a worker thread has sent a signal.
    pub(super) fn signal_done(&self, slot: usize, result: i32) {
        if let Self::Threads(threads) = self {
            threads.signal_done(slot, result);
        }
    }

    /// Takes what has happened and calls or wakes those who wait for it. Returns whether there was anything.
    #[inline]
    pub(super) fn reap(&self, operations: &Operations) -> bool {
        match self {
            Self::Uring(uring) => uring.reap(operations),
            Self::Threads(threads) => threads.reap(),
        }
    }

    /// Hands over what was submitted, without waiting; no system call when there is nothing to do.
    #[inline]
    pub(super) fn enter_nowait(&self) {
        match self {
            Self::Uring(uring) => uring.enter_nowait(),
            Self::Threads(threads) => threads.enter_nowait(),
        }
    }

    /// Hands over what was submitted and waits for something to happen, or the timeout.
    pub(super) fn enter_wait(&self, timeout: Option<Duration>) {
        match self {
            Self::Uring(uring) => uring.enter_wait(timeout),
            Self::Threads(threads) => threads.enter_wait(timeout),
        }
    }
}

/// Says why there is no io_uring.
fn explain(error: &io::Error) -> String {
    let why = match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring".to_owned(),
        Some(libc::EPERM | libc::EACCES) => match std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled") {
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
        _ => "io_uring fails".to_owned(),
    };
    format!("{why} ({error})")
}
