//! Node: an opened block driver with its users. It owns the node's size, its options, and who may do what with it;
//! requests pass it by (they go from edge to channel).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::driver::BlockDriver;
use crate::error::{OpenError, OpenResult};
use crate::limits::BlockLimits;
use crate::permissions::Permissions;
use crate::ranges::RangeLocks;

/// What a node does with writes of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// Nothing special.
    #[default]
    Off,
    /// Turns them into write-zeroes.
    On,
    /// Turns them into write-zeroes that may give the space back.
    Unmap,
}

/// The options that every node has, whatever its driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeOptions {
    /// The node's name, unique in the graph.
    pub name: String,
    /// Opened for reading only.
    pub read_only: bool,
    /// Fall back to reading only where writing is not permitted.
    pub auto_read_only: bool,
    /// Whether discards are passed on; else they have no effect.
    pub discard: bool,
    /// What is done with writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Bypass the host's page cache.
    pub cache_direct: bool,
    /// Ignore flushes: fast, and everything is lost when the host crashes.
    pub cache_no_flush: bool,
    /// Let everyone else write too; for reading only.
    pub force_share: bool,
}

/// The size of a sector: nodes are a whole number of them long.
pub const SECTOR: u64 = 512;

/// An opened block driver.
pub struct Node {
    options: NodeOptions,
    driver_name: &'static str,
    driver: Box<dyn BlockDriver>,
    /// In bytes, a multiple of [`SECTOR`].
    length: AtomicU64,
    limits: Mutex<BlockLimits>,
    active: AtomicBool,
    users: Mutex<Users>,
    pub(crate) ranges: Arc<RangeLocks>,
}

/// See [`Node::hurry`]. It keeps the nodes that were told: the graph may be another one at its end.
#[must_use]
pub struct Hurry(Vec<Arc<Node>>);

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.iter().rev().for_each(|node| node.driver.drained_end());
    }
}

#[derive(Default)]
struct Users {
    list: Vec<User>,
    next_id: u64,
}

struct User {
    id: u64,
    name: String,
    permissions: Permissions,
    granularity: u32,
}

impl Users {
    fn total(&self) -> Permissions {
        self.list.iter().fold(Permissions::UNUSED, |sum, user| sum.and(user.permissions))
    }
}

impl Node {
    /// Wraps an opened driver and activates it.
    pub(crate) fn new(
        options: NodeOptions,
        driver_name: &'static str,
        driver: Box<dyn BlockDriver>,
    ) -> OpenResult<Arc<Self>> {
        let node = Arc::new(Self {
            length: AtomicU64::new(0),
            limits: Mutex::new(BlockLimits::default()),
            active: AtomicBool::new(false),
            users: Mutex::default(),
            ranges: Arc::default(),
            options,
            driver_name,
            driver,
        });
        node.activate()?;
        Ok(node)
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// The options that every node has.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }

    /// The name of its driver.
    pub fn driver_name(&self) -> &'static str {
        self.driver_name
    }

    /// Its driver, for the control path.
    pub fn driver(&self) -> &dyn BlockDriver {
        &*self.driver
    }

    /// The size in bytes, a multiple of [`SECTOR`]: the driver's, rounded up.
    pub fn length(&self) -> u64 {
        self.length.load(Ordering::Acquire)
    }

