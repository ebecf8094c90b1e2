//! Tests of the split ring: against `virtio_queue` as oracle on what is valid, against a model of the specification on
//! what is not, and one by one where a rule deserves a name. `virtio_queue` is laxer than virtio 1.3 in these places,
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
mod notifications;
mod oracle;
mod random;
