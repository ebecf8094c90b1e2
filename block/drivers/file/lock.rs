//! FileLocks: permissions held as locks on bytes of the file, in the way QEMU does it, so that its programs and ours
//! keep out of each other's way. It owns the order of lock, test and unlock; it never touches data.
//!
//! Byte 100+n is read-locked by who holds permission n, byte 200+n by who does *not* share it (n as in
//! [`PermissionSet::NAMES`]). Locks that say the opposite of ours are somebody else's objection: each new lock is taken
//! first and objections looked for afterwards, so that of two who come at once at least one sees the other.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{OpenError, OpenResult};
use crate::permissions::{PermissionSet, Permissions};
use crate::sys::{self, ByteLock};

/// How long the first locks are waited for. A process that was killed keeps its own until the kernel has ended its I/O,
/// and the one that is started in its place comes at once.
const PATIENCE: Duration = Duration::from_millis(500);
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

const HELD_BYTE: u64 = 100;
const NOT_SHARED_BYTE: u64 = 200;

/// The option `locking`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Locking {
    /// Where the host can.
    Auto,
    On,
    Off,
}

/// The locks that one open file holds.
pub(super) struct FileLocks {
    /// How errors name the file.
    name: Arc<str>,
    enabled: bool,
    held: PermissionSet,
    not_shared: PermissionSet,
    /// Locks that may be there and are not held, on each side: they are dropped once that is allowed.
    surplus: [PermissionSet; 2],
    /// While it is true, another process may hold the same open file, and no lock is dropped.
    keep: Arc<AtomicBool>,
}

/// Which locks: those for what is held, or those for what is not shared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Held,
    NotShared,
}

impl Side {
    fn byte(self, n: u8) -> u64 {
        u64::from(n)
            + match self {
                Self::Held => HELD_BYTE,
                Self::NotShared => NOT_SHARED_BYTE,
            }
    }

    /// The side on which others object to this one.
    fn opposite(self) -> Self {
        match self {
            Self::Held => Self::NotShared,
            Self::NotShared => Self::Held,
        }
    }
}

impl FileLocks {
    /// No lock yet on `fd`, which errors call `name`.
    ///
    /// # Errors
    /// Locking is on, and the host or the file system has no such locks.
    pub(super) fn new(locking: Locking, name: &str, fd: &OwnedFd, keep: Arc<AtomicBool>) -> OpenResult<Self> {
        let enabled = match (locking, sys::is_byte_locked(fd.as_raw_fd(), HELD_BYTE)) {
            (Locking::Off, _) => false,
            (_, Ok(_)) => true,
            (Locking::Auto, Err(error)) => {
                tracing::warn!("{name}: cannot be locked ({error}); nothing keeps other processes from using it");
                false
            }
            (Locking::On, Err(error)) => return Err(OpenError(format!("{name}: cannot be locked: {error}"))),
        };
        Ok(Self { name: name.into(), enabled, keep, ..Self::none() })
    }

    /// No lock on anything.
    fn none() -> Self {
        Self {
            name: "".into(),
            enabled: false,
            held: PermissionSet::NONE,
            not_shared: PermissionSet::NONE,
            surplus: [PermissionSet::NONE; 2],
            keep: Arc::default(),
        }
    }

    /// The open file came from another process, with whatever locks that had on it.
    pub(super) fn adopt(&mut self) {
        self.surplus = [PermissionSet::ALL; 2];
    }

    /// The same for another open file of the same file; it holds nothing yet.
    pub(super) fn renewed(&self) -> Self {
        Self { name: self.name.clone(), enabled: self.enabled, keep: self.keep.clone(), ..Self::none() }
    }

    /// Holds exactly the locks that `permissions` ask for. Where it held none before, it waits a while for them.
    ///
    /// # Errors
    /// Somebody else objects; the locks are as before.
    pub(super) fn set(&mut self, fd: &OwnedFd, permissions: Permissions) -> OpenResult {
        if !self.enabled {
            return Ok(());
        }
        let is_first = self.held == PermissionSet::NONE && self.not_shared == PermissionSet::NONE;
        let until = Instant::now() + PATIENCE;
        loop {
            match self.try_set(fd, permissions) {
                Err(_) if is_first && Instant::now() < until => std::thread::sleep(RETRY_INTERVAL),
                result => return result,
            }
        }
    }

    fn try_set(&mut self, fd: &OwnedFd, permissions: Permissions) -> OpenResult {
        let held = permissions.held;
        let not_shared = PermissionSet::ALL.without(permissions.shared);
        let more_held = held.without(self.held);
        let more_not_shared = not_shared.without(self.not_shared);
        let taken = self
            .take(fd, Side::Held, more_held)
            .and_then(|()| self.take(fd, Side::NotShared, more_not_shared))
            .and_then(|()| self.look_for_objections(fd, Side::Held, more_held))
            .and_then(|()| self.look_for_objections(fd, Side::NotShared, more_not_shared));
        let [surplus_held, surplus_not_shared] = self.surplus;
        self.surplus = [surplus_held | self.held | more_held, surplus_not_shared | self.not_shared | more_not_shared];
        if taken.is_ok() {
            (self.held, self.not_shared) = (held, not_shared);
        }
        self.drop_surplus(fd);
        taken
    }

    /// Drops what may be there and is not held.
    fn drop_surplus(&mut self, fd: &OwnedFd) {
        if self.keep.load(Ordering::Relaxed) {
            return;
        }
        let [held, not_shared] = std::mem::replace(&mut self.surplus, [PermissionSet::NONE; 2]);
        self.drop_locks(fd, Side::Held, held.without(self.held));
        self.drop_locks(fd, Side::NotShared, not_shared.without(self.not_shared));
    }

