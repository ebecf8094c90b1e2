//! Media: what the monitor's commands do with a backend's tray and medium, with QEMU's rules. It owns the order in which
//! the device is told; opening nodes is the caller's.

use std::sync::Arc;

use super::{BlockBackend, rebuild};
use crate::drained::Drained;
use crate::error::{OpenError, OpenResult};
use crate::event::{self, BlockEvent};
use crate::node::{Node, Operation};
use crate::permissions::Permissions;

/// What became of the wish to open a tray.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrayOpening {
    /// It is open.
    Open,
    /// There is no tray.
    NoTray,
    /// The guest has locked it, and was asked to let go.
    Asked,
}

impl BlockBackend {
    /// `blockdev-open-tray`: opens the tray. A locked one opens when the guest lets go, or at once with `force`; without
    /// a tray nothing happens.
    ///
    /// # Errors
    /// The device's medium cannot be changed.
    pub fn open_tray(&self, force: bool) -> OpenResult<TrayOpening> {
        self.check_removable()?;
        let Some(device) = self.device() else { return Ok(TrayOpening::NoTray) };
        match device.is_tray_open() {
            None => return Ok(TrayOpening::NoTray),
            Some(true) => return Ok(TrayOpening::Open),
            Some(false) => {}
        }
        let locked = device.is_medium_locked();
        if locked {
            device.eject_request(force);
        }
        if locked && !force {
            return Ok(TrayOpening::Asked);
        }
        self.change_media(false)?;
        Ok(TrayOpening::Open)
    }

    /// `blockdev-close-tray`: closes the tray. Without a tray, or with a closed one, nothing happens.
    ///
    /// # Errors
    /// The device's medium cannot be changed, or the device refuses to load.
    pub fn close_tray(&self) -> OpenResult {
        self.check_removable()?;
        if self.is_tray_open() { self.change_media(true) } else { Ok(()) }
    }

    /// `blockdev-remove-medium`: takes the medium out. Without a medium nothing happens.
    ///
    /// # Errors
    /// The device's medium cannot be changed, its tray is closed, or somebody blocks it.
    pub fn remove_medium(&self) -> OpenResult {
        self.check_removable()?;
        self.check_tray_is_open()?;
        if self.root().is_none() {
            return Ok(());
        }
        self.check_not_blocked()?;
        self.remove();
        // A device without a tray learns of it only now, and finds the drive empty.
        if self.has_tray() { Ok(()) } else { self.change_media(false) }
    }

    /// `blockdev-insert-medium`: puts a medium in. A medium that cannot be written can be put into any device; its writes
    /// fail.
    ///
    /// # Errors
    /// The device's medium cannot be changed, its tray is closed, there is a medium already, other users of the node do
    /// not share what this device needs, or the device refuses to load; nothing has changed.
    pub fn insert_medium(&self, node: Arc<Node>) -> OpenResult {
        self.check_removable()?;
        self.check_tray_is_open()?;
        let wanted = self.permissions();
        let permissions = if node.is_read_only() { wanted.without_writing() } else { wanted };
        self.insert(node, permissions)?;
        self.remember_permissions(wanted);
        if self.has_tray() {
            return Ok(());
        }
        self.change_media(true).inspect_err(|_| self.remove())
    }

    /// `blockdev-change-medium`: puts `node`, which was opened before so that nothing is lost if that fails, in the place
    /// of the medium.
    ///
    /// # Errors
    /// As for `open_tray` (a locked tray is one), `remove_medium`, `insert_medium` and `close_tray`; the old medium is
    /// back in its place then.
    pub fn change_medium(&self, node: Arc<Node>, force: bool) -> OpenResult {
        self.check_not_blocked()?;
        let was_open = self.is_tray_open();
        self.open_tray_now(force)?;
        let old = self.root();
        let result = self.remove_medium().and_then(|()| self.insert_medium(node)).and_then(|()| self.close_tray());
        if result.is_err() {
            let back = self.remove_medium().and_then(|()| old.map_or(Ok(()), |old| self.insert_medium(old)));
            let back = back.and_then(|()| if was_open { Ok(()) } else { self.close_tray() });
            if let Err(error) = back {
                tracing::error!("\"{}\": the old medium could not be put back: {error}", self.label);
            }
        }
        result
    }

    /// `eject`: opens the tray and takes the medium out.
    ///
    /// # Errors
    /// As for `open_tray` (a locked tray is one) and `remove_medium`.
    pub fn eject(&self, force: bool) -> OpenResult {
        self.check_not_blocked()?;
        self.open_tray_now(force)?;
        self.remove_medium()
    }

    /// The guest has opened or closed the tray by itself; its device calls this. Control thread.
    pub fn tray_moved(&self) {
        self.refresh_availability();
        let (device, tray_open) = (self.label.clone(), self.is_tray_open());
        event::emit(BlockEvent::TrayMoved { device, tray_open });
    }

    /// Whether the device has a tray.
    pub fn has_tray(&self) -> bool {
        self.device().is_some_and(|device| device.is_tray_open().is_some())
    }

    /// Whether the guest has locked the medium in.
    pub fn is_medium_locked(&self) -> bool {
        self.device().is_some_and(|device| device.is_medium_locked())
    }

    /// Whether the medium can be changed. That of a backend without a device can.
    pub fn is_removable(&self) -> bool {
        self.device().is_none_or(|device| device.is_removable())
    }

    /// Whether requests find a medium.
    pub fn is_available(&self) -> bool {
        self.is_inserted() && !self.is_tray_open()
    }

    fn check_removable(&self) -> OpenResult {
        match self.is_removable() {
            true => Ok(()),
            false => Err(OpenError(format!("device \"{}\" is not removable", self.label))),
        }
    }

    fn check_not_blocked(&self) -> OpenResult {
        self.root().map_or(Ok(()), |node| node.check_operation(Operation::Eject))
    }

    fn check_tray_is_open(&self) -> OpenResult {
        match self.has_tray() && !self.is_tray_open() {
            true => Err(OpenError(format!("the tray of device \"{}\" is not open", self.label))),
            false => Ok(()),
        }
    }

    fn open_tray_now(&self, force: bool) -> OpenResult {
        match self.open_tray(force)? {
            TrayOpening::Open | TrayOpening::NoTray => Ok(()),
            TrayOpening::Asked => Err(OpenError(format!(
                "device \"{}\" is locked and force was not given; the guest was asked to let go: wait for the tray to \
                 open and try again",
                self.label
            ))),
        }
    }

    /// Tells the device that its medium was loaded or ejected, and everyone if that moved a tray.
    fn change_media(&self, load: bool) -> OpenResult {
        let Some(device) = self.device() else { return Ok(()) };
        let before = device.is_tray_open();
        device.change_media(load)?;
        if device.is_tray_open() != before {
            self.tray_moved();
        }
        Ok(())
    }

    /// What is behind an open tray cannot be reached.
    fn refresh_availability(&self) {
        let drained = Drained::new(self.this.upgrade().into_iter().collect());
        if let Err(error) = rebuild(drained.backends()) {
            tracing::error!("\"{}\": {error}", self.label);
        }
    }

    fn remember_permissions(&self, permissions: Permissions) {
        *super::lock(&self.permissions) = permissions;
    }
}
