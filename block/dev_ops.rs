//! BlockDevOps: what a BlockBackend tells the device model attached to it. It owns the contract, nothing else.

use crate::error::OpenResult;

/// The callbacks of a device model. Every method states the thread that calls it: *control* is the main thread, *any*
/// is any thread of the process.
///
/// A method that a device has no use for says so by its answer, never by a silent default: see
/// [`BlockDevOps::is_tray_open`] and [`BlockDevOps::is_medium_locked`].
pub trait BlockDevOps: Send + Sync {
    /// Whether the medium can be changed while the device is attached. A backend without a device is always removable.
    fn is_removable(&self) -> bool;

    /// Control. The virtual medium was loaded (`true`) or ejected. Loading may fail, and the caller rolls back; ejecting
    /// must succeed. Not called for a change of the physical medium in the host.
    fn change_media(&self, load: bool) -> OpenResult;

    /// Control. The monitor wants to eject while the tray is closed and the medium locked; with `force` the device
    /// unlocks.
    fn eject_request(&self, force: bool);

    /// Any. `None`: the device has no tray.
    fn is_tray_open(&self) -> Option<bool>;

    /// Control. Whether the guest has locked the medium; a device without a lock answers false.
    fn is_medium_locked(&self) -> bool;

    /// Control. Whether the requests of its backend may come from another AioContext from now on.
    ///
    /// # Errors
    /// They may not; the error says why.
    fn may_move(&self) -> OpenResult;

    /// Any. The size has changed already; read the length again. Must not block.
    fn resize(&self);

    /// Control. On the first of nested quiesce calls: submit no new request until `drained_end`.
    fn drained_begin(&self);

    /// Control. Whether the device still has activity that the backend does not count as in flight.
    fn drained_poll(&self) -> bool;

    /// Control. On the last of nested ends: go on.
    fn drained_end(&self);
}
