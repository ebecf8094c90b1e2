//! The config space and the feature bits of the device (virtio 1.3 §5.2.3, §5.2.4), derived from the export's settings
//! and the medium's limits. It negotiates nothing and remembers nothing.

use blockport_block::{BlockBackend, BlockLimits};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::export::ExportSettings;

/// The unit of offsets and lengths in requests and in the config space, in bytes (§5.2.6).
pub(crate) const SECTOR_SIZE: u64 = 512;
/// The most segments in one discard or write-zeroes.
pub(crate) const RANGE_SEGMENTS_MAX: u32 = 32;
/// The most sectors in one segment of a discard or write-zeroes: 2 GiB.
pub(crate) const RANGE_SECTORS_MAX: u32 = 1 << 22;

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub(crate) const F_PROTOCOL_FEATURES: u32 = 30;

/// VHOST_F_LOG_ALL: changes with the migration, not with the rings. No guest driver sees it.
pub(crate) const F_LOG_ALL: u32 = 26;

/// `1 << bit`.
pub(crate) const fn bit(bit: u32) -> u64 {
    1 << bit
}

/// Size of `struct virtio_blk_config` up to and including the zoned fields.
pub(crate) const CONFIG_BYTES: usize = 96;
/// The most that a front-end may ask for, VHOST_USER_MAX_CONFIG_SIZE: what lies behind the structure reads as zero.
const CONFIG_SPACE_BYTES: u32 = 256;
/// Where the config space begins in virtio-mmio's registers. Some front-ends count from there (Dragonball).
const MMIO_CONFIG_OFFSET: u32 = 0x100;
/// The offset of the writeback byte.
pub(crate) const WRITEBACK_OFFSET: u32 = 32;

/// The feature bits offered. Fixed for the life of an export: what a guest has acknowledged must not go away.
pub(crate) fn features(settings: &ExportSettings, can_discard: bool) -> u64 {
    let mut features = bit(VIRTIO_BLK_F_SEG_MAX)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_FLUSH)
        | bit(VIRTIO_BLK_F_TOPOLOGY)
        | bit(VIRTIO_BLK_F_CONFIG_WCE)
        | bit(VIRTIO_BLK_F_MQ)
        | bit(VIRTIO_RING_F_INDIRECT_DESC)
        | bit(VIRTIO_RING_F_EVENT_IDX)
        | bit(F_LOG_ALL)
        | bit(F_PROTOCOL_FEATURES)
        | bit(VIRTIO_F_VERSION_1);
    if settings.writable {
        features |= bit(VIRTIO_BLK_F_WRITE_ZEROES);
        if can_discard {
            features |= bit(VIRTIO_BLK_F_DISCARD);
        }
    } else {
        features |= bit(VIRTIO_BLK_F_RO);
    }
    if settings.packed {
        features |= bit(VIRTIO_F_RING_PACKED);
    }
    features
}

/// What GET_CONFIG asks for: `size` bytes at `offset`. `None` where there is no config space.
pub(crate) fn part(config: &[u8; CONFIG_BYTES], offset: u32, size: u32) -> Option<Vec<u8>> {
    let offset = offset.checked_sub(MMIO_CONFIG_OFFSET).unwrap_or(offset);
    let end = offset.checked_add(size).filter(|end| *end <= CONFIG_SPACE_BYTES)?;
    Some((offset..end).map(|at| config.get(at as usize).copied().unwrap_or(0)).collect())
}

/// Sets up a discard's or zeroing's limit in sectors: what the node says, cut to ours.
fn sectors_max(bytes: u64, block_size: u32) -> u32 {
    let unit = u64::from(block_size) / SECTOR_SIZE;
    let sectors = match bytes {
        0 => u64::from(RANGE_SECTORS_MAX),
        bytes => (bytes / SECTOR_SIZE).min(u64::from(RANGE_SECTORS_MAX)),
    };
    // At most RANGE_SECTORS_MAX.
    (sectors / unit * unit).max(unit) as u32
}

/// The limits of one export's discards and write-zeroes, in sectors a segment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RangeLimits {
    pub(crate) discard_sectors_max: u32,
    pub(crate) zeroes_sectors_max: u32,
}

impl RangeLimits {
    pub(crate) fn new(limits: &BlockLimits, block_size: u32) -> Self {
        Self {
            discard_sectors_max: sectors_max(limits.max_discard, block_size),
            zeroes_sectors_max: sectors_max(limits.max_write_zeroes, block_size),
        }
    }
}

/// The config space as it is now. Without a medium the capacity is 0. `ranges` are those of the device, which stay what
/// they are when the medium changes: the block layer cuts what a medium cannot take in one piece.
pub(crate) fn config(
    settings: &ExportSettings,
    backend: &BlockBackend,
    features: u64,
    ranges: &RangeLimits,
    writeback: bool,
) -> [u8; CONFIG_BYTES] {
    let limits = backend.limits();
    let block_size = settings.logical_block_size;
    let physical = limits.physical_block_size.max(block_size).max(limits.request_alignment);
    let physical_exponent = (physical / block_size).checked_ilog2().unwrap_or(0);
    let blocks = |bytes: u32| bytes.div_ceil(block_size);

    let mut config = [0u8; CONFIG_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
    // The length is a whole number of sectors: the node rounds up (spec: the tail reads zero).
    put(0, &(backend.length().unwrap_or(0) / SECTOR_SIZE).to_le_bytes());
    put(12, &settings.seg_max.to_le_bytes());
    put(20, &block_size.to_le_bytes());
    put(24, &[physical_exponent as u8, 0]);
    put(26, &1u16.to_le_bytes());
    put(28, &blocks(limits.optimal_transfer).to_le_bytes());
    put(WRITEBACK_OFFSET as usize, &[u8::from(writeback)]);
    put(34, &settings.num_queues.to_le_bytes());
    if features & bit(VIRTIO_BLK_F_DISCARD) != 0 {
        let alignment = limits.discard_alignment.max(block_size);
        put(36, &ranges.discard_sectors_max.to_le_bytes());
        put(40, &RANGE_SEGMENTS_MAX.to_le_bytes());
        put(44, &(alignment / SECTOR_SIZE as u32).to_le_bytes());
    }
    if features & bit(VIRTIO_BLK_F_WRITE_ZEROES) != 0 {
        put(48, &ranges.zeroes_sectors_max.to_le_bytes());
        put(52, &RANGE_SEGMENTS_MAX.to_le_bytes());
        put(56, &[u8::from(limits.can_unmap_zeroes)]);
    }
    config
}
