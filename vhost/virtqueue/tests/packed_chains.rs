//! Packed rings, rule by rule: which chains are taken, with which error the rest is refused, where a ring may lie and
//! stand, what the guest sees and when either side is told (virtio 1.3 §2.8).

use super::packed_features;
use crate::testing::guest::{BORDER, BUFFERS, Buffer, Guest, INDIRECT, NEXT, WRITE};
use crate::testing::packed_driver::{AVAIL, Event, PackedDescriptor, PackedDriver, USED};
use crate::virtqueue::{Chain, RingError, RingFeatures, RingLayout, VirtQueue};

const SIZE: u16 = 5;
const NEW: u64 = SIZE as u64;
const A: u64 = BUFFERS[0].guest;
const TABLE: u64 = BUFFERS[2].guest;

fn readable(addr: u64, len: u32) -> PackedDescriptor {
    PackedDescriptor { addr, len, id: 0, flags: 0 }
}

fn writable(addr: u64, len: u32) -> PackedDescriptor {
    PackedDescriptor { flags: WRITE, ..readable(addr, len) }
}

fn table_of(entries: u32) -> PackedDescriptor {
    PackedDescriptor { addr: TABLE, len: 16 * entries, id: 0, flags: INDIRECT }
}

fn buffer(addr: u64, len: u64, writable: bool) -> Buffer {
    Buffer { addr, len, writable }
}

fn start(features: RingFeatures) -> (PackedDriver, VirtQueue) {
    let driver = PackedDriver::new(SIZE, 0, NEW);
    let device = driver.guest.device_at(features, driver.base(NEW, NEW));
    (driver, device)
}

/// What the device makes of these descriptors, made available as they are, and of this table.
fn pop_with(
    features: RingFeatures,
    ring: &[PackedDescriptor],
    table: &[PackedDescriptor],
) -> Result<(u16, Vec<Buffer>, usize), RingError> {
    let (driver, mut device) = start(features);
    for (at, descriptor) in (NEW..).zip(ring) {
        driver.poke(at, PackedDescriptor { flags: descriptor.flags | driver.available(at), ..*descriptor });
    }
    table.iter().enumerate().for_each(|(at, entry)| driver.guest.write(TABLE + 16 * at as u64, &entry.to_bytes()));
    let mut chain = Chain::default();
    let popped = device.pop(&mut chain);
    if popped.is_err() {
        assert_eq!(device.base(), driver.base(NEW, NEW), "nothing is taken when the ring lies");
        assert_eq!(device.pop(&mut Chain::default()), popped, "and it lies once more when asked again");
    }
    popped.map(|any| {
        assert!(any);
        (chain.head.number, driver.guest.buffers_of(&chain), chain.readable)
    })
}

fn pop(ring: &[PackedDescriptor], table: &[PackedDescriptor]) -> Result<(u16, Vec<Buffer>, usize), RingError> {
    pop_with(packed_features(false, true), ring, table)
}

fn then(descriptor: PackedDescriptor) -> PackedDescriptor {
    PackedDescriptor { flags: descriptor.flags | NEXT, ..descriptor }
}

#[test]
fn a_list_gives_its_buffers_in_order_and_its_last_descriptor_s_id() {
    let last = PackedDescriptor { id: 4, ..writable(A + 0x200, 1) };
    let list = [then(PackedDescriptor { id: 9, ..readable(A, 16) }), then(writable(A + 0x100, 64)), last];
    let expected = vec![buffer(A, 16, false), buffer(A + 0x100, 64, true), buffer(A + 0x200, 1, true)];
    assert_eq!(pop(&list, &[]), Ok((4, expected, 1)));
}

