//! Logging for live migration: what the front-end says of its log, and the barrier over all iothreads when that changes.
//! It sets no bit.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::Result;
use vhost::vhost_user::message::{VhostUserLog, VhostUserVringAddrFlags};

use super::rings::SessionState;
use super::{Session, refuse};
use crate::config_space::{F_LOG_ALL, bit};
use crate::dirty_log::{DirtyLog, RingLog};

impl SessionState {
    /// What a ring logs to, if it does.
    pub(super) fn log_of(&self, index: usize) -> Option<RingLog> {
        let log = self.log.as_ref().filter(|_| self.features & bit(F_LOG_ALL) != 0)?;
        Some(RingLog { log: log.clone(), ring_addr: self.vrings.get(index)?.log_addr })
    }

    /// Up to where guest memory reaches.
    fn memory_end(&self) -> u64 {
        self.memory.regions().iter().map(|region| region.guest_addr + region.size).max().unwrap_or(0)
    }
}

impl Session {
    /// Takes a log. When this returns, nobody writes to the one before any more.
    pub(super) fn keep_log(&self, state: &mut SessionState, told: &VhostUserLog, file: &File) -> Result<()> {
        let log = DirtyLog::map(file, told.mmap_offset, told.mmap_size).map_err(refuse)?;
        let end = state.memory_end();
        if !log.covers(end) {
            let size = told.mmap_size;
            return Err(refuse(format_args!("a dirty log of {size} bytes: guest memory reaches up to {end:#x}")));
        }
        state.log = Some(Arc::new(log));
        self.log_anew(state);
        Ok(())
    }

    /// Has every ring that runs log as the state says. When this returns, all iothreads do.
    pub(super) fn log_anew(&self, state: &SessionState) {
        for index in (0..state.vrings.len()).filter(|index| state.vrings[*index].started) {
            let log = state.log_of(index);
            self.on_queue(index, move |_, queue, answer| {
                queue.set_log(log);
                answer.give(());
            });
        }
    }

    /// Takes what SET_VRING_ADDR says of logging what we write into the ring, `bytes` from `addr` on.
    pub(super) fn keep_log_addr(
        &self,
        state: &mut SessionState,
        index: usize,
        flags: VhostUserVringAddrFlags,
        addr: u64,
        bytes: u64,
    ) -> Result<()> {
        let log_addr = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(addr);
        // It need not be in guest memory, but in the log.
        let fits = |log: &Arc<DirtyLog>| addr.checked_add(bytes).is_some_and(|end| log.covers(end));
        if log_addr.is_some() && !state.log.as_ref().is_none_or(fits) {
            return Err(refuse(format_args!(
                "the ring is to be logged at {addr:#x}, which the dirty log does not cover"
            )));
        }
        state.vrings[index].log_addr = log_addr;
        if state.vrings[index].started {
            self.log_anew(state);
        }
        Ok(())
    }
}
