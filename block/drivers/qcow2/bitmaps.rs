//! Bitmaps: which parts of the disk were written, kept in the image from one opening to the next. It owns the bitmaps in
//! memory and what marks them; where they lie in the image is `bitmap_store.rs`'s.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::Qcow2;
use super::directories::{Region, text};
use super::header::BITMAPS_MAX;
use super::state::Image;
use crate::error::{OpenError, OpenResult};

/// A bitmap of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// The bytes that one bit stands for.
    pub granularity: u64,
    /// Writes are marked in it (the flag `auto` on disk).
    pub enabled: bool,
    /// It is not up to date: it was in use when the image was not closed properly, or somebody wrote to the image who did
    /// not know of it. It can only be removed.
    pub inconsistent: bool,
    /// The flag `in-use` on disk, as it was when the image was opened.
    pub in_use: bool,
    /// Of a kind that is not known; it is kept, and nothing can be done with it.
    pub unknown: bool,
    /// How many bytes of the disk are marked in it; 0 if it is inconsistent.
    pub marked_bytes: u64,
}

/// A bitmap that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBitmap {
    /// 1 to 1,023 bytes.
    pub name: String,
    /// The bytes that one bit stands for, a power of two from 512 to 2 GiB. `None`: the size of a cluster, within 4 KiB to
    /// 64 KiB.
    pub granularity: Option<u64>,
    /// Writes are marked in it.
    pub enabled: bool,
}

/// What is marked in a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Marked {
    /// The size of the disk in bytes.
    pub size: u64,
    /// Offset and length in bytes, in order, apart from each other.
    pub ranges: Vec<(u64, u64)>,
}

/// What can be done with a bitmap.
pub(super) enum Condition {
    Usable(Bits),
    Inconsistent,
    Unknown,
}

/// A bitmap, as the image has it or will have it.
pub(super) struct Bitmap {
    pub name: Vec<u8>,
    pub granularity_bits: u32,
    pub enabled: bool,
    pub was_in_use: bool,
    pub condition: Condition,
    /// Flags on disk that we do not change.
    pub other_flags: u32,
    pub kind: u8,
    pub extra: Vec<u8>,
    /// Its table on disk.
    pub stored: Option<Region>,
    /// Its bits are not what is on disk.
    pub changed: bool,
}

impl Bitmap {
    pub(super) fn is_usable(&self) -> bool {
        matches!(self.condition, Condition::Usable(_))
    }

    fn info(&self) -> BitmapInfo {
        BitmapInfo {
            name: text(&self.name),
            granularity: 1u64.checked_shl(self.granularity_bits).unwrap_or(0),
            enabled: self.enabled,
            inconsistent: matches!(self.condition, Condition::Inconsistent),
            in_use: self.was_in_use,
            unknown: matches!(self.condition, Condition::Unknown),
            marked_bytes: match &self.condition {
                Condition::Usable(bits) => bits.ranges().iter().map(|(_, bytes)| bytes).sum(),
                _ => 0,
            },
        }
    }
}

/// One bit for each piece of a disk.
pub(super) struct Bits {
    words: Vec<u64>,
    granularity_bits: u32,
    /// Of the disk, in bytes.
    size: u64,
}

impl Bits {
    /// Nothing is marked. The caller has bounded the memory.
    pub(super) fn new(size: u64, granularity_bits: u32) -> Self {
        let words = Self::bytes_for(size, granularity_bits).div_ceil(8);
        Self { words: vec![0; usize::try_from(words).unwrap_or(usize::MAX)], granularity_bits, size }
    }

    /// How many bytes of bits a disk has.
    pub(super) fn bytes_for(size: u64, granularity_bits: u32) -> u64 {
        size.div_ceil(1 << granularity_bits).div_ceil(8)
    }

    pub(super) fn len_bytes(&self) -> usize {
        Self::bytes_for(self.size, self.granularity_bits) as usize
    }

