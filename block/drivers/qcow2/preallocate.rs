//! Preallocate: clusters that are there before anything is written to them. It owns the modes and what each costs.

use super::Qcow2;
use crate::error::{OpenError, OpenResult};

/// What is allocated of a new disk, or of one that grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Clusters have their place in the image, which the host does not back yet.
    Metadata,
    /// The host reserves the space, too.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl Qcow2 {
    /// Gives every cluster from `start` to `end` on the disk, where there is none so far, its place.
    pub(super) fn preallocate(&self, _start: u64, _end: u64, _mode: Preallocation) -> OpenResult {
        Err(OpenError::new("this is not possible yet"))
    }
}
