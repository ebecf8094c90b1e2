//! Events: what the block layer tells the outside by itself, and where it goes. It owns the list and one place for the
//! sink; who turns them into a protocol's messages is none of its business.

use std::sync::{Arc, PoisonError, RwLock};

use crate::backend::RequestInfo;
use crate::on_error::ErrorAction;

/// Something that happened. `device` is the label of a backend: the id of its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockEvent {
    /// A request failed on the host (BLOCK_IO_ERROR).
    IoError {
        /// The device that asked.
        device: String,
        /// The node of its medium; `None`: it has none by now.
        node_name: Option<String>,
        /// Whether something was read, or written or flushed.
        is_read: bool,
        /// What is done about it.
        action: ErrorAction,
        /// The host is out of space.
        nospace: bool,
        /// The error, for people.
        reason: String,
    },
    /// A tray moved (DEVICE_TRAY_MOVED).
    TrayMoved {
        /// The device with the tray.
        device: String,
        /// Where the tray is now.
        tray_open: bool,
    },
    /// A write went past the threshold of a node, which is gone with this (BLOCK_WRITE_THRESHOLD).
    WriteThreshold {
        /// The node.
        node_name: String,
        /// By how many bytes.
        amount_exceeded: u64,
        /// The threshold in bytes from the start of the node.
        write_threshold: u64,
    },
    /// An image contradicts itself (BLOCK_IMAGE_CORRUPTED).
    ImageCorrupted {
        /// The node.
        node_name: String,
        /// What is wrong, for people.
        message: String,
        /// Where, in bytes, if that can be said.
        offset: Option<u64>,
        /// How much of it, in bytes, if that can be said.
        size: Option<u64>,
        /// The node answers nothing but errors from now on.
        fatal: bool,
    },
    /// A virtqueue broke; it serves nothing until it is stopped and started.
    QueueBroken {
        /// The device.
        device: String,
        /// The number of the queue, from 0.
        queue: u16,
        /// Why, for people.
        reason: String,
    },
    /// Requests take longer than they ever should.
    RequestsStuck {
        /// The device.
        device: String,
        /// The oldest of them.
        request: RequestInfo,
        /// How many they are, of one iothread.
        count: u64,
    },
}

type Sink = Arc<dyn Fn(BlockEvent) + Send + Sync>;

static SINK: RwLock<Option<Sink>> = RwLock::new(None);

/// Has every event of the process go to `sink` from now on. It is called on any thread, iothreads included: it must not
/// wait, and not call back into the block layer.
pub fn set_sink(sink: impl Fn(BlockEvent) + Send + Sync + 'static) {
    *SINK.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(sink));
}

/// Tells of an event. Without a sink it is only logged.
pub fn emit(event: BlockEvent) {
    tracing::debug!("{event:?}");
    let sink = SINK.read().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(sink) = sink {
        sink(event);
    }
}
