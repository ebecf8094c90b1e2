//! WriteCache: whether the disk's write cache is on, as negotiated, set by the guest, and remembered over connections.
//! QEMU reads and writes the value only when it starts, never on a reconnect, so the value stays as last set.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockport_block::{BlockBackend, BlockResult};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::config_space::bit;

/// The write cache of one export.
pub(crate) struct WriteCache {
    /// What the export's own settings say.
    own: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// As last set; `None` while no front-end of this process has read or set it.
    value: Option<bool>,
    /// What this connection's guest driver accepted; `None` until it has.
    features: Option<u64>,
}

impl WriteCache {
    pub(crate) fn new(own: bool) -> Self {
        Self { own, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new front-end: the value stays, what was negotiated does not.
    pub(crate) fn connected(&self) {
        self.state().features = None;
    }

    /// What the config space says now: the truth.
    pub(crate) fn value(&self) -> bool {
        let state = self.state();
        self.effective(&state)
    }

    /// The value as last set, whatever this connection's driver can make of it; `None` while this process does not know.
    pub(crate) fn known_value(&self) -> Option<bool> {
        self.state().value
    }

    /// What this connection's guest driver accepted; `None` until it has.
    pub(crate) fn features(&self) -> Option<u64> {
        self.state().features
    }

    /// Goes on with what the process before us had.
    pub(crate) fn resume(&self, value: Option<bool>, features: Option<u64>, backend: &Arc<BlockBackend>) {
        let mut state = self.state();
        *state = State { value, features };
        backend.set_write_cache(self.effective(&state));
    }

    /// A front-end reads the config before it starts its first ring: a new guest, which gets the export's own value.
    pub(crate) fn config_read(&self, backend: &Arc<BlockBackend>) {
        let mut state = self.state();
        state.value = Some(self.own);
        self.apply(&state, backend);
    }

    /// The guest driver has accepted features. Without FLUSH it cannot make anything stable, so the cache starts off.
    pub(crate) fn negotiated(&self, features: u64, backend: &Arc<BlockBackend>) {
        let mut state = self.state();
        state.features = Some(features);
        if features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0 && features & bit(VIRTIO_BLK_F_FLUSH) == 0 {
            state.value = Some(false);
        }
        self.apply(&state, backend);
    }

    /// The first ring of a connection starts. One that never read the config, at a process that does not know the value,
    /// is a guest of the process before us. That one left the value in the in-flight region (`kept`), or else may have
    /// told the guest "off": off.
    pub(crate) fn first_start(
        &self,
        config_read: bool,
        kept: Option<bool>,
        features: u64,
        backend: &Arc<BlockBackend>,
    ) {
        let mut state = self.state();
        state.features = Some(features);
        if !config_read && state.value.is_none() {
            state.value = Some(kept.unwrap_or(false));
        }
        self.apply(&state, backend);
    }

    /// The value as another process knew it, of a guest that comes from there.
    pub(crate) fn restore(&self, on: bool, backend: &Arc<BlockBackend>) {
        let mut state = self.state();
        state.value = Some(on);
        self.apply(&state, backend);
    }

    /// The guest driver sets the value.
    ///
    /// # Errors
    /// What was written before could not be made stable, so the cache stays on.
    pub(crate) fn set(&self, on: bool, backend: &Arc<BlockBackend>) -> BlockResult {
        let mut state = self.state();
        let before = state.value.replace(on);
        let result = self.try_apply(&state, backend);
        if result.is_err() {
            state.value = before;
            backend.set_write_cache(true);
        }
        result
    }

    fn effective(&self, state: &State) -> bool {
        let wanted = state.value.unwrap_or(self.own);
        let can_flush = bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE);
        wanted && state.features.is_none_or(|features| features & can_flush != 0)
    }

    fn apply(&self, state: &State, backend: &Arc<BlockBackend>) {
        if let Err(error) = self.try_apply(state, backend) {
            tracing::error!("\"{}\": flushing while the write cache goes off: {error}", backend.label());
        }
    }

    /// Hands the value to the backend. When it goes off, writes that start from now on are stable by themselves; those
    /// before are waited for, as a flush covers only what has completed, and flushed.
    fn try_apply(&self, state: &State, backend: &Arc<BlockBackend>) -> BlockResult {
        let (was, now) = (backend.write_cache(), self.effective(state));
        backend.set_write_cache(now);
        if !was || now {
            return Ok(());
        }
        backend.drain_begin();
        backend.drain_end();
        backend.flush_blocking()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLUSH: u64 = bit(VIRTIO_BLK_F_FLUSH);
    const WCE: u64 = bit(VIRTIO_BLK_F_CONFIG_WCE);

    #[test]
    fn a_driver_that_cannot_flush_has_no_write_cache() {
        let (cache, backend) = (WriteCache::new(true), BlockBackend::new("b"));
        cache.config_read(&backend);
        assert!(cache.value(), "before anything is negotiated: the export's own");
        cache.negotiated(0, &backend);
        assert!(!cache.value() && !backend.write_cache());
        cache.negotiated(FLUSH, &backend);
        assert!(cache.value() && backend.write_cache());
        cache.negotiated(WCE, &backend);
        assert!(!cache.value(), "without FLUSH it starts off");
        cache.set(true, &backend).expect("nothing to flush");
        assert!(cache.value(), "but can be switched on");
    }

    #[test]
    fn the_value_outlives_a_connection_that_does_not_read_it() {
        let (cache, backend) = (WriteCache::new(true), BlockBackend::new("b"));
        cache.config_read(&backend);
        cache.first_start(true, None, FLUSH | WCE, &backend);
        cache.set(false, &backend).expect("nothing to flush");
        cache.connected();
        cache.first_start(false, Some(true), FLUSH | WCE, &backend);
        assert!(!backend.write_cache(), "a reconnect: the process knows the value");
        cache.connected();
        cache.config_read(&backend);
        cache.first_start(true, Some(false), FLUSH | WCE, &backend);
        assert!(backend.write_cache(), "a new guest");
    }

    #[test]
    fn a_restarted_daemon_runs_write_through_for_a_guest_it_does_not_know() {
        let (cache, backend) = (WriteCache::new(true), BlockBackend::new("b"));
        cache.connected();
        cache.first_start(false, None, FLUSH | WCE, &backend);
        assert!(!backend.write_cache());
    }

    #[test]
    fn a_restarted_daemon_takes_the_value_that_the_one_before_it_left() {
        for kept in [false, true] {
            let (cache, backend) = (WriteCache::new(true), BlockBackend::new("b"));
            cache.connected();
            cache.first_start(false, Some(kept), FLUSH | WCE, &backend);
            assert_eq!((backend.write_cache(), cache.known_value()), (kept, Some(kept)));
        }
    }
}
