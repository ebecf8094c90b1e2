//! Notifier: the eventfd by which we call the guest or report a broken ring. It owns the precaution that a front-end
//! must not be able to block an iothread in a write.
#![allow(unsafe_code)] // fcntl and poll have no wrapper in the standard library; one call each.

use std::fs::File;
use std::os::fd::AsRawFd;

use std::io::Write;

/// An eventfd of the front-end's.
#[derive(Debug)]
pub(crate) struct Notifier {
    file: File,
    /// Whether a write may block when the counter is full, so that it must be asked first.
    may_block: bool,
}

impl Notifier {
    /// Takes a descriptor; `None` if it is no eventfd: a pipe, for one, would fill up and block.
    pub(crate) fn new(file: File) -> Option<Self> {
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        if !kind.to_string_lossy().contains("[eventfd]") {
            return None;
        }
        // SAFETY: the descriptor is open; F_GETFL takes no argument.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        Some(Self { file, may_block: flags < 0 || flags & libc::O_NONBLOCK == 0 })
    }

    /// Adds one to the counter. A full counter has signalled often enough; nothing is lost by leaving it.
    pub(crate) fn signal(&self) {
        if !self.may_block || self.is_writable() {
            let _ = (&self.file).write(&1u64.to_ne_bytes());
        }
    }

    fn is_writable(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one valid pollfd; no waiting.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }
}
