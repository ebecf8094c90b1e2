//! The events that clients of a monitor are told.
//!
//! This file owns their names and what is told with each. When something is an event is for whoever raises it.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

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
    Shutdown: "SHUTDOWN";
}
