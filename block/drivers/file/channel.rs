//! FileChannel: a file's requests on one AioContext. It owns what a short transfer, an error or a missing ability of
//! the file system means; it holds no state of a request.

use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::cached::CachedReads;
use super::probe::{FileKind, Probe};
use super::{Cache, Shared};
use crate::aio::{AioContext, Completion, Operation};
use crate::driver::{BlockFuture, BlockStatus, BoxFuture, IoChannel, RingOwner, WriteFlags};
use crate::error::{BlockError, BlockResult};
use crate::iovec::{self, IoVec};
use crate::node::SECTOR;
use crate::sys;

#[cfg(test)]
mod tests;

/// A file's half on one AioContext.
pub(super) struct FileChannel(Rc<Inner>);

struct Inner {
    context: AioContext,
    shared: Arc<Shared>,
    /// The number of `shared.fd`, which stays the same.
    fd: RawFd,
    cache: Cache,
    kind: FileKind,
    in_memory: bool,
    cached: CachedReads,
    /// The unit of direct transfers in bytes; 1 for buffered ones.
    alignment: u64,
}

impl FileChannel {
    pub(super) fn new(context: &AioContext, shared: &Arc<Shared>, probe: &Probe, cache: Cache) -> Self {
        Self(Rc::new(Inner {
            context: context.clone(),
            fd: shared.fd.as_raw_fd(),
            shared: shared.clone(),
            cache,
            kind: probe.kind,
            in_memory: probe.in_memory,
            cached: CachedReads::default(),
            alignment: u64::from(probe.request_alignment),
        }))
    }
}

impl IoChannel for FileChannel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        let this = &self.0;
        if this.in_memory {
            return BlockFuture::ready(this.read_now(offset, iov));
        }
        if !this.cache.direct && this.cached.read(this.fd, offset, iov) {
            return BlockFuture::ready(Ok(()));
        }
        this.submit(Operation::Read { fd: this.fd, offset, iov })
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        let this = &self.0;
        let fua = this.is_fua(flags);
        if this.in_memory {
            return BlockFuture::ready(this.write_now(offset, iov, fua));
        }
        this.submit(Operation::Write { fd: this.fd, offset, iov, fua })
    }

    fn flush(&self) -> BlockFuture {
        let this = &self.0;
        if this.cache.no_flush {
            return BlockFuture::ready(Ok(()));
        }
        if let Err(error) = this.shared.flushes_can_be_believed() {
            return BlockFuture::ready(Err(error));
        }
        if this.in_memory {
            return BlockFuture::ready(sys::fdatasync(this.fd).map_err(BlockError::from));
        }
        this.submit(Operation::Fdatasync { fd: this.fd })
    }

    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture {
        let this = self.0.clone();
        if this.shared.no_punch.load(Ordering::Relaxed) {
            return BlockFuture::ready(Err(BlockError::NotSupported));
        }
        BlockFuture::boxed(async move { this.punch(offset, bytes).await })
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        let this = self.0.clone();
        BlockFuture::boxed(async move { this.zero(offset, bytes, flags).await })
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        // The kernel has no asynchronous way to ask; it answers from the metadata it caches.
        Box::pin(std::future::ready(self.0.status(offset, bytes)))
    }
}

impl Inner {
    fn submit(self: &Rc<Self>, operation: Operation<'_>) -> BlockFuture {
        BlockFuture::ring(self.context.submit(operation, self.clone()))
    }

    fn is_fua(&self, flags: WriteFlags) -> bool {
        flags.fua && !self.cache.no_flush
    }

    /// Reads with a system call of our own.
    fn read_now(&self, offset: u64, iov: &[IoVec]) -> BlockResult {
        let bytes = iovec::total_len(iov);
        let mut done = retried(|| sys::preadv(self.fd, iov, offset))?;
        while done < bytes {
            let rest = iovec::slice(iov, done, bytes - done);
            match retried(|| sys::preadv(self.fd, &rest, offset + done))? {
                0 => {
                    iovec::fill(&rest, 0);
                    return Ok(());
                }
                more => done += more,
            }
        }
        Ok(())
    }