    fn count(&self) -> u64 {
        self.size.div_ceil(1 << self.granularity_bits)
    }

    /// Marks `bytes` from `offset` on, as far as the disk reaches.
    fn mark(&mut self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes).min(self.size);
        if offset >= end {
            return;
        }
        let (first, last) = (offset >> self.granularity_bits, (end - 1) >> self.granularity_bits);
        let (from, to) = ((first / 64) as usize, (last / 64) as usize);
        for at in from..=to {
            let low = if at == from { u64::MAX << (first % 64) } else { u64::MAX };
            let high = if at == to { u64::MAX >> (63 - last % 64) } else { u64::MAX };
            if let Some(word) = self.words.get_mut(at) {
                *word |= low & high;
            }
        }
    }

    fn is_marked(&self, index: u64) -> bool {
        self.words.get((index / 64) as usize).is_some_and(|word| word >> (index % 64) & 1 != 0)
    }

    /// What is marked: offset and length in bytes.
    fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges = Vec::new();
        let (mut at, count) = (0, self.count());
        while at < count {
            // Whole words at a time where there is nothing.
            if at % 64 == 0 && self.words.get((at / 64) as usize) == Some(&0) {
                at += 64;
                continue;
            }
            if !self.is_marked(at) {
                at += 1;
                continue;
            }
            let first = at;
            while at < count && self.is_marked(at) {
                at += 1;
            }
            let start = first << self.granularity_bits;
            ranges.push((start, (at << self.granularity_bits).min(self.size) - start));
        }
        ranges
    }

    /// Takes bits over as they stand on disk, from byte `start` on.
    pub(super) fn load(&mut self, start: usize, bytes: &[u8]) {
        let end = self.len_bytes();
        for (at, byte) in (start..end).zip(bytes) {
            if let Some(word) = self.words.get_mut(at / 8) {
                *word |= u64::from(*byte) << (at % 8 * 8);
            }
        }
        // Bits past the disk's end say nothing.
        let used = self.count() % 64;
        if let Some(last) = self.words.last_mut().filter(|_| used != 0) {
            *last &= u64::MAX >> (64 - used);
        }
    }

    /// `bytes` bytes as they stand on disk, from byte `start` on; zeroes past the end.
    pub(super) fn store(&self, start: usize, bytes: usize) -> Vec<u8> {
        let byte = |at: usize| self.words.get(at / 8).map_or(0, |word| (word >> (at % 8 * 8)) as u8);
        (start..start + bytes).map(byte).collect()
    }

    /// Of a disk of another size; what is new is not marked.
    fn resized(&self, size: u64) -> Self {
        let mut other = Self::new(size, self.granularity_bits);
        self.ranges().into_iter().for_each(|(offset, bytes)| other.mark(offset, bytes));
        other
    }
}

/// The bitmaps of an image that is open.
#[derive(Default)]
pub(super) struct Bitmaps {
    list: Vec<Bitmap>,
    /// Tables of those that were removed.
    gone: Vec<Region>,
    /// The image was opened for writing, and so the directory has to be stored at the end.
    to_be_stored: bool,
}

/// The most bytes of a name.
const NAME_BYTES_MAX: usize = 1023;
/// The most bytes of bits that one bitmap may have.
const BITS_BYTES_MAX: u64 = 512 << 20;

impl Image {
    pub(super) fn bitmaps(&self) -> MutexGuard<'_, Bitmaps> {
        self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request is about to write there.
    pub(super) fn mark_written(&self, offset: u64, bytes: u64) {
        if self.tracking.load(Ordering::Relaxed) {
            self.bitmaps().mark(offset, bytes);
        }
    }

    /// Works out whether writes are to be marked.
    fn update_tracking(&self) {
        let tracking = self.bitmaps().list.iter().any(|bitmap| bitmap.enabled && bitmap.is_usable());
        self.tracking.store(tracking, Ordering::Relaxed);
    }
}

