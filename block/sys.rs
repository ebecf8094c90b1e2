//! Thin wrappers of system calls that the standard library lacks, and [`Mapping`], memory from the kernel. They turn
//! raw results into `io::Result` and nothing else: no retry, no policy.
#![allow(unsafe_code)] // System calls take raw addresses; each block says why they are valid.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::iovec::{IoVec, is_zero, total_len};

/// The file system types (`f_type` of statfs) that callers ask about.
pub(crate) const TMPFS_MAGIC: i64 = libc::TMPFS_MAGIC;

/// What a byte of a file is locked as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ByteLock {
    /// Shared with other read locks.
    Read,
    /// Not locked.
    None,
}

/// What direct I/O on a file asks of addresses and of offsets, both in bytes; 0: direct I/O does not work on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DirectAlignment {
    pub memory: u32,
    pub offset: u32,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_size(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// An offset as the kernel takes it. Offsets above 2^63 − 1 cannot exist in a file.
fn kernel_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// The array of a vectored call. The kernel refuses more than IOV_MAX pieces, so the count may saturate.
fn kernel_iov(iov: &[IoVec]) -> (*const libc::iovec, libc::c_int) {
    // IoVec is transparent over libc::iovec.
    (iov.as_ptr().cast(), libc::c_int::try_from(iov.len()).unwrap_or(libc::c_int::MAX))
}

/// preadv(2): reads into `iov` from `offset`; returns the bytes read, 0 at the end of the file.
pub(crate) fn preadv(fd: RawFd, iov: &[IoVec], offset: u64) -> io::Result<usize> {
    let (array, count) = kernel_iov(iov);
    let offset = kernel_offset(offset)?;
    // SAFETY: `array` holds `count` pieces, which are valid for writes by the promise of `IoVec::new`.
    check_size(unsafe { libc::preadv(fd, array, count, offset) })
}

/// preadv2(2) with RWF_NOWAIT: as [`preadv`], but only what is in the page cache. EAGAIN: nothing of it is; EOPNOTSUPP:
/// the file system does not know.
pub(crate) fn preadv_cached(fd: RawFd, iov: &[IoVec], offset: u64) -> io::Result<usize> {
    let (array, count) = kernel_iov(iov);
    let offset = kernel_offset(offset)?;
    // SAFETY: `array` holds `count` pieces, which are valid for writes by the promise of `IoVec::new`.
    check_size(unsafe { libc::preadv2(fd, array, count, offset, libc::RWF_NOWAIT) })
}

/// pwritev2(2): writes `iov` at `offset`, stable before it returns if `dsync`; returns the bytes written.
pub(crate) fn pwritev(fd: RawFd, iov: &[IoVec], offset: u64, dsync: bool) -> io::Result<usize> {
    let (array, count) = kernel_iov(iov);
    let offset = kernel_offset(offset)?;
    let flags = if dsync { libc::RWF_DSYNC } else { 0 };
    // SAFETY: `array` holds `count` pieces, which are valid for reads by the promise of `IoVec::new`.
    check_size(unsafe { libc::pwritev2(fd, array, count, offset, flags) })
}

/// fdatasync(2).
pub(crate) fn fdatasync(fd: RawFd) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::fdatasync(fd) }).map(|_| ())
}

/// fallocate(2): `mode` is of FALLOC_FL_*, offset and length are in bytes.
pub(crate) fn fallocate(fd: RawFd, mode: libc::c_int, offset: u64, bytes: u64) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::fallocate(fd, mode, kernel_offset(offset)?, kernel_offset(bytes)?) }).map(|_| ())
}

/// write(2) of a one, which is what signals an eventfd. It may wait for as long as whoever has it too pleases.
pub(crate) fn add_one(fd: &OwnedFd) -> io::Result<()> {
    let one = 1u64;
    // SAFETY: the address is that of 8 bytes.
    check_size(unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) }).map(|_| ())
}

/// ppoll(2): waits until a descriptor is readable, and says whether it is. False also when a signal interrupts it.
pub(crate) fn wait_readable(fd: RawFd, timeout: Duration) -> bool {
    let mut fds = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        // Below 10^9.
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: one struct pollfd and a timespec, valid for the call; no signal mask.
    unsafe { libc::ppoll(&raw mut fds, 1, &raw const timeout, std::ptr::null()) == 1 }
}

/// Fills `bytes` with random numbers that are fit for keys.
pub(crate) fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: the kernel writes at most as many bytes as `rest` has.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => done += n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// sched_setaffinity(2): lets the calling thread run wherever the main thread may, as a thread inherits from the one that
/// starts it. A host that refuses leaves it where it is.
pub(crate) fn run_anywhere() {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: the kernel writes at most `size` bytes to the set, and reads as many from it.
    unsafe {
        if libc::sched_getaffinity(libc::getpid(), size, set.as_mut_ptr()) == 0 {
            let _ = libc::sched_setaffinity(0, size, set.as_ptr());
        }
    }
}

