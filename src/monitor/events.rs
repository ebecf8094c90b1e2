//! The events that clients of a monitor are told.
//!
//! This file owns their names and what is told with each. When something is an event is for whoever raises it.

use std::time::{SystemTime, UNIX_EPOCH};

use blockport_block::ErrorAction;
use blockport_block::event::BlockEvent;
use serde::Serialize;
use serde_json::{Value, json};

use super::commands::requests::{self, RequestUnderWay};
use super::schema::{QapiType, Schema, answer, choice};

/// An event, with the time it was raised.
#[derive(Debug, Clone)]
pub struct Event {
    name: &'static str,
    data: Value,
    at: SystemTime,
}

/// What is told with an event.
pub trait EventData: QapiType + Serialize {
    /// The event's name.
    const NAME: &'static str;
}

impl<T: EventData> From<T> for Event {
    fn from(data: T) -> Self {
        // Names and numbers: nothing that JSON lacks.
        let data = serde_json::to_value(data).unwrap_or_default();
        Self { name: T::NAME, data, at: SystemTime::now() }
    }
}

impl Event {
    /// As it goes over the wire.
    pub fn to_json(&self) -> Value {
        let at = self.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({"seconds": at.as_secs(), "microseconds": at.subsec_micros()});
        json!({"event": self.name, "data": self.data, "timestamp": timestamp})
    }
}

answer! {
    /// An export is gone: nobody can connect any more, its name is free.
    ExportDeleted {
        "id" => id: String,
    }
}

choice! {
    /// What was asked for.
    IoOperationType {
        "read" => Read,
        "write" => Write,
    }
}

choice! {
    /// What is done about an error.
    BlockErrorAction {
        "report" => Report,
        "ignore" => Ignore,
        "stop" => Stop,
    }
}

answer! {
    /// A request failed on the host.
    IoError {
        "device" => device: String,
        "node-name" => node_name: Option<String>,
        "operation" => operation: IoOperationType,
        "action" => action: BlockErrorAction,
        "nospace" => nospace: bool,
        "reason" => reason: String,
    }
}

answer! {
    /// A tray has opened or closed.
    TrayMoved {
        "device" => device: String,
        "id" => id: String,
        "tray-open" => tray_open: bool,
    }
}

answer! {
    /// A write went past a threshold, which is gone with this.
    WriteThreshold {
        "node-name" => node_name: String,
        "amount-exceeded" => amount_exceeded: u64,
        "write-threshold" => write_threshold: u64,
    }
}

answer! {
    /// An image contradicts itself.
    ImageCorrupted {
        /// Always empty: the node says where.
        "device" => device: String,
        "node-name" => node_name: String,
        "msg" => message: String,
        "offset" => offset: Option<u64>,
        "size" => size: Option<u64>,
        "fatal" => fatal: bool,
    }
}

answer! {
    /// Requests take longer than they ever should; each is told of once.
    RequestsStuck {
        "device" => device: String,
        /// The one that is under way longest.
        "oldest" => oldest: RequestUnderWay,
        /// How many they are, of one iothread.
        "count" => count: u64,
    }
}

answer! {
    /// A virtqueue broke; it serves nothing until its front-end has stopped and started it.
    QueueBroken {
        "device" => device: String,
        "queue" => queue: u64,
        "reason" => reason: String,
    }
}

impl From<BlockEvent> for Event {
    fn from(event: BlockEvent) -> Self {
        match event {
            BlockEvent::IoError { device, node_name, is_read, action, nospace, reason } => IoError {
                device,
                node_name,
                operation: if is_read { IoOperationType::Read } else { IoOperationType::Write },
                action: match action {
                    ErrorAction::Report => BlockErrorAction::Report,
                    ErrorAction::Ignore => BlockErrorAction::Ignore,
                    ErrorAction::Stop => BlockErrorAction::Stop,
                },
                nospace,
                reason,
            }
            .into(),
            BlockEvent::TrayMoved { device, tray_open } => TrayMoved { id: device.clone(), device, tray_open }.into(),
            BlockEvent::WriteThreshold { node_name, amount_exceeded, write_threshold } => {
                WriteThreshold { node_name, amount_exceeded, write_threshold }.into()
            }
            BlockEvent::ImageCorrupted { node_name, message, offset, size, fatal } => {
                ImageCorrupted { device: String::new(), node_name, message, offset, size, fatal }.into()
            }
            BlockEvent::RequestsStuck { device, request, count } => {
                let oldest = requests::told(&device, &request);
                RequestsStuck { device, oldest, count }.into()
            }
            BlockEvent::QueueBroken { device, queue, reason } => {
                QueueBroken { device, queue: queue.into(), reason }.into()
            }
        }
    }
}

choice! {
    /// Why the daemon ends.
    ShutdownCause {
        "host-qmp-quit" => Quit,
        "host-signal" => Signal,
    }
}

answer! {
    /// The daemon ends.
    Shutdown {
        "guest" => guest: bool,
        "reason" => reason: ShutdownCause,
    }
}

macro_rules! events {
    ($($data:ident: $name:literal;)*) => {
        $(impl EventData for $data {
            const NAME: &'static str = $name;
        })*

        /// Describes all events.
        pub fn describe(schema: &mut Schema) {
            $({
                let arguments = $data::describe(schema);
                schema.add($name, json!({"meta-type": "event", "arg-type": arguments}));
            })*
        }
    };
}

events! {
    ExportDeleted: "BLOCK_EXPORT_DELETED";
    ImageCorrupted: "BLOCK_IMAGE_CORRUPTED";
    IoError: "BLOCK_IO_ERROR";
    QueueBroken: "X_BLOCKPORT_QUEUE_BROKEN";
    RequestsStuck: "X_BLOCKPORT_REQUESTS_STUCK";
    TrayMoved: "DEVICE_TRAY_MOVED";
    WriteThreshold: "BLOCK_WRITE_THRESHOLD";
    Shutdown: "SHUTDOWN";
}
