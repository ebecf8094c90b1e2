//! Directories: the table of internal snapshots and the directory of bitmaps. It owns how they are read and bounded, so
//! that what they name is protected from being written over; it changes neither.

use super::channel::Channel;
use super::header::{BitmapDirectory, Header, check_place};
use crate::error::{OpenError, OpenResult};

const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;
const SNAPSHOT_EXTRA_BYTES_MAX: u32 = 1024;
/// Of an L1 table.
const L1_ENTRIES_MAX: u32 = (32 << 20) / 8;
/// Of the bitmap of one bit for each 512 bytes of the largest disk that an L1 table maps, in clusters of 512 bytes.
const BITMAP_TABLE_ENTRIES_MAX: u32 = (128 << 20) / 8;
/// The fixed part of a snapshot's entry.
const SNAPSHOT_ENTRY_BYTES: u64 = 40;
/// The fixed part of a bitmap's entry.
const BITMAP_ENTRY_BYTES: u64 = 24;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub id: String,
    pub name: String,
    pub l1_offset: u64,
    pub l1_entries: u32,
}

/// A piece of the file that holds metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub offset: u64,
    pub bytes: u64,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes.iter().skip(at).take(N).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Channel {
    async fn read_or_say(&self, what: &str, offset: u64, bytes: u64) -> OpenResult<Vec<u8>> {
        self.read_bytes(offset, bytes).await.map_err(|e| OpenError(format!("{what} cannot be read: {e}")))
    }

    /// The snapshots, and where their table lies.
    pub(super) async fn read_snapshots(&self, header: &Header) -> OpenResult<(Vec<Snapshot>, Region)> {
        let what = "the snapshot table";
        let cluster = 1 << header.cluster_bits;
        let mut list = Vec::new();
        let mut at = header.snapshots_offset;
        for index in 0..header.snapshots {
            let fixed = self.read_or_say(what, at, SNAPSHOT_ENTRY_BYTES).await?;
            let (id_bytes, name_bytes) = (number::<2>(&fixed, 12), number::<2>(&fixed, 14));
            let extra_bytes = number::<4>(&fixed, 36);
            if extra_bytes > SNAPSHOT_EXTRA_BYTES_MAX.into() {
                return Err(OpenError(format!("snapshot {index} has {extra_bytes} bytes of extra data, too many")));
            }
            let names_at = at + SNAPSHOT_ENTRY_BYTES + extra_bytes;
            let names = self.read_or_say(what, names_at, id_bytes + name_bytes).await?;
            let (id, name) = names.split_at(names.len().min(id_bytes as usize));
            let snapshot = Snapshot {
                id: text(id),
                name: text(name),
                l1_offset: number::<8>(&fixed, 0),
                l1_entries: number::<4>(&fixed, 8) as u32,
            };
            if snapshot.l1_entries > L1_ENTRIES_MAX {
                return Err(OpenError(format!("the L1 table of snapshot \"{}\" is too large", snapshot.name)));
            }
            let place = format!("the L1 table of snapshot \"{}\"", snapshot.name);
            check_place(&place, snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8, cluster)?;
            list.push(snapshot);
            at = (names_at + id_bytes + name_bytes).next_multiple_of(8);
            if at - header.snapshots_offset > SNAPSHOT_TABLE_BYTES_MAX {
                return Err(OpenError::new("the snapshot table is too large: 64 MiB is the most"));
            }
        }
        Ok((list, Region { offset: header.snapshots_offset, bytes: at - header.snapshots_offset }))
    }

    /// Where the directory of bitmaps and the bitmaps' tables lie.
    pub(super) async fn read_bitmap_regions(&self, bitmaps: BitmapDirectory, cluster: u64) -> OpenResult<Vec<Region>> {
        let mut regions = vec![Region { offset: bitmaps.offset, bytes: bitmaps.bytes }];
        let directory = self.read_or_say("the directory of bitmaps", bitmaps.offset, bitmaps.bytes).await?;
        let mut at = 0;
        for index in 0..bitmaps.count {
            let entry = directory.get(at..).filter(|rest| rest.len() as u64 >= BITMAP_ENTRY_BYTES);
            let entry =
                entry.ok_or_else(|| OpenError(format!("the directory of bitmaps ends before entry {index}")))?;
            let entries = number::<4>(entry, 8);
            if entries > BITMAP_TABLE_ENTRIES_MAX.into() {
                return Err(OpenError(format!("the table of bitmap {index} is too large")));
            }
            let region = Region { offset: number::<8>(entry, 0), bytes: entries * 8 };
            check_place(&format!("the table of bitmap {index}"), region.offset, region.bytes, cluster)?;
            regions.push(region);
            let bytes = BITMAP_ENTRY_BYTES + number::<2>(entry, 18) + number::<4>(entry, 20);
            at += bytes.next_multiple_of(8) as usize;
        }
        Ok(regions)
    }
}
