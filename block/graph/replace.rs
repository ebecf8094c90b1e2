//! Replacing: edges lead to another node from now on, under load: how a filter is put above a node that has users, and
//! taken out again. All edges and all channels go over, with what their users hold, or none.

use std::sync::Arc;

use super::Graph;
use crate::backend::{self, BlockBackend};
use crate::child::{Child, Parent};
use crate::drained::Drained;
use crate::error::{OpenError, OpenResult};
use crate::node::{Lengths, Node, Operation, parents_first};
use crate::permissions::PermissionUpdate;

impl Graph {
    /// Puts `to` in the place of `from` for all its users, but for those that `to` itself stands on `from` with: a filter
    /// that was opened over `from` gets in between, and one that is left goes out. Control thread.
    ///
    /// # Errors
    /// It would make a loop, users do not share what others hold, or an iothread cannot use it; nothing has changed.
    pub fn replace_node(&self, from: &Arc<Node>, to: &Arc<Node>) -> OpenResult {
        from.check_operation(Operation::Replace)?;
        let below = parents_first(std::slice::from_ref(to));
        let is_below = |user: &Arc<Child>| match user.parent() {
            Parent::Node(parent) => {
                parent.upgrade().is_some_and(|parent| below.iter().any(|b| Arc::ptr_eq(b, &parent)))
            }
            Parent::Backend(_) | Parent::None => false,
        };
        let edges: Vec<Arc<Child>> = from.users().into_iter().filter(|user| !is_below(user)).collect();
        redirect(&edges, to)
    }

    /// Puts `to` in the place of a backend's medium, without the device seeing a change of medium. Control thread.
    ///
    /// # Errors
    /// There is no medium; else as for [`Graph::replace_node`].
    pub fn replace_root(&self, backend: &BlockBackend, to: &Arc<Node>) -> OpenResult {
        let edge = backend.root_edge().ok_or_else(|| OpenError(format!("\"{}\" has no medium", backend.label())))?;
        edge.node().check_operation(Operation::Replace)?;
        redirect(&[edge], to)
    }

    /// Puts `to` in the place of a node's child. `role` is the key of the parent's option, as "file". Control thread.
    ///
    /// # Errors
    /// There is no such child; else as for [`Graph::replace_node`].
    pub fn replace_child(&self, parent: &Arc<Node>, role: &str, to: &Arc<Node>) -> OpenResult {
        let edge = parent.child(role)?;
        edge.node().check_operation(Operation::Replace)?;
        redirect(&[edge], to)
    }
}

impl Node {
    /// The edge to its child of that role.
    ///
    /// # Errors
    /// It has none.
    pub fn child(&self, role: &str) -> OpenResult<Arc<Child>> {
        let child = self.driver().children().iter().find(|child| child.role() == role).cloned();
        child.ok_or_else(|| OpenError(format!("node \"{}\" has no child \"{role}\"", self.name())))
    }
}

/// Has these edges lead to another node.
pub(super) fn redirect(edges: &[Arc<Child>], to: &Arc<Node>) -> OpenResult {
    let below = parents_first(std::slice::from_ref(to));
    for edge in edges {
        if let Parent::Node(parent) = edge.parent()
            && let Some(parent) = parent.upgrade()
            && below.iter().any(|node| Arc::ptr_eq(node, &parent))
        {
            let (to, parent) = (to.name(), parent.name());
            return Err(OpenError(format!("node \"{to}\" stands on node \"{parent}\" itself: that would be a loop")));
        }
    }
    let mut nodes: Vec<Arc<Node>> = edges.iter().map(|edge| edge.node()).collect();
    nodes.push(to.clone());
    let drained = Drained::above_all(&nodes);
    let lengths = Lengths::of(drained.backends());

    let mut permissions = PermissionUpdate::default();
    nodes.iter().for_each(|node| permissions.touch(node));
    let old: Vec<Arc<Node>> = edges.iter().map(|edge| edge.replace_node(to.clone())).collect();
    let result = permissions.apply().and_then(|()| {
        refresh_above(to);
        backend::prepare(drained.backends()).inspect_err(|_| permissions.undo())
    });
    if let Err(error) = result {
        for (edge, node) in edges.iter().zip(old) {
            edge.replace_node(node);
        }
        nodes.iter().for_each(refresh_above);
        backend::abort(drained.backends());
        return Err(error);
    }
    backend::commit(drained.backends());
    drop(drained);
    lengths.tell();
    Ok(())
}

/// Has what stands on a node take over the size and limits that it has now.
fn refresh_above(node: &Arc<Node>) {
    node.and_above().iter().skip(1).for_each(|above| above.refresh());
}
