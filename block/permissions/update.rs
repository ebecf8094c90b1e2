//! PermissionUpdate: a change of what edges hold and share, carried from each node down to its children and to the
//! drivers: either everyone agrees, or nothing has changed. It owns the order and the way back.

use std::sync::Arc;

use super::{PermissionSet, Permissions};
use crate::child::Child;
use crate::error::{OpenError, OpenResult};
use crate::node::{Node, parents_first};

/// A change under way. Control thread.
#[derive(Default)]
pub(crate) struct PermissionUpdate {
    /// Where users came, went or changed.
    nodes: Vec<Arc<Node>>,
    /// Edges that were changed, with what they held before.
    edges: Vec<(Arc<Child>, Permissions)>,
    /// Nodes whose drivers were told, with what they were told before.
    told: Vec<(Arc<Node>, Permissions)>,
}

impl PermissionUpdate {
    /// The node has users that it had not, or the other way round.
    pub(crate) fn touch(&mut self, node: &Arc<Node>) {
        self.nodes.push(node.clone());
    }

    /// Sets what an edge holds and shares.
    pub(crate) fn set(&mut self, child: &Arc<Child>, permissions: Permissions) {
        self.touch(&child.node());
        self.edges.push((child.clone(), child.replace_permissions(permissions)));
    }

    /// Carries the change out.
    ///
    /// # Errors
    /// Two users do not go together, a node is read-only, or another process has locked a file; nothing has changed.
    pub(crate) fn apply(&mut self) -> OpenResult {
        let result = self.try_apply();
        if result.is_err() {
            self.undo();
        }
        result
    }

    fn try_apply(&mut self) -> OpenResult {
        let order = parents_first(&self.nodes);
        for node in &order {
            self.check(node)?;
            let (total, driver) = (node.total_permissions(), node.driver());
            for child in driver.children() {
                let wanted = child.narrowed(driver.child_permissions(total));
                if child.permissions() != wanted {
                    self.edges.push((child.clone(), child.replace_permissions(wanted)));
                }
            }
        }
        for node in &order {
            let total = node.total_permissions();
            if node.told_permissions() != total {
                let told = node.driver().set_permissions(total);
                told.map_err(|e| e.context(format_args!("node \"{}\"", node.name())))?;
                self.told.push((node.clone(), node.replace_told_permissions(total)));
            }
        }
        Ok(())
    }

    /// Whether the users of a node go together, and it can be written where one of them writes.
    fn check(&self, node: &Arc<Node>) -> OpenResult {
        let users = node.users();
        let changed = |child: &Arc<Child>| self.edges.iter().any(|(edge, _)| Arc::ptr_eq(edge, child));
        for (at, user) in users.iter().enumerate() {
            if user.permissions().held.contains(PermissionSet::WRITE) && node.is_read_only() {
                let (user, name) = (user.user(), node.name());
                return Err(OpenError(format!("{user} cannot write to node \"{name}\", which is read-only")));
            }
            for other in &users[..at] {
                let conflict = user.permissions().conflict(other.permissions());
                if conflict.is_empty() {
                    continue;
                }
                // Whoever wants something new comes first.
                let (new, old) = if changed(other) && !changed(user) { (other, user) } else { (user, other) };
                let (new, old, name) = (new.user(), old.user(), node.name());
                return Err(OpenError(format!(
                    "{new} cannot use node \"{name}\" together with {old}: they do not share \"{conflict}\""
                )));
            }
        }
        Ok(())
    }

    /// Puts everything back.
    pub(crate) fn undo(&mut self) {
        for (node, before) in self.told.drain(..).rev() {
            if let Err(error) = node.driver().set_permissions(before) {
                tracing::error!("node \"{}\": permissions {before:?} not restored: {error}", node.name());
            }
            node.replace_told_permissions(before);
        }
        for (child, before) in self.edges.drain(..).rev() {
            child.replace_permissions(before);
        }
    }
}