impl Bitmaps {
    fn mark(&mut self, offset: u64, bytes: u64) {
        for bitmap in self.list.iter_mut().filter(|bitmap| bitmap.enabled) {
            if let Condition::Usable(bits) = &mut bitmap.condition {
                bits.mark(offset, bytes);
                bitmap.changed = true;
            }
        }
    }

    fn find(&mut self, name: &str) -> OpenResult<&mut Bitmap> {
        let found = self.list.iter_mut().find(|bitmap| bitmap.name == name.as_bytes());
        found.ok_or_else(|| OpenError(format!("there is no bitmap \"{name}\"")))
    }

    fn find_usable(&mut self, name: &str) -> OpenResult<(&mut Bits, &mut bool)> {
        let bitmap = self.find(name)?;
        match &mut bitmap.condition {
            Condition::Usable(bits) => Ok((bits, &mut bitmap.changed)),
            Condition::Inconsistent => Err(OpenError(format!(
                "bitmap \"{name}\" is not up to date, as the image was not closed properly: it can only be removed"
            ))),
            Condition::Unknown => Err(OpenError(format!("bitmap \"{name}\" is of a kind that is not known"))),
        }
    }
}

impl Qcow2 {
    /// Reads the bitmaps of an image that was just loaded; has it say that they are in use, if it can be written.
    pub(super) fn open_bitmaps(&self) -> OpenResult {
        let size = self.image.size.load(Ordering::Relaxed);
        let writable = self.image.writable && !self.image.for_repair.load(Ordering::Relaxed);
        if self.image.lock().header.bitmaps.is_some() {
            let list = self.blocking(async move |channel| {
                let list = channel.load_bitmaps(size).await?;
                if writable {
                    channel.mark_bitmaps_in_use(&list).await?;
                }
                Ok(list)
            })?;
            let to_be_stored = writable && !list.is_empty();
            *self.image.bitmaps() = Bitmaps { list, gone: Vec::new(), to_be_stored };
        }
        self.image.update_tracking();
        Ok(())
    }

    /// Stores the bitmaps and forgets them.
    pub(super) fn close_bitmaps(&self) -> OpenResult {
        let bitmaps = std::mem::take(&mut *self.image.bitmaps());
        self.image.update_tracking();
        if !bitmaps.to_be_stored || self.image.is_broken() {
            return Ok(());
        }
        let result = self.blocking(async move |channel| {
            let stored = channel.store_bitmaps(&bitmaps.list, &bitmaps.gone).await;
            Ok((stored, bitmaps))
        });
        let (stored, bitmaps) = result?;
        if stored.is_err() {
            // As they were; the next attempt may do better.
            *self.image.bitmaps() = bitmaps;
            self.image.update_tracking();
        }
        stored
    }

    /// Has all bitmaps say that everything was written.
    pub(super) fn mark_all_in_bitmaps(&self) {
        let size = self.image.size.load(Ordering::Relaxed);
        self.resize_bitmaps();
        self.image.bitmaps().mark(0, size);
    }

    /// Fits the bitmaps to the size of the disk.
    pub(super) fn resize_bitmaps(&self) {
        let size = self.image.size.load(Ordering::Relaxed);
        for bitmap in &mut self.image.bitmaps().list {
            if let Condition::Usable(bits) = &mut bitmap.condition {
                if Bits::bytes_for(size, bitmap.granularity_bits) > BITS_BYTES_MAX {
                    bitmap.condition = Condition::Inconsistent;
                } else {
                    *bits = bits.resized(size);
                    bitmap.changed = true;
                }
            } else if let Condition::Unknown = bitmap.condition {
                // It says something of a disk of another size.
                bitmap.was_in_use = true;
            }
        }
    }

    pub(super) fn bitmaps(&self) -> OpenResult<Vec<BitmapInfo>> {
        Ok(self.image.bitmaps().list.iter().map(Bitmap::info).collect())
    }

