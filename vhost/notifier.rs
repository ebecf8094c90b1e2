//! Notifier: the descriptor by which we call the guest or report a broken ring. It owns the precaution that a front-end
//! must not be able to block an iothread in a write.

use std::fs::File;
use std::io::Write;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// A descriptor of the front-end's, as a rule an eventfd.
#[derive(Debug)]
pub(crate) struct Notifier(File);

impl Notifier {
    /// Takes a descriptor and makes it non-blocking, for the front-end too, as qemu-storage-daemon does. `None` if that
    /// does not help: writing to a file or a disk waits whatever the flag says.
    pub(crate) fn new(file: File) -> Option<Self> {
        use std::os::unix::fs::FileTypeExt;
        let kind = file.metadata().ok()?.file_type();
        if kind.is_file() || kind.is_block_device() || kind.is_char_device() {
            return None;
        }
        fcntl_setfl(&file, fcntl_getfl(&file).ok()? | OFlags::NONBLOCK).ok()?;
        Some(Self(file))
    }

    /// Adds one to the counter. A full counter has signalled often enough; nothing is lost by leaving it.
    pub(crate) fn signal(&self) {
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests;
