//! Handover: how the image files of a graph go to another process, which opens the same nodes. It owns the open files that
//! were handed to us, the rule that no lock is dropped while two processes hold the same open file, and what tells one
//! disk from another. Who hands what to whom it does not know.
//!
//! Locks belong to the open file, so a process that is given a descriptor has the locks that came with it, and no third
//! one gets in between.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::rebuild;
use crate::drained::Drained;
use crate::drivers::{self, DriverKind, file, raw};
use crate::error::{OpenError, OpenResult};
use crate::graph::Graph;
use crate::node::{Node, parents_first};

/// An open image file.
#[derive(Debug)]
pub struct HandedFile {
    /// The open file itself, with its locks.
    pub descriptor: OwnedFd,
    /// The errno of the first flush of it that failed; 0: none has. The kernel tells of it only once.
    pub flush_errno: i32,
}

/// What a graph knows of handing over.
#[derive(Default)]
pub(crate) struct Handover {
    /// What was handed to us and is not in use yet.
    files: Mutex<Vec<HandedFile>>,
    /// Whether another process may hold our open files, so that no lock is dropped.
    keeps_locks: Arc<AtomicBool>,
}

impl Handover {
    /// True while no lock may be dropped.
    pub(crate) fn keeps_locks(&self) -> Arc<AtomicBool> {
        self.keeps_locks.clone()
    }

    /// Takes the first of the files that was handed to us and is wanted.
    pub(crate) fn take(&self, wanted: impl Fn(&OwnedFd) -> bool) -> Option<HandedFile> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let at = files.iter().position(|file| wanted(&file.descriptor))?;
        Some(files.remove(at))
    }
}

/// A graph that is ready to be opened by another process: nothing is in flight, nothing is cached but in the host, and
/// the files are open and locked. Either it is taken back, or the process ends without touching it.
#[must_use]
pub struct Quiescent {
    drained: Drained,
    /// Parents first.
    inactive: Vec<Arc<Node>>,
    keeps_locks: Arc<AtomicBool>,
}

impl Graph {
    /// The image files that are open, for another process.
    ///
    /// # Errors
    /// There are too few descriptors.
    pub fn open_files(&self) -> OpenResult<Vec<HandedFile>> {
        let mut files = Vec::new();
        for node in self.all_nodes() {
            if let Some((descriptor, flush_errno)) = file::open_file(&*node.driver()) {
                let descriptor = descriptor.as_fd().try_clone_to_owned();
                let descriptor = descriptor.map_err(|e| OpenError(format!("node \"{}\": {e}", node.name())))?;
                files.push(HandedFile { descriptor, flush_errno });
            }
        }
        Ok(files)
    }

    /// Nodes that are opened from now on use these open files, where they are the files of their paths. No lock is
    /// dropped until [`Graph::settle_locks`].
    pub fn adopt_files(&self, files: Vec<HandedFile>) {
        self.handover.keeps_locks.store(true, Ordering::Relaxed);
        *self.handover.files.lock().unwrap_or_else(PoisonError::into_inner) = files;
    }

    /// The open files are ours alone: what was handed to us and is not used is closed, and locks that nobody needs are
    /// dropped.
    pub fn settle_locks(&self) {
        self.handover.files.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.handover.keeps_locks.store(false, Ordering::Relaxed);
        for node in self.all_nodes() {
            if file::open_file(&*node.driver()).is_some()
                && let Err(error) = node.driver().set_permissions(node.told_permissions())
            {
                tracing::warn!("node \"{}\": {error}", node.name());
            }
        }
    }

    /// Stops all I/O, has formats write back and forget what they cache, and keeps files open and locked. Control thread.
    ///
    /// # Errors
    /// Something could not be written back; everything goes on as before.
    pub fn quiesce_for_handover(&self) -> OpenResult<Quiescent> {
        let nodes = self.all_nodes();
        let keeps_locks = self.handover.keeps_locks();
        keeps_locks.store(true, Ordering::Relaxed);
        let mut quiescent = Quiescent { drained: Drained::above_all(&nodes), inactive: Vec::new(), keeps_locks };
        for node in parents_first(&nodes) {
            if !node.is_active() || node.driver().children().is_empty() {
                continue;
            }
            if let Err(error) = node.driver().inactivate() {
                let error = error.context(format_args!("node \"{}\"", node.name()));
                quiescent.take_back(self);
                return Err(error);
            }
            node.set_active(false);
            quiescent.inactive.push(node);
        }
        Ok(quiescent)
    }
}

impl Quiescent {
    /// The other process does not want it: everything goes on.
    pub fn take_back(self, graph: &Graph) {
        let Self { drained, inactive, keeps_locks } = self;
        for node in inactive.iter().rev() {
            if let Err(error) = node.take_access() {
                tracing::error!("it could not be opened as it was before: {error}");
            }
        }
        keeps_locks.store(false, Ordering::Relaxed);
        graph.settle_locks();
        if !inactive.is_empty()
            && let Err(error) = rebuild(drained.backends())
        {
            tracing::error!("{error}");
        }
    }
}

/// What makes the disk on top of a node this disk and no other: its formats and files, from the top. Filters do not count.
///
/// # Errors
/// A driver keeps in this process what the disk holds, or what it did, so that no other can go on with it.
pub fn disk_identity(root: &Arc<Node>) -> OpenResult<Vec<String>> {
    fn visit(node: &Arc<Node>, identity: &mut Vec<String>) -> OpenResult {
        let name = node.driver_name();
        if KEPT_IN_PROCESS.contains(&name) {
            return Err(OpenError(format!(
                "node \"{}\" cannot go to another process: what the driver \"{name}\" keeps is in this one",
                node.name()
            )));
        }
        match file::open_file(&*node.driver()) {
            Some((descriptor, _)) => identity.push(file_identity(descriptor)?),
            None if drivers::find(name).is_some_and(|row| row.kind == DriverKind::Filter) => {}
            None => identity.push(match raw::offset(&*node.driver()) {
                Some(offset) if offset > 0 => format!("{name} from {offset}"),
                _ => name.to_owned(),
            }),
        }
        // A file before what lies behind it.
        node.driver().children().iter().try_for_each(|child| visit(&child.node(), identity))
    }
    let mut identity = Vec::new();
    visit(root, &mut identity)?;
    Ok(identity)
}

/// Drivers whose nodes cannot be opened a second time with the same content.
const KEPT_IN_PROCESS: [&str; 2] = ["memory", "blklogwrites"];

/// How [`disk_identity`] names a file.
///
/// # Errors
/// The host cannot tell.
pub fn file_identity(file: &impl AsFd) -> OpenResult<String> {
    let (device, inode) = file::identity(file).map_err(OpenError::new)?;
    Ok(file_identity_of(device, inode))
}

/// The same of a file whose device and inode are known.
pub fn file_identity_of(device: u64, inode: u64) -> String {
    format!("file {device}:{inode}")
}
