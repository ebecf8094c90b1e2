//! Files that another process handed to us, or that go to another: which of them is the file that a node names, and
//! whether it is open as the node wants it. It opens nothing itself.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;

use super::File;
use super::open::{Access, Source};
use crate::driver::BlockDriver;
use crate::error::{OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::handover::HandedFile;
use crate::sys;

/// The open file behind a driver of ours, and the errno of its first failed flush.
pub(crate) fn open_file(driver: &dyn BlockDriver) -> Option<(&OwnedFd, i32)> {
    let driver: &dyn std::any::Any = driver;
    let file = driver.downcast_ref::<File>()?;
    Some((&file.shared.fd, file.shared.flush_errno.load(Ordering::Relaxed)))
}

/// Device and inode of an open file.
pub(crate) fn identity(file: &impl AsFd) -> io::Result<(u64, u64)> {
    let copy = std::fs::File::from(file.as_fd().try_clone_to_owned()?);
    copy.metadata().map(|found| (found.dev(), found.ino()))
}

/// The handed-over file that a node names by its path, if there is one.
///
/// # Errors
/// There is one, and it is open for other access than is wanted: nothing could be done about its locks then.
pub(super) fn take(source: &Source, context: &OpenContext<'_>, access: Access) -> OpenResult<Option<HandedFile>> {
    let Source::Path(path) = source else { return Ok(None) };
    let Ok(wanted) = std::fs::metadata(path).map(|found| (found.dev(), found.ino())) else { return Ok(None) };
    let is_wanted = |file: &OwnedFd| identity(file).is_ok_and(|found| found == wanted);
    if let Some(file) = context.handover().take(|file| is_wanted(file) && is_open_for(file, access)) {
        return Ok(Some(file));
    }
    match context.handover().take(is_wanted) {
        None => Ok(None),
        Some(_) => Err(OpenError(format!(
            "{source}: the process before us has it open with other access: read-only and cache.direct must stay as \
             they are while it is taken over"
        ))),
    }
}

/// Whether an open file can be written.
pub(super) fn is_writable(file: &OwnedFd) -> bool {
    sys::status_flags(file.as_raw_fd()).is_ok_and(|flags| flags & libc::O_ACCMODE == libc::O_RDWR)
}

fn is_open_for(file: &OwnedFd, access: Access) -> bool {
    let Ok(flags) = sys::status_flags(file.as_raw_fd()) else { return false };
    let (writable, direct) = (is_writable(file), flags & libc::O_DIRECT != 0);
    (writable == access.write || access.or_read && !writable) && direct == access.direct
}
