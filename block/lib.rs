//! The block layer: BlockBackend, nodes, block drivers, AioContexts. It knows nothing of virtio.

mod accounting;
pub mod aio;
mod backend;
mod backends;
mod backing;
mod child;
mod dev_ops;
mod drained;
pub mod driver;
pub mod drivers;
mod error;
pub mod event;
mod graph;
pub mod handoff;
pub mod handover;
pub mod iovec;
mod limits;
mod merging;
mod node;
mod offload;
mod on_error;
pub mod options;
mod permissions;
mod ranges;
pub mod secret;
mod shaping;
mod sync;
mod sys;
pub mod throttle;

pub use accounting::{BOUNDARIES_MAX, KindStatistics, LatencyHistogram, RequestKind, Statistics};
pub use backend::{
    Attached, BackendChannel, BackendHurry, BackendNotice, BlockBackend, Cancellable, Canceller, Completed, Notifier,
    Plug, Request, RequestInfo, Submitted, TrayOpening, WaitsFor,
};
pub use backing::resolve as resolve_path;
pub use child::{Child, ChildChannel};
pub use dev_ops::BlockDevOps;
pub use drained::Drained;
pub use error::{BlockError, BlockResult, OpenError, OpenResult};
pub use graph::{Graph, OpenContext, Snapshot, StatedFile};
pub use limits::{BlockLimits, Geometry, MAX_IOV, MAX_TRANSFER};
pub use node::{DetectZeroes, Node, NodeOptions, OpBlocker, Operation, SECTOR};
pub use on_error::{ErrorAction, IoStatus, OnErrorPolicy};
pub use permissions::{PermissionSet, Permissions};
