//! Bitmap store: how bitmaps lie in an image. It owns the coding of directory, tables and bits, and the order in which
//! they reach the disk; what the bits mean is `bitmaps.rs`'s. With no request in flight.

use super::bitmaps::{Bitmap, Bits, Condition};
use super::channel::Channel;
use super::directories::{Region, number};
use super::geometry::OFFSET_MASK;
use super::header::{AUTOCLEAR_BITMAPS, BitmapDirectory, EXTENSION_BITMAPS};
use super::state::{Reach, Span};
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};

const ENTRY_BYTES: usize = 24;
const IN_USE: u32 = 1 << 0;
const AUTO: u32 = 1 << 1;
const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
/// The kind of bitmap that marks what was written.
const DIRTY_TRACKING: u8 = 1;
/// An entry of a table whose cluster, of ones only, is not stored.
const ALL_ONES: u64 = 1;
/// The most bytes of bits, of all bitmaps of an image, that are held in memory.
const MEMORY_MAX: u64 = 512 << 20;
const SECTOR: u64 = 512;

fn failed(error: BlockError) -> OpenError {
    OpenError(format!("the bitmaps cannot be stored: {error}"))
}

impl Channel {
    /// Reads all bitmaps; `size` is the size of the disk.
    pub(super) async fn load_bitmaps(&self, size: u64) -> OpenResult<Vec<Bitmap>> {
        let header = self.image.lock().header.clone();
        let Some(place) = header.bitmaps.filter(|_| header.has_valid_bitmaps()) else { return Ok(Vec::new()) };
        let directory = self.read_or_say("the directory of bitmaps", place.offset, place.bytes).await?;
        let mut list: Vec<Bitmap> = Vec::new();
        let (mut at, mut memory) = (0, 0);
        for index in 0..place.count {
            let cut_off = || OpenError(format!("the directory of bitmaps ends before entry {index} does"));
            let entry = directory.get(at..).filter(|rest| rest.len() >= ENTRY_BYTES).ok_or_else(cut_off)?;
            let (name_bytes, extra_bytes) = (number::<2>(entry, 18) as usize, number::<4>(entry, 20) as usize);
            let rest = entry.get(ENTRY_BYTES..).unwrap_or(&[]);
            let extra = rest.get(..extra_bytes).ok_or_else(cut_off)?;
            let name = rest.get(extra_bytes..).and_then(|rest| rest.get(..name_bytes)).ok_or_else(cut_off)?;
            let flags = number::<4>(entry, 12) as u32;
            let (kind, granularity_bits) = (number::<1>(entry, 16) as u8, number::<1>(entry, 17) as u32);
            let table = Region { offset: number::<8>(entry, 0), bytes: number::<4>(entry, 8) * 8 };
            let mut bitmap = Bitmap {
                name: name.to_vec(),
                granularity_bits,
                enabled: flags & AUTO != 0,
                was_in_use: flags & IN_USE != 0,
                condition: Condition::Unknown,
                other_flags: flags & !(IN_USE | AUTO),
                kind,
                extra: extra.to_vec(),
                stored: Some(table),
                changed: false,
            };
            let known = kind == DIRTY_TRACKING
                && (extra.is_empty() || flags & EXTRA_DATA_COMPATIBLE != 0)
                && flags & !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE) == 0
                && (9..=31).contains(&granularity_bits);
            if known {
                let bytes = Bits::bytes_for(size, granularity_bits);
                let clusters = bytes.div_ceil(self.image.geometry.cluster_size());
                memory += bytes;
                bitmap.condition = if bitmap.was_in_use || clusters * 8 != table.bytes {
                    Condition::Inconsistent
                } else if memory > MEMORY_MAX {
                    tracing::warn!("node \"{}\": there is no memory for all of its bitmaps", self.image.name);
                    Condition::Unknown
                } else {
                    Condition::Usable(self.read_bits(table, size, granularity_bits).await?)
                };
            }
            list.push(bitmap);
            at += (ENTRY_BYTES + extra_bytes + name_bytes).next_multiple_of(8);
        }
        Ok(list)
    }

    async fn read_bits(&self, table: Region, size: u64, granularity_bits: u32) -> OpenResult<Bits> {
        let cluster = self.image.geometry.cluster_size();
        let unreadable = |e| OpenError(format!("a bitmap cannot be read: {e}"));
        let mut bits = Bits::new(size, granularity_bits);
        let entries = self.read_words(table.offset, table.bytes).await.map_err(unreadable)?;
        for (index, entry) in entries.into_iter().enumerate() {
            let start = index * cluster as usize;
            match entry {
                0 => {}
                ALL_ONES => bits.load(start, &vec![0xff; cluster as usize]),
                entry if entry & !OFFSET_MASK == 0 && (entry & OFFSET_MASK).is_multiple_of(cluster) => {
                    let bytes = self.read_bytes(entry, cluster).await.map_err(unreadable)?;
                    bits.load(start, &bytes);
                }
                _ => return Err(OpenError::new("the table of a bitmap has an entry that cannot be")),
            }
        }
        Ok(bits)
    }

    /// Has the directory say that bitmaps are in use, stable, before the first write.
    pub(super) async fn mark_bitmaps_in_use(&self, list: &[Bitmap]) -> OpenResult {
        let header = self.image.lock().header.clone();
        let Some(place) = header.bitmaps.filter(|_| list.iter().any(Bitmap::is_usable)) else { return Ok(()) };
        let mut directory =
            self.read_bytes(place.offset, place.bytes.next_multiple_of(SECTOR)).await.map_err(failed)?;
        let mut at = 0;
        for bitmap in list {
            if let Some(flags) = directory.get_mut(at + 15).filter(|_| bitmap.is_usable()) {
                // The lowest of the four bytes.
                *flags |= IN_USE as u8;
            }
            at += (ENTRY_BYTES + bitmap.extra.len() + bitmap.name.len()).next_multiple_of(8);
        }
        self.write_bytes(place.offset, &directory).await.map_err(failed)?;
        self.file.flush().await.map_err(failed)
    }

    /// Stores all bitmaps, those that can be used as no longer in use. `gone` are the tables of those that were removed.
    pub(super) async fn store_bitmaps(&self, list: &[Bitmap], gone: &[Region]) -> OpenResult {
        let old = {
            let header = &self.image.lock().header;
            header.bitmaps.filter(|_| header.has_valid_bitmaps())
        };
        let mut taken = Vec::new();
        let mut freed = gone.to_vec();
        let written = self.write_new_bitmaps(list, &mut taken, &mut freed).await;
        let linked = match written {
            Ok(directory) => {
                self.edit_header(|header| {
                    let data = directory.map(|place| {
                        let count = u64::from(place.count) << 32;
                        [count, place.bytes, place.offset].iter().flat_map(|number| number.to_be_bytes()).collect()
                    });
                    let bit = if data.is_some() { AUTOCLEAR_BITMAPS } else { 0 };
                    header.set_extension(EXTENSION_BITMAPS, data);
                    header.put(88, self.image.lock().header.kept_autoclear() & !AUTOCLEAR_BITMAPS | bit);
                    Ok(())
                })
                .await
            }
            Err(error) => Err(failed(error)),
        };
        if let Err(error) = linked {
            if !self.image.is_broken() {
                for span in taken {
                    self.give_back(span).await;
                }
            }
            return Err(error);
        }
        if let Some(old) = old {
            self.free_region(Region { offset: old.offset, bytes: old.bytes }).await;
        }
        for table in freed {
            let entries = self.read_words(table.offset, table.bytes).await.map_err(failed)?;
            for entry in entries.into_iter().map(|entry| entry & OFFSET_MASK).filter(|entry| *entry != 0) {
                self.free_region(Region { offset: entry, bytes: 1 }).await;
            }
            self.free_region(table).await;
        }
        Ok(())
    }

    /// Writes bits that changed, their tables and a new directory, stable; `None`: there is no bitmap. What is no longer
    /// needed afterwards is put to `freed`, new clusters to `taken`.
    async fn write_new_bitmaps(
        &self,
        list: &[Bitmap],
        taken: &mut Vec<Span>,
        freed: &mut Vec<Region>,
    ) -> BlockResult<Option<BitmapDirectory>> {
        let mut directory = Vec::new();
        for bitmap in list {
            let table = match &bitmap.condition {
                Condition::Usable(bits) if bitmap.changed => {
                    freed.extend(bitmap.stored);
                    self.write_bits(bits, taken).await?
                }
                _ => bitmap.stored.unwrap_or(Region { offset: 0, bytes: 0 }),
            };
            let in_use = match bitmap.condition {
                Condition::Usable(_) => 0,
                Condition::Inconsistent => IN_USE,
                Condition::Unknown if bitmap.was_in_use => IN_USE,
                Condition::Unknown => 0,
            };
            let flags = bitmap.other_flags | in_use | if bitmap.enabled { AUTO } else { 0 };
            directory.extend(table.offset.to_be_bytes());
            directory.extend(((table.bytes / 8) as u32).to_be_bytes());
            directory.extend(flags.to_be_bytes());
            directory.extend([bitmap.kind, bitmap.granularity_bits as u8]);
            directory.extend((bitmap.name.len() as u16).to_be_bytes());
            directory.extend((bitmap.extra.len() as u32).to_be_bytes());
            directory.extend(&bitmap.extra);
            directory.extend(&bitmap.name);
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        let place = match list.len() as u32 {
            0 => None,
            count => {
                let bytes = directory.len() as u64;
                let offset = self.write_to_new(&directory, taken).await?;
                Some(BitmapDirectory { count, bytes, offset })
            }
        };
        self.write_back(Reach::Disk).await?;
        Ok(place)
    }

    /// Writes bits and their table to new clusters.
    async fn write_bits(&self, bits: &Bits, taken: &mut Vec<Span>) -> BlockResult<Region> {
        let cluster = self.image.geometry.cluster_size() as usize;
        let mut table = Vec::new();
        for start in (0..bits.len_bytes()).step_by(cluster) {
            let bytes = bits.store(start, cluster);
            let entry = match bytes.iter().all(|byte| *byte == 0) {
                true => 0,
                false => self.write_to_new(&bytes, taken).await?,
            };
            table.extend(entry.to_be_bytes());
        }
        let bytes = table.len() as u64;
        let offset = self.write_to_new(&table, taken).await?;
        Ok(Region { offset, bytes })
    }

    /// Writes bytes to new clusters in one piece; returns where. Of nothing: 0.
    async fn write_to_new(&self, bytes: &[u8], taken: &mut Vec<Span>) -> BlockResult<u64> {
        let cluster = self.image.geometry.cluster_size();
        if bytes.is_empty() {
            return Ok(0);
        }
        let span = self.take_run((bytes.len() as u64).div_ceil(cluster)).await?;
        taken.push(span);
        let offset = span.first << self.image.geometry.cluster_bits;
        let mut whole = bytes.to_vec();
        whole.resize(bytes.len().next_multiple_of(cluster as usize), 0);
        self.extend_file(offset + whole.len() as u64).await;
        self.write_bytes(offset, &whole).await?;
        Ok(offset)
    }
}
