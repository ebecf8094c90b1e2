//! Disk images on the host, and data that tells where it belongs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A raw image in a directory of its own under target/, which is a real file system rather than memory.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    _dir: TempDir,
}

impl Image {
    /// An image of `bytes` zeroes.
    pub fn empty(bytes: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("image-").tempdir_in(env!("CARGO_TARGET_TMPDIR"));
        let dir = dir.expect("a directory for an image");
        let path = dir.path().join("disk.raw");
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("an image");
        file.set_len(bytes).expect("room for an image");
        Self { file, path, _dir: dir }
    }

    /// An image of `bytes`, filled with `pattern(0, …)`.
    pub fn filled(bytes: usize) -> Self {
        let image = Self::empty(bytes as u64);
        image.file.write_all_at(&pattern(0, bytes), 0).expect("write an image");
        image
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the host sees.
    pub fn read(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.file.read_exact_at(&mut data, offset).expect("read an image");
        data
    }
}

/// Bytes in which every 8 differ from every other 8 of the same seed, and of other seeds.
pub fn pattern(seed: u32, bytes: usize) -> Vec<u8> {
    let words =
        (0..bytes.div_ceil(8) as u64).map(|at| (u64::from(seed) << 40 | at).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut data: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    data.truncate(bytes);
    data
}
