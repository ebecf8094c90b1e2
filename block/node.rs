//! Node: an opened block driver with its users. It owns the node's size, its options, and who its users are; requests
//! pass it by (they go from edge to channel). `node/control.rs` changes it while requests run.

mod blockers;
mod control;
mod threshold;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::backend::BlockBackend;
use crate::child::{Child, Parent};
use crate::driver::BlockDriver;
use crate::error::{OpenError, OpenResult};
use crate::limits::BlockLimits;
use crate::options::Options;
use crate::permissions::Permissions;
use crate::ranges::RangeLocks;

use blockers::Blockers;
pub use blockers::{OpBlocker, Operation};
pub(crate) use control::Lengths;
use threshold::Threshold;

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
    /// Activated when it is opened; else when it is told to be.
    pub active: bool,
    /// Let everyone else write too; for reading only.
    pub force_share: bool,
    /// The path of the host's file that the node itself opens, if it opens one.
    pub file_name: Option<String>,
}

/// The size of a sector: nodes are a whole number of them long.
pub const SECTOR: u64 = 512;

/// An opened block driver.
pub struct Node {
    name: String,
    driver_name: &'static str,
    opened: Mutex<Opened>,
    /// In bytes, a multiple of [`SECTOR`].
    length: AtomicU64,
    threshold: Threshold,
    limits: Mutex<BlockLimits>,
    active: AtomicBool,
    users: Mutex<Vec<Weak<Child>>>,
    /// What the driver was last told that its users hold and share.
    told: Mutex<Permissions>,
    blockers: Blockers,
    pub(crate) ranges: Arc<RangeLocks>,
}

/// See [`Node::hurry`]. It keeps the drivers that were told: the graph may be another one at its end.
#[must_use]
pub struct Hurry(Vec<Arc<dyn BlockDriver>>);

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.iter().rev().for_each(|driver| driver.drained_end());
    }
}

/// What a reopening puts another in the place of.
#[derive(Clone)]
pub(crate) struct Opened {
    pub(crate) options: Arc<NodeOptions>,
    /// All that it was defined with, its driver's own options included.
    pub(crate) definition: Arc<Options>,
    pub(crate) driver: Arc<dyn BlockDriver>,
}

impl Node {
    /// Wraps an opened driver and activates it, unless its options say otherwise: then what it stands on, which was
    /// active so that it could be opened, becomes inactive too.
    pub(crate) fn new(
        options: NodeOptions,
        definition: Options,
        driver_name: &'static str,
        driver: Box<dyn BlockDriver>,
    ) -> OpenResult<Arc<Self>> {
        let node = Arc::new(Self {
            name: options.name.clone(),
            length: AtomicU64::new(0),
            threshold: Threshold::default(),
            limits: Mutex::new(BlockLimits::default()),
            active: AtomicBool::new(false),
            users: Mutex::default(),
            told: Mutex::new(Permissions::UNUSED),
            blockers: Blockers::default(),
            ranges: Arc::default(),
            driver_name,
            opened: Mutex::new(Opened {
                options: Arc::new(options),
                definition: Arc::new(definition),
                driver: driver.into(),
            }),
        });
        node.adopt_children();
        if node.options().active {
            node.activate()?;
        } else {
            node.refresh();
            node.give_children_up()?;
        }
        Ok(node)
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The options that every node has, as they are now.
    pub fn options(&self) -> Arc<NodeOptions> {
        self.opened().options
    }

    /// What it was last defined with, as it was given: children defined in place among it.
    pub(crate) fn definition(&self) -> Options {
        (*self.opened().definition).clone()
    }

    /// The path of the host's file that it stands on, if that has one: its own, or that of its first child.
    pub fn file_name(&self) -> Option<String> {
        let behind = || self.driver().children().first().and_then(|child| child.node().file_name());
        self.options().file_name.clone().or_else(behind)
    }

    /// The name of its driver.
    pub fn driver_name(&self) -> &'static str {
        self.driver_name
    }

    /// Its driver, for the control path.
    pub fn driver(&self) -> Arc<dyn BlockDriver> {
        self.opened().driver
    }

    pub(crate) fn opened(&self) -> Opened {
        lock(&self.opened).clone()
    }

    /// Puts another driver in the place of the one before, which is returned. Drained, and the node is inactive.
    pub(crate) fn replace_opened(self: &Arc<Self>, opened: Opened) -> Opened {
        let old = std::mem::replace(&mut *lock(&self.opened), opened);
        self.adopt_children();
        old
    }

    fn adopt_children(self: &Arc<Self>) {
        for child in self.driver().children() {
            child.set_parent(Parent::Node(Arc::downgrade(self)));
        }
    }

    /// The size in bytes, a multiple of [`SECTOR`]: the driver's, rounded up.
    pub fn length(&self) -> u64 {
        self.length.load(Ordering::Acquire)
    }

    /// What it can do.
    pub fn limits(&self) -> BlockLimits {
        *lock(&self.limits)
    }

    /// Whether nothing can be written: by its options, or because its driver could only open it for reading.
    pub fn is_read_only(&self) -> bool {
        self.options().read_only || self.limits().read_only
    }

