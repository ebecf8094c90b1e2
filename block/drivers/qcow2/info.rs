//! Info: what an image says of itself, for people and tools. It owns which of the header's fields are told; it reads
//! nothing that is not in memory.

use super::header::{AUTOCLEAR_RAW_DATA, Compression, incompatible};
use super::with_image;
use crate::error::OpenResult;
use crate::node::Node;

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// 2 or 3.
    pub version: u32,
    /// In bytes.
    pub cluster_size: u64,
    /// Of the disk, in bytes.
    pub size: u64,
    /// The width of a refcount.
    pub refcount_bits: u32,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Clusters are allocated in 32nds.
    pub extended_l2: bool,
    /// New compressed clusters are compressed by zstd; else by zlib.
    pub zstd: bool,
    /// It was not closed after its last writer.
    pub dirty: bool,
    /// It is marked as corrupt.
    pub corrupt: bool,
    /// The backing file, as it is written.
    pub backing: Option<String>,
    /// The format of the backing file, if it is stated.
    pub backing_format: Option<String>,
    /// Whether the guest's data is in another file.
    pub has_data_file: bool,
    /// The name of that file, if the image states it.
    pub data_file: Option<String>,
    /// That file is a raw image by itself.
    pub data_file_raw: bool,
    /// How many internal snapshots there are.
    pub snapshots: u32,
    /// How many bitmaps there are.
    pub bitmaps: u32,
}

/// What an active qcow2 node says of itself.
///
/// # Errors
/// The node is no qcow2 image, or inactive.
pub fn info(node: &Node) -> OpenResult<ImageInfo> {
    with_image(node, |image| {
        let state = image.image.lock();
        let header = &state.header;
        Ok(ImageInfo {
            version: header.version,
            cluster_size: 1 << header.cluster_bits,
            size: header.size,
            refcount_bits: 1 << header.refcount_order,
            lazy_refcounts: header.has_lazy_refcounts(),
            extended_l2: header.is_extended(),
            zstd: header.compression == Compression::Zstd,
            dirty: header.incompatible & incompatible::DIRTY != 0,
            corrupt: header.incompatible & incompatible::CORRUPT != 0,
            backing: header.backing.clone(),
            backing_format: header.backing_format.clone(),
            has_data_file: header.has_data_file(),
            data_file: header.data_file.clone(),
            data_file_raw: header.autoclear & AUTOCLEAR_RAW_DATA != 0,
            snapshots: header.snapshots,
            bitmaps: header.bitmaps.map_or(0, |directory| directory.count),
        })
    })
}
