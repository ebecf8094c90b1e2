//! Sync: the atomics of what is handed over between threads. `tests/races` puts loom's in their place.

pub(crate) use std::sync::atomic::{AtomicBool, Ordering, fence};
