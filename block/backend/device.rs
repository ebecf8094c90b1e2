//! The device of a backend: who is attached, and what it is told. What a device must do is in `dev_ops.rs`.

use std::sync::Arc;

use super::{BlockBackend, lock};
use crate::dev_ops::BlockDevOps;
use crate::error::{OpenError, OpenResult};
use crate::permissions::Permissions;

/// A device is attached as long as this lives. It holds a reference to the backend.
pub struct Attached(Arc<BlockBackend>);

impl Attached {
    /// The backend that the device is attached to.
    pub fn backend(&self) -> &Arc<BlockBackend> {
        &self.0
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        lock(&self.0.device).take();
        // Without a device nobody reads or writes.
        if let Err(error) = self.0.set_permissions(Permissions::UNUSED) {
            tracing::warn!("\"{}\": permissions could not be given up: {error}", self.0.label);
        }
    }
}

impl BlockBackend {
    /// Attaches a device model.
    ///
    /// # Errors
    /// Another one is attached.
    pub fn attach(self: &Arc<Self>, device: Arc<dyn BlockDevOps>) -> OpenResult<Attached> {
        // Held, so that a drain does not begin between the two.
        let quiesced = lock(&self.quiesced);
        {
            let mut slot = lock(&self.device);
            if slot.is_some() {
                return Err(OpenError(format!("\"{}\" is busy: a device is attached to it", self.label)));
            }
            *slot = Some(device.clone());
        }
        self.reset_iostatus();
        if *quiesced > 0 {
            device.drained_begin();
        }
        Ok(Attached(self.clone()))
    }

    pub(super) fn device(&self) -> Option<Arc<dyn BlockDevOps>> {
        lock(&self.device).clone()
    }

    /// Whether a device model is attached.
    pub fn has_device(&self) -> bool {
        lock(&self.device).is_some()
    }

    /// Whether the tray is open; false without a tray.
    pub fn is_tray_open(&self) -> bool {
        self.device().is_some_and(|device| device.is_tray_open() == Some(true))
    }

    /// Tells the device that the size has changed.
    pub(crate) fn tell_resized(&self) {
        if let Some(device) = self.device() {
            device.resize();
        }
    }
}
