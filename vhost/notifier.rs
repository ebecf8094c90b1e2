//! Descriptors of the front-end's that we write to: the precaution that writing must not be able to hold us.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Whether a descriptor is of a kind that can be waited for: an eventfd, a pipe, a socket; no file, disk or terminal.
pub(crate) fn can_be_polled(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| {
        let kind = metadata.file_type();
        !(kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_block_device() || kind.is_char_device())
    }) && fcntl_getfl(file).is_ok_and(|flags| !flags.contains(OFlags::PATH))
}

/// Takes a descriptor for calls or errors and makes it non-blocking, for the front-end too, as qemu-storage-daemon does:
/// then it is signalled at once. `None` if it is of a kind that no write may be tried on.
pub(crate) fn take_notifier(file: File) -> Option<Arc<OwnedFd>> {
    if !can_be_polled(&file) {
        return None;
    }
    fcntl_setfl(&file, fcntl_getfl(&file).ok()? | OFlags::NONBLOCK).ok()?;
    Some(Arc::new(file.into()))
}

#[cfg(test)]
mod tests;
