//! Notifier: the eventfd by which we call the guest or report a broken ring. It owns the precaution that a front-end
//! must not be able to block an iothread in a write.
#![allow(unsafe_code)] // fcntl has no wrapper in the standard library; two calls.

use std::fs::File;
use std::os::fd::AsRawFd;

use std::io::Write;

/// An eventfd of the front-end's.
#[derive(Debug)]
pub(crate) struct Notifier(File);

impl Notifier {
    /// Takes a descriptor and makes it non-blocking, for the front-end too, as qemu-storage-daemon does; `None` if it
    /// is no eventfd: a pipe, for one, would fill up.
    pub(crate) fn new(file: File) -> Option<Self> {
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        if !kind.to_string_lossy().contains("[eventfd]") {
            return None;
        }
        // SAFETY: the descriptor is open; F_GETFL takes no argument.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: the descriptor is open; F_SETFL takes an int.
        let set = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
        (flags >= 0 && set >= 0).then_some(Self(file))
    }

    /// Adds one to the counter. A full counter has signalled often enough; nothing is lost by leaving it.
    pub(crate) fn signal(&self) {
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }
}
