//! Descriptor chains and ring addresses, rule by rule: what is taken, and with which error the rest is refused.

use std::sync::Arc;

use super::next_avail;
use crate::guest_memory::GuestMemory;
use crate::testing::guest::{BORDER, BUFFERS, Buffer, Descriptor, Guest, INDIRECT, NEXT, WRITE, joined};
use crate::virtqueue::{Chain, RingError, RingFeatures, RingLayout, VirtQueue};

const INDIRECT_ON: RingFeatures = RingFeatures { event_idx: false, indirect: true, packed: false };
const SIZE: u16 = 4;
/// Where buffers are, and where indirect tables are.
const A: u64 = BUFFERS[0].guest;
const TABLE: u64 = BUFFERS[2].guest;

fn readable(addr: u64, len: u32) -> Descriptor {
    Descriptor { addr, len, flags: 0, next: 0 }
}

fn writable(addr: u64, len: u32) -> Descriptor {
    Descriptor { flags: WRITE, ..readable(addr, len) }
}

fn then(descriptor: Descriptor, next: u16) -> Descriptor {
    Descriptor { flags: descriptor.flags | NEXT, next, ..descriptor }
}

fn table_of(entries: u32) -> Descriptor {
    Descriptor { addr: TABLE, len: 16 * entries, flags: INDIRECT, next: 0 }
}

/// What the device makes of a chain that begins at descriptor 0, with these in the ring's table and these in the
/// indirect one.
fn pop_with(
    features: RingFeatures,
    direct: &[Descriptor],
    indirect: &[Descriptor],
) -> Result<(Vec<Buffer>, usize), RingError> {
    let guest = Guest::new(SIZE, 0);
    guest.set_table(guest.desc, direct);
    guest.set_table(TABLE, indirect);
    guest.offer(0, &[0]);
    let mut device = guest.device(features, 0);
    let mut chain = Chain::default();
    let popped = device.pop(&mut chain);
    assert_eq!(next_avail(&device), u16::from(popped.is_ok()), "nothing is taken when the ring lies");
    assert_eq!(device.pop(&mut Chain::default()).err(), popped.err(), "and it lies once more when asked again");
    popped.map(|any| {
        assert!(any);
        (guest.buffers_of(&chain), chain.readable)
    })
}

fn pop(direct: &[Descriptor], indirect: &[Descriptor]) -> Result<(Vec<Buffer>, usize), RingError> {
    pop_with(INDIRECT_ON, direct, indirect)
}

fn buffer(addr: u64, len: u64, writable: bool) -> Buffer {
    Buffer { addr, len, writable }
}

#[test]
fn a_chain_gives_its_readable_buffers_and_then_its_writable_ones() {
    let chain = [then(readable(A, 16), 2), writable(A + 0x200, 1), then(writable(A + 0x100, 64), 1)];
    let expected = [buffer(A, 16, false), buffer(A + 0x100, 64, true), buffer(A + 0x200, 1, true)];
    assert_eq!(pop(&chain, &[]), Ok((expected.to_vec(), 1)));
}

#[test]
fn a_buffer_across_two_regions_comes_in_two_pieces() {
    let (pieces, _) = pop(&[readable(BORDER - 3, 8)], &[]).expect("both are guest memory");
    assert_eq!(pieces, [buffer(BORDER - 3, 3, false), buffer(BORDER, 5, false)]);
}

#[test]
fn a_buffer_may_end_with_the_region_and_not_after_it() {
    for region in [BUFFERS[1], BUFFERS[2], BUFFERS[3]] {
        let last = region.guest + region.size - 8;
        assert_eq!(pop(&[readable(last, 8)], &[]), Ok((vec![buffer(last, 8, false)], 1)));
        let outside = RingError::BufferAddress { addr: last, len: 9 };
        assert_eq!(pop(&[readable(last, 9)], &[]), Err(outside));
    }
}

#[test]
fn a_buffer_outside_memory_is_refused() {
    for (addr, len) in [(0, 1), (A - 1, 1), (A - 1, 2), (u64::MAX, 1), (u64::MAX, 2), (A, u32::MAX), (A, 0x10000)] {
        assert_eq!(pop(&[writable(addr, len)], &[]), Err(RingError::BufferAddress { addr, len }));
    }
}

