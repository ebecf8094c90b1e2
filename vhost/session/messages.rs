//! What comes with a message, in the form that the session keeps.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserSingleMemoryRegion;

use super::refuse;
use crate::guest_memory::MemoryRegion;
use crate::notifier::take_notifier;

/// Maps the region of a message that has one.
pub(super) fn map_single(region: &VhostUserSingleMemoryRegion, file: File) -> Result<MemoryRegion> {
    MemoryRegion::map(region.guest_phys_addr, region.user_addr, region.memory_size, region.mmap_offset, file)
        .map_err(refuse)
}

/// The descriptor of a message that may have one, made fit to be signalled.
pub(super) fn notifier(file: Option<File>) -> Result<Option<Arc<OwnedFd>>> {
    let wrap = |file| take_notifier(file).ok_or_else(|| refuse("the descriptor is no eventfd"));
    file.map(wrap).transpose()
}
