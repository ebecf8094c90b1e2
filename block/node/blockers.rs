//! OpBlocker: what must not be done to a node for now, and who says so. It owns the list and the words; who does such a
//! thing asks first.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::Node;
use crate::error::{OpenError, OpenResult};

/// What can be blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Changing the size.
    Resize,
    /// Taking the medium out of a device.
    Eject,
    /// Revoking a device's access.
    DriveDel,
    /// Closing the node.
    Delete,
    /// Reopening it with other options.
    Reopen,
    /// Putting another node in its place.
    Replace,
    /// Giving locks and access up, or taking them.
    ChangeActive,
    /// Moving it to other iothreads.
    ChangeContext,
    /// Being what a job writes to.
    JobTarget,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 9] = [
        Self::Resize,
        Self::Eject,
        Self::DriveDel,
        Self::Delete,
        Self::Reopen,
        Self::Replace,
        Self::ChangeActive,
        Self::ChangeContext,
        Self::JobTarget,
    ];
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Resize => "be resized",
            Self::Eject => "be ejected",
            Self::DriveDel => "be removed from its device",
            Self::Delete => "be deleted",
            Self::Reopen => "be reopened",
            Self::Replace => "be replaced",
            Self::ChangeActive => "change between active and inactive",
            Self::ChangeContext => "move to other iothreads",
            Self::JobTarget => "be the target of a job",
        })
    }
}

#[derive(Default)]
pub(super) struct Blockers(Arc<Mutex<List>>);

#[derive(Default)]
struct List {
    entries: Vec<Entry>,
    next_number: u64,
}

struct Entry {
    number: u64,
    operations: Vec<Operation>,
    reason: String,
}

fn lock(list: &Mutex<List>) -> MutexGuard<'_, List> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps some operations from a node until it is dropped.
pub struct OpBlocker {
    list: Weak<Mutex<List>>,
    number: u64,
}

impl Drop for OpBlocker {
    fn drop(&mut self) {
        if let Some(list) = self.list.upgrade() {
            lock(&list).entries.retain(|entry| entry.number != self.number);
        }
    }
}

impl Node {
    /// Blocks these operations until the answer is dropped. `reason` follows "because": `job "j0" copies it`.
    pub fn block_operations(&self, operations: &[Operation], reason: &str) -> OpBlocker {
        let mut list = lock(&self.blockers.0);
        let number = list.next_number;
        list.next_number += 1;
        list.entries.push(Entry { number, operations: operations.to_vec(), reason: reason.to_owned() });
        OpBlocker { list: Arc::downgrade(&self.blockers.0), number }
    }

    /// Whether this may be done to the node now.
    ///
    /// # Errors
    /// Somebody blocks it; the error says who.
    pub fn check_operation(&self, operation: Operation) -> OpenResult {
        let list = lock(&self.blockers.0);
        match list.entries.iter().find(|entry| entry.operations.contains(&operation)) {
            Some(entry) => {
                let reason = &entry.reason;
                Err(OpenError(format!("node \"{}\" cannot {operation} now, because {reason}", self.name())))
            }
            None => Ok(()),
        }
    }
}
