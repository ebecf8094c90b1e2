//! Opening: where the file comes from (a path, or a descriptor handed to the daemon), with which access. It owns the
//! words about what the host refused; it never reads or writes the file.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use super::probe::FileKind;
use crate::error::{OpenError, OpenResult};
use crate::options::Options;
use crate::sys;

/// Where the file comes from. Printed, it names the file in errors.
pub(super) enum Source {
    Path(String),
    /// A descriptor that was there when the daemon started.
    Descriptor(RawFd),
}

/// What is asked of an open file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Access {
    /// For writing too.
    pub write: bool,
    /// For reading only where the host does not allow writing.
    pub or_read: bool,
    /// O_DIRECT.
    pub direct: bool,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "file \"{path}\""),
            Self::Descriptor(fd) => write!(f, "the file behind fd={fd}"),
        }
    }
}

impl Source {
    /// Takes `filename` or `fd`.
    pub(super) fn take(options: &mut Options) -> OpenResult<Self> {
        let path = options.take_str("filename").map_err(OpenError::new)?;
        let highest = RawFd::MAX.unsigned_abs().into();
        let fd = options.take_u64_in("fd", 0..=highest).map_err(OpenError::new)?;
        match (path, fd.map(RawFd::try_from)) {
            (Some(_), Some(_)) => Err(OpenError::new(options.conflict("filename", "fd"))),
            (Some(path), None) if path.is_empty() => Err(OpenError::new(options.invalid("filename", path, "a path"))),
            (Some(path), None) if path.starts_with("/dev/fdset/") => {
                Err(OpenError::new(options.unsupported_value("filename", path)))
            }
            (Some(path), None) => Ok(Self::Path(path)),
            (None, Some(Ok(fd))) => Ok(Self::Descriptor(fd)),
            (None, _) => Err(OpenError::new(options.missing("filename"))),
        }
    }

    /// Opens the file. Returns whether it is open for writing.
    pub(super) fn open(&self, access: Access) -> OpenResult<(OwnedFd, bool)> {
        match self {
            Self::Path(path) => {
                // Looked at before it is opened: opening a FIFO waits for its other end. What cannot be looked at
                // fails to open, with the better error.
                if let Ok(meta) = std::fs::metadata(path) {
                    FileKind::of(&meta).map_err(|e| e.context(self))?;
                }
                self.open_path(path, access)
            }
            Self::Descriptor(fd) => self.take_descriptor(*fd, access),
        }
    }

    /// Whether [`Source::reopen`] may be tried. The access of a descriptor that was handed to us is not ours to get
    /// back once it is given up.
    pub(super) fn can_reopen(&self) -> bool {
        matches!(self, Self::Path(_))
    }

    /// Opens the file behind `fd` once more, even if its path names another one by now.
    pub(super) fn reopen(&self, fd: &OwnedFd, access: Access) -> OpenResult<(OwnedFd, bool)> {
        self.open_path(&descriptor_path(fd.as_raw_fd()), access)
    }

    fn open_path(&self, path: &str, access: Access) -> OpenResult<(OwnedFd, bool)> {
        match open_path(path, access.write, access.direct) {
            Ok(fd) => Ok((fd, access.write)),
            Err(error) if access.write && access.or_read && is_write_refused(&error) => {
                let fd = open_path(path, false, access.direct).map_err(|e| self.explain(access, &e))?;
                tracing::info!("{self}: opened for reading only ({error})");
                Ok((fd, false))
            }
            Err(error) => Err(self.explain(access, &error)),
        }
    }

    fn take_descriptor(&self, number: RawFd, access: Access) -> OpenResult<(OwnedFd, bool)> {
        let flags = sys::status_flags(number).map_err(|e| self.explain(access, &e))?;
        let mode = flags & libc::O_ACCMODE;
        if mode == libc::O_WRONLY || flags & libc::O_PATH != 0 {
            return Err(OpenError(format!("{self}: it is not open for reading")));
        }
        let writable = mode == libc::O_RDWR;
        if access.write && !writable && !access.or_read {
            return Err(OpenError(format!("{self}: it is open for reading only; use read-only=on")));
        }
        // With O_NONBLOCK, io_uring answers EAGAIN where it should wait.
        if (flags & libc::O_DIRECT != 0) == access.direct && flags & libc::O_NONBLOCK == 0 {
            return Ok((sys::dup(number).map_err(|e| self.explain(access, &e))?, writable));
        }
        // Its flags belong to whoever opened it too, so they are not changed; another open file is made instead.
        let access = Access { write: access.write && writable, ..access };
        self.open_path(&descriptor_path(number), access)
    }

    fn explain(&self, access: Access, error: &io::Error) -> OpenError {
        let hint = match error.raw_os_error() {
            Some(libc::EINVAL) if access.direct => {
                ": its file system does not do direct I/O; leave cache.direct=on out (cache writeback)"
            }
            Some(libc::EACCES | libc::EROFS | libc::EPERM) if access.write => {
                "; read-only=on or auto-read-only=on opens it for reading"
            }
            Some(libc::EBADF) => ": no such descriptor was handed to the daemon",
            _ => "",
        };
        OpenError(format!("{self}: cannot be opened: {error}{hint}"))
    }
}

/// Changes the length of a file.
pub(super) fn set_length(fd: &OwnedFd, bytes: u64) -> io::Result<()> {
    // Of a duplicate, which shares the open file: std changes lengths of what it owns only.
    File::from(fd.try_clone()?).set_len(bytes)
}

fn open_path(path: &str, write: bool, direct: bool) -> io::Result<OwnedFd> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)?;
    // A device that cannot be written can be opened for writing all the same, by root.
    if write && file.metadata()?.file_type().is_block_device() && sys::is_device_read_only(file.as_raw_fd())? {
        return Err(io::Error::from_raw_os_error(libc::EROFS));
    }
    Ok(file.into())
}

/// Leads to the open file itself, wherever its path leads by now.
fn descriptor_path(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

fn is_write_refused(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EROFS | libc::EPERM))
}
