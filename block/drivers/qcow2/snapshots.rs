//! Snapshots: internal ones, taken, applied and deleted. It owns the order in which refcounts, marks and tables reach the
//! disk; how their table is coded is `snapshot_table.rs`'s. With no request in flight.

use super::Qcow2;
use crate::error::{OpenError, OpenResult};

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique; digits, if we made it.
    pub id: String,
    /// Need not be unique.
    pub name: String,
    /// The size of its disk in bytes.
    pub disk_bytes: u64,
    /// The size of the machine's state that was saved with it, in bytes; 0: none.
    pub vm_state_bytes: u64,
    /// When it was taken: seconds since 1970, and nanoseconds.
    pub date_sec: u32,
    /// Nanoseconds, below 10^9.
    pub date_nsec: u32,
    /// How long the machine had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// How many instructions the machine had executed, if it counted them.
    pub icount: Option<u64>,
}

fn later<T>() -> OpenResult<T> {
    Err(OpenError::new("this is not possible yet"))
}

impl Qcow2 {
    pub(super) fn snapshots(&self) -> OpenResult<Vec<SnapshotInfo>> {
        later()
    }

    pub(super) fn snapshot_create(&self, _name: &str) -> OpenResult<SnapshotInfo> {
        later()
    }

    pub(super) fn snapshot_apply(&self, _snapshot: &str) -> OpenResult {
        later()
    }

    pub(super) fn snapshot_delete(&self, _snapshot: &str) -> OpenResult {
        later()
    }

    pub(super) fn snapshot_load(&self, _snapshot: &str) -> OpenResult {
        later()
    }
}
