//! The block layer: BlockBackend, nodes, block drivers, AioContexts. It knows nothing of virtio.

mod accounting;
pub mod aio;
mod backend;
mod child;
mod dev_ops;
pub mod driver;
pub mod drivers;
mod error;
mod graph;
pub mod iovec;
mod limits;
mod node;
pub mod options;
mod permissions;
mod ranges;
mod shaping;
mod sys;
pub mod throttle;

pub use accounting::{KindStatistics, RequestKind, Statistics};
pub use backend::{BackendChannel, BlockBackend, Completed, Request, Submitted};
pub use child::{Child, ChildChannel};
pub use dev_ops::BlockDevOps;
pub use error::{BlockError, BlockResult, OpenError, OpenResult};
pub use graph::{Graph, OpenContext};
pub use limits::{BlockLimits, MAX_IOV, MAX_TRANSFER};
pub use node::{DetectZeroes, Hurry, Node, NodeOptions, SECTOR};
pub use permissions::{PermissionSet, Permissions};
