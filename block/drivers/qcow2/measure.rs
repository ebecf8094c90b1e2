//! Measure: how large a new image will be. It owns the count of all the metadata that an image of some size needs.

use super::create::CreateOptions;
use super::geometry::Geometry;
use crate::error::OpenResult;

/// How large an image becomes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// With what it is known to hold.
    pub required: u64,
    /// Once everything has been written to.
    pub fully_allocated: u64,
}

/// How large a new image becomes in which `data_bytes` of the disk, in whole clusters, hold data.
///
/// # Errors
/// The options contradict each other or the format's limits; the error says how.
pub fn measure(options: &CreateOptions, data_bytes: u64) -> OpenResult<Measured> {
    let header = options.header()?;
    let geometry = Geometry::new(&header, options.cluster_size);
    let cluster = options.cluster_size;
    let size = options.size.next_multiple_of(cluster);
    let entry_bytes = geometry.entry_words() as u64 * 8;
    // One cluster for the header; then the L2 tables and the L1 table.
    let l2_clusters = (size / cluster).next_multiple_of(cluster / entry_bytes) * entry_bytes / cluster;
    let l1_clusters = (l2_clusters * 8).div_ceil(cluster);
    let counted = 1 + l2_clusters + l1_clusters + size / cluster;
    // What counts them counts itself.
    let (mut blocks, mut table) = (0u64, 0u64);
    loop {
        let more = (counted + blocks + table).div_ceil(geometry.refcounts_per_block());
        let more_table = (more * 8).div_ceil(cluster);
        if (more, more_table) == (blocks, table) {
            break;
        }
        (blocks, table) = (more, more_table);
    }
    let fully_allocated = (counted + blocks + table) * cluster;
    let data = match options.preallocation {
        super::Preallocation::Falloc | super::Preallocation::Full => size,
        _ => data_bytes.next_multiple_of(cluster).min(size),
    };
    Ok(Measured { required: fully_allocated - size + data, fully_allocated })
}