    /// What it can do.
    pub fn limits(&self) -> BlockLimits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing can be written: by its options, or because its driver could only open it for reading.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.limits().read_only
    }

    /// Whether it holds its locks and serves requests.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Takes locks and access, those of its children first. An active node is left alone.
    ///
    /// # Errors
    /// Something is in the way; the node stays inactive.
    pub fn activate(&self) -> OpenResult {
        if self.is_active() {
            return Ok(());
        }
        for child in self.driver.children() {
            child.node().activate()?;
        }
        self.driver.activate().map_err(|e| e.context(format_args!("node \"{}\"", self.name())))?;
        self.refresh();
        self.active.store(true, Ordering::Release);
        Ok(())
    }

    /// Gives locks and access up, then those of its children. Its backends must be drained and flushed.
    ///
    /// # Errors
    /// Something could not be written back; the node stays active.
    pub fn inactivate(&self) -> OpenResult {
        if !self.is_active() {
            return Ok(());
        }
        self.driver.inactivate().map_err(|e| e.context(format_args!("node \"{}\"", self.name())))?;
        self.active.store(false, Ordering::Release);
        self.driver.children().iter().try_for_each(|child| child.node().inactivate())
    }

    /// Has this node and all below it hold nothing back until what this returns is dropped. Not on an iothread.
    pub fn hurry(self: Arc<Self>) -> Hurry {
        let mut told = vec![self];
        let mut at = 0;
        while let Some(node) = told.get(at).cloned() {
            node.driver.drained_begin();
            told.extend(node.driver.children().iter().map(|child| child.node().clone()));
            at += 1;
        }
        Hurry(told)
    }

    /// Changes the size. Its backends must be drained; they tell their devices afterwards.
    ///
    /// # Errors
    /// No disk is that long, the driver cannot, or the host refuses; the size is what it was.
    pub fn resize(&self, bytes: u64) -> OpenResult {
        if bytes > i64::MAX as u64 {
            return Err(OpenError(format!("node \"{}\": {bytes} bytes are more than a disk can have", self.name())));
        }
        self.driver.resize(bytes).map_err(|e| e.context(format_args!("node \"{}\"", self.name())))?;
        self.refresh();
        Ok(())
    }

    /// Reads size and limits from the driver again. Only with nothing in flight.
    pub(crate) fn refresh(&self) {
        let length = self.driver.length();
        self.length.store(length.checked_next_multiple_of(SECTOR).unwrap_or(length), Ordering::Release);
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = self.driver.limits();
    }

    /// Whether some user writes in smaller units than the driver does, so that writes may be padded.
    pub(crate) fn may_pad(&self) -> bool {
        let align = self.limits().request_alignment;
        self.users().list.iter().any(|user| user.granularity < align)
    }

    /// Adds a user. `granularity` is the unit, in bytes, of everything it writes.
    pub(crate) fn add_user(&self, name: &str, permissions: Permissions, granularity: u32) -> OpenResult<u64> {
        let mut users = self.users();
        let id = users.next_id;
        users.next_id += 1;
        users.list.push(User { id, name: name.to_owned(), permissions: Permissions::UNUSED, granularity });
        let result = self.change(&mut users, id, permissions);
        if result.is_err() {
            users.list.retain(|user| user.id != id);
        }
        result.map(|()| id)
    }

    /// Changes what a user holds and shares; on an error nothing has changed.
    pub(crate) fn set_user_permissions(&self, id: u64, permissions: Permissions) -> OpenResult {
        self.change(&mut self.users(), id, permissions)
    }

    pub(crate) fn remove_user(&self, id: u64) {
        let mut users = self.users();
        if let Err(error) = self.change(&mut users, id, Permissions::UNUSED) {
            tracing::warn!("node \"{}\": permissions could not be given up: {error}", self.name());
        }
        users.list.retain(|user| user.id != id);
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes one user's permissions and passes the new total down; children that agreed are put back on an error.
    fn change(&self, users: &mut Users, id: u64, permissions: Permissions) -> OpenResult {
        let Some(this) = users.list.iter().position(|user| user.id == id) else { return Ok(()) };
        for other in users.list.iter().filter(|user| user.id != id) {
            let conflict = permissions.conflict(other.permissions);
            if !conflict.is_empty() {
                return Err(OpenError(format!(
                    "{} cannot use node \"{}\" together with {}: they do not share \"{conflict}\"",
                    users.list[this].name,
                    self.name(),
                    other.name
                )));
            }
        }
        let old = std::mem::replace(&mut users.list[this].permissions, permissions);
        let before = Permissions::UNUSED.and(old);
        let total = users.total();
        let result = self.pass_down(total);
        if result.is_err() {
            users.list[this].permissions = old;
            if let Err(error) = self.pass_down(users.total()) {
                tracing::error!("node \"{}\": permissions {before:?} not restored: {error}", self.name());
            }
        }
        result
    }

    fn pass_down(&self, total: Permissions) -> OpenResult {
        for child in self.driver.children() {
            child.set_permissions(self.driver.child_permissions(total))?;
        }
        self.driver.set_permissions(total).map_err(|e| e.context(format_args!("node \"{}\"", self.name())))
    }
}
