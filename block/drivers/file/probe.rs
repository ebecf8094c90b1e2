//! Probe: what an open file is and asks for. It only looks; trial reads are the most it does to the file.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use crate::error::{OpenError, OpenResult};
use crate::iovec::AlignedBuffer;
use crate::limits::Geometry;
use crate::node::SECTOR;
use crate::sys::{self, DirectAlignment};

/// The alignments that direct I/O may ask for, in bytes; a page satisfies every file system.
const ALIGNMENTS: [u32; 4] = [512, 1024, 2048, ALIGNMENT_MAX];
const ALIGNMENT_MAX: u32 = 4096;

/// What the file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    Regular,
    BlockDevice,
}

impl FileKind {
    /// # Errors
    /// It is something else, which cannot hold a disk.
    pub(super) fn of(meta: &Metadata) -> OpenResult<Self> {
        match meta.file_type() {
            kind if kind.is_file() => Ok(Self::Regular),
            kind if kind.is_block_device() => Ok(Self::BlockDevice),
            kind if kind.is_dir() => Err(OpenError::new("it is a directory, not a file")),
            _ => Err(OpenError::new("it is neither a file nor a block device")),
        }
    }
}

/// What is known about an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Probe {
    pub kind: FileKind,
    /// Bytes.
    pub length: u64,
    /// For [`crate::BlockLimits`].
    pub request_alignment: u32,
    /// For [`crate::BlockLimits`].
    pub memory_alignment: u32,
    /// For [`crate::BlockLimits`].
    pub optimal_transfer: u32,
    /// For [`crate::BlockLimits`].
    pub physical_block_size: u32,
    /// For [`crate::BlockLimits`].
    pub geometry: Option<Geometry>,
    /// Space can be given back, as far as can be known without trying.
    pub can_discard: bool,
    /// For [`crate::BlockLimits`].
    pub discard_alignment: u32,
    /// It lives in memory: a plain system call is over sooner than a hand-over to the kernel's worker threads, which is
    /// what io_uring does with every access to tmpfs, and it never waits for a device.
    pub in_memory: bool,
}

impl Probe {
    pub(super) fn new(fd: &OwnedFd, direct: bool) -> OpenResult<Self> {
        let meta = File::from(fd.try_clone().map_err(OpenError::new)?).metadata().map_err(OpenError::new)?;
        let raw = fd.as_raw_fd();
        let kind = FileKind::of(&meta)?;
        let length = match kind {
            FileKind::Regular => meta.len(),
            FileKind::BlockDevice => sys::seek_end(raw).map_err(OpenError::new)?,
        };
        let in_memory =
            kind == FileKind::Regular && sys::file_system_type(raw).map_err(OpenError::new)? == sys::TMPFS_MAGIC;
        let alignment = match direct && !in_memory {
            true => direct_alignment(raw, kind, length).map_err(OpenError::new)?,
            false => DirectAlignment { memory: 1, offset: 1 },
        };
        let (physical, optimal) = match kind {
            // What a file system calls its block is what it writes without reading first; network file systems put
            // a transfer size there instead, which says nothing of the kind.
            FileKind::Regular => (u32::try_from(meta.blksize()).unwrap_or(0), 0),
            FileKind::BlockDevice => {
                (sys::physical_block_size(raw).unwrap_or(0), sys::optimal_transfer(raw).unwrap_or(0))
            }
        };
        let (can_discard, discard_alignment) = match kind {
            FileKind::Regular => (true, 0),
            FileKind::BlockDevice => discard_of(&meta),
        };
        // What is not whole blocks a device neither discards nor zeroes, cached or not.
        let unit = match kind {
            FileKind::Regular => 1,
            FileKind::BlockDevice => sys::logical_block_size(raw).map_err(OpenError::new)?,
        };
        let sane = physical.is_power_of_two() && (512..=1 << 16).contains(&physical);
        Ok(Self {
            kind,
            length,
            request_alignment: alignment.offset.max(unit),
            // The length of each buffer must be a multiple of the offset's alignment as well (before Linux 6.18 or
            // so), and one number speaks for both address and length.
            memory_alignment: alignment.memory.max(alignment.offset),
            optimal_transfer: optimal,
            physical_block_size: if sane { physical } else { 0 },
            geometry: if kind == FileKind::BlockDevice { geometry_of(sys::geometry(raw).ok(), length) } else { None },
            can_discard,
            discard_alignment,
            in_memory,
        })
    }
}

