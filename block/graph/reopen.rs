//! Reopening: nodes get other options, and so other children perhaps, under load. Each driver is opened anew behind the
//! same node, after the old one has written back what it cached and has let its locks go. All nodes of a list go over,
//! with all edges and channels, or none.

use std::sync::Arc;

use super::{Graph, Inherited, OpenContext};
use crate::backend;
use crate::drained::Drained;
use crate::drivers;
use crate::error::{OpenError, OpenResult};
use crate::node::{Lengths, Node, NodeOptions, Opened, Operation, parents_first};
use crate::options::{ChildRef, Options};
use crate::permissions::{PermissionUpdate, Permissions};

/// A node that is to be reopened.
struct Item {
    node: Arc<Node>,
    node_options: NodeOptions,
    /// The driver's own options.
    options: Options,
    definition: Options,
}

/// A node that was reopened, with what is needed to go back.
struct Reopened {
    node: Arc<Node>,
    old: Opened,
    told: Permissions,
    permissions: PermissionUpdate,
}

impl Graph {
    /// Reopens nodes with other options. Each tree is a full definition: what is left out goes back to its default. The
    /// node-name says which node is meant; the driver must stay the same. A child is named by its node-name, and may be
    /// another one than before; a group of options in its place reopens the child that is there. Control thread.
    ///
    /// # Errors
    /// A definition is wrong, a driver could not open, users do not share what others hold, or an iothread cannot use
    /// the result; nothing has changed.
    pub fn reopen(&self, list: Vec<Options>) -> OpenResult {
        let mut items = Vec::new();
        for options in list {
            self.add_item(options, None, Inherited::TOP, &mut items)?;
        }
        let nodes: Vec<Arc<Node>> = items.iter().map(|item| item.node.clone()).collect();
        for node in &nodes {
            node.check_operation(Operation::Reopen)?;
        }
        let drained = Drained::above_all(&nodes);
        let lengths = Lengths::of(drained.backends());
        for backend in drained.backends() {
            let flushed = backend.flush_drained();
            flushed.map_err(|e| OpenError(format!("\"{}\" could not be flushed: {e}", backend.label())))?;
        }

        let parents_first: Vec<Arc<Node>> =
            parents_first(&nodes).into_iter().filter(|node| is_among(node, &nodes) && node.is_active()).collect();
        let mut reopened = Vec::new();
        let result = let_go(&parents_first)
            .and_then(|()| self.open_again(items, &parents_first, &mut reopened))
            .and_then(|()| backend::prepare(drained.backends()));
        if let Err(error) = result {
            go_back(reopened, &parents_first);
            backend::abort(drained.backends());
            return Err(error);
        }
        backend::commit(drained.backends());
        drop(drained);
        lengths.tell();
        Ok(())
    }

    /// Finds out which node is meant, and takes the options that all nodes have.
    fn add_item(
        &self,
        mut options: Options,
        child: Option<Arc<Node>>,
        inherited: Inherited<'_>,
        items: &mut Vec<Item>,
    ) -> OpenResult {
        let definition = options.clone();
        let name = options.take_str("node-name").map_err(OpenError::new)?;
        let node = match (child, name) {
            (None, None) => return Err(OpenError::new(options.missing("node-name"))),
            (None, Some(name)) => self.find(&name).ok_or_else(|| OpenError(format!("there is no node \"{name}\"")))?,
            (Some(child), Some(name)) if name != child.name() => {
                return Err(OpenError::new(options.invalid(
                    "node-name",
                    name,
                    format!("{:?} as before", child.name()),
                )));
            }
            (Some(child), _) => child,
        };
        let driver = options.require_str("driver").map_err(OpenError::new)?;
        if driver != node.driver_name() {
            let expected = format!("{:?}, as node {:?} was opened with", node.driver_name(), node.name());
            return Err(OpenError::new(options.invalid("driver", driver, expected)));
        }
        if items.iter().any(|item: &Item| Arc::ptr_eq(&item.node, &node)) {
            return Err(OpenError(format!("node \"{}\" is to be reopened twice at once", node.name())));
        }
        let name = node.name().to_owned();
        let says_active = options.contains("active");
        let node_options = self.node_options(&mut options, name, inherited).map_err(OpenError::new)?;
        if says_active && node_options.active != node.is_active() {
            let name = node.name();
            return Err(OpenError(format!("node \"{name}\": reopening changes nothing about it being active or not")));
        }
        let inherited = Inherited::from(&node_options);
        for child in node.driver().children() {
            let role = child.role();
            // A null takes the child away.
            if options.contains(role) && !options.is_null(role) && options.peek_str(role).is_none() {
                let child = child.node();
                if let ChildRef::Inline(of_child) = options.require_child(role).map_err(OpenError::new)? {
                    self.add_item(of_child, Some(child.clone()), inherited, items)?;
                }
                options.set_str(role, child.name());
            }
        }
        items.push(Item { node, node_options, options, definition });
        Ok(())
    }

