//! Drained: a section in which no request is in flight at any of some backends, and none starts. Every request comes
//! from a backend, so that draining the backends above a node drains the node, and everything between them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::BlockBackend;
use crate::error::OpenResult;
use crate::node::Node;

/// A drained section: it begins with this value and ends when it is dropped. Sections nest. Control side, never an
/// iothread.
pub struct Drained(Vec<Arc<BlockBackend>>);

impl Drained {
    /// Drains these backends. All of them stop before any is waited for, and a device stops before its backend.
    pub fn new(backends: Vec<Arc<BlockBackend>>) -> Self {
        backends.iter().for_each(|backend| backend.quiesce());
        backends.iter().for_each(|backend| backend.wait_until_idle());
        Self(backends)
    }

    /// Drains these backends, unless that takes longer than `time`.
    ///
    /// # Errors
    /// It does; the error says what hangs. Nothing is drained any more.
    pub fn within(time: Duration, backends: Vec<Arc<BlockBackend>>) -> OpenResult<Self> {
        let deadline = Instant::now() + time;
        backends.iter().for_each(|backend| backend.quiesce());
        let drained = Self(backends);
        drained.0.iter().try_for_each(|backend| backend.wait_until_idle_by(deadline))?;
        Ok(drained)
    }

    /// Drains every backend whose requests can reach the node.
    pub fn above(node: &Arc<Node>) -> Self {
        Self::above_all(std::slice::from_ref(node))
    }

    /// The same for several nodes.
    pub fn above_all(nodes: &[Arc<Node>]) -> Self {
        let mut backends: Vec<Arc<BlockBackend>> = Vec::new();
        for backend in nodes.iter().flat_map(Node::backends_above) {
            if !backends.iter().any(|known| Arc::ptr_eq(known, &backend)) {
                backends.push(backend);
            }
        }
        Self::new(backends)
    }

    pub(crate) fn backends(&self) -> &[Arc<BlockBackend>] {
        &self.0
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        // Children before parents.
        self.0.iter().rev().for_each(|backend| backend.drain_end());
    }
}