#[test]
fn an_id_is_the_guest_s_own_business() {
    let (driver, mut device) = start(packed_features(false, false));
    let mut heads = Vec::new();
    for at in NEW..NEW + 3 {
        let flags = driver.available(at);
        driver.poke(at, PackedDescriptor { id: 0xfedc, flags, ..readable(A, 8) });
        let mut chain = Chain::default();
        assert_eq!(device.pop(&mut chain), Ok(true), "the same id again, and larger than the ring");
        heads.push(chain.head);
    }
    heads.into_iter().for_each(|head| device.push(head, 0));
    device.publish();
    assert!((NEW..NEW + 3).all(|at| driver.peek(at).id == 0xfedc));
    assert_eq!(device.base(), driver.base(NEW + 3, NEW + 3));
}

#[test]
fn what_is_not_available_is_not_taken() {
    for flags in [0, USED, AVAIL | USED] {
        let (driver, mut device) = start(packed_features(false, false));
        driver.poke(NEW, PackedDescriptor { flags, ..readable(A, 8) });
        assert_eq!(device.pop(&mut Chain::default()), Ok(false), "flags {flags:#x} with the wrap counter at 1");
        assert!(!device.enable_kicks());
    }
}

#[test]
fn a_buffer_outside_memory_is_refused() {
    for (addr, len) in [(0, 1), (A - 1, 2), (u64::MAX, 2), (A, u32::MAX)] {
        assert_eq!(pop(&[writable(addr, len)], &[]), Err(RingError::BufferAddress { addr, len }));
    }
}

#[test]
fn a_readable_buffer_after_a_writable_one_is_refused() {
    let list = [writable(A, 8), readable(A, 8)];
    assert_eq!(pop(&[then(list[0]), list[1]], &[]), Err(RingError::ReadAfterWrite));
    assert_eq!(pop(&[table_of(2)], &list), Err(RingError::ReadAfterWrite));
}

#[test]
fn a_list_may_take_every_entry_and_no_more() {
    let mut list = [then(readable(A, 8)); SIZE as usize];
    assert_eq!(pop(&list, &[]), Err(RingError::Loop));
    list[4] = readable(A, 8);
    assert_eq!(pop(&list, &[]).map(|(_, buffers, _)| buffers.len()), Ok(5));
}

#[test]
fn a_list_may_not_run_into_what_is_in_flight() {
    let (mut driver, mut device) = start(packed_features(false, false));
    driver.offer(0, &[readable(A, 8); 2]);
    assert_eq!(device.pop(&mut Chain::default()), Ok(true));
    for at in NEW + 2..NEW + 5 {
        driver.poke(at, PackedDescriptor { flags: NEXT | driver.available(at), ..readable(A, 8) });
    }
    assert_eq!(device.pop(&mut Chain::default()), Err(RingError::Loop));
}

#[test]
fn more_than_the_ring_holds_is_refused_until_it_is_given_back() {
    let (mut driver, mut device) = start(packed_features(false, false));
    driver.offer(0, &[readable(A, 8); SIZE as usize]);
    let mut chain = Chain::default();
    assert_eq!(device.pop(&mut chain), Ok(true));
    driver.poke(2 * NEW, PackedDescriptor { flags: driver.available(2 * NEW), ..readable(A, 8) });
    assert_eq!(device.pop(&mut Chain::default()), Err(RingError::Overrun(SIZE)));
    device.push(chain.head, 0);
    assert_eq!(device.pop(&mut Chain::default()), Err(RingError::Overrun(SIZE)), "the guest has not seen it");
    device.publish();
    driver.offer(0, &[readable(A, 8)]);
    assert_eq!(device.pop(&mut Chain::default()), Ok(true));
}

#[test]
fn the_entries_of_a_table_follow_each_other_whatever_their_other_flags() {
    let odd = PackedDescriptor { id: 77, flags: NEXT | AVAIL, ..readable(A, 8) };
    let (id, buffers, readable) = pop(
        &[PackedDescriptor { id: 3, flags: INDIRECT | WRITE, ..table_of(3) }],
        &[odd, writable(A + 0x100, 8), writable(A + 0x200, 8)],
    )
    .expect("a table");
    assert_eq!((id, readable), (3, 1));
    assert_eq!(buffers, [buffer(A, 8, false), buffer(A + 0x100, 8, true), buffer(A + 0x200, 8, true)]);
}

