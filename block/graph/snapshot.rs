//! Snapshots by overlay: an image gets on top of a node, takes its place for all who use it, and shows what that holds
//! where it holds nothing itself. From then on the node is only read. Under load, all of it or nothing.

use std::sync::Arc;

use super::Graph;
use super::replace::redirect;
use crate::child::Child;
use crate::drained::Drained;
use crate::drivers;
use crate::error::{OpenError, OpenResult};
use crate::node::{Node, Operation};

/// The child that shows where an image holds nothing.
const BACKING: &str = "backing";

/// A snapshot that was taken, with what is needed to go back.
pub struct Snapshot {
    node: Arc<Node>,
    overlay: Arc<Node>,
    /// Those who used the node.
    edges: Vec<Arc<Child>>,
}

impl Graph {
    /// Puts `overlay`, an image without a backing file and without users, on top of `node`: what the users of that write
    /// from now on goes to the overlay. Devices see no change of medium. What the overlay's file says of its backing file
    /// stays as it is. Control thread.
    ///
    /// # Errors
    /// The overlay has users or a backing file, or cannot have one; it is read-only where users write; somebody blocks it;
    /// an iothread cannot use it. Nothing has changed.
    pub fn snapshot(&self, node: &Arc<Node>, overlay: &Arc<Node>) -> OpenResult<Snapshot> {
        let name = overlay.name();
        node.check_operation(Operation::Replace)?;
        overlay.check_operation(Operation::Reopen)?;
        if let Some(user) = overlay.users().first() {
            return Err(OpenError(format!("The overlay is already in use: node '{name}' by {}", user.user())));
        }
        let driver = drivers::find(overlay.driver_name());
        if !driver.is_some_and(|row| row.options.iter().any(|(option, _)| *option == BACKING)) {
            let driver = overlay.driver_name();
            return Err(OpenError(format!("The overlay does not support backing images: node '{name}' is {driver}")));
        }
        if overlay.child(BACKING).is_ok() {
            return Err(OpenError(format!("The overlay already has a backing image: node '{name}'")));
        }
        let snapshot = Snapshot { node: node.clone(), overlay: overlay.clone(), edges: node.users() };
        let _drained = Drained::above(node);
        // The users first: as long as they write to the node, nobody can rely on what it holds.
        redirect(&snapshot.edges, overlay)?;
        if let Err(error) = self.set_backing(overlay, Some(node)) {
            snapshot.users_back();
            return Err(error);
        }
        Ok(snapshot)
    }

    /// Takes a snapshot back that was just taken; nothing was written since.
    pub fn undo_snapshot(&self, snapshot: &Snapshot) {
        let _drained = Drained::above(&snapshot.overlay);
        if let Err(error) = self.set_backing(&snapshot.overlay, None) {
            tracing::error!("a snapshot could not be taken back: {error}");
            return;
        }
        snapshot.users_back();
    }

    /// Opens an image again as it is, but for its backing file.
    fn set_backing(&self, image: &Arc<Node>, backing: Option<&Arc<Node>>) -> OpenResult {
        let mut definition = image.definition();
        // The children as they are now, whatever the definition made them from.
        for child in image.driver().children() {
            definition.set_str(child.role(), child.node().name());
        }
        match backing {
            Some(node) => definition.set_str(BACKING, node.name()),
            None => definition.set_null(BACKING),
        };
        definition.set_str("node-name", image.name());
        self.reopen(vec![definition])
    }
}

impl Snapshot {
    fn users_back(&self) {
        if let Err(error) = redirect(&self.edges, &self.node) {
            tracing::error!("node \"{}\": its users could not be given back to it: {error}", self.node.name());
        }
    }
}
