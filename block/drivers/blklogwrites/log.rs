//! Log: the format of the kernel's device-mapper target log-writes, version 1, which its replay tools read. It owns the
//! bytes and the position of the next entry; the caller lets one entry in at a time.
//!
//! A log is a sequence of sectors of one size. Sector 0 is the super block: magic, version and number of entries as u64,
//! sector size as u32. From sector 1 on stands entry after entry: a sector with first sector, number of sectors, flags
//! and length of a mark's text as u64, the text of a mark behind them; then, unless it is a discard, as many sectors of
//! data. Numbers are little-endian.

use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::child::ChildChannel;
use crate::driver::WriteFlags;
use crate::error::{BlockError, BlockResult};
use crate::iovec::{AlignedBuffer, IoVec};

const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;

/// What an entry is: a write, unless it says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EntryFlags(u64);

impl EntryFlags {
    pub(super) const NONE: Self = Self(0);
    pub(super) const FLUSH: Self = Self(1 << 0);
    pub(super) const FUA: Self = Self(1 << 1);
    pub(super) const DISCARD: Self = Self(1 << 2);

    /// Whether everything before it is stable with it.
    fn is_barrier(self) -> bool {
        self.0 & (Self::FLUSH.0 | Self::FUA.0) != 0
    }
}

/// What follows the header of an entry.
#[derive(Clone, Copy)]
pub(super) enum Data {
    /// Nothing.
    None,
    /// The bytes that were written.
    Bytes(IoVec),
    /// As many zeroes as the entry is long.
    Zeroes,
}

/// Where the log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    /// The sector of the next entry.
    pub(super) sector: u64,
    pub(super) entries: u64,
    /// Entries that the super block does not count yet.
    uncounted: u64,
}

impl End {
    /// Of a log without entries.
    pub(super) const EMPTY: Self = Self { sector: 1, entries: 0, uncounted: 0 };
}

/// The log of a node, as all its channels share it.
pub(super) struct Log {
    /// In bytes, a power of two, at least 512.
    pub(super) sector_size: u64,
    /// How many entries may be written before the super block counts them.
    pub(super) super_update_interval: u64,
    end: Mutex<End>,
}

impl Log {
    pub(super) fn new(sector_size: u64, super_update_interval: u64) -> Self {
        Self { sector_size, super_update_interval, end: Mutex::new(End::EMPTY) }
    }

    fn end(&self) -> MutexGuard<'_, End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_end(&self, end: End) {
        *self.end() = end;
    }

    fn sector(&self, fields: &[&[u8]]) -> AlignedBuffer {
        let mut sector = AlignedBuffer::new(self.sector_size as usize, 4096);
        let bytes = fields.concat();
        sector.fill_from(&bytes);
        sector
    }

    /// Writes one entry for `bytes` at `offset` of the disk. The caller lets in one at a time.
    pub(super) async fn append(
        &self,
        file: &Rc<ChildChannel>,
        flags: EntryFlags,
        offset: u64,
        bytes: u64,
        data: Data,
    ) -> BlockResult {
        let end = *self.end();
        let sectors = bytes / self.sector_size;
        let header = [offset / self.sector_size, sectors, flags.0, 0].map(u64::to_le_bytes);
        let header = self.sector(&header.each_ref().map(|field| field.as_slice()));
        let position = end.sector.checked_mul(self.sector_size).ok_or(BlockError::NoSpace)?;
        let plain = WriteFlags::default();
        let (next, written) = match data {
            Data::None => (end.sector + 1, file.pwritev(position, &[header.iov()], plain).await),
            Data::Bytes(data) => (end.sector + 1 + sectors, file.pwritev(position, &[header.iov(), data], plain).await),
            Data::Zeroes => {
                let written = file.pwritev(position, &[header.iov()], plain).await;
                written?;
                (end.sector + 1 + sectors, file.pwrite_zeroes(position + self.sector_size, bytes, plain).await)
            }
        };
        written?;
        let end = End { sector: next, entries: end.entries + 1, uncounted: end.uncounted + 1 };
        self.set_end(end);
        if flags.is_barrier() || end.uncounted >= self.super_update_interval {
            self.count(file, flags.is_barrier()).await?;
        }
        Ok(())
    }

    /// Has the super block count all entries, stable if asked.
    async fn count(&self, file: &Rc<ChildChannel>, stable: bool) -> BlockResult {
        if stable {
            file.flush().await?;
        }
        let entries = self.end().entries;
        let numbers = [MAGIC, VERSION, entries].map(u64::to_le_bytes);
        let size = (self.sector_size as u32).to_le_bytes();
        let block = self.sector(&[&numbers[0], &numbers[1], &numbers[2], &size]);
        file.pwritev(0, &[block.iov()], WriteFlags { fua: stable, ..WriteFlags::default() }).await?;
        self.end().uncounted = 0;
        Ok(())
    }

    /// Finds the end of a log that is there.
    pub(super) async fn find_end(&self, file: &Rc<ChildChannel>) -> Result<End, String> {
        let length = file.length();
        if length == 0 {
            return Ok(End::EMPTY);
        }
        let sector = AlignedBuffer::new(self.sector_size as usize, 4096);
        let read = async |number: u64| {
            let offset = number
                .checked_mul(self.sector_size)
                .filter(|offset| length.checked_sub(self.sector_size).is_some_and(|last| *offset <= last));
            let offset = offset.ok_or_else(|| format!("it ends before sector {number}, where an entry should be"))?;
            let read = file.preadv(offset, &[sector.iov()]).await;
            read.map_err(|error| format!("sector {number}: {error}"))?;
            let bytes = sector.to_vec();
            Ok::<_, String>(std::array::from_fn::<u64, 4, _>(|field| {
                u64::from_le_bytes(std::array::from_fn(|byte| bytes[8 * field + byte]))
            }))
        };
        let [magic, version, entries, size] = read(0).await?;
        if magic != MAGIC || version != VERSION {
            return Err("it holds no log of writes, of version 1".to_owned());
        }
        if size & u64::from(u32::MAX) != self.sector_size {
            return Err(format!("its sectors have {} bytes, not log-sector-size={}", size as u32, self.sector_size));
        }
        let mut end = End::EMPTY;
        while end.entries < entries {
            let [_, sectors, flags, _] = read(end.sector).await?;
            let data = if flags & EntryFlags::DISCARD.0 != 0 { 0 } else { sectors };
            let next = end.sector.checked_add(1).and_then(|next| next.checked_add(data));
            end.sector = next.ok_or("an entry is longer than any disk")?;
            end.entries += 1;
        }
        Ok(end)
    }
}
