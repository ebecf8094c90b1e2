//! The medium of a backend: insert, remove, and what can be asked of it. Devices are told by `media.rs`; here only who
//! asked for it with a notifier is.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{BackendNotice, BlockBackend, abort, commit, lock, prepare};
use crate::child::{Child, EdgeKind, Parent};
use crate::drained::Drained;
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::limits::BlockLimits;
use crate::node::{Node, NodeOptions};
use crate::permissions::Permissions;

impl BlockBackend {
    /// Puts a medium in, under load. What the device needs of it is remembered for the media that follow. Control
    /// thread.
    ///
    /// # Errors
    /// There is one already, another user of the node does not share what `permissions` hold, or an iothread cannot use
    /// it; nothing has changed.
    pub fn insert(&self, node: Arc<Node>, permissions: Permissions) -> OpenResult {
        if lock(&self.root).is_some() {
            return Err(OpenError(format!("\"{}\" has a medium already", self.label)));
        }
        let kind = EdgeKind {
            role: "root".to_owned(),
            user: format!("\"{}\"", self.label),
            granularity: self.block_size.load(Ordering::Relaxed),
            may_grow: false,
            only_read: false,
        };
        let drained = Drained::new(self.this.upgrade().into_iter().collect());
        let child = Child::new(node, kind, permissions, Parent::Backend(self.this.clone()))?;
        *lock(&self.root) = Some(child);
        self.medium.fetch_add(1, Ordering::AcqRel);
        if let Err(error) = prepare(drained.backends()) {
            *lock(&self.root) = None;
            abort(drained.backends());
            return Err(error);
        }
        commit(drained.backends());
        *lock(&self.permissions) = permissions;
        self.notifiers.notify(&BackendNotice::InsertRoot);
        Ok(())
    }

    /// Takes the medium out, under load; afterwards every request answers "no medium". Its options are remembered.
    /// Without a medium, nothing happens. Control thread.
    pub fn remove(&self) {
        if lock(&self.root).is_none() {
            return;
        }
        self.notifiers.notify(&BackendNotice::RemoveRoot);
        if let Some(node) = self.root() {
            *lock(&self.root_state) = Some(node.options());
        }
        self.drain_begin();
        // What was written is stable when the medium is somebody else's.
        if let Err(error) = self.flush_drained() {
            tracing::error!("\"{}\": flushing while the medium goes: {error}", self.label);
        }
        self.take_root();
        self.drain_end();
    }

    /// Drained.
    pub(super) fn take_root(&self) {
        let old = lock(&self.root).take();
        let medium = self.medium.fetch_add(1, Ordering::AcqRel) + 1;
        self.each_channel(move |_, channel| {
            channel.set_root(None);
            channel.set_medium(medium);
        });
        drop(old);
    }

    /// The node of the medium, if there is one.
    pub fn root(&self) -> Option<Arc<Node>> {
        self.root_edge().map(|child| child.node())
    }

    /// The edge to the medium, unless it lies behind an open tray.
    pub(super) fn reachable_root(&self) -> Option<Arc<Child>> {
        if self.is_tray_open() { None } else { self.root_edge() }
    }

    /// The edge to the medium.
    pub fn root_edge(&self) -> Option<Arc<Child>> {
        lock(&self.root).clone()
    }

    /// The options of the medium that was removed last.
    pub fn root_state(&self) -> Option<Arc<NodeOptions>> {
        lock(&self.root_state).clone()
    }

    /// What the device needs of its medium.
    pub fn permissions(&self) -> Permissions {
        *lock(&self.permissions)
    }

    /// Changes what the device needs of its medium, now and of those that follow. Control thread.
    ///
    /// # Errors
    /// Another user, or another process, does not share it; nothing has changed.
    pub fn set_permissions(&self, permissions: Permissions) -> OpenResult {
        if let Some(child) = self.root_edge() {
            child.set_permissions(permissions)?;
        }
        *lock(&self.permissions) = permissions;
        Ok(())
    }

    /// Whether there is a medium, in an open tray or not.
    pub fn is_inserted(&self) -> bool {
        lock(&self.root).is_some()
    }

    /// The size in bytes, a multiple of 512.
    ///
    /// # Errors
    /// There is no medium, or its tray is open.
    pub fn length(&self) -> BlockResult<u64> {
        if self.is_tray_open() {
            return Err(BlockError::NoMedium);
        }
        self.root().map(|node| node.length()).ok_or(BlockError::NoMedium)
    }

    /// What the medium can do; the default limits without one.
    pub fn limits(&self) -> BlockLimits {
        self.root().map(|node| node.limits()).unwrap_or_default()
    }

    /// Whether a discard would do something on this medium.
    pub fn can_discard(&self) -> bool {
        self.root().is_some_and(|node| node.limits().can_discard && node.options().discard)
    }

    /// Whether the medium cannot be written. False without one.
    pub fn is_read_only(&self) -> bool {
        self.root().is_some_and(|node| node.is_read_only())
    }

    /// Changes the size of the medium and tells every device that shows it. Control thread.
    ///
    /// # Errors
    /// There is no medium, or it cannot change; see [`Node::block_resize`].
    pub fn resize(&self, bytes: u64) -> OpenResult {
        match self.root() {
            Some(node) => node.block_resize(bytes),
            None => Err(OpenError(format!("\"{}\" has no medium", self.label))),
        }
    }
}
