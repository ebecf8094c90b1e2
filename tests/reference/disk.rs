//! The medium: a file driven with plain synchronous system calls, or nothing. It owns every system call on data;
//! ranges are checked by the caller.

// preadv, pwritev and fallocate have no wrapper in std; each call below says why it is sound.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vm_memory::VolatileSlice;

/// What the system takes in one vectored call (IOV_MAX).
const IOVECS_MAX: usize = 1024;

/// An opened medium.
pub struct Disk {
    file: Option<File>,
    /// In bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

impl Disk {
    /// Opens a regular file or block device.
    pub fn open(path: &Path, direct: bool, read_only: bool) -> io::Result<Self> {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let mut file = OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)?;
        // Not metadata(): a block device says 0 there.
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file: Some(file), size, read_only })
    }

    /// A medium of `size` bytes that stores nothing and leaves the buffers of reads as they are.
    pub fn null(size: u64, read_only: bool) -> Self {
        Self { file: None, size, read_only }
    }

    /// Reads at `offset`; what lies behind the end of the file is zero.
    pub fn read(&self, buffers: &[VolatileSlice], offset: u64) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        transfer(buffers, offset, |iovecs, count, at| {
            // SAFETY: the iovecs point into guest memory that `buffers` keeps mapped, and whose content may change
            // at any time by its nature; the descriptor is open.
            match unsafe { libc::preadv(file.as_raw_fd(), iovecs, count, at) } {
                0 => Ok(None),
                n => checked(n).map(Some),
            }
        })
    }

    /// Writes at `offset`.
    pub fn write(&self, buffers: &[VolatileSlice], offset: u64) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        transfer(buffers, offset, |iovecs, count, at| {
            // SAFETY: as in `read`.
            match unsafe { libc::pwritev(file.as_raw_fd(), iovecs, count, at) } {
                0 => Err(io::ErrorKind::WriteZero.into()),
                n => checked(n).map(Some),
            }
        })
    }

    /// Makes completed writes durable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), File::sync_data)
    }

    /// Gives space back. A hint: a file system that cannot is no error.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.fallocate(libc::FALLOC_FL_PUNCH_HOLE, offset, bytes) {
            Err(e) if unsupported(&e) => Ok(()),
            other => other,
        }
    }

    /// Makes a range read as zeroes; with `unmap` it may lose its space. Falls back to writing zeroes.
    pub fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let mode = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        match self.fallocate(mode, offset, bytes) {
            Err(e) if unsupported(&e) => {}
            other => return other,
        }
        const CHUNK: usize = 1 << 20;
        // Room to align by hand: the descriptor may be O_DIRECT.
        let mut zeroes = vec![0; CHUNK + 4096];
        let aligned = zeroes.as_ptr().align_offset(4096);
        let chunk = VolatileSlice::from(&mut zeroes[aligned..aligned + CHUNK]);
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let parts = (0..bytes).step_by(CHUNK).map(|done| chunk.subslice(0, CHUNK.min(bytes - done)));
        let parts: Vec<_> = parts.collect::<Result<_, _>>().map_err(io::Error::other)?;
        self.write(&parts, offset)
    }

    fn fallocate(&self, mode: i32, offset: u64, bytes: u64) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        if bytes == 0 {
            return Ok(());
        }
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is passed; the descriptor is open.
        let n = unsafe { libc::fallocate(file.as_raw_fd(), mode, signed(offset)?, signed(bytes)?) };
        if n == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Moves all of `buffers` with `call(iovecs, count, offset)`, which says how many bytes it moved, or `None` at the
/// end of the file: then the rest becomes zero.
fn transfer(
    buffers: &[VolatileSlice],
    offset: u64,
    call: impl Fn(*const libc::iovec, i32, i64) -> io::Result<Option<usize>>,
) -> io::Result<()> {
    let mut iovecs: Vec<libc::iovec> = buffers
        .iter()
        // An empty one at the end would look like the end of the file.
        .filter(|b| !b.is_empty())
        .map(|b| libc::iovec { iov_base: b.ptr_guard_mut().as_ptr().cast(), iov_len: b.len() })
        .collect();
    let mut first = 0;
    let mut at = offset;
    while first < iovecs.len() {
        let count = (iovecs.len() - first).min(IOVECS_MAX);
        let moved = match call(iovecs[first..].as_ptr(), count as i32, signed(at)?) {
            Ok(moved) => moved,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let Some(mut moved) = moved else {
            for iovec in &iovecs[first..] {
                // SAFETY: a part of one of `buffers`, which keep it mapped and writable.
                unsafe { iovec.iov_base.cast::<u8>().write_bytes(0, iovec.iov_len) };
            }
            return Ok(());
        };
        at += moved as u64;
        while let Some(iovec) = iovecs.get_mut(first) {
            if moved < iovec.iov_len {
                iovec.iov_base = iovec.iov_base.wrapping_byte_add(moved);
                iovec.iov_len -= moved;
                break;
            }
            moved -= iovec.iov_len;
            first += 1;
        }
    }
    Ok(())
}

/// A system call's result, negative for an error.
fn checked(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// An offset or length as the system takes it.
fn signed(n: u64) -> io::Result<i64> {
    i64::try_from(n).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV))
}