#[test]
fn a_table_that_was_not_negotiated_is_refused() {
    let refused = pop_with(packed_features(false, false), &[table_of(1)], &[readable(A, 8)]);
    assert_eq!(refused, Err(RingError::IndirectTable(16)));
}

#[test]
fn a_table_of_a_wrong_length_is_refused() {
    for len in [0, 1, 15, 17, 16 * 129, u32::MAX] {
        let refused = pop(&[PackedDescriptor { len, ..table_of(1) }], &[readable(A, 8)]);
        assert_eq!(refused, Err(RingError::IndirectTable(len)));
    }
    let table: Vec<_> = (0..128).map(|_| readable(A, 8)).collect();
    assert_eq!(pop(&[table_of(128)], &table).map(|(_, buffers, _)| buffers.len()), Ok(128));
}

#[test]
fn a_table_in_a_list_is_refused() {
    assert_eq!(pop(&[then(table_of(1)), readable(A, 8)], &[readable(A, 8)]), Err(RingError::IndirectTable(16)));
    assert_eq!(pop(&[then(readable(A, 8)), table_of(1)], &[readable(A, 8)]), Err(RingError::IndirectTable(16)));
}

#[test]
fn a_nested_table_is_refused() {
    assert_eq!(pop(&[table_of(2)], &[readable(A, 8), table_of(1)]), Err(RingError::IndirectTable(32)));
}

#[test]
fn a_table_may_lie_across_regions_and_not_outside_of_them() {
    let (driver, mut device) = start(packed_features(false, true));
    let addr = BORDER - 24;
    driver.guest.write(addr, &readable(A, 8).to_bytes());
    driver.guest.write(addr + 16, &writable(A + 0x100, 8).to_bytes());
    let flags = INDIRECT | driver.available(NEW);
    driver.poke(NEW, PackedDescriptor { addr, flags, ..table_of(2) });
    let mut chain = Chain::default();
    assert_eq!(device.pop(&mut chain), Ok(true));
    assert_eq!(driver.guest.buffers_of(&chain), [buffer(A, 8, false), buffer(A + 0x100, 8, true)]);
    let nowhere = PackedDescriptor { addr: u64::MAX - 15, ..table_of(2) };
    assert_eq!(pop(&[nowhere], &[]), Err(RingError::BufferAddress { addr: nowhere.addr, len: 32 }));
}

#[test]
fn a_new_ring_stands_at_its_size_or_at_0() {
    let (mut driver, mut device) = start(packed_features(false, false));
    assert_eq!(device.base(), 0x8000_8000);
    driver.offer(0, &[readable(A, 8)]);
    let mut from_0 = driver.guest.device_at(packed_features(false, false), 0);
    assert_eq!(from_0.base(), 0x8000_8000, "as libblkio says it");
    for device in [&mut device, &mut from_0] {
        assert_eq!(device.pop(&mut Chain::default()), Ok(true));
    }
}

#[test]
fn a_ring_that_was_gone_through_once_stands_at_0() {
    for offered in [false, true] {
        let mut driver = PackedDriver::new(SIZE, 0, 2 * NEW);
        // A list that began before the lap left its tail here; its flags are those of an available entry.
        driver.poke(0, PackedDescriptor { flags: AVAIL, ..readable(A, 8) });
        if offered {
            driver.offer(0, &[readable(A, 8)]);
        }
        let mut device = driver.guest.device_at(packed_features(false, false), 0);
        assert_eq!(device.base(), 0);
        assert_eq!(device.pop(&mut Chain::default()), Ok(offered));
    }
}