    /// Writes with a system call of our own.
    fn write_now(&self, offset: u64, iov: &[IoVec], fua: bool) -> BlockResult {
        let bytes = iovec::total_len(iov);
        let mut done = retried(|| sys::pwritev(self.fd, iov, offset, fua))?;
        let mut nothing_before = done == 0;
        while done < bytes {
            let rest = iovec::slice(iov, done, bytes - done);
            let more = retried(|| sys::pwritev(self.fd, &rest, offset + done, fua))?;
            if more == 0 && nothing_before {
                return Err(BlockError::NoSpace);
            }
            nothing_before = more == 0;
            done += more;
        }
        self.shared.reached(offset + bytes);
        Ok(())
    }

    /// What follows the kernel's answer to a read.
    fn read_done(self: &Rc<Self>, fd: RawFd, offset: u64, iov: &[IoVec], done: u64) -> BlockFuture {
        let bytes = iovec::total_len(iov);
        if done >= bytes {
            return BlockFuture::ready(Ok(()));
        }
        let rest = iovec::slice(iov, done, bytes - done);
        // Nothing, or a part of a unit of direct I/O, comes only at the end of the file.
        if done == 0 || !done.is_multiple_of(self.alignment) {
            iovec::fill(&rest, 0);
            return BlockFuture::ready(Ok(()));
        }
        self.submit(Operation::Read { fd, offset: offset + done, iov: &rest })
    }

    /// Gives a range back to the file system. It reads as zeroes then.
    async fn punch(self: &Rc<Self>, offset: u64, bytes: u64) -> BlockResult {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let result = self.submit(Operation::Fallocate { fd: self.fd, mode, offset, bytes }).await;
        remember_unsupported(result, &self.shared.no_punch)
    }

    async fn zero(self: &Rc<Self>, offset: u64, bytes: u64, flags: WriteFlags) -> BlockResult {
        let end = offset + bytes;
        // Punching never makes a file longer, and zeroes past its end must.
        let inside = end <= self.shared.length.load(Ordering::Relaxed);
        let mut result = Err(BlockError::NotSupported);
        if flags.may_unmap && inside && !self.shared.no_punch.load(Ordering::Relaxed) {
            result = self.punch(offset, bytes).await;
        }
        if result == Err(BlockError::NotSupported) && !self.shared.no_zero_range.load(Ordering::Relaxed) {
            let mode = libc::FALLOC_FL_ZERO_RANGE;
            result = self.submit(Operation::Fallocate { fd: self.fd, mode, offset, bytes }).await;
            result = remember_unsupported(result, &self.shared.no_zero_range);
        }
        result?;
        self.shared.reached(end);
        if self.is_fua(flags) {
            self.shared.flushes_can_be_believed()?;
            return self.submit(Operation::Fdatasync { fd: self.fd }).await;
        }
        Ok(())
    }

    fn status(&self, offset: u64, bytes: u64) -> BlockResult<BlockStatus> {
        let whole = |zero| Ok(placed(offset, bytes, zero));
        if self.kind == FileKind::BlockDevice {
            return whole(false);
        }
        let errno = |error: &std::io::Error| error.raw_os_error();
        match sys::seek_data(self.fd, offset) {
            // No data from here on, or past the end of the file, which a node's last sector may be.
            Err(error) if errno(&error) == Some(libc::ENXIO) => whole(true),
            // A file system without holes.
            Err(error) if matches!(errno(&error), Some(libc::EINVAL | libc::EOPNOTSUPP)) => whole(false),
            Err(error) => Err(error.into()),
            Ok(data) if data > offset => Ok(placed(offset, bytes.min(data - offset), true)),
            Ok(_) => {
                let hole = match sys::seek_hole(self.fd, offset) {
                    Ok(hole) if hole > offset => hole,
                    // Punched between the two questions; call it data, which is never wrong.
                    Ok(_) => return whole(false),
                    Err(error) if errno(&error) == Some(libc::ENXIO) => return whole(true),
                    Err(error) => return Err(error.into()),
                };
                let data = hole.checked_next_multiple_of(SECTOR).unwrap_or(hole) - offset;
                Ok(placed(offset, bytes.min(data), false))
            }
        }
    }
}

