//! The in-flight region of a session: making one, taking one back from the front-end, and the write cache's value in it.
//! It looks into no queue's part.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserInflight;

use super::rings::SessionState;
use super::{Session, refuse};
use crate::inflight::InflightRegion;

impl Session {
    /// A new region of the size asked for, which the front-end is to give back to us or to the process after us.
    pub(super) fn make_region(&self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (num_queues, queue_size) = self.inflight_bounds(asked)?;
        let file = InflightRegion::create(num_queues, queue_size).map_err(refuse)?;
        let size = InflightRegion::size(num_queues, queue_size);
        // From what was asked, so that the padding is the front-end's own and none of our memory.
        Ok((VhostUserInflight { mmap_size: size, mmap_offset: 0, ..*asked }, file))
    }

    /// Takes a region back, before rings start.
    pub(super) fn keep_region(&self, state: &mut SessionState, told: &VhostUserInflight, file: File) -> Result<()> {
        let (num_queues, queue_size) = self.inflight_bounds(told)?;
        if state.vrings.iter().any(|vring| vring.started) {
            return Err(refuse("rings are running"));
        }
        let (range, packed) = ((told.mmap_offset, told.mmap_size), state.ring_features().packed);
        let region = InflightRegion::map(file, range, num_queues, queue_size, packed).map_err(refuse)?;
        state.inflight = Some(Arc::new(region));
        Ok(())
    }

    /// Queues and entries of an in-flight region, of which there may not be more than the export has.
    fn inflight_bounds(&self, region: &VhostUserInflight) -> Result<(u16, u16)> {
        let most = self.export.settings.num_queues;
        match (region.num_queues, region.queue_size) {
            (queues, size @ 1..=32768) if (1..=most).contains(&queues) => Ok((queues, size)),
            (queues, size) => Err(refuse(format_args!("{queues} queues of {size}: at most {most} of 32768"))),
        }
    }

    /// Leaves the write cache's value to the process after us.
    pub(super) fn keep_write_cache(&self, state: &SessionState) {
        if let (Some(region), Some(on)) = (&state.inflight, self.export.write_cache.known_value()) {
            region.set_write_cache(on);
        }
    }
}