    /// Opens all items, those first that others of them name as children.
    fn open_again(&self, mut items: Vec<Item>, active: &[Arc<Node>], reopened: &mut Vec<Reopened>) -> OpenResult {
        while !items.is_empty() {
            let waits = |item: &Item| items.iter().any(|other| item.names(other.node.name()));
            let at = items.iter().position(|item| !waits(item)).unwrap_or(0);
            let item = items.remove(at);
            let (node, wanted) = (item.node.clone(), is_among(&item.node, active));
            self.open_item(item, reopened)?;
            if wanted {
                node.take_access()?;
            }
            node.and_above().iter().for_each(|above| above.refresh());
        }
        Ok(())
    }

    fn open_item(&self, item: Item, reopened: &mut Vec<Reopened>) -> OpenResult {
        let Item { node, node_options, mut options, definition } = item;
        let row = drivers::find(node.driver_name())
            .ok_or_else(|| OpenError(format!("there is no driver \"{}\"", node.driver_name())))?;
        let previous = node.driver();
        let context = OpenContext { graph: self, node: &node_options, previous: Some(&*previous), chain: None };
        let driver = (row.open)(&mut options, &context)?;
        options.finish().map_err(OpenError::new)?;
        let children: Vec<Arc<Node>> = driver.children().iter().map(|child| child.node()).collect();
        if is_among(&node, &parents_first(&children)) {
            return Err(OpenError(format!("node \"{}\" would stand on itself", node.name())));
        }
        let opened =
            Opened { options: Arc::new(node_options), definition: Arc::new(definition), driver: driver.into() };
        let old = node.replace_opened(opened);
        let told = node.replace_told_permissions(Permissions::UNUSED);
        let mut permissions = PermissionUpdate::default();
        for child in old.driver.children() {
            permissions.set(child, Permissions::UNUSED);
        }
        permissions.touch(&node);
        let applied = permissions.apply();
        reopened.push(Reopened { node, old, told, permissions });
        applied
    }
}

impl Item {
    /// Whether one of its options is this name.
    fn names(&self, name: &str) -> bool {
        self.options.keys().any(|key| self.options.peek_str(key) == Some(name))
    }
}

fn is_among(node: &Arc<Node>, nodes: &[Arc<Node>]) -> bool {
    nodes.iter().any(|other| Arc::ptr_eq(node, other))
}

/// Has drivers write back what they cache and let their locks go. Their children stay as they are.
fn let_go(parents_first: &[Arc<Node>]) -> OpenResult {
    for node in parents_first {
        node.driver().inactivate().map_err(|e| e.context(format_args!("node \"{}\"", node.name())))?;
        node.set_active(false);
    }
    Ok(())
}

/// Puts the old drivers back, and has those that were active take their locks again.
fn go_back(reopened: Vec<Reopened>, parents_first: &[Arc<Node>]) {
    for Reopened { node, old, told, mut permissions } in reopened.into_iter().rev() {
        if node.is_active() {
            if let Err(error) = node.driver().inactivate() {
                tracing::error!("node \"{}\": {error}", node.name());
            }
            node.set_active(false);
        }
        permissions.undo();
        node.replace_opened(old);
        node.replace_told_permissions(told);
    }
    for node in parents_first.iter().rev() {
        if let Err(error) = node.take_access() {
            tracing::error!("it could not be opened as it was before: {error}");
        }
        node.and_above().iter().for_each(|above| above.refresh());
    }
}
