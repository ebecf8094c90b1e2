//! Snapshot table: how internal snapshots stand in an image. It owns the coding of an entry and its limits; what the
//! entries name is `snapshots.rs`'s. Fields that are not known are kept.

use super::channel::Channel;
use super::directories::{Region, number, text};
use super::header::{Header, L1_BYTES_MAX, check_place};
use super::snapshots::SnapshotInfo;
use crate::error::{OpenError, OpenResult};

pub(super) const TABLE_BYTES_MAX: u64 = 64 << 20;
const EXTRA_BYTES_MAX: u32 = 1024;
/// Of an L1 table.
const L1_ENTRIES_MAX: u32 = (L1_BYTES_MAX / 8) as u32;
/// Of the L1 tables of all snapshots together, so that what they name can be looked at in bounded time.
const L1_BYTES_OF_ALL_MAX: u64 = 1 << 30;
/// The fixed part of an entry.
const ENTRY_BYTES: u64 = 40;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub id: Vec<u8>,
    pub name: Vec<u8>,
    pub l1_offset: u64,
    pub l1_entries: u32,
    pub date_sec: u32,
    pub date_nsec: u32,
    pub vm_clock_nsec: u64,
    pub vm_state_short: u32,
    /// The size of the machine's state, the disk's size, the instruction count, and what is not known yet.
    pub extra: Vec<u8>,
}

impl Snapshot {
    /// Where its L1 table lies.
    pub(super) fn l1(&self) -> Region {
        Region { offset: self.l1_offset, bytes: u64::from(self.l1_entries) * 8 }
    }

    fn extra_number(&self, at: usize) -> Option<u64> {
        (self.extra.len() >= at + 8).then(|| number::<8>(&self.extra, at))
    }

    /// The size of its disk in bytes; `current` where it is older than that field.
    pub(super) fn disk_bytes(&self, current: u64) -> u64 {
        self.extra_number(8).unwrap_or(current)
    }

    pub(super) fn is_called(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }

    pub(super) fn has_id(&self, id: &str) -> bool {
        self.id == id.as_bytes()
    }

    /// As others see it; `current` is the size of the disk.
    pub(super) fn info(&self, current: u64) -> SnapshotInfo {
        SnapshotInfo {
            id: text(&self.id),
            name: text(&self.name),
            disk_bytes: self.disk_bytes(current),
            vm_state_bytes: self.extra_number(0).unwrap_or(self.vm_state_short.into()),
            date_sec: self.date_sec,
            date_nsec: self.date_nsec,
            vm_clock_nsec: self.vm_clock_nsec,
            // All ones: it was not counted.
            icount: self.extra_number(16).filter(|count| *count != u64::MAX),
        }
    }

    fn encode(&self, table: &mut Vec<u8>) {
        table.extend(self.l1_offset.to_be_bytes());
        table.extend(self.l1_entries.to_be_bytes());
        table.extend((self.id.len() as u16).to_be_bytes());
        table.extend((self.name.len() as u16).to_be_bytes());
        table.extend(self.date_sec.to_be_bytes());
        table.extend(self.date_nsec.to_be_bytes());
        table.extend(self.vm_clock_nsec.to_be_bytes());
        table.extend(self.vm_state_short.to_be_bytes());
        table.extend((self.extra.len() as u32).to_be_bytes());
        table.extend(&self.extra);
        table.extend(&self.id);
        table.extend(&self.name);
        table.resize(table.len().next_multiple_of(8), 0);
    }
}

/// The table as it stands on disk. Names have been read from one, or checked.
pub(super) fn encode(list: &[Snapshot]) -> Vec<u8> {
    let mut table = Vec::new();
    list.iter().for_each(|snapshot| snapshot.encode(&mut table));
    table
}

impl Channel {
    /// The snapshots, and where their table lies.
    pub(super) async fn read_snapshots(&self, header: &Header) -> OpenResult<(Vec<Snapshot>, Region)> {
        let what = "the snapshot table";
        let cluster = 1 << header.cluster_bits;
        let mut list = Vec::new();
        let mut at = header.snapshots_offset;
        let mut l1_bytes = 0;
        for index in 0..header.snapshots {
            let fixed = self.read_or_say(what, at, ENTRY_BYTES).await?;
            let (id_bytes, name_bytes) = (number::<2>(&fixed, 12), number::<2>(&fixed, 14));
            let extra_bytes = number::<4>(&fixed, 36);
            if extra_bytes > EXTRA_BYTES_MAX.into() {
                return Err(OpenError(format!("snapshot {index} has {extra_bytes} bytes of extra data, too many")));
            }
            let rest_at = at + ENTRY_BYTES;
            let rest = self.read_or_say(what, rest_at, extra_bytes + id_bytes + name_bytes).await?;
            let (extra, names) = rest.split_at(rest.len().min(extra_bytes as usize));
            let (id, name) = names.split_at(names.len().min(id_bytes as usize));
            let snapshot = Snapshot {
                id: id.to_vec(),
                name: name.to_vec(),
                l1_offset: number::<8>(&fixed, 0),
                l1_entries: number::<4>(&fixed, 8) as u32,
                date_sec: number::<4>(&fixed, 16) as u32,
                date_nsec: number::<4>(&fixed, 20) as u32,
                vm_clock_nsec: number::<8>(&fixed, 24),
                vm_state_short: number::<4>(&fixed, 32) as u32,
                extra: extra.to_vec(),
            };
            let name = text(&snapshot.name);
            if snapshot.l1_entries > L1_ENTRIES_MAX {
                return Err(OpenError(format!("the L1 table of snapshot \"{name}\" is too large")));
            }
            let region = snapshot.l1();
            check_place(&format!("the L1 table of snapshot \"{name}\""), region.offset, region.bytes, cluster)?;
            l1_bytes += region.bytes;
            if l1_bytes > L1_BYTES_OF_ALL_MAX {
                return Err(OpenError::new("the L1 tables of its snapshots are too large: 1 GiB is the most for all"));
            }
            list.push(snapshot);
            at = (rest_at + extra_bytes + id_bytes + name_bytes).next_multiple_of(8);
            if at - header.snapshots_offset > TABLE_BYTES_MAX {
                return Err(OpenError::new("the snapshot table is too large: 64 MiB is the most"));
            }
        }
        Ok((list, Region { offset: header.snapshots_offset, bytes: at - header.snapshots_offset }))
    }
}
