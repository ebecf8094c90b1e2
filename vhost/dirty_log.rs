//! DirtyLog: the bitmap in which a front-end learns which pages of guest memory we have written, while it migrates the
//! guest (vhost-user, "Migration"). It owns the mapping and how an address becomes bits; who writes what is the ring's.
#![allow(unsafe_code)] // Memory shared with the front-end; the block says why its address is valid.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::handover::{Descriptors, LogImage};
use crate::mapping::Mapping;

/// VHOST_LOG_PAGE: bytes of guest memory for each bit.
const PAGE: u64 = 4096;

/// A log, mapped: one bit for each page, from guest address 0 on.
pub(crate) struct DirtyLog {
    mapping: Mapping,
    file: File,
    /// Where it begins in the file, bytes.
    offset: u64,
    /// Bytes.
    size: u64,
    /// Whether a write behind its end was told of.
    was_too_small: AtomicBool,
}

impl DirtyLog {
    /// Maps `size` bytes of a file from `offset` on.
    ///
    /// # Errors
    /// Prose: it does not fit its file, or cannot be mapped.
    pub(crate) fn map(file: &File, offset: u64, size: u64) -> Result<Self, String> {
        let mapping = Mapping::of(file, offset, size).map_err(|why| format!("the dirty log: {why}"))?;
        let file = file.try_clone().map_err(|e| format!("the dirty log: {e}"))?;
        Ok(Self { mapping, file, offset, size, was_too_small: AtomicBool::new(false) })
    }

    /// What a process after us must know to map it.
    ///
    /// # Errors
    /// There are too few descriptors.
    pub(crate) fn image(&self, descriptors: &mut Descriptors) -> std::io::Result<LogImage> {
        Ok(LogImage { file: descriptors.add(&self.file)?, mmap_offset: self.offset, mmap_size: self.size })
    }

    /// Whether it has bits for everything below this guest address.
    pub(crate) fn covers(&self, end: u64) -> bool {
        end.div_ceil(PAGE).div_ceil(8) <= self.size
    }

    /// Whether the front-end truncated its file.
    pub(crate) fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Notes that `len` bytes at a guest address were written, after they were. What lies behind the log's end is left
    /// out, and told of once.
    pub(crate) fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|rest| addr.saturating_add(rest)) else { return };
        let (mut page, last) = (addr / PAGE, last / PAGE);
        while page <= last {
            let end = last.min(page | 7);
            // From bit `page % 8` to bit `end % 8`.
            let bits = (0xff << (page % 8)) as u8 & (0xff >> (7 - end % 8)) as u8;
            let Some(byte) = self.byte(page / 8) else { return self.complain(addr) };
            // Always written, even if the bits seem to be there: the front-end may be taking them at this moment, and what
            // was written must be visible before whatever comes after that.
            byte.fetch_or(bits, Ordering::AcqRel);
            page = end + 1;
        }
    }

    fn byte(&self, index: u64) -> Option<&AtomicU8> {
        let index = usize::try_from(index).ok().filter(|_| index < self.size)?;
        // SAFETY: the byte lies in the `size` bytes that are mapped as long as this log lives; both sides access it
        // atomically.
        Some(unsafe { AtomicU8::from_ptr((self.mapping.host() + index) as *mut u8) })
    }

    #[cold]
    fn complain(&self, addr: u64) {
        if !self.was_too_small.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "the dirty log of {} bytes has no bit for guest address {addr:#x}: the migration will miss what is written \
                 there",
                self.size
            );
        }
    }
}

/// What a ring needs in order to log.
#[derive(Clone)]
pub(crate) struct RingLog {
    pub(crate) log: Arc<DirtyLog>,
    /// The guest address, as the front-end says it, of what we write into the ring itself (log_guest_addr). `None`: that is
    /// not logged.
    pub(crate) ring_addr: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memfd;

    fn log(size: u64) -> (File, DirtyLog) {
        let file = memfd(size);
        let log = DirtyLog::map(&file, 0, size).expect("it fits");
        (file, log)
    }

    fn pages(file: &File) -> Vec<u64> {
        let mut bytes = vec![0; file.metadata().expect("a memfd").len() as usize];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).expect("a memfd");
        (0..8 * bytes.len() as u64).filter(|page| bytes[(page / 8) as usize] & 1 << (page % 8) != 0).collect()
    }

    #[test]
    fn exactly_the_pages_touched_are_marked() {
        for (addr, len, touched) in [
            (0, 0, vec![]),
            (0, 1, vec![0]),
            (4095, 1, vec![0]),
            (4095, 2, vec![0, 1]),
            (4096 * 7, 4096, vec![7]),
            (4096 * 7 + 1, 4096, vec![7, 8]),
            (4096 * 3, 4096 * 20, (3..23).collect()),
            (4096 * 8, 4096 * 8, (8..16).collect()),
        ] {
            let (file, log) = log(4096);
            log.mark(addr, len);
            assert_eq!(pages(&file), touched, "{len} bytes at {addr}");
        }
    }

    #[test]
    fn what_is_marked_stays_marked() {
        let (file, log) = log(4096);
        log.mark(4096 * 2, 1);
        log.mark(4096 * 5, 1);
        log.mark(4096 * 2, 1);
        assert_eq!(pages(&file), [2, 5]);
    }

    #[test]
    fn nothing_is_marked_behind_the_end() {
        let (file, log) = log(2);
        log.mark(4096 * 15, 4096 * 3);
        log.mark(u64::MAX, u64::MAX);
        log.mark(4096 * 16, 1);
        assert_eq!(pages(&file), [15]);
        assert!(log.covers(4096 * 16) && !log.covers(4096 * 16 + 1) && log.covers(0));
        assert!(!log.covers(u64::MAX));
    }

    #[test]
    fn a_log_that_is_not_in_its_file_is_refused() {
        let file = memfd(4096);
        for (offset, size) in [(0, 4097), (4095, 2), (u64::MAX, 2), (0, 0), (0, u64::MAX)] {
            assert!(DirtyLog::map(&file, offset, size).is_err(), "{size} bytes at {offset}");
        }
        let log = DirtyLog::map(&file, 100, 100).expect("it need not be aligned");
        log.mark(0, 1);
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 100).expect("a memfd");
        assert_eq!(byte, [1]);
    }

    #[test]
    fn a_truncated_log_is_lost_and_nothing_else() {
        let (file, log) = log(4096);
        file.set_len(0).expect("a memfd shrinks");
        log.mark(0, 1);
        assert!(log.is_lost());
    }
}