/// Bytes of the file are where they are.
fn placed(offset: u64, bytes: u64, zero: bool) -> BlockStatus {
    BlockStatus { bytes, zero, allocated: true, place: Some(offset), ..BlockStatus::default() }
}

impl RingOwner for Inner {
    fn complete(self: Rc<Self>, completion: &Completion<'_>) -> BlockFuture {
        match (completion.operation, transferred(completion)) {
            (operation, Err(libc::EINTR | libc::EAGAIN)) => self.submit(operation),
            (Operation::Read { fd, offset, iov }, Ok(done)) => self.read_done(fd, offset, iov, done),
            (Operation::Write { offset, fua, .. }, Ok(done)) if done == completion.bytes() => {
                self.shared.reached(offset + done);
                // The kernel may have told another write or flush that writing back had failed.
                BlockFuture::ready(if fua { self.shared.flushes_can_be_believed() } else { Ok(()) })
            }
            (Operation::Write { fd, offset, iov, fua }, Ok(done)) => {
                let rest = iovec::slice(iov, done, completion.bytes() - done);
                let again = Operation::Write { fd, offset: offset + done, iov: &rest, fua };
                match done {
                    0 => BlockFuture::ring(self.context.submit(again, Rc::new(NothingWritten(self.clone())))),
                    _ => self.submit(again),
                }
            }
            (Operation::Fdatasync { .. }, Ok(_)) => BlockFuture::ready(self.shared.flushes_can_be_believed()),
            (Operation::Fallocate { .. }, Ok(_)) => BlockFuture::ready(Ok(())),
            (operation, Err(errno)) => {
                // Writing back failed somewhere in the file, and the kernel tells only once.
                let lost = match operation {
                    Operation::Fdatasync { .. } => true,
                    Operation::Write { fua, .. } => fua && errno == libc::EIO,
                    Operation::Read { .. } | Operation::Fallocate { .. } => false,
                };
                if lost && !self.cache.direct {
                    self.shared.flush_failed(errno);
                }
                BlockFuture::ready(Err(BlockError::from_errno(errno)))
            }
        }
    }
}

/// Owns the second attempt of a write of which the kernel took nothing: nothing again means that there is no room.
struct NothingWritten(Rc<Inner>);

impl RingOwner for NothingWritten {
    fn complete(self: Rc<Self>, completion: &Completion<'_>) -> BlockFuture {
        match completion.result {
            0 => BlockFuture::ready(Err(BlockError::NoSpace)),
            _ => self.0.clone().complete(completion),
        }
    }
}

impl Shared {
    /// Notes that the file reaches to `end` at least. A line that all threads read and hardly ever write.
    fn reached(&self, end: u64) {
        if end > self.length.load(Ordering::Relaxed) {
            self.length.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// Notes that a flush of a buffered file failed; the first errno sticks.
    fn flush_failed(&self, errno: i32) {
        let _ = self.flush_errno.compare_exchange(0, errno, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The error of the flush that failed, if one did.
    fn flushes_can_be_believed(&self) -> BlockResult {
        match self.flush_errno.load(Ordering::Relaxed) {
            0 => Ok(()),
            errno => Err(BlockError::from_errno(errno)),
        }
    }
}

/// The bytes that an operation transferred, or the errno.
fn transferred(completion: &Completion<'_>) -> Result<u64, i32> {
    u64::try_from(completion.result).map_err(|_| completion.result.saturating_neg())
}

/// Has a system call made again while it is merely interrupted.
fn retried(mut call: impl FnMut() -> std::io::Result<usize>) -> BlockResult<u64> {
    loop {
        match call() {
            Ok(bytes) => return Ok(bytes as u64),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sets `unsupported` when the file system cannot do what was asked, so that it is not asked again.
fn remember_unsupported(result: BlockResult, unsupported: &AtomicBool) -> BlockResult {
    if result == Err(BlockError::NotSupported) {
        unsupported.store(true, Ordering::Relaxed);
    }
    result
}
