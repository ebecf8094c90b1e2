//! A queue without an export around it, for benches and fuzzing. It serves as any other does and calls nobody.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockport_block::BlockBackend;
use blockport_block::aio::AioContext;

use super::{Notifiers, Queue, QueueSetup};
use crate::config_space::RangeLimits;
use crate::device_stop::DeviceStop;
use crate::virtio_blk::DeviceModel;
use crate::virtqueue::VirtQueue;

/// A writable queue with the default settings, on the calling iothread.
pub fn start_for_bench(
    context: &AioContext,
    backend: &Arc<BlockBackend>,
    ring: VirtQueue,
    kick: Arc<OwnedFd>,
) -> Rc<Queue> {
    let block_size = 512;
    let device = DeviceModel {
        serial: [0; 20],
        writable: true,
        can_discard: true,
        block_size,
        ranges: RangeLimits::new(&backend.limits(), block_size),
    };
    let setup = QueueSetup {
        name: "bench".to_owned(),
        index: 0,
        ring,
        device: Arc::new(device),
        device_stop: DeviceStop::new(Vec::new(), None),
        kick: Some(kick),
        notifiers: Notifiers::default(),
        enabled: true,
        size: 0,
        figures: Arc::default(),
    };
    let channel = backend.channel(context).unwrap_or_else(|error| panic!("{error}"));
    Queue::start(setup, context, channel)
}