#[test]
fn a_base_that_no_ring_can_have_is_refused() {
    let guest = Guest::packed(SIZE, 0);
    let base = |avail: u32, used: u32| avail | used << 16;
    let wrap = 0x8000;
    for wrong in [base(wrap | 5, wrap), base(wrap, wrap | 5), base(wrap | 1, wrap | 2), base(3, wrap | 2)] {
        let refused = VirtQueue::new(guest.memory.clone(), guest.layout(), packed_features(true, true), wrong);
        assert_eq!(refused.err(), Some(RingError::Base { base: wrong, size: SIZE }));
        assert!(!VirtQueue::is_base(packed_features(true, true), SIZE, wrong));
    }
    for right in [base(wrap | 4, wrap), base(2, wrap | 2), base(1, wrap | 4), base(3, 3)] {
        assert_eq!(guest.device_at(packed_features(true, true), right).base(), right);
    }
}

#[test]
fn a_ring_that_is_not_aligned_or_not_in_memory_is_refused() {
    let guest = Guest::packed(SIZE, 64);
    let right = guest.layout();
    let refused = |layout| {
        let refused = VirtQueue::new(guest.memory.clone(), layout, packed_features(true, true), 0x8000_8000).err();
        assert!(matches!(refused, None | Some(RingError::Addresses)));
        refused.is_some()
    };
    assert!(!refused(right), "the device's event structure ends where the region ends");
    for (desc, avail, used) in [(8, 0, 0), (0, 2, 0), (0, 0, 2), (0, 0, 1)] {
        let layout =
            RingLayout { desc: right.desc - desc, avail: right.avail - avail, used: right.used - used, ..right };
        assert!(refused(layout), "{layout:x?}");
    }
    assert!(refused(RingLayout { used: right.used + 4, ..right }));
    assert!(refused(RingLayout { avail: 0, ..right }));
    for size in [0, 64, 32769] {
        assert!(refused(RingLayout { size, ..right }), "{size} entries");
    }
}

#[test]
fn completions_show_all_at_once_and_skip_the_entries_of_their_lists() {
    let (mut driver, mut device) = start(packed_features(false, false));
    driver.offer(3, &[readable(A, 8); 3]);
    driver.offer(1, &[writable(A, 8)]);
    let mut heads = Vec::new();
    for _ in 0..2 {
        let mut chain = Chain::default();
        assert_eq!(device.pop(&mut chain), Ok(true));
        heads.push(chain.head);
    }
    device.push(heads[1], 8);
    device.push(heads[0], 0);
    assert_eq!(driver.take(), None);
    assert!(device.publish());
    assert!(!device.publish(), "nothing was pushed since");
    assert_eq!([driver.take(), driver.take(), driver.take()], [Some((1, 8)), Some((3, 0)), None]);
}

#[test]
fn with_event_indices_the_first_publish_calls_whatever_the_guest_says() {
    for (event_idx, first) in [(true, true), (false, false)] {
        let (mut driver, mut device) = start(packed_features(event_idx, false));
        driver.set_driver_event(Event::Disable);
        assert!(!device.publish(), "there is nothing to show");
        for call in [first, false] {
            driver.offer(0, &[readable(A, 8)]);
            let mut chain = Chain::default();
            assert_eq!(device.pop(&mut chain), Ok(true));
            device.push(chain.head, 0);
            assert_eq!(device.publish(), call);
            assert_eq!(driver.take(), Some((0, 0)));
        }
    }
}

#[test]
fn without_event_indices_a_place_means_always() {
    let (mut driver, mut device) = start(packed_features(false, false));
    driver.set_driver_event(Event::At(3, false));
    driver.offer(0, &[readable(A, 8)]);
    let mut chain = Chain::default();
    assert_eq!(device.pop(&mut chain), Ok(true));
    device.push(chain.head, 0);
    assert!(device.publish());
}

#[test]
fn a_ring_goes_on_in_another_memory_table() {
    let (mut driver, mut device) = start(packed_features(false, false));
    driver.offer(0, &[readable(A, 8)]);
    assert_eq!(device.set_memory(std::sync::Arc::default()), Err(RingError::Addresses));
    assert_eq!(device.set_memory(driver.guest.memory.clone()), Ok(()));
    assert_eq!(device.pop(&mut Chain::default()), Ok(true));
}
