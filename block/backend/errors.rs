//! Error policies of a backend: what the control thread sets and asks, and what a device asks about a request that
//! failed. What they mean is in `on_error.rs`.

use super::{BackendChannel, BlockBackend};
use crate::accounting::RequestKind;
use crate::error::BlockError;
use crate::on_error::{ErrorAction, IoStatus, OnErrorPolicy};

impl BlockBackend {
    /// Says what is done about failed reads, and about failed requests of all other kinds. Report and enospc until told
    /// otherwise.
    pub fn set_on_error(&self, read: OnErrorPolicy, write: OnErrorPolicy) {
        self.on_error.set_policies(read, write);
    }

    /// What is done about failed reads, or about all others; never `Auto`.
    pub fn on_error(&self, is_read: bool) -> OnErrorPolicy {
        self.on_error.policy(is_read)
    }

    /// Whether the device has stopped over an error since it was attached, continued or reset.
    pub fn iostatus(&self) -> IoStatus {
        self.on_error.status()
    }

    /// Forgets the error.
    pub fn reset_iostatus(&self) {
        self.on_error.reset_status();
    }

    /// Revokes the device's access: its requests answer "no medium" from now on, and none of them is kept.
    pub(crate) fn revoke(&self) {
        self.set_on_error(OnErrorPolicy::Report, OnErrorPolicy::Report);
        self.remove();
        if let Some(device) = self.device()
            && let Err(error) = device.change_media(false)
        {
            tracing::warn!("\"{}\": {error}", self.label);
        }
    }
}

impl BackendChannel {
    /// What the device must do about a request that failed with `error`; the status and the event are out when this
    /// returns. A device that cannot stop now, as it is about to end, reports instead. A request that is kept does not
    /// count as failed, until [`BackendChannel::account_given_up`].
    #[cold]
    pub fn error_action(&self, kind: RequestKind, error: BlockError, may_stop: bool) -> ErrorAction {
        let action = match self.on_error.action(kind, error) {
            ErrorAction::Stop if !may_stop => ErrorAction::Report,
            action => action,
        };
        if matches!(error, BlockError::NoSpace | BlockError::Host(_)) {
            self.on_error.show(&self.label, self.node_name(), kind, error, action);
        }
        if action == ErrorAction::Stop {
            self.accounting.not_failed(kind);
        }
        action
    }

    /// Counts a request that the device kept and now answers with an error.
    pub fn account_given_up(&self, kind: RequestKind) {
        self.accounting.done(kind, 0, false);
    }
}