    /// Whether it holds its locks and serves requests.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    pub(crate) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
    }

    /// Has this node and all below it hold nothing back until what this returns is dropped. Not on an iothread.
    pub fn hurry(self: Arc<Self>) -> Hurry {
        let told: Vec<_> = parents_first(&[self]).iter().map(|node| node.driver()).collect();
        told.iter().for_each(|driver| driver.drained_begin());
        Hurry(told)
    }

    /// Changes the size, on behalf of a driver above or of [`Node::block_resize`]. Everything above is drained.
    ///
    /// # Errors
    /// No disk is that long, the driver cannot, or the host refuses; the size is what it was.
    pub fn resize(&self, bytes: u64) -> OpenResult {
        if bytes > i64::MAX as u64 {
            return Err(OpenError(format!("node \"{}\": {bytes} bytes are more than a disk can have", self.name())));
        }
        self.driver().resize(bytes).map_err(|e| e.context(format_args!("node \"{}\"", self.name())))?;
        self.refresh();
        Ok(())
    }

    /// Reads size and limits from the driver again. Only with nothing in flight.
    pub(crate) fn refresh(&self) {
        let driver = self.driver();
        let length = driver.length();
        self.length.store(length.checked_next_multiple_of(SECTOR).unwrap_or(length), Ordering::Release);
        *lock(&self.limits) = driver.limits();
    }

    /// Whether some user writes in smaller units than the driver does, so that writes may be padded.
    pub(crate) fn may_pad(&self) -> bool {
        let align = self.limits().request_alignment;
        self.users().iter().any(|user| user.granularity() < align)
    }

    /// The edges that lead here, in the order in which they came.
    pub fn users(&self) -> Vec<Arc<Child>> {
        lock(&self.users).iter().filter_map(Weak::upgrade).collect()
    }

    pub(crate) fn add_user(&self, child: &Arc<Child>) {
        lock(&self.users).push(Arc::downgrade(child));
    }

    pub(crate) fn remove_user(&self, child: &Arc<Child>) {
        lock(&self.users).retain(|user| !std::ptr::eq(user.as_ptr(), Arc::as_ptr(child)));
    }

    pub(crate) fn forget_dead_users(&self) {
        lock(&self.users).retain(|user| user.strong_count() > 0);
    }

    /// What all users together hold, and what all of them share.
    pub fn total_permissions(&self) -> Permissions {
        self.users().iter().fold(Permissions::UNUSED, |sum, user| sum.and(user.permissions()))
    }

    pub(crate) fn told_permissions(&self) -> Permissions {
        *lock(&self.told)
    }

    pub(crate) fn replace_told_permissions(&self, permissions: Permissions) -> Permissions {
        std::mem::replace(&mut *lock(&self.told), permissions)
    }

    /// The nodes whose drivers stand on this one.
    pub fn parents(&self) -> Vec<Arc<Node>> {
        let parent = |user: &Arc<Child>| match user.parent() {
            Parent::Node(node) => node.upgrade(),
            Parent::Backend(_) | Parent::None => None,
        };
        self.users().iter().filter_map(parent).collect()
    }

    /// This node and all that stand on it, each once.
    pub(crate) fn and_above(self: &Arc<Self>) -> Vec<Arc<Node>> {
        let mut above = vec![self.clone()];
        let mut at = 0;
        while at < above.len() {
            for parent in above[at].parents() {
                if !above.iter().any(|known| Arc::ptr_eq(known, &parent)) {
                    above.push(parent);
                }
            }
            at += 1;
        }
        above
    }

    /// The backends whose requests can reach this node, each once.
    pub fn backends_above(self: &Arc<Self>) -> Vec<Arc<BlockBackend>> {
        let mut backends: Vec<Arc<BlockBackend>> = Vec::new();
        for user in self.and_above().iter().flat_map(|node| node.users()) {
            if let Parent::Backend(backend) = user.parent()
                && let Some(backend) = backend.upgrade()
                && !backends.iter().any(|known| Arc::ptr_eq(known, &backend))
            {
                backends.push(backend);
            }
        }
        backends
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.is_active()
            && let Err(error) = self.driver().inactivate()
        {
            tracing::error!("node \"{}\": closing: {error}", self.name);
        }
    }
}

/// The backends of all nodes that hang together with this one, by whatever edges, each once.
pub(crate) fn connected_backends(node: &Arc<Node>) -> Vec<Arc<BlockBackend>> {
    let mut nodes = vec![node.clone()];
    let mut at = 0;
    while at < nodes.len() {
        let children = nodes[at].driver().children().iter().map(|child| child.node()).collect::<Vec<_>>();
        for next in nodes[at].parents().into_iter().chain(children) {
            if !nodes.iter().any(|known| Arc::ptr_eq(known, &next)) {
                nodes.push(next);
            }
        }
        at += 1;
    }
    let mut backends: Vec<Arc<BlockBackend>> = Vec::new();
    for backend in nodes.iter().flat_map(Node::backends_above) {
        if !backends.iter().any(|known| Arc::ptr_eq(known, &backend)) {
            backends.push(backend);
        }
    }
    backends
}

/// These nodes and all that they stand on, each once, parents before children.
pub(crate) fn parents_first(nodes: &[Arc<Node>]) -> Vec<Arc<Node>> {
    fn visit(node: &Arc<Node>, seen: &mut Vec<*const Node>, order: &mut Vec<Arc<Node>>) {
        if seen.contains(&Arc::as_ptr(node)) {
            return;
        }
        seen.push(Arc::as_ptr(node));
        for child in node.driver().children() {
            visit(&child.node(), seen, order);
        }
        order.push(node.clone());
    }
    let (mut seen, mut order) = (Vec::new(), Vec::new());
    nodes.iter().for_each(|node| visit(node, &mut seen, &mut order));
    order.reverse();
    order
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
