//! The block layer: BlockBackend, nodes, block drivers, AioContexts. It knows nothing of virtio.

pub mod options;
