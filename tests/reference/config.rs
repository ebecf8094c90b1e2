//! What the device tells about itself: feature bits and the configuration space (virtio 1.3, 5.2.3 and 5.2.4).
//! It never touches a request.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use vhost::vhost_user::message::VhostUserVirtioFeatures;

use crate::disk::Disk;

/// Bytes in a sector, the unit of every number on the wire.
pub const SECTOR: u64 = 512;
/// Data segments of one request; small enough for rings of 128.
const SEGMENTS_MAX: u32 = 126;
/// Segments of one discard or write-zeroes request.
pub const ZERO_SEGMENTS_MAX: u32 = 32;
/// Sectors of one discard or write-zeroes segment: 1 GiB.
pub const ZERO_SECTORS_MAX: u32 = 1 << 21;

/// The bit of a feature.
pub const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// The features offered for `disk`.
pub fn features(disk: &Disk) -> u64 {
    let always = bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_RING_F_EVENT_IDX)
        | bit(VIRTIO_RING_F_INDIRECT_DESC)
        | bit(VIRTIO_BLK_F_SEG_MAX)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_FLUSH)
        | bit(VIRTIO_BLK_F_MQ)
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if disk.read_only {
        always | bit(VIRTIO_BLK_F_RO)
    } else {
        always | bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES)
    }
}

/// The bytes of `struct virtio_blk_config`, with the fields of features that are not offered zero.
pub fn space(disk: &Disk, queues: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(96);
    bytes.extend(disk.size.div_ceil(SECTOR).to_le_bytes()); // capacity
    bytes.extend(0u32.to_le_bytes()); // size_max: not offered
    bytes.extend(SEGMENTS_MAX.to_le_bytes());
    bytes.extend([0; 4]); // geometry
    bytes.extend(512u32.to_le_bytes()); // blk_size
    bytes.extend([0; 8]); // topology
    bytes.extend([1, 0]); // write-back, since FLUSH is offered; a hole
    bytes.extend(queues.to_le_bytes());
    for _ in ["discard", "write zeroes"] {
        bytes.extend(ZERO_SECTORS_MAX.to_le_bytes());
        bytes.extend(ZERO_SEGMENTS_MAX.to_le_bytes());
        // For discard the alignment in sectors; for write zeroes "may unmap" and its padding.
        bytes.extend(1u32.to_le_bytes());
    }
    bytes.resize(96, 0); // secure erase and zones
    bytes
}
