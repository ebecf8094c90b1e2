//! Oracle: `virtio_queue::Queue` behind the same operations as ours. It owns the two rules that the oracle lacks (the
//! first notification, NO_INTERRUPT) and the tests that pin where it is laxer than the specification.

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use crate::guest_memory::GuestMemory;
use crate::testing::guest::{BUFFERS, Buffer, Descriptor, Guest, INDIRECT, NEXT, WRITE, joined};
use crate::virtqueue::RingFeatures;

pub(super) struct Oracle {
    queue: Queue,
    memory: Arc<GuestMemory>,
    event_idx: bool,
    first: bool,
    added: bool,
}

impl Oracle {
    pub(super) fn new(guest: &Guest, features: RingFeatures, base: u16) -> Self {
        let mut queue = Queue::new(guest.size).expect("a power of two");
        queue.try_set_desc_table_address(GuestAddress(guest.desc)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(guest.avail)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(guest.used)).expect("aligned");
        queue.set_event_idx(features.event_idx);
        queue.set_next_avail(base);
        queue.set_next_used(guest.used_idx());
        queue.set_ready(true);
        let memory = guest.memory.clone();
        assert!(queue.is_valid(memory.vm_memory()));
        Self { queue, memory, event_idx: features.event_idx, first: true, added: false }
    }

    /// The next chain: its head and its buffers. An error: the available index jumped.
    pub(super) fn pop(&mut self) -> Result<Option<(u16, Vec<Buffer>)>, virtio_queue::Error> {
        let memory = self.memory.vm_memory();
        let Some(chain) = self.queue.iter(memory)?.next() else { return Ok(None) };
        let head = chain.head_index();
        let buffers = chain.map(|descriptor| Buffer {
            addr: descriptor.addr().0,
            len: descriptor.len().into(),
            writable: descriptor.is_write_only(),
        });
        Ok(Some((head, buffers.collect())))
    }

    pub(super) fn push(&mut self, head: u16, written: u32) {
        self.queue.add_used(self.memory.vm_memory(), head, written).expect("the head is in the table");
        self.added = true;
    }

    /// Whether the guest must be called.
    pub(super) fn publish(&mut self, guest: &Guest) -> bool {
        let needed = self.queue.needs_notification(self.memory.vm_memory()).expect("the ring is in guest memory");
        if !std::mem::take(&mut self.added) {
            return false;
        }
        let first = std::mem::take(&mut self.first);
        if self.event_idx { needed || first } else { guest.avail_flags() & 1 == 0 }
    }

    pub(super) fn suppress_kicks(&mut self) {
        self.queue.disable_notification(self.memory.vm_memory()).expect("the ring is in guest memory");
    }

    pub(super) fn enable_kicks(&mut self) -> bool {
        self.queue.enable_notification(self.memory.vm_memory()).expect("the ring is in guest memory")
    }

    pub(super) fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }
}

const A: u64 = BUFFERS[0].guest;

/// What the oracle makes of a chain that starts at descriptor 0 of a ring of 4 entries, or at an indirect table.
fn oracle_takes(direct: &[Descriptor], indirect: &[Descriptor]) -> Vec<Buffer> {
    let guest = Guest::new(4, 0);
    guest.set_table(guest.desc, direct);
    guest.set_table(A, indirect);
    guest.offer(0, &[0]);
    let chain = Oracle::new(&guest, RingFeatures::default(), 0).pop();
    joined(&chain.expect("the index did not jump").expect("one chain").1)
}

fn readable(len: u32, next: Option<u16>) -> Descriptor {
    Descriptor { addr: A + 0x1000, len, flags: next.map_or(0, |_| NEXT), next: next.unwrap_or(0) }
}

#[test]
fn the_oracle_ends_a_bad_chain_quietly() {
    let whole = [Buffer { addr: A + 0x1000, len: 8, writable: false }];
    assert_eq!(oracle_takes(&[readable(8, Some(4))], &[]), whole, "a descriptor out of range");
    assert_eq!(oracle_takes(&[readable(8, Some(0))], &[]).len(), 4, "a loop");
    let nested = Descriptor { addr: A, len: 16, flags: INDIRECT, next: 0 };
    assert_eq!(oracle_takes(&[nested], &[nested]), [], "a nested indirect table");
    assert_eq!(oracle_takes(&[Descriptor { len: 17, ..nested }], &[readable(8, None)]), [], "a broken length");
    assert_eq!(oracle_takes(&[Descriptor { addr: 0, ..nested }], &[]), [], "a table outside memory");
    let huge = Descriptor { len: u32::MAX, ..readable(8, Some(1)) };
    let more_than_4_gib = oracle_takes(&[huge, readable(8, None)], &[]);
    assert_eq!(more_than_4_gib, [Buffer { len: u32::MAX.into(), ..whole[0] }]);
}

#[test]
fn the_oracle_takes_indirect_tables_that_it_should_not() {
    let whole = [Buffer { addr: A + 0x1000, len: 8, writable: false }];
    let table = Descriptor { addr: A, len: 16, flags: INDIRECT, next: 0 };
    assert_eq!(oracle_takes(&[table], &[readable(8, None)]), whole, "not negotiated");
    assert_eq!(oracle_takes(&[Descriptor { len: 0, ..table }], &[readable(8, None)]), [], "an empty one");
    let long = Descriptor { len: 0xffff * 16, ..table };
    assert_eq!(oracle_takes(&[long], &[readable(8, None)]), whole, "a long one");
    let with_next = Descriptor { flags: INDIRECT | NEXT, next: 1, ..table };
    assert_eq!(oracle_takes(&[with_next, readable(9, None)], &[readable(8, None)]), whole, "one with a next");
}

#[test]
fn the_oracle_looks_neither_at_the_order_nor_at_the_place_of_buffers() {
    let writable = Descriptor { flags: NEXT | WRITE, next: 1, ..readable(8, None) };
    assert_eq!(oracle_takes(&[writable, readable(8, None)], &[]).len(), 2);
    let outside = Descriptor { addr: 0x10, ..readable(8, None) };
    assert_eq!(oracle_takes(&[outside], &[]), [Buffer { addr: 0x10, len: 8, writable: false }]);
}

#[test]
fn the_oracle_ignores_no_interrupt_and_knows_no_first_notification() {
    let guest = Guest::new(4, 0);
    guest.set_avail_flags(1);
    let mut oracle = Oracle::new(&guest, RingFeatures::default(), 0);
    assert!(oracle.queue.needs_notification(guest.memory.vm_memory()).expect("in memory"), "nothing was added");
    let mut oracle = Oracle::new(&guest, RingFeatures { event_idx: true, indirect: false, packed: false }, 0);
    guest.set_used_event(7);
    oracle.push(0, 0);
    assert!(!oracle.queue.needs_notification(guest.memory.vm_memory()).expect("in memory"));
}