#[test]
fn a_buffer_that_wraps_around_all_addresses_is_refused() {
    let addr = BUFFERS[3].guest + 8;
    let wraps = RingError::BufferAddress { addr, len: u32::MAX };
    assert_eq!(pop(&[readable(addr, u32::MAX)], &[]), Err(wraps));
}

#[test]
fn descriptors_of_no_length_count_as_no_bytes_wherever_they_point() {
    let chain = [then(readable(0, 0), 1), then(readable(A, 16), 2), then(writable(u64::MAX, 0), 3), writable(A, 1)];
    assert_eq!(pop(&chain, &[]), Ok((vec![buffer(A, 16, false), buffer(A, 1, true)], 1)));
}

#[test]
fn a_chain_of_nothing_is_a_chain() {
    assert_eq!(pop(&[readable(0, 0)], &[]), Ok((Vec::new(), 0)));
}

#[test]
fn a_readable_buffer_after_a_writable_one_is_refused() {
    assert_eq!(pop(&[then(writable(A, 8), 1), readable(A, 8)], &[]), Err(RingError::ReadAfterWrite));
    let in_table = [then(writable(A, 8), 1), readable(A, 8)];
    assert_eq!(pop(&[table_of(2)], &in_table), Err(RingError::ReadAfterWrite));
    let before_table = [then(writable(A, 8), 1), table_of(1)];
    assert_eq!(pop(&before_table, &[readable(A, 8)]), Err(RingError::ReadAfterWrite));
}

#[test]
fn a_chain_may_use_every_descriptor_and_no_more() {
    let chain: Vec<_> = (0..SIZE).map(|at| readable(A + 0x100 * u64::from(at), 8)).collect();
    let link = |at: u16, next: u16| then(chain[usize::from(at)], next);
    let whole = [link(0, 1), link(1, 2), link(2, 3), chain[3]];
    assert_eq!(pop(&whole, &[]).map(|(pieces, _)| pieces.len()), Ok(4));
    assert_eq!(pop(&[link(0, 1), link(1, 2), link(2, 3), link(3, 1)], &[]), Err(RingError::Loop));
    assert_eq!(pop(&[link(0, 0)], &[]), Err(RingError::Loop));
}

