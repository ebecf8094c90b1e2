//! Bitmaps: which parts of the disk were written, kept in the image from one opening to the next. It owns the bitmaps in
//! memory and what marks them; where they lie in the image is `bitmap_store.rs`'s.

use super::Qcow2;
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

fn later<T>() -> OpenResult<T> {
    Err(OpenError::new("this is not possible yet"))
}

impl Qcow2 {
    /// Has all bitmaps say that everything was written.
    pub(super) fn mark_all_in_bitmaps(&self) {}

    pub(super) fn bitmaps(&self) -> OpenResult<Vec<BitmapInfo>> {
        later()
    }

    pub(super) fn bitmap_add(&self, _bitmap: &NewBitmap) -> OpenResult {
        later()
    }

    pub(super) fn bitmap_remove(&self, _name: &str) -> OpenResult {
        later()
    }

    pub(super) fn bitmap_clear(&self, _name: &str) -> OpenResult {
        later()
    }

    pub(super) fn bitmap_enable(&self, _name: &str, _enabled: bool) -> OpenResult {
        later()
    }

    pub(super) fn bitmap_marked(&self, _name: &str) -> OpenResult<Marked> {
        later()
    }

    pub(super) fn bitmap_merge(&self, _name: &str, _marked: &Marked) -> OpenResult {
        later()
    }
}
