//! What is done to a node while its backends may have requests in flight: resize, activate, inactivate. Each drains
//! every backend above, has their channels made anew, and tells devices whose size has changed.

use std::sync::Arc;

use super::{Node, Operation};
use crate::backend::{self, BlockBackend};
use crate::child::{Child, EdgeKind, Parent};
use crate::drained::Drained;
use crate::error::{OpenError, OpenResult};
use crate::permissions::{PermissionSet, Permissions};

/// The lengths of backends before something is done to their graphs; devices of those that change are told at the end.
pub(crate) struct Lengths(Vec<(Arc<BlockBackend>, u64)>);

impl Lengths {
    pub(crate) fn of(backends: &[Arc<BlockBackend>]) -> Self {
        Self(backends.iter().map(|backend| (backend.clone(), backend.length().unwrap_or(0))).collect())
    }

    /// Tells the devices. Not drained.
    pub(crate) fn tell(self) {
        for (backend, before) in self.0 {
            if backend.length().unwrap_or(0) != before {
                backend.tell_resized();
            }
        }
    }
}

impl Node {
    /// Changes the size under load. Control thread.
    ///
    /// # Errors
    /// A user does not share "resize", somebody blocks it, or it cannot be done; the size is what it was.
    pub fn block_resize(self: &Arc<Self>, bytes: u64) -> OpenResult {
        self.check_operation(Operation::Resize)?;
        let drained = Drained::above(self);
        let lengths = Lengths::of(drained.backends());
        // As a user that writes nothing, and so never has anything padded.
        let kind = EdgeKind { granularity: u32::MAX, ..EdgeKind::outside("a resize") };
        let permissions = Permissions { held: PermissionSet::RESIZE, shared: PermissionSet::ALL };
        let user = Child::new(self.clone(), kind, permissions, Parent::None)?;
        let resized = self.resize(bytes);
        drop(user);
        // The channels hold limits that may have changed with the size, and so may those of the nodes above.
        self.and_above().iter().skip(1).for_each(|node| node.refresh());
        let result = resized.and_then(|()| backend::rebuild(drained.backends()));
        drop(drained);
        lengths.tell();
        result
    }

    /// Takes locks and access, those of its children first. An active node is left alone. Control thread.
    ///
    /// # Errors
    /// Something is in the way; the node stays inactive.
    pub fn activate(self: &Arc<Self>) -> OpenResult {
        if self.is_active() {
            return Ok(());
        }
        self.check_operation(Operation::ChangeActive)?;
        let drained = Drained::above(self);
        let lengths = Lengths::of(drained.backends());
        let result = self.take_access().and_then(|()| backend::rebuild(drained.backends()));
        drop(drained);
        lengths.tell();
        result
    }

    pub(crate) fn take_access(&self) -> OpenResult {
        if self.is_active() {
            return Ok(());
        }
        let driver = self.driver();
        let activated = driver
            .children()
            .iter()
            .try_for_each(|child| child.node().take_access())
            .and_then(|()| driver.activate().map_err(|e| e.context(format_args!("node \"{}\"", self.name()))));
        if let Err(error) = activated {
            // Whoever is to have the image instead needs all of it.
            if let Err(again) = self.give_children_up() {
                tracing::error!("{again}");
            }
            return Err(error);
        }
        self.refresh();
        self.set_active(true);
        Ok(())
    }

    /// Drains and flushes, then gives locks and access up, then those of its children that no other active node stands
    /// on. Control thread.
    ///
    /// # Errors
    /// An active node stands on it, or something could not be written back; the node stays active.
    pub fn inactivate(self: &Arc<Self>) -> OpenResult {
        if !self.is_active() {
            return Ok(());
        }
        self.check_operation(Operation::ChangeActive)?;
        if let Some(parent) = self.parents().iter().find(|parent| parent.is_active()) {
            let (name, parent) = (self.name(), parent.name());
            return Err(OpenError(format!("node \"{name}\" cannot be inactive under the active node \"{parent}\"")));
        }
        let drained = Drained::above(self);
        for backend in drained.backends() {
            let flushed = backend.flush_drained();
            flushed.map_err(|e| OpenError(format!("node \"{}\": it could not be flushed: {e}", self.name())))?;
        }
        self.give_access_up()
    }

    pub(crate) fn give_access_up(&self) -> OpenResult {
        if !self.is_active() {
            return Ok(());
        }
        let driver = self.driver();
        driver.inactivate().map_err(|e| e.context(format_args!("node \"{}\"", self.name())))?;
        self.set_active(false);
        self.give_children_up().inspect_err(|_| {
            // As it was: this node is of no use without its child.
            if let Err(again) = self.take_access() {
                tracing::error!("{again}");
            }
        })
    }

    /// Inactivates those of its children that no active node stands on and nobody else uses.
    pub(super) fn give_children_up(&self) -> OpenResult {
        for child in self.driver().children() {
            let node = child.node();
            if !node.parents().iter().any(|parent| parent.is_active()) && !node.is_held() {
                node.give_access_up()?;
            }
        }
        Ok(())
    }

    /// Whether something else than a node uses it: a backend, which wants it active.
    fn is_held(&self) -> bool {
        self.users().iter().any(|user| !matches!(user.parent(), Parent::Node(_)))
    }
}