/// lseek(2) with SEEK_DATA: where data begins at or after `offset`. ENXIO: nowhere.
pub(crate) fn seek_data(fd: RawFd, offset: u64) -> io::Result<u64> {
    seek(fd, offset, libc::SEEK_DATA)
}

/// lseek(2) with SEEK_HOLE: where a hole, or the end of the file, begins at or after `offset`.
pub(crate) fn seek_hole(fd: RawFd, offset: u64) -> io::Result<u64> {
    seek(fd, offset, libc::SEEK_HOLE)
}

/// lseek(2) with SEEK_END: the size in bytes, of block devices too.
pub(crate) fn seek_end(fd: RawFd) -> io::Result<u64> {
    seek(fd, 0, libc::SEEK_END)
}

fn seek(fd: RawFd, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = kernel_offset(offset)?;
    // SAFETY: no memory is passed.
    u64::try_from(unsafe { libc::lseek(fd, offset, whence) }).map_err(|_| io::Error::last_os_error())
}

/// A new descriptor of the same open file, closed on exec. EBADF where `fd` is none.
pub(crate) fn dup(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let new = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel has just made `new` for us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Makes `target`'s number stand for the open file of `with`, atomically; what it stood for before is closed.
pub(crate) fn replace(target: &OwnedFd, with: OwnedFd) -> io::Result<()> {
    // SAFETY: no memory is passed; `target` owns its number, which stays open.
    check(unsafe { libc::dup3(with.as_raw_fd(), target.as_raw_fd(), libc::O_CLOEXEC) }).map(|_| ())
}

/// fcntl(2) F_GETFL: the access mode and status flags of an open file.
pub(crate) fn status_flags(fd: RawFd) -> io::Result<libc::c_int> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::fcntl(fd, libc::F_GETFL) })
}

/// fstatfs(2): the type of the file system that `fd` is on.
pub(crate) fn file_system_type(fd: RawFd) -> io::Result<i64> {
    let mut buffer = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the buffer is valid for writes of a struct statfs.
    check(unsafe { libc::fstatfs(fd, buffer.as_mut_ptr()) })?;
    // SAFETY: all zeroes is a valid struct statfs, and the kernel has filled it in.
    Ok(unsafe { buffer.assume_init() }.f_type)
}

/// statx(2) STATX_DIOALIGN: what direct I/O asks for; `None` where the kernel or the file system does not say.
pub(crate) fn direct_alignment(fd: RawFd) -> io::Result<Option<DirectAlignment>> {
    let mut buffer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, the buffer is valid for writes of a struct statx.
    let result =
        unsafe { libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, buffer.as_mut_ptr()) };
    check(result)?;
    // SAFETY: all zeroes is a valid struct statx, and the kernel has filled it in.
    let stat = unsafe { buffer.assume_init() };
    let said = stat.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(said.then_some(DirectAlignment { memory: stat.stx_dio_mem_align, offset: stat.stx_dio_offset_align }))
}

/// ioctl(2) BLKPBSZGET: a block device's physical block size in bytes.
pub(crate) fn physical_block_size(fd: RawFd) -> io::Result<u32> {
    block_device_number(fd, libc::BLKPBSZGET)
}

/// ioctl(2) BLKSSZGET: a block device's logical block size in bytes.
pub(crate) fn logical_block_size(fd: RawFd) -> io::Result<u32> {
    block_device_number(fd, libc::BLKSSZGET)
}

/// ioctl(2) BLKROGET: whether a block device cannot be written.
pub(crate) fn is_device_read_only(fd: RawFd) -> io::Result<bool> {
    /// The same on every architecture; libc does not name it.
    const BLKROGET: libc::Ioctl = 0x125e;
    block_device_number(fd, BLKROGET).map(|number| number != 0)
}

/// ioctl(2) BLKIOOPT: a block device's preferred size of requests in bytes; 0: none.
pub(crate) fn optimal_transfer(fd: RawFd) -> io::Result<u32> {
    block_device_number(fd, libc::BLKIOOPT)
}

/// ioctl(2) HDIO_GETGEO: cylinders, heads and sectors of a disk, and the sector that it begins at on the disk that it is a
/// part of. An error where a device has no such thing, as loop devices.
pub(crate) fn geometry(fd: RawFd) -> io::Result<(u16, u8, u8, u64)> {
    /// The same on every architecture; libc does not name it.
    const HDIO_GETGEO: libc::Ioctl = 0x0301;
    /// The kernel's struct hd_geometry.
    #[repr(C)]
    #[derive(Default)]
    struct HdGeometry {
        heads: u8,
        sectors: u8,
        cylinders: u16,
        start: libc::c_ulong,
    }
    let mut found = HdGeometry::default();
    // SAFETY: the request writes one struct hd_geometry to the address.
    check(unsafe { libc::ioctl(fd, HDIO_GETGEO, &raw mut found) })?;
    Ok((found.cylinders, found.heads, found.sectors, found.start))
}

