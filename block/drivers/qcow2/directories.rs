//! Directories: the directory of bitmaps, as far as everybody needs it. It owns how it is read and bounded, so that what
//! it names is protected from being written over; it changes nothing.

use super::channel::Channel;
use super::header::{BitmapDirectory, check_place};
use crate::error::{OpenError, OpenResult};

/// Of the bitmap of one bit for each 512 bytes of the largest disk that an L1 table maps, in clusters of 512 bytes.
const BITMAP_TABLE_ENTRIES_MAX: u32 = (128 << 20) / 8;
/// Of the tables of all bitmaps together, so that they can be looked at in bounded time.
const BITMAP_TABLES_BYTES_MAX: u64 = 1 << 30;
/// The fixed part of a bitmap's entry.
const BITMAP_ENTRY_BYTES: u64 = 24;

/// A piece of the file that holds metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub offset: u64,
    pub bytes: u64,
}

pub(super) fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes.iter().skip(at).take(N).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Channel {
    pub(super) async fn read_or_say(&self, what: &str, offset: u64, bytes: u64) -> OpenResult<Vec<u8>> {
        self.read_bytes(offset, bytes).await.map_err(|e| OpenError(format!("{what} cannot be read: {e}")))
    }

    /// Where the directory of bitmaps and the bitmaps' tables lie.
    pub(super) async fn read_bitmap_regions(&self, bitmaps: BitmapDirectory, cluster: u64) -> OpenResult<Vec<Region>> {
        let mut regions = vec![Region { offset: bitmaps.offset, bytes: bitmaps.bytes }];
        let directory = self.read_or_say("the directory of bitmaps", bitmaps.offset, bitmaps.bytes).await?;
        let (mut at, mut table_bytes) = (0, 0);
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
            table_bytes += region.bytes;
            if table_bytes > BITMAP_TABLES_BYTES_MAX {
                return Err(OpenError::new("the tables of its bitmaps are too large: 1 GiB is the most for all"));
            }
            regions.push(region);
            let bytes = BITMAP_ENTRY_BYTES + number::<2>(entry, 18) + number::<4>(entry, 20);
            at += bytes.next_multiple_of(8) as usize;
        }
        Ok(regions)
    }
}
