//! The rings of virtio-driver itself, a client that is not of this project: slower, and another opinion of what a ring is.
#![allow(unsafe_code)] // Its calls take raw buffers: safe ones would need a reference to memory that another process writes.

use std::io;
use std::sync::atomic::{Ordering, fence};

use virtio_driver::VirtioBlkQueue;

use super::{Answer, Kind, NOT_IN_FLIGHT, Requests};

const SECTOR_BYTES: u64 = 512;
/// What virtio-driver makes a status of, and back.
const IO_ERROR: u8 = 1;

pub(super) struct LibraryRing {
    pub(super) ring: VirtioBlkQueue<'static, u16>,
    pub(super) event_idx: bool,
}

impl LibraryRing {
    pub(super) fn submit(&mut self, requests: &Requests, slot: u16, kind: Kind, sector: u64) -> io::Result<()> {
        let (buffer, len, offset) = (requests.buffer(slot), requests.buffer_bytes as usize, sector * SECTOR_BYTES);
        // SAFETY: the buffer is the slot's part of a mapping that `requests` holds; nothing here has a reference into it.
        unsafe {
            match kind {
                Kind::Read => self.ring.read_raw(offset, buffer, len, slot),
                Kind::Write => self.ring.write_raw(offset, buffer, len, slot),
                Kind::Flush => self.ring.flush(slot),
            }
        }
    }

    pub(super) fn needs_kick(&mut self) -> bool {
        if !self.event_idx {
            // Without EVENT_IDX virtio-driver reads the flags with no fence after publishing: the store must not pass the
            // load, or both sides sleep.
            fence(Ordering::SeqCst);
        }
        self.ring.avail_notif_needed()
    }

    pub(super) fn has_answer(&mut self) -> bool {
        self.ring.completions().has_next()
    }

    pub(super) fn next_answer(&mut self) -> Result<Option<Answer>, &'static str> {
        let mut completions = self.ring.completions();
        if !completions.has_next() {
            return Ok(None);
        }
        let answer = |ret| if ret == 0 { 0 } else { IO_ERROR };
        completions.next().map(|c| Some(Answer { slot: c.context, status: answer(c.ret) })).ok_or(NOT_IN_FLIGHT)
    }
}
