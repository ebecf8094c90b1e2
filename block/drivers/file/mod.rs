//! The drivers `file` and `host_device`: a plain file of the host, and a block device. This file owns the options and the
//! control verbs; `open.rs` opens, `probe.rs` asks what the file can do, `lock.rs` keeps other processes out,
//! `channel.rs` does the requests, `cached.rs` those that the page cache answers.

mod cached;
mod channel;
mod handed;
mod lock;
mod open;
mod probe;

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::channel::FileChannel;
pub(crate) use self::handed::{identity, open_file};
use self::lock::{FileLocks, Locking};
use self::open::{Access, Source};
use self::probe::{FileKind, Probe};
use super::{DriverKind, DriverRow};
use crate::aio::AioContext;
use crate::child::Child;
use crate::driver::{BlockDriver, IoChannel};
use crate::error::{OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::limits::BlockLimits;
use crate::options::Options;
use crate::permissions::{PermissionSet, Permissions};
use crate::sys;

pub(super) const ROW: DriverRow = DriverRow {
    name: "file",
    kind: DriverKind::Protocol,
    summary: "a file of the host",
    options: OPTIONS,
    open: |options, context| open(options, context, FileKind::Regular),
};

pub(super) const HOST_DEVICE: DriverRow = DriverRow {
    name: "host_device",
    kind: DriverKind::Protocol,
    summary: "a block device of the host: a whole disk, a partition, a logical volume",
    options: OPTIONS,
    open: |options, context| open(options, context, FileKind::BlockDevice),
};

const OPTIONS: &[(&str, &str)] = &[
    ("filename", "path of the file or device; this or fd must be given"),
    ("fd", "number of a descriptor that the daemon was started with, open on the file"),
    ("locking", "auto (default), on, off: keep other processes from using the image by locks that QEMU understands"),
    ("aio", "threads, native or io_uring, as other programs take it; the iothread's own engine serves all of them"),
];

/// An opened file, as the control thread knows it.
struct File {
    /// How errors name it.
    name: String,
    source: Source,
    read_only: bool,
    auto_read_only: bool,
    force_share: bool,
    cache: Cache,
    shared: Arc<Shared>,
    state: Mutex<State>,
}

/// How the host's page cache is used.
#[derive(Debug, Clone, Copy)]
struct Cache {
    /// Bypassed.
    direct: bool,
    /// Never asked to write back.
    no_flush: bool,
}

/// What all channels of a file share.
struct Shared {
    /// The same number as long as the node lives; activation may put another open file behind it.
    fd: OwnedFd,
    /// The size in bytes as far as we know.
    length: AtomicU64,
    /// The errno of the first failed flush of a buffered file, 0 while there was none. The kernel may have dropped the
    /// pages that it could not write, so no later flush can be believed.
    flush_errno: AtomicI32,
    /// The file system has turned down punching holes.
    no_punch: AtomicBool,
    /// The file system has turned down zeroing ranges.
    no_zero_range: AtomicBool,
}

impl Shared {
    fn new(fd: OwnedFd, probe: &Probe, flush_errno: i32) -> Self {
        Self {
            fd,
            length: AtomicU64::new(probe.length),
            flush_errno: AtomicI32::new(flush_errno),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
        }
    }
}

struct State {
    probe: Probe,
    locks: FileLocks,
    /// What all users together hold and share, also while inactive.
    permissions: Permissions,
    active: bool,
    /// Opened for writing.
    writable: bool,
    /// It was inactive before, so that another host may have written meanwhile.
    was_inactive: bool,
}

/// Opens the file as what its driver is for.
fn open(options: &mut Options, context: &OpenContext<'_>, kind: FileKind) -> OpenResult<Box<dyn BlockDriver>> {
    let source = Source::take(options)?;
    let locking = [("auto", Locking::Auto), ("on", Locking::On), ("off", Locking::Off)];
    let locking = options.take_enum("locking", &locking).map_err(OpenError::new)?.unwrap_or(Locking::Auto);
    let engines = [("threads", "threads"), ("native", "native"), ("io_uring", "io_uring")];
    if let Some(engine) = options.take_enum("aio", &engines).map_err(OpenError::new)? {
        tracing::debug!("{source}: aio={engine} says nothing here; the iothread's aio-engine decides");
    }
    options
        .take_unsupported(&["pr-manager", "drop-cache", "aio-max-batch", "x-check-cache-dropped"])
        .map_err(OpenError::new)?;

    let node = context.node;
    let cache = Cache { direct: node.cache_direct, no_flush: node.cache_no_flush };
    let access = Access { write: !node.read_only, or_read: node.auto_read_only, direct: cache.direct };
    let name = source.to_string();
    let handed = handed::take(&source, context, access)?;
    let flush_errno = handed.as_ref().map(|file| file.flush_errno);
    let (fd, writable) = match handed {
        Some(file) => {
            let writable = handed::is_writable(&file.descriptor);
            (file.descriptor, writable)
        }
        None => source.open(access)?,
    };
    let probe = Probe::new(&fd, cache.direct).map_err(|e| e.context(&name))?;
    match (kind, probe.kind) {
        (FileKind::BlockDevice, FileKind::Regular) => {
            return Err(OpenError(format!("{name}: it is no block device; the driver \"file\" is for files")));
        }
        (FileKind::Regular, FileKind::BlockDevice) => {
            tracing::warn!("{name}: it is a block device; the driver \"host_device\" is for those");
        }
        _ => {}
    }
    let mut locks = FileLocks::new(locking, &name, &fd, context.handover().keeps_locks())?;
    if flush_errno.is_some() {
        locks.adopt();
    }
    Ok(Box::new(File {
        name,
        source,
        read_only: node.read_only,
        auto_read_only: node.auto_read_only,
        force_share: node.force_share,
        cache,
        shared: Arc::new(Shared::new(fd, &probe, flush_errno.unwrap_or(0))),
        state: Mutex::new(State {
            probe,
            locks,
            permissions: Permissions::UNUSED,
            active: false,
            writable,
            was_inactive: false,
        }),
    }))
}

impl File {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be locked for these users. What they share with each other in this process, other processes do not
    /// get: nobody else writes to a file in use or changes its size, unless the user said so.
    fn to_lock(&self, permissions: Permissions) -> Permissions {
        let shared = match (self.force_share, permissions == Permissions::UNUSED) {
            (true, _) => PermissionSet::ALL,
            (false, true) => permissions.shared,
            (false, false) => permissions.shared.without(PermissionSet::WRITE | PermissionSet::RESIZE),
        };
        Permissions { shared, ..permissions }
    }

    /// Opens the file anew behind the same number, with its locks held before the old one goes.
    fn reopen(&self, state: &mut State, access: Access, permissions: Permissions) -> OpenResult {
        let (fd, writable) = self.source.reopen(&self.shared.fd, access)?;
        let mut locks = state.locks.renewed();
        locks.set(&fd, permissions)?;
        sys::replace(&self.shared.fd, fd).map_err(|e| OpenError(format!("{}: {e}", self.name)))?;
        state.locks = locks;
        state.writable = writable;
        Ok(())
    }
}

/// The most bytes of one request that is carried out at once, while others wait.
const AT_ONCE_MAX: u32 = 1 << 20;
/// The most bytes of one request to the kernel, which pins the pages, or copies from the page cache, while we wait.
const TRANSFER_MAX: u32 = 4 << 20;

impl BlockDriver for File {
    fn limits(&self) -> BlockLimits {
        let state = self.state();
        let probe = &state.probe;
        let can_punch = probe.can_discard && !self.shared.no_punch.load(Ordering::Relaxed);
        BlockLimits {
            read_only: !self.read_only && !state.writable,
            request_alignment: probe.request_alignment,
            memory_alignment: probe.memory_alignment,
            max_transfer: if probe.in_memory { AT_ONCE_MAX } else { TRANSFER_MAX },
            can_discard: can_punch,
            discard_alignment: probe.discard_alignment,
            can_write_zeroes: true,
            can_unmap_zeroes: can_punch,
            optimal_transfer: probe.optimal_transfer,
            physical_block_size: probe.physical_block_size,
            geometry: probe.geometry,
            ..BlockLimits::default()
        }
    }

    fn length(&self) -> u64 {
        self.shared.length.load(Ordering::Relaxed)
    }

    fn children(&self) -> &[Arc<Child>] {
        &[]
    }

    fn child_permissions(&self, own: Permissions) -> Permissions {
        own
    }

    fn set_permissions(&self, permissions: Permissions) -> OpenResult {
        let mut state = self.state();
        if state.active {
            state.locks.set(&self.shared.fd, self.to_lock(permissions))?;
        }
        state.permissions = permissions;
        Ok(())
    }

    fn resize(&self, bytes: u64) -> OpenResult {
        let state = self.state();
        if state.probe.kind == FileKind::BlockDevice {
            // Its size is its own; but it may have changed, and this is how we are told.
            let now =
                sys::seek_end(self.shared.fd.as_raw_fd()).map_err(|e| OpenError(format!("{}: {e}", self.name)))?;
            if bytes != now {
                return Err(OpenError(format!(
                    "{}: it has {now} bytes, and a block device is not resized here",
                    self.name
                )));
            }
            self.shared.length.store(now, Ordering::Relaxed);
            return Ok(());
        }
        if !state.writable {
            return Err(OpenError(format!("{}: it is open for reading only", self.name)));
        }
        open::set_length(&self.shared.fd, bytes)
            .map_err(|e| OpenError(format!("{}: cannot be resized to {bytes} bytes: {e}", self.name)))?;
        self.shared.length.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn activate(&self) -> OpenResult {
        let mut state = self.state();
        if state.active {
            return Ok(());
        }
        let permissions = self.to_lock(state.permissions);
        if state.was_inactive && self.source.can_reopen() {
            let access = Access { write: !self.read_only, or_read: self.auto_read_only, direct: self.cache.direct };
            self.reopen(&mut state, access, permissions)?;
            // Another host may have written meanwhile.
            sys::drop_cache(self.shared.fd.as_raw_fd());
        } else {
            state.locks.set(&self.shared.fd, permissions)?;
        }
        let probe = Probe::new(&self.shared.fd, self.cache.direct).map_err(|e| e.context(&self.name))?;
        self.shared.length.store(probe.length, Ordering::Relaxed);
        state.probe = probe;
        state.active = true;
        Ok(())
    }

    fn inactivate(&self) -> OpenResult {
        let mut state = self.state();
        if !state.active {
            return Ok(());
        }
        if state.writable && self.source.can_reopen() {
            let access = Access { write: false, or_read: false, direct: self.cache.direct };
            self.reopen(&mut state, access, Permissions::UNUSED)?;
        } else {
            state.locks.set(&self.shared.fd, Permissions::UNUSED)?;
        }
        state.active = false;
        state.was_inactive = true;
        Ok(())
    }

    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        let state = self.state();
        Ok(Rc::new(FileChannel::new(context, &self.shared, &state.probe, self.cache)))
    }
}
