//! Tests of the rings. The split one: against `virtio_queue` as oracle on what is valid, against a model of the
//! specification on what is not, and one by one where a rule deserves a name. The packed one: against a driver and a
//! model written from the specification (`packed_*`). `virtio_queue` is laxer than virtio 1.3 in these places,
//! each with a test in `oracle.rs` that holds it to that, so that a change there shows here:
//!
//! - it ends a chain quietly, with what it had so far, at a descriptor out of range, at a loop, at an indirect table
//!   that is nested, no multiple of 16 bytes or outside memory, and at 4 GiB in total; it reports nothing (§2.7.5);
//! - it takes an indirect table whether or not VIRTIO_RING_F_INDIRECT_DESC was negotiated (§2.7.5.3.1), an empty one,
//!   one of 65,535 entries, and one whose descriptor has VIRTQ_DESC_F_NEXT set as well;
//! - it takes readable buffers after writable ones (§2.7.4.2);
//! - it does not look at where buffers lie;
//! - it ignores VIRTQ_AVAIL_F_NO_INTERRUPT (§2.7.7.2), and without event indices always notifies;
//! - it knows no first notification: with event indices, ours is unconditional after a start.

mod chains;
mod hostile;
mod inflight;
mod notifications;
mod oracle;
mod packed_chains;
mod packed_hostile;
mod packed_random;
mod random;

use super::{RingFeatures, VirtQueue};

/// The number of the next available entry of a split ring.
fn next_avail(device: &VirtQueue) -> u16 {
    u16::try_from(device.base()).expect("the base of a split ring")
}

fn packed_features(event_idx: bool, indirect: bool) -> RingFeatures {
    RingFeatures { event_idx, indirect, packed: true }
}
