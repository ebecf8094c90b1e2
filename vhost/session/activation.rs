//! A session's use of the medium: it is activated before the first ring starts, where that is how the export is set up,
//! and may be given up when none runs any more, so that another process can have it. It waits for the control thread of
//! the graph, which does it.

use std::sync::atomic::Ordering;

use blockport_block::OpenResult;
use vhost::vhost_user::Result;

use super::rings::SessionState;
use super::{Session, refuse};

/// Who activates and inactivates the medium of an export's drive: only the control thread of the graph may do that.
pub trait Activator: Send + Sync {
    /// Has it done, and waits for that; gives up soon after `is_over` says that nobody needs it any more.
    ///
    /// # Errors
    /// It cannot be done, or nobody waits for it any more.
    fn set_active(&self, active: bool, is_over: &dyn Fn() -> bool) -> OpenResult;
}

/// How an export shares its medium with other processes over time.
pub struct Activation {
    /// Who does it.
    pub activator: Box<dyn Activator>,
    /// The medium is given up whenever no ring runs.
    pub hand_over: bool,
}

impl Session {
    /// A ring is about to start. If it is the first, the medium becomes active.
    pub(super) fn claim_medium(&self, state: &SessionState) -> Result<()> {
        let Some(activation) = &self.export.activation else { return Ok(()) };
        if state.vrings.iter().any(|vring| vring.started) {
            return Ok(());
        }
        // Said first, so that nobody who looks at it later takes the medium away.
        self.export.in_use.store(true, Ordering::SeqCst);
        activation.activator.set_active(true, &|| self.export.is_ending()).map_err(|error| {
            self.export.in_use.store(false, Ordering::SeqCst);
            refuse(error)
        })
    }

    /// A ring has stopped, or has not started after all. If it was the last, the medium may be had by others.
    pub(super) fn release_medium(&self, state: &SessionState) {
        let Some(activation) = &self.export.activation else { return };
        if state.vrings.iter().any(|vring| vring.started) || !self.export.in_use.swap(false, Ordering::SeqCst) {
            return;
        }
        if !activation.hand_over || self.export.is_ending() {
            return;
        }
        match activation.activator.set_active(false, &|| self.export.is_ending()) {
            Ok(()) => tracing::info!("{}: no ring runs; its image is free for others", self.export.name()),
            Err(_) if self.export.is_ending() => {}
            Err(error) => tracing::warn!("{}: its image is not given up: {error}", self.export.name()),
        }
    }
}
