//! Backends: the register of BlockBackends: all that were created, and those that the monitor has named, in order. A name
//! holds a reference. That names are unique over nodes as well is seen to by the graph, which owns this.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::backend::BlockBackend;
use crate::drained::Drained;
use crate::error::{BlockResult, OpenError, OpenResult};
use crate::graph::Graph;
use crate::node::{Node, Operation};
use crate::options::{Options, is_valid_id};
use crate::permissions::Permissions;

/// The backends of a graph.
#[derive(Default)]
pub(crate) struct Backends(Mutex<Lists>);

#[derive(Default)]
struct Lists {
    /// In the order of creation.
    all: Vec<Weak<BlockBackend>>,
    /// In the order of naming.
    named: Vec<(String, Arc<BlockBackend>)>,
}

impl Backends {
    fn lists(&self) -> MutexGuard<'_, Lists> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.lists().named.iter().any(|(known, _)| known == name)
    }
}

/// The BlockBackends of the graph.
impl Graph {
    /// A new backend without a medium, in the list of all. `label` is what errors, logs and events call it: the id of its
    /// device.
    pub fn create_backend(&self, label: &str) -> Arc<BlockBackend> {
        let backend = BlockBackend::new(label);
        let mut lists = self.backends.lists();
        lists.all.retain(|backend| backend.strong_count() > 0);
        lists.all.push(Arc::downgrade(&backend));
        backend
    }

    /// A new backend with a node of its own, which is opened for it and closes with its last user.
    ///
    /// # Errors
    /// The node could not be opened, or it cannot be used so.
    pub fn open_backend(
        &self,
        label: &str,
        options: Options,
        permissions: Permissions,
    ) -> OpenResult<Arc<BlockBackend>> {
        let node = self.open_unowned(options)?;
        let backend = self.create_backend(label);
        backend.insert(node, permissions)?;
        Ok(backend)
    }

    /// All backends, named or not, in the order of their creation. The list is a copy, and does not change.
    pub fn all_backends(&self) -> Vec<Arc<BlockBackend>> {
        self.backends.lists().all.iter().filter_map(Weak::upgrade).collect()
    }

    /// The backends that have a name, in the order in which they were named. The list is a copy, and does not change.
    pub fn named_backends(&self) -> Vec<Arc<BlockBackend>> {
        self.backends.lists().named.iter().map(|(_, backend)| backend.clone()).collect()
    }

    /// The backend of that name.
    pub fn find_backend(&self, name: &str) -> Option<Arc<BlockBackend>> {
        let lists = self.backends.lists();
        lists.named.iter().find(|(known, _)| known == name).map(|(_, backend)| backend.clone())
    }

    /// Names an anonymous backend; the name holds a reference to it.
    ///
    /// # Errors
    /// The name is no identifier, it is taken by a node or another backend, or the backend has one already.
    pub fn name_backend(&self, backend: &Arc<BlockBackend>, name: &str) -> OpenResult {
        if !is_valid_id(name) {
            let expected = "a letter followed by letters, digits, '-', '.' or '_'";
            return Err(OpenError(format!("a backend's name must be {expected}, not {name:?}")));
        }
        if let Some(known) = backend.name() {
            return Err(OpenError(format!("\"{}\" has a name already: \"{known}\"", backend.label())));
        }
        self.check_name(name)?;
        backend.set_name(Some(name.to_owned()));
        self.backends.lists().named.push((name.to_owned(), backend.clone()));
        Ok(())
    }

    /// Takes a backend's name away, and the reference that it held. Without a name, nothing happens.
    pub fn unname_backend(&self, backend: &Arc<BlockBackend>) {
        backend.set_name(None);
        // Dropped without the lock: it may be the last reference.
        let mut dropped = Vec::new();
        let mut lists = self.backends.lists();
        let (gone, stay) = lists.named.drain(..).partition(|(_, known)| Arc::ptr_eq(known, backend));
        lists.named = stay;
        dropped.extend::<Vec<(String, Arc<BlockBackend>)>>(gone);
        drop(lists);
    }

    /// Removal by the monitor ("drive_del"): revokes the device's access, so that its requests answer "no medium" and
    /// none may be parked for ever, and frees the name at once. The backend lives until its last holder lets go.
    ///
    /// # Errors
    /// An operation blocker stands against it; nothing has changed.
    pub fn drive_del(&self, backend: &Arc<BlockBackend>) -> OpenResult {
        if let Some(node) = backend.root() {
            node.check_operation(Operation::DriveDel)?;
        }
        backend.revoke();
        self.unname_backend(backend);
        Ok(())
    }

    /// Drains every backend.
    pub fn drain_all(&self) -> Drained {
        Drained::new(self.all_backends())
    }

    /// Flushes every backend. All are tried; the first error is returned.
    pub fn flush_all(&self) -> BlockResult {
        let results: Vec<BlockResult> = self.all_backends().iter().map(BlockBackend::flush_blocking).collect();
        results.into_iter().collect()
    }

    /// Whether a new node or backend may have this name.
    pub(crate) fn check_name(&self, name: &str) -> OpenResult {
        if self.find(name).is_some() {
            return Err(OpenError(format!("node-name \"{name}\" is taken")));
        }
        if self.backends.has_name(name) {
            return Err(OpenError(format!("\"{name}\" is the name of a backend")));
        }
        Ok(())
    }

    /// Ends the use of a node by the graph; see [`Graph::blockdev_del`].
    pub(crate) fn check_unused(&self, node: &Arc<Node>) -> OpenResult {
        match node.users().first() {
            Some(user) => Err(OpenError(format!("node \"{}\" is in use by {}", node.name(), user.user()))),
            None => Ok(()),
        }
    }
}