    pub(super) fn bitmap_add(&self, new: &NewBitmap) -> OpenResult {
        let size = self.image.size.load(Ordering::Relaxed);
        if new.name.is_empty() || new.name.len() > NAME_BYTES_MAX {
            return Err(OpenError(format!("the name of a bitmap has 1 to {NAME_BYTES_MAX} bytes")));
        }
        if !self.image.geometry.v3 {
            return Err(OpenError::new("an image of version 2 cannot have bitmaps"));
        }
        let default = self.image.geometry.cluster_size().clamp(4096, 65536);
        let granularity = new.granularity.unwrap_or(default);
        if !granularity.is_power_of_two() || !(512..=2 << 30).contains(&granularity) {
            return Err(OpenError::new("the granularity of a bitmap is a power of two from 512 to 2G"));
        }
        let granularity_bits = granularity.ilog2();
        if Bits::bytes_for(size, granularity_bits) > BITS_BYTES_MAX {
            return Err(OpenError::new("the granularity is too fine for a disk of this size"));
        }
        let mut bitmaps = self.image.bitmaps();
        if bitmaps.find(&new.name).is_ok() {
            return Err(OpenError(format!("there is a bitmap \"{}\" already", new.name)));
        }
        if bitmaps.list.len() >= BITMAPS_MAX as usize {
            return Err(OpenError(format!("there are {BITMAPS_MAX} bitmaps, and no more are possible")));
        }
        bitmaps.list.push(Bitmap {
            name: new.name.clone().into_bytes(),
            granularity_bits,
            enabled: new.enabled,
            was_in_use: false,
            condition: Condition::Usable(Bits::new(size, granularity_bits)),
            other_flags: 0,
            kind: 1,
            extra: Vec::new(),
            stored: None,
            changed: true,
        });
        bitmaps.to_be_stored = true;
        drop(bitmaps);
        self.image.update_tracking();
        Ok(())
    }

    pub(super) fn bitmap_remove(&self, name: &str) -> OpenResult {
        let mut bitmaps = self.image.bitmaps();
        bitmaps.find(name)?;
        bitmaps.to_be_stored = true;
        let Bitmaps { list, gone, .. } = &mut *bitmaps;
        list.retain(|bitmap| {
            let stays = bitmap.name != name.as_bytes();
            gone.extend(bitmap.stored.filter(|_| !stays));
            stays
        });
        drop(bitmaps);
        self.image.update_tracking();
        Ok(())
    }

    pub(super) fn bitmap_clear(&self, name: &str) -> OpenResult {
        let mut bitmaps = self.image.bitmaps();
        let (bits, changed) = bitmaps.find_usable(name)?;
        *bits = Bits::new(bits.size, bits.granularity_bits);
        *changed = true;
        Ok(())
    }

    pub(super) fn bitmap_enable(&self, name: &str, enabled: bool) -> OpenResult {
        let mut bitmaps = self.image.bitmaps();
        bitmaps.find_usable(name)?;
        bitmaps.find(name)?.enabled = enabled;
        drop(bitmaps);
        self.image.update_tracking();
        Ok(())
    }

    pub(super) fn bitmap_marked(&self, name: &str) -> OpenResult<Marked> {
        let mut bitmaps = self.image.bitmaps();
        let (bits, _) = bitmaps.find_usable(name)?;
        Ok(Marked { size: bits.size, ranges: bits.ranges() })
    }

    pub(super) fn bitmap_merge(&self, name: &str, marked: &Marked) -> OpenResult {
        let mut bitmaps = self.image.bitmaps();
        let (bits, changed) = bitmaps.find_usable(name)?;
        if bits.size != marked.size {
            return Err(OpenError::new("the other bitmap is of a disk of another size"));
        }
        marked.ranges.iter().for_each(|(offset, bytes)| bits.mark(*offset, *bytes));
        *changed = true;
        Ok(())
    }
}