/// The geometry of a whole disk: a part of one has that of the disk, which is none of its own. The kernel counts cylinders
/// in 16 bits; a larger disk has as many as go into its length.
fn geometry_of(said: Option<(u16, u8, u8, u64)>, length: u64) -> Option<Geometry> {
    let (_, heads, sectors, start) = said?;
    let track = u64::from(heads) * u64::from(sectors);
    let cylinders = u32::try_from((length / SECTOR).checked_div(track)?).ok()?;
    (start == 0 && cylinders > 0).then_some(Geometry { cylinders, heads, sectors })
}

/// Whether a block device discards, and in which unit in bytes (0: unknown). Where the kernel does not say, trying will
/// tell.
fn discard_of(meta: &Metadata) -> (bool, u32) {
    let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
    let number = |name: &str| -> Option<u64> {
        // A partition's queue is that of the disk, one level up.
        let places = ["queue", "../queue"].map(|queue| format!("/sys/dev/block/{major}:{minor}/{queue}/{name}"));
        places.iter().find_map(|place| std::fs::read_to_string(place).ok())?.trim().parse().ok()
    };
    let granularity = number("discard_granularity").and_then(|bytes| u32::try_from(bytes).ok()).unwrap_or(0);
    (number("discard_max_bytes") != Some(0), granularity)
}

/// What direct I/O on the file asks for: as the host says, else by trial.
fn direct_alignment(fd: RawFd, kind: FileKind, length: u64) -> io::Result<DirectAlignment> {
    if let Some(said) = sys::direct_alignment(fd)?
        && said.memory.is_power_of_two()
        && said.offset.is_power_of_two()
    {
        return Ok(said);
    }
    if kind == FileKind::BlockDevice {
        let size = sys::logical_block_size(fd)?;
        return Ok(DirectAlignment { memory: size, offset: size });
    }
    // A read at the end of the file succeeds whatever its alignment, so an almost empty one tells nothing.
    let found = if length < u64::from(ALIGNMENT_MAX) { None } else { smallest_that_reads(fd)? };
    let alignment = found.unwrap_or(ALIGNMENT_MAX);
    Ok(DirectAlignment { memory: alignment, offset: alignment })
}

/// The smallest unit in which the file can be read from an address and an offset that are no multiple of the next
/// larger one. `None`: none could.
fn smallest_that_reads(fd: RawFd) -> io::Result<Option<u32>> {
    let buffer = AlignedBuffer::new(2 * ALIGNMENT_MAX as usize, ALIGNMENT_MAX as usize);
    for alignment in ALIGNMENTS {
        let size = alignment as usize;
        // From the last of the page's units: aligned to this size and to no larger one.
        let at = (ALIGNMENT_MAX as usize - size) % ALIGNMENT_MAX as usize;
        match sys::preadv(fd, &[buffer.iov().part(at, size)], at as u64) {
            Ok(_) => return Ok(Some(alignment)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_disk_has_the_geometry_that_the_host_says() {
        let geometry = |cylinders, heads, sectors| Some(Geometry { cylinders, heads, sectors });
        assert_eq!(geometry_of(Some((1023, 16, 63, 0)), 1023 * 16 * 63 * SECTOR), geometry(1023, 16, 63));
        assert_eq!(geometry_of(Some((65535, 255, 63, 0)), 1 << 42), geometry(534_698, 255, 63), "larger than 16 bits");
        assert_eq!(geometry_of(Some((1023, 16, 63, 2048)), 1 << 30), None, "a partition");
        assert_eq!(geometry_of(Some((0, 0, 0, 0)), 1 << 30), None);
        assert_eq!(geometry_of(Some((1, 255, 63, 0)), 512), None, "less than a cylinder");
        assert_eq!(geometry_of(None, 1 << 30), None);
    }

    #[test]
    fn trial_reads_find_an_alignment_that_direct_reads_take() {
        use std::os::unix::fs::OpenOptionsExt;
        let path = std::env::temp_dir().join(format!("blockport-probe-{}", std::process::id()));
        std::fs::write(&path, vec![1; 1 << 16]).expect("the temporary directory is writable");
        let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path);
        std::fs::remove_file(&path).expect("it was just made");
        // Where the file system refuses direct I/O there is nothing to find.
        let Ok(file) = file else { return };
        let found = smallest_that_reads(file.as_raw_fd()).expect("it can be read").expect("a page is enough");
        let said = sys::direct_alignment(file.as_raw_fd()).expect("statx works");
        assert!(said.is_none_or(|said| said.offset == 0 || said.offset <= found), "{said:?}, {found}");
    }
}
