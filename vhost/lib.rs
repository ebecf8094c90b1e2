//! The virtio-blk device model and its vhost-user transport. It knows nothing of options, and of the block layer only
//! what a device model may: BlockBackend and AioContext.

mod config_space;
mod device_stop;
mod dirty_log;
mod export;
mod extra_messages;
mod guest_memory;
pub mod handover;
mod inflight;
mod mapping;
mod notifier;
mod queue;
mod server;
mod session;
mod sigbus;
mod socket;
#[cfg(test)]
mod testing;
mod virtio_blk;
mod virtqueue;
mod write_cache;

pub use export::{ExportError, ExportSettings, VhostUserBlkExport};
pub use queue::QueueFigures;
pub use server::HandingOver;
pub use session::{Activation, Activator};
pub use socket::{Endpoint, Listener, SocketAddress, SocketError, SocketFile};

/// What benches, property tests and fuzzing need of the inside; not part of the interface.
#[doc(hidden)]
pub mod internals {
    pub use crate::guest_memory::{GuestMemory, MemoryRegion};
    pub use crate::queue::{Queue, start_for_bench};
    pub use crate::session::Session;
    pub use crate::virtqueue::{Chain, Head, RingError, RingFeatures, RingLayout, VirtQueue};
}