fn block_device_number(fd: RawFd, request: libc::Ioctl) -> io::Result<u32> {
    let mut number: libc::c_uint = 0;
    // SAFETY: these requests write one int to the address.
    check(unsafe { libc::ioctl(fd, request, &raw mut number) })?;
    Ok(number)
}

/// posix_fadvise(2) DONTNEED over the whole file: drops clean pages from the page cache. Advisory.
pub(crate) fn drop_cache(fd: RawFd) {
    // SAFETY: no memory is passed. Advice may fail without consequence.
    let _ = unsafe { libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED) };
}

/// cachestat(2): how many pages of a file are in the page cache and not yet on their medium. ENOSYS before Linux 6.5.
#[cfg(test)]
pub(crate) fn dirty_pages(fd: RawFd) -> io::Result<u64> {
    /// The same on every architecture; libc does not name it yet.
    const SYS_CACHESTAT: libc::c_long = 451;
    // Offset and length; both 0: the whole file.
    let range = [0u64; 2];
    // Pages in the cache, dirty, being written back, evicted, evicted recently.
    let mut counts = [0u64; 5];
    // SAFETY: the kernel reads a struct cachestat_range, two numbers, from the one address and writes a struct cachestat,
    // five numbers, to the other.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd, range.as_ptr(), counts.as_mut_ptr(), 0) };
    check_size(result as isize)?;
    Ok(counts[1] + counts[2])
}

/// fcntl(2) F_OFD_SETLK: sets or drops our lock on one byte, without waiting. EAGAIN: somebody's lock is in the way;
/// EINVAL: the host has no such locks.
pub(crate) fn lock_byte(fd: RawFd, byte: u64, lock: ByteLock) -> io::Result<()> {
    let kind = match lock {
        ByteLock::Read => libc::F_RDLCK,
        ByteLock::None => libc::F_UNLCK,
    };
    let lock = flock(kind, byte)?;
    // SAFETY: the kernel reads a struct flock from the address.
    check(unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const lock) }).map(|_| ())
}

/// fcntl(2) F_OFD_GETLK: whether another open file holds any lock on the byte.
pub(crate) fn is_byte_locked(fd: RawFd, byte: u64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte)?;
    // SAFETY: the kernel reads and writes a struct flock at the address.
    check(unsafe { libc::fcntl(fd, libc::F_OFD_GETLK, &raw mut lock) })?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

fn flock(kind: libc::c_int, byte: u64) -> io::Result<libc::flock> {
    Ok(libc::flock {
        // The three kinds are 0, 1 and 2.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: kernel_offset(byte)?,
        l_len: 1,
        l_pid: 0,
    })
}

/// Zeroed memory of our own, straight from the kernel: pages that were never written take no room, and may be given
/// back one by one. Any number of threads may use any part of it at once, without a lock: bytes are only ever copied in
/// and out, never referred to, so that two who use the same bytes at once get a mixture of both, as with a real disk.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    /// Bytes of address space, a multiple of the page size.
    reserved: usize,
    /// How many of them are memory. It only grows, so that whoever has checked a range may go on to use it.
    usable: AtomicUsize,
    page: usize,
}