    fn take(&self, fd: &OwnedFd, side: Side, set: PermissionSet) -> OpenResult {
        numbers(set).try_for_each(|(n, permission)| {
            match sys::lock_byte(fd.as_raw_fd(), side.byte(n), ByteLock::Read) {
                Ok(()) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(self.refused(side, permission)),
                Err(error) => Err(OpenError(format!("{}: cannot be locked: {error}", self.name))),
            }
        })
    }

    fn look_for_objections(&self, fd: &OwnedFd, side: Side, set: PermissionSet) -> OpenResult {
        numbers(set).try_for_each(|(n, permission)| {
            match sys::is_byte_locked(fd.as_raw_fd(), side.opposite().byte(n)) {
                Ok(false) => Ok(()),
                Ok(true) => Err(self.refused(side, permission)),
                Err(error) => Err(OpenError(format!("{}: cannot be locked: {error}", self.name))),
            }
        })
    }

    fn drop_locks(&self, fd: &OwnedFd, side: Side, set: PermissionSet) {
        for (n, permission) in numbers(set) {
            if let Err(error) = sys::lock_byte(fd.as_raw_fd(), side.byte(n), ByteLock::None) {
                tracing::warn!("{}: the \"{permission}\" lock could not be dropped: {error}", self.name);
            }
        }
    }

    fn refused(&self, side: Side, permission: &str) -> OpenError {
        let what = match side {
            Side::Held => format!("the \"{permission}\" lock is not to be had"),
            Side::NotShared => format!("the \"{permission}\" lock cannot be kept from others, one of them has it"),
        };
        OpenError(format!("{}: {what}. Is another process using the image?", self.name))
    }
}

fn numbers(set: PermissionSet) -> impl Iterator<Item = (u8, &'static str)> {
    PermissionSet::NAMES.into_iter().filter(move |(_, one, _)| set.contains(*one)).map(|(n, _, name)| (n, name))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// The same file opened twice: locks belong to open files, so they conflict even within a process.
    fn opened_twice(name: &str) -> (OwnedFd, OwnedFd) {
        let path = std::env::temp_dir().join(format!("blockport-lock-{name}-{}", std::process::id()));
        let first = File::create_new(&path).expect("the temporary directory is writable");
        drop(first);
        let open = || OwnedFd::from(File::open(&path).expect("it was just made"));
        let pair = (open(), open());
        std::fs::remove_file(&path).expect("it was just made");
        pair
    }

    fn locks(fd: &OwnedFd) -> FileLocks {
        FileLocks::new(Locking::On, "file \"x\"", fd, Arc::default()).expect("this host has OFD locks")
    }

    fn device(writable: bool, share_writes: bool) -> Permissions {
        let shared = match share_writes {
            true => PermissionSet::ALL,
            false => PermissionSet::CONSISTENT_READ | PermissionSet::WRITE_UNCHANGED,
        };
        Permissions { shared, ..Permissions::device(writable) }
    }

    #[test]
    fn a_second_writer_is_refused_until_the_first_lets_go() {
        let (a, b) = opened_twice("writers");
        let (mut first, mut second) = (locks(&a), locks(&b));
        let writer = device(true, false);
        first.set(&a, writer).expect("nobody else is there");
        first.set(&a, writer).expect("our own locks are no objection");
        let error = second.set(&b, writer).expect_err("the first one does not share writing");
        assert!(error.0.contains("file \"x\"") && error.0.contains("\"write\"") && error.0.contains("another process"));
        assert!(second.set(&b, device(false, false)).is_err(), "a reader that shares no writing");
        second.set(&b, device(false, true)).expect("a reader that shares writing");
        first.set(&a, Permissions::UNUSED).expect("less is never refused");
        second.set(&b, writer).expect("the first one has let go");
    }

    #[test]
    fn a_refused_change_leaves_the_locks_as_they_were() {
        let (a, b) = opened_twice("unchanged");
        let (mut first, mut second) = (locks(&a), locks(&b));
        let reader = device(false, false);
        first.set(&a, reader).expect("nobody else is there");
        second.set(&b, reader).expect("readers live side by side");
        first.set(&a, device(true, false)).expect_err("the other reader does not share writing");
        second.set(&b, Permissions::UNUSED).expect("less is never refused");
        // Had the refused write lock stayed, this reader would be refused now.
        second.set(&b, reader).expect("the first one is a reader still");
    }

    #[test]
    fn a_handed_over_file_keeps_its_locks_until_they_are_settled() {
        let (a, b) = opened_twice("handed");
        let (mut old, mut third) = (locks(&a), locks(&b));
        old.set(&a, device(true, false)).expect("nobody else is there");
        // The other process has the same open file.
        let handed = a.try_clone().expect("a descriptor");
        let keep = Arc::new(AtomicBool::new(true));
        let mut new = FileLocks::new(Locking::On, "file \"x\"", &handed, keep.clone()).expect("locks");
        new.adopt();
        new.set(&handed, device(false, false)).expect("the same open file is no objection");
        new.set(&handed, Permissions::UNUSED).expect("less is never refused");
        assert!(third.set(&b, device(false, false)).is_err(), "the first one still writes");
        keep.store(false, Ordering::Relaxed);
        new.set(&handed, device(false, false)).expect("it is ours");
        third.set(&b, device(false, false)).expect("a reader besides a reader");
    }
}
