//! The device's state as a front-end carries it to another back-end (vhost-user, "Migrating back-end state"), for those that
//! do not keep it themselves: the write cache's value. It owns the format. Front-ends may send anything as state.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

use super::Session;
use crate::notifier::can_be_polled;

const MAGIC: [u8; 8] = *b"blockprt";
/// The only version there is.
const VERSION: u32 = 1;
/// Magic, version u32, write cache u8 (0: not known, 1: off, 2: on), zeroes.
const BYTES: usize = 16;

/// A transfer that was begun.
pub(super) enum Transfer {
    /// All was written.
    Saved,
    /// The state is to be read here when the front-end asks how it went: it has written all by then.
    Load(File),
}

fn to_bytes(write_cache: Option<bool>) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12] = write_cache.map_or(0, |on| 1 + u8::from(on));
    bytes
}

fn from_bytes(bytes: &[u8]) -> Result<Option<bool>, &'static str> {
    match bytes {
        bytes if bytes == to_bytes(None) => Ok(None),
        bytes if bytes == to_bytes(Some(false)) => Ok(Some(false)),
        bytes if bytes == to_bytes(Some(true)) => Ok(Some(true)),
        bytes if bytes.starts_with(&MAGIC) => Err("it is of a version that is not known, or damaged"),
        _ => Err("it is not blockport's"),
    }
}

impl Session {
    /// Begins a transfer: a save is done at once, a load when [`Session::end_transfer`] is called.
    pub(super) fn begin_transfer(
        &self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<(), String> {
        let mut state = self.state();
        state.transfer = None;
        if phase != VhostTransferStatePhase::STOPPED || state.vrings.iter().any(|vring| vring.started) {
            return Err("rings are running".into());
        }
        if !can_be_polled(&file) {
            return Err("the descriptor is no pipe or socket".into());
        }
        // Whatever is at the other end must not hold us.
        let flags = fcntl_getfl(&file).map_err(|e| e.to_string())?;
        fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(|e| e.to_string())?;
        state.transfer = Some(match direction {
            VhostTransferStateDirection::SAVE => {
                (&file).write_all(&to_bytes(self.export.write_cache.known_value())).map_err(|e| e.to_string())?;
                Transfer::Saved
            }
            VhostTransferStateDirection::LOAD => Transfer::Load(file),
        });
        Ok(())
    }

    /// Says how the last transfer went, after the front-end's part of it.
    pub(super) fn end_transfer(&self) -> Result<(), String> {
        let mut state = self.state();
        let file = match state.transfer.take() {
            None => return Err("no transfer was begun".into()),
            Some(Transfer::Saved) => return Ok(()),
            Some(Transfer::Load(file)) => file,
        };
        if state.vrings.iter().any(|vring| vring.started) {
            return Err("rings are running".into());
        }
        // One byte more than there may be.
        let (mut bytes, mut len) = ([0; BYTES + 1], 0);
        while len < bytes.len() {
            match (&file).read(&mut bytes[len..]).map_err(|e| format!("its end has not come: {e}"))? {
                0 => break,
                more => len += more,
            }
        }
        if let Some(on) = from_bytes(&bytes[..len])? {
            // The guest is one that knows this value: reading the config does not make it a new one.
            self.config_read.store(true, Ordering::Relaxed);
            self.export.write_cache.restore(on, &self.export.backend);
            self.keep_write_cache(&state);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        for value in [None, Some(false), Some(true)] {
            assert_eq!(from_bytes(&to_bytes(value)), Ok(value));
        }
        let good = to_bytes(Some(true));
        for at in 0..BYTES {
            let mut bad = good;
            bad[at] ^= 0x80;
            assert!(from_bytes(&bad).is_err(), "byte {at}");
            assert!(from_bytes(&good[..at]).is_err(), "{at} bytes");
        }
        assert!(from_bytes(&[&good[..], &[0]].concat()).is_err());
    }
}