// SAFETY: it owns its memory, and every access goes through raw copies that assume nothing about other threads.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves address space for `bytes` (at least 1), none of it usable yet.
    pub(crate) fn reserve(bytes: u64) -> io::Result<Self> {
        let too_big = || io::Error::from_raw_os_error(libc::ENOMEM);
        // SAFETY: no memory is passed.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let reserved = usize::try_from(bytes.max(1)).map_err(|_| too_big())?;
        let reserved = reserved.checked_next_multiple_of(page).ok_or_else(too_big)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(too_big)?;
        Ok(Self { base, reserved, usable: AtomicUsize::new(0), page })
    }

    /// Makes the first `bytes` usable, and the rest of their last page with them. What is usable stays so. ENOMEM where
    /// that is more than was reserved.
    pub(crate) fn make_usable(&self, bytes: u64) -> io::Result<()> {
        let too_big = || io::Error::from_raw_os_error(libc::ENOMEM);
        let bytes = usize::try_from(bytes).map_err(|_| too_big())?;
        let bytes = bytes.checked_next_multiple_of(self.page).ok_or_else(too_big)?;
        if bytes > self.reserved {
            return Err(too_big());
        }
        // SAFETY: the range is the beginning of our own mapping; access is only ever added.
        check(unsafe { libc::mprotect(self.base.as_ptr().cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) })?;
        self.usable.fetch_max(bytes, Ordering::Release);
        Ok(())
    }

    /// Where `bytes` from `offset` on lie; `None` unless all of them are usable.
    fn place(&self, offset: u64, bytes: u64) -> Option<(*mut u8, usize)> {
        let (offset, bytes) = (usize::try_from(offset).ok()?, usize::try_from(bytes).ok()?);
        let end = offset.checked_add(bytes)?;
        (end <= self.usable.load(Ordering::Acquire)).then(|| (self.base.as_ptr().wrapping_add(offset), bytes))
    }

    /// Copies from `offset` on into `iov`. False, and nothing done, where that is not usable.
    pub(crate) fn read(&self, offset: u64, iov: &[IoVec]) -> bool {
        let Some((mut from, _)) = self.place(offset, total_len(iov)) else { return false };
        for v in iov {
            // SAFETY: `place` has checked the sum of the lengths, the other side is valid by the promise of
            // `IoVec::new`; nobody holds a reference to either.
            unsafe { std::ptr::copy(from, v.base(), v.len()) };
            from = from.wrapping_add(v.len());
        }
        true
    }

    /// Copies `iov` to `offset` on. False, and nothing done, where that is not usable.
    pub(crate) fn write(&self, offset: u64, iov: &[IoVec]) -> bool {
        let Some((mut to, _)) = self.place(offset, total_len(iov)) else { return false };
        for v in iov {
            // SAFETY: as in `read`.
            unsafe { std::ptr::copy(v.base(), to, v.len()) };
            to = to.wrapping_add(v.len());
        }
        true
    }

    /// Writes zeroes. False, and nothing done, where the range is not usable.
    pub(crate) fn zero(&self, offset: u64, bytes: u64) -> bool {
        let Some((at, bytes)) = self.place(offset, bytes) else { return false };
        // SAFETY: `place` has checked the range, and nobody holds a reference to it.
        unsafe { std::ptr::write_bytes(at, 0, bytes) };
        true
    }

    /// Zeroes a range and gives its whole pages back. False, and nothing done, where the range is not usable.
    pub(crate) fn give_back(&self, offset: u64, bytes: u64) -> bool {
        let Some((at, bytes)) = self.place(offset, bytes) else { return false };
        let head = at.align_offset(self.page).min(bytes);
        let pages = (bytes - head) / self.page * self.page;
        let first_page = at.wrapping_add(head);
        // SAFETY: whole pages of our own within the range that `place` has checked; private anonymous memory reads as
        // zeroes after this.
        let given = unsafe { libc::madvise(first_page.cast(), pages, libc::MADV_DONTNEED) };
        // It is refused for locked memory, which is zeroed like the two ends.
        let rest = if given == 0 { head + pages } else { head };
        // SAFETY: both lie within the range that `place` has checked, and nobody holds a reference to it.
        unsafe {
            std::ptr::write_bytes(at, 0, head);
            std::ptr::write_bytes(at.wrapping_add(rest), 0, bytes - rest);
        }
        true
    }

    /// Whether the range holds zeroes only. False also where it is not usable.
    pub(crate) fn is_zero(&self, offset: u64, bytes: u64) -> bool {
        let Some((at, bytes)) = self.place(offset, bytes) else { return false };
        // SAFETY: `place` has checked the range, and the piece goes no further than this call.
        is_zero(&[unsafe { IoVec::new(at, bytes) }])
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `reserve` mapped; whoever uses it borrows it, so nobody does.
        let _ = unsafe { libc::munmap(self.base.as_ptr().cast(), self.reserved) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iovec::AlignedBuffer;

    #[test]
    fn a_mapping_checks_ranges_grows_and_gives_pages_back() {
        let mapping = Mapping::reserve(1 << 20).expect("address space is plenty");
        mapping.make_usable(10_000).expect("it was reserved");
        let mut data = AlignedBuffer::new(10_000, 1);
        data.fill_from(&[7; 10_000]);
        assert!(mapping.write(0, &[data.iov().part(0, 1), data.iov().part(1, 9_999)]));
        assert!(!mapping.write(3 * 4096 - 1, &[data.iov().part(0, 2)]), "past the last usable page");
        assert!(!mapping.zero(u64::MAX, 2) && !mapping.read(1 << 20, &[data.iov()]));
        assert!(mapping.give_back(100, 9_000));
        assert!(mapping.is_zero(100, 9_000) && !mapping.is_zero(99, 1) && !mapping.is_zero(9_100, 1));
        assert!(mapping.give_back(98, 1) && mapping.is_zero(98, 1) && !mapping.is_zero(97, 1));
        mapping.make_usable(1 << 20).expect("it was reserved");
        assert!(mapping.is_zero(10_000, (1 << 20) - 10_000));
        assert!(mapping.make_usable((1 << 20) + 1).is_err());
    }
}
