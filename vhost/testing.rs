//! What this crate's unit tests share: a guest, files in memory.

pub(crate) mod guest;

use std::fs::File;

/// A memfd of `size` bytes.
pub(crate) fn memfd(size: u64) -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(size).expect("room in a memfd");
    file
}