#[test]
fn a_descriptor_number_outside_the_table_is_refused() {
    for next in [SIZE, u16::MAX] {
        assert_eq!(pop(&[then(readable(A, 8), next)], &[]), Err(RingError::DescriptorOutOfRange(next)));
    }
    let guest = Guest::new(SIZE, 0);
    guest.offer(0, &[SIZE]);
    let popped = guest.device(INDIRECT_ON, 0).pop(&mut Chain::default());
    assert_eq!(popped, Err(RingError::DescriptorOutOfRange(SIZE)));
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors_and_ends_the_chain() {
    let direct = [then(readable(A, 8), 1), table_of(2)];
    let indirect = [then(readable(A + 0x100, 8), 1), writable(A + 0x200, 8)];
    let expected = vec![buffer(A, 8, false), buffer(A + 0x100, 8, false), buffer(A + 0x200, 8, true)];
    assert_eq!(pop(&direct, &indirect), Ok((expected, 2)));
    let goes_on = [Descriptor { flags: INDIRECT | NEXT, next: 1, ..table_of(2) }, readable(A, 8)];
    assert_eq!(pop(&goes_on, &indirect), Err(RingError::IndirectTable(32)));
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_refused() {
    let refused = pop_with(RingFeatures::default(), &[table_of(1)], &[readable(A, 8)]);
    assert_eq!(refused, Err(RingError::IndirectTable(16)));
}

#[test]
fn an_indirect_table_of_a_wrong_length_is_refused() {
    for len in [0, 1, 15, 17, 16 * 129, 16 * 65536, u32::MAX] {
        let refused = pop(&[Descriptor { len, ..table_of(1) }], &[readable(A, 8)]);
        assert_eq!(refused, Err(RingError::IndirectTable(len)));
    }
}

#[test]
fn an_indirect_table_may_be_as_long_as_the_ring_or_the_most_segments() {
    let entry = |at: u16, last: u16| if at == last { readable(A, 8) } else { then(readable(A, 8), at + 1) };
    let table: Vec<_> = (0..128).map(|at| entry(at, 127)).collect();
    assert_eq!(pop(&[table_of(128)], &table).map(|(pieces, _)| pieces.len()), Ok(128), "a small ring");
    let guest = Guest::new(256, 0);
    let table: Vec<_> = (0..256).map(|at| entry(at, 255)).collect();
    guest.set_descriptor(guest.desc, 0, table_of(256));
    guest.set_table(TABLE, &table);
    guest.offer(0, &[0]);
    let mut chain = Chain::default();
    assert_eq!(guest.device(INDIRECT_ON, 0).pop(&mut chain), Ok(true), "a large one");
    assert_eq!(chain.iov.len(), 256);
}

#[test]
fn an_indirect_table_may_lie_at_any_address_and_across_regions() {
    let guest = Guest::new(SIZE, 0);
    for addr in [BORDER + 1, BORDER - 24, BORDER - 1, BORDER - 47] {
        guest.set_descriptor(guest.desc, 0, Descriptor { addr, ..table_of(3) });
        guest.set_table(addr, &[then(readable(A, 8), 2), writable(A + 0x100, 8), then(writable(A + 0x200, 8), 1)]);
        guest.offer(0, &[0]);
        let mut chain = Chain::default();
        assert_eq!(guest.device(INDIRECT_ON, 0).pop(&mut chain), Ok(true), "at {addr:#x}");
        let expected = [buffer(A, 8, false), buffer(A + 0x200, 8, true), buffer(A + 0x100, 8, true)];
        assert_eq!(joined(&guest.buffers_of(&chain)), expected, "at {addr:#x}");
    }
}

#[test]
fn an_indirect_table_outside_memory_is_refused() {
    let end = BUFFERS[1].guest + BUFFERS[1].size;
    for addr in [0, end - 16, u64::MAX - 15, u64::MAX] {
        let refused = pop(&[Descriptor { addr, ..table_of(2) }], &[]);
        assert_eq!(refused, Err(RingError::BufferAddress { addr, len: 32 }));
    }
}

#[test]
fn a_nested_indirect_table_is_refused() {
    assert_eq!(pop(&[table_of(1)], &[table_of(1)]), Err(RingError::IndirectTable(16)));
    let later = [then(readable(A, 8), 1), table_of(1)];
    assert_eq!(pop(&[table_of(2)], &later), Err(RingError::IndirectTable(32)));
}

#[test]
fn a_loop_in_an_indirect_table_is_refused() {
    let table = [then(readable(A, 8), 1), then(readable(A, 8), 0)];
    assert_eq!(pop(&[table_of(2)], &table), Err(RingError::Loop));
    assert_eq!(pop(&[table_of(2)], &[then(readable(A, 8), 2)]), Err(RingError::DescriptorOutOfRange(2)));
}

#[test]
fn an_available_index_may_run_ahead_by_the_ring_s_size_and_no_more() {
    for base in [0, 7, 65534] {
        let guest = Guest::new(SIZE, 0);
        guest.set_table(guest.desc, &[readable(A, 8)]);
        guest.offer(base, &[0; SIZE as usize]);
        let mut device = guest.device(INDIRECT_ON, base);
        for _ in 0..SIZE {
            assert_eq!(device.pop(&mut Chain::default()), Ok(true));
        }
        assert_eq!(device.pop(&mut Chain::default()), Ok(false));
        // All are in flight: there is room for none. With all given back, for as many as the ring has.
        let jump_by_one = guest_offers(&guest, &device, 1);
        assert_eq!(device.pop(&mut Chain::default()), Err(jump_by_one));
        for _ in 0..SIZE {
            device.push(0.into(), 0);
        }
        for jump in [SIZE + 1, u16::MAX] {
            let jumped = guest_offers(&guest, &device, jump);
            assert_eq!(device.pop(&mut Chain::default()), Err(jumped));
        }
    }
}

/// Has the available index jump, and says what the device must answer if it may not.
fn guest_offers(guest: &Guest, device: &VirtQueue, jump: u16) -> RingError {
    let last_avail = next_avail(device);
    let avail_idx = last_avail.wrapping_add(jump);
    guest.set_avail_idx(avail_idx);
    RingError::IndexJump { avail_idx, last_avail, size: SIZE }
}

#[test]
fn a_chain_s_former_content_is_replaced() {
    let guest = Guest::new(SIZE, 0);
    guest.set_table(guest.desc, &[readable(A, 8), writable(A + 0x100, 8)]);
    guest.offer(0, &[0, 1]);
    let mut device = guest.device(INDIRECT_ON, 0);
    let mut chain = Chain::default();
    assert_eq!(device.pop(&mut chain), Ok(true));
    assert_eq!(device.pop(&mut chain), Ok(true));
    assert_eq!((chain.head, chain.readable), (1.into(), 0));
    assert_eq!(guest.buffers_of(&chain), [buffer(A + 0x100, 8, true)]);
}

fn refused(memory: &Arc<GuestMemory>, layout: RingLayout) -> bool {
    let refused = VirtQueue::new(memory.clone(), layout, RingFeatures::default(), 0).err();
    assert!(matches!(refused, None | Some(RingError::Addresses)));
    refused.is_some()
}

#[test]
fn a_ring_is_found_by_the_front_end_s_addresses_alone() {
    let guest = Guest::new(8, 0);
    assert!(!refused(&guest.memory, guest.layout()));
    let (desc, avail, used) = (guest.desc, guest.avail, guest.used);
    assert!(refused(&guest.memory, RingLayout { desc, avail, used, ..guest.layout() }));
}

#[test]
fn a_ring_that_is_not_aligned_is_refused() {
    let guest = Guest::new(8, 64);
    let right = guest.layout();
    for (desc, avail, used) in [(8, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 2), (0, 0, 1)] {
        let layout =
            RingLayout { desc: right.desc - desc, avail: right.avail - avail, used: right.used - used, ..right };
        assert!(refused(&guest.memory, layout), "{layout:x?}");
    }
}

#[test]
fn a_ring_that_reaches_out_of_memory_is_refused() {
    let guest = Guest::new(8, 64);
    let right = guest.layout();
    // The used ring with its event field ends where the region ends.
    assert!(!refused(&guest.memory, right));
    assert!(refused(&guest.memory, RingLayout { used: right.used + 4, ..right }));
    assert!(refused(&guest.memory, RingLayout { size: 16, ..right }));
    let end = right.used + 4 + 8 * 8 + 2;
    assert!(refused(&guest.memory, RingLayout { avail: end - (4 + 2 * 8), ..right }), "no room for used_event");
    for nowhere in [0, u64::MAX - 15] {
        assert!(refused(&guest.memory, RingLayout { desc: nowhere, ..right }));
        assert!(refused(&guest.memory, RingLayout { avail: nowhere, ..right }));
        assert!(refused(&guest.memory, RingLayout { used: nowhere, ..right }));
    }
}

#[test]
fn a_ring_has_a_power_of_two_entries() {
    let guest = Guest::new(8, 0);
    for size in [0, 3, 7] {
        assert!(refused(&guest.memory, RingLayout { size, ..guest.layout() }), "{size}");
    }
}

#[test]
fn a_ring_goes_on_in_another_memory_table_and_stays_where_the_new_one_lacks_it() {
    let guest = Guest::new(SIZE, 0);
    guest.set_table(guest.desc, &[readable(A, 8)]);
    guest.offer(0, &[0, 0]);
    let mut device = guest.device(INDIRECT_ON, 0);
    assert_eq!(device.pop(&mut Chain::default()), Ok(true));
    let without_buffers = guest.memory.regions().iter().filter(|region| region.guest_addr < A).cloned().collect();
    let without_buffers = Arc::new(GuestMemory::new(without_buffers).expect("they do not overlap"));
    assert_eq!(device.set_memory(without_buffers), Ok(()));
    let gone = RingError::BufferAddress { addr: A, len: 8 };
    assert_eq!(device.pop(&mut Chain::default()), Err(gone), "the old table's regions are not used any more");
    assert_eq!(device.set_memory(Arc::default()), Err(RingError::Addresses));
    assert_eq!(device.pop(&mut Chain::default()), Err(gone));
    assert_eq!(device.set_memory(guest.memory.clone()), Ok(()));
    assert_eq!(device.pop(&mut Chain::default()), Ok(true));
}
