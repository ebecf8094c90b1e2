//! Thin wrappers of system calls that the standard library lacks. They turn raw results into `io::Result` and nothing
//! else: no retry, no policy, no state.
#![allow(unsafe_code)] // System calls take raw addresses; each block says why they are valid.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::iovec::IoVec;

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

/// ioctl(2) BLKIOOPT: a block device's preferred size of requests in bytes; 0: none.
pub(crate) fn optimal_transfer(fd: RawFd) -> io::Result<u32> {
    block_device_number(fd, libc::BLKIOOPT)
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
