//! Mapping: a piece of a front-end's file, mapped by us, checked to lie in the file and guarded against its truncation.
//! It never reads or writes what is in it.
#![allow(unsafe_code)] // mmap and munmap; each block gives its reason.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use crate::sigbus::SigbusGuard;

/// A mapping of our own: vm-memory's would keep a second descriptor, and would not notice one past the end of its file.
pub(crate) struct Mapping {
    pub(crate) start: usize,
    pub(crate) len: usize,
    /// The address of the first byte asked for.
    host: usize,
    /// Taken before the mapping is undone.
    guard: Option<SigbusGuard>,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: the range was mapped by us and nobody holds an address in it any more: whoever uses one holds what owns
        // the mapping.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.len) };
    }
}

/// fstatfs(2) of a file on hugetlbfs.
const HUGETLBFS_MAGIC: i64 = 0x958458f6;

impl Mapping {
    /// Maps `size` bytes of a file from `offset` on, shared, for reading and writing.
    ///
    /// # Errors
    /// Prose: it is empty or wraps around, does not fit the file, or cannot be mapped or guarded.
    pub(crate) fn of(file: &File, offset: u64, size: u64) -> Result<Self, String> {
        let end = offset.checked_add(size).filter(|end| *end <= i64::MAX as u64 && size > 0);
        let end = end.ok_or("its addresses wrap around")?;
        let metadata = file.metadata().map_err(|e| format!("its file: {e}"))?;
        // A device, such as /dev/dax, says 0.
        if metadata.file_type().is_file() && end > metadata.len() {
            return Err(format!("it ends at {end:#x} in a file of {:#x} bytes", metadata.len()));
        }
        let page = page_size(file, metadata.blksize());
        let map_start = offset / page * page;
        let len = end.checked_next_multiple_of(page).map(|end| end - map_start);
        let len = len.and_then(|len| usize::try_from(len).ok()).ok_or("it is too large")?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                map_start as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(format!("mmap: {}", std::io::Error::last_os_error()));
        }
        let start = start as usize;
        // At most `len`, which fits.
        let host = start + (offset - map_start) as usize;
        let mapping = Self { start, len, host, guard: SigbusGuard::new(start, len) };
        if mapping.guard.is_none() {
            return Err("the process has too many mappings".into());
        }
        // A front-end's memory is large and not ours: leave it out of core dumps. Advice, so a failure does not matter.
        // SAFETY: the range was just mapped.
        unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTDUMP) };
        Ok(mapping)
    }

    /// The address of the first byte asked for.
    pub(crate) fn host(&self) -> usize {
        self.host
    }

    /// Whether the file was truncated under us.
    pub(crate) fn is_lost(&self) -> bool {
        self.guard.as_ref().is_none_or(SigbusGuard::is_lost)
    }
}

/// What offset and length of a mapping must be a multiple of: a huge page on hugetlbfs, else a page.
fn page_size(file: &File, block_size: u64) -> u64 {
    // SAFETY: an all-zero statfs is a valid value to be overwritten.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `stat` is a valid place for the answer.
    let known = unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } == 0;
    if known && stat.f_type == HUGETLBFS_MAGIC && block_size.is_power_of_two() {
        block_size
    } else {
        rustix::param::page_size() as u64
    }
}
