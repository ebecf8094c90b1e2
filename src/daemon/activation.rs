//! Activation: how an export's own thread has the main thread activate the medium, or inactivate it.
//!
//! This file owns the question and the wait for its answer. What may be done is for the exports to say.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use blockport_block::{OpenError, OpenResult};
use blockport_vhost::Activator;

use super::notices::{Notice, Notifier};

/// How often a wait looks whether it is still needed: the main thread may be waiting for whoever waits here.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Asks the main thread about one export.
pub struct AskMainThread {
    /// The export's number.
    pub number: u64,
    /// The way to the main thread.
    pub notifier: Notifier,
}

impl Activator for AskMainThread {
    fn set_active(&self, active: bool, is_over: &dyn Fn() -> bool) -> OpenResult {
        let (answer, result) = mpsc::channel();
        self.notifier.send(Notice::SetActive { number: self.number, active, answer });
        loop {
            match result.recv_timeout(LOOK_INTERVAL) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) if !is_over() => {}
                Err(_) => return Err(OpenError::new("the export ends")),
            }
        }
    }
}
