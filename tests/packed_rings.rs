//! What only packed rings have (virtio 1.3, 2.8; vhost-user, "Vring descriptor indices for packed virtqueues"): their
//! bases, sizes that are no powers of two, and the ways in which they can lie.

use crate::backend::{Backend, Setup};
use crate::frontend::blk::{NO_STATUS, OK, Request, feature};
use crate::frontend::device::{Device, MemoryBy, Profile};
use crate::frontend::queue::{Descriptor, INDIRECT, NEXT, Queue, WRITE};
use crate::frontend::session::{VringAddresses, protocol};
use crate::frontend::wait::DEADLINE;

const AVAIL: u16 = 1 << 7;

/// Without an in-flight region, which says where a packed ring goes on, whatever its base.
fn packed() -> Profile {
    let qemu = Profile::qemu();
    let protocol_features = qemu.protocol_features & !protocol::INFLIGHT_SHMFD;
    Profile { features: qemu.features | feature::RING_PACKED, protocol_features, ..qemu }
}

fn start(profile: &Profile) -> (Device, Backend) {
    let backend = Setup::null(1 << 20).export("num-queues=2").start();
    (backend.device(profile), backend)
}

#[test]
fn a_new_ring_stands_at_0_with_both_wrap_counters_at_1() {
    let (mut device, _backend) = start(&packed());
    assert!(device.queue().ring.packed);
    assert_eq!(device.stop_queue(0), 0x8000_8000);
}

#[test]
fn a_ring_stops_and_goes_on_at_every_place() {
    // Three entries a request: in a ring of 7 they stand at every place, in laps of both kinds.
    for queue_size in [3, 7, 10] {
        let (mut device, _backend) = start(&Profile { queue_size, ..packed() });
        for _ in 0..30 {
            device.queue().works();
            assert_eq!(device.stop_queue(0), device.queue().base());
            device.start_queue(0);
        }
    }
}

#[test]
fn any_size_up_to_32768_is_a_ring_size() {
    for queue_size in [3, 100, 1000, 32767, 32768] {
        let (mut device, _backend) = start(&Profile { queue_size, ..packed() });
        for _ in 0..10 {
            device.queue().works();
        }
    }
}

#[test]
fn a_ring_size_of_0_or_too_large_is_refused() {
    let (mut device, _backend) = start(&Profile { starts: false, ..packed() });
    device.announce(MemoryBy::Table);
    for size in [0, 32769, 65536, u32::MAX] {
        device.session.set_vring_num(0, size).refused();
    }
    device.start_queue(0);
    device.queue().works();
}

#[test]
fn a_base_that_the_ring_cannot_have_is_refused() {
    let (mut device, _backend) = start(&Profile { starts: false, ..packed() });
    device.announce(MemoryBy::Table);
    device.session.set_vring_num(0, 100).accepted();
    // Beyond the ring; completions ahead of what is available; more than a lap between them.
    for base in [0x8000_8064, 0x8064_8000, 0x8002_8001, 0x8001_0002] {
        device.session.set_vring_base(0, base).refused();
    }
    device.start_queue(0);
    device.queue().works();
}

#[test]
fn ring_addresses_outside_the_memory_or_not_aligned_to_4_are_refused() {
    let (mut device, _backend) = start(&Profile { starts: false, ..packed() });
    device.announce(MemoryBy::Table);
    device.session.set_vring_num(0, 128).accepted();
    let good = device.addresses(0);
    let placement = device.memory.regions()[2].placement;
    let end = placement.user + placement.size;
    for bad in [
        VringAddresses { descriptors: end - 128 * 16 + 16, ..good },
        VringAddresses { avail: end, ..good },
        VringAddresses { avail: good.avail + 2, ..good },
        VringAddresses { used: end, ..good },
        VringAddresses { used: device.queues[0].ring.used, ..good },
    ] {
        device.session.set_vring_addr(0, &bad).refused();
    }
    device.start_queue(0);
    device.queue().works();
}

#[test]
fn a_base_of_0_is_a_new_ring_where_the_ring_is_new() {
    let (mut device, _backend) = start(&Profile { starts: false, ..packed() });
    device.announce(MemoryBy::Table);
    device.set_up_queue(0);
    // As libblkio says it.
    device.session.set_vring_base(0, 0).accepted();
    device.set_kick(0);
    device.enable(0, true);
    device.queue().works();
}

#[test]
fn a_ring_that_was_gone_through_once_goes_on_at_0() {
    let (mut device, _backend) = start(&Profile { queue_size: 6, ..packed() });
    for _ in 0..4 {
        // Two requests are a lap.
        device.queue().works();
        device.queue().works();
        assert_eq!(device.stop_queue(0), device.queue().base());
        device.start_queue(0);
    }
}

#[test]
fn a_guest_changes_from_split_to_packed_rings_and_back() {
    let (mut device, _backend) = start(&Profile { starts: false, ..packed() });
    let both = device.session.features;
    for round in 0..6 {
        let is_packed = round % 2 == 0;
        device.session.reset_device().accepted();
        device.session.features = if is_packed { both } else { both & !feature::RING_PACKED };
        let queue = device.queue();
        let size = queue.ring.size;
        queue.ring = crate::frontend::queue::RingLayout::cut(&mut queue.arena, size, is_packed);
        queue.reset();
        device.announce(MemoryBy::Table);
        device.start_queue(0);
        device.queue().works();
        device.stop_queue(0);
    }
}

/// Writes these descriptors as the first of a new ring, the first one last.
fn offer_raw(queue: &Queue, descriptors: &[Descriptor]) {
    for (at, descriptor) in descriptors.iter().enumerate().rev() {
        let entry = queue.ring.descriptors + Descriptor::SIZE * at as u64;
        let bytes = Descriptor { flags: descriptor.flags | AVAIL, ..*descriptor }.to_packed_bytes(7);
        queue.memory.write(entry, &bytes[..14]);
        queue.memory.store_u16(entry + 14, descriptor.flags | AVAIL);
    }
}

/// These descriptors break the first queue of two; the other goes on, and a new start heals the first.
#[track_caller]
fn breaks_the_queue(descriptors: impl FnOnce(&mut Queue) -> Vec<Descriptor>) {
    let (mut device, _backend) = start(&Profile { queues: 2, queue_size: 16, ..packed() });
    let descriptors = descriptors(&mut device.queues[0]);
    offer_raw(&device.queues[0], &descriptors);
    device.queues[0].kick.signal();
    assert!(device.queues[0].reports_error(DEADLINE), "no error event");
    assert!(!device.queues[0].has_completion(), "something was completed");
    device.queues[1].works();
    device.stop_queue(0);
    device.queues[0].reset();
    device.start_queue(0);
    device.queues[0].works();
}

fn header(queue: &mut Queue) -> Descriptor {
    let addr = queue.arena.cut(16, 16, 0);
    queue.memory.write(addr, &[0; 16]);
    Descriptor { addr, len: 16, flags: NEXT, next: 0 }
}

#[test]
fn an_endless_list_breaks_the_queue() {
    breaks_the_queue(|queue| vec![header(queue); 16]);
}

#[test]
fn an_address_outside_memory_breaks_the_queue() {
    breaks_the_queue(|queue| vec![header(queue), Descriptor { addr: 0xdead_0000_0000, len: 1, flags: WRITE, next: 0 }]);
}

#[test]
fn a_readable_descriptor_after_a_writable_one_breaks_the_queue() {
    breaks_the_queue(|queue| {
        let readable = Descriptor { flags: 0, ..header(queue) };
        vec![Descriptor { flags: WRITE | NEXT, ..readable }, readable]
    });
}

#[test]
fn an_indirect_table_of_a_wrong_length_breaks_the_queue() {
    for len in [0, 24, 16 * 129, u32::MAX] {
        breaks_the_queue(|queue| vec![Descriptor { len, flags: INDIRECT, ..header(queue) }]);
    }
}

#[test]
fn an_indirect_table_in_a_list_breaks_the_queue() {
    breaks_the_queue(|queue| vec![header(queue), Descriptor { flags: INDIRECT, ..header(queue) }]);
}

#[test]
fn an_id_beyond_the_ring_comes_back_as_it_is() {
    let (mut device, _backend) = start(&packed());
    let queue = device.queue();
    let status = queue.arena.cut(1, 16, 0);
    queue.memory.write(status, &[NO_STATUS]);
    // A flush.
    let header = header(queue);
    queue.memory.write(header.addr, &[4]);
    let status = Descriptor { addr: status, len: 1, flags: WRITE, next: 0 };
    let entry = |at: u64| queue.ring.descriptors + Descriptor::SIZE * at;
    queue.memory.write(entry(1), &Descriptor { flags: WRITE | AVAIL, ..status }.to_packed_bytes(0xfedc));
    queue.memory.write(entry(0), &header.to_packed_bytes(0));
    queue.memory.store_u16(entry(0) + 14, NEXT | AVAIL);
    queue.kick.signal();
    crate::frontend::wait::until("it is completed", || queue.has_completion());
    assert_eq!(queue.memory.load_u16(entry(0) + 12), 0xfedc);
    assert_eq!(queue.memory.read(status.addr, 1), [OK]);
}

#[test]
fn a_write_and_a_read_on_the_other_layout_find_each_other() {
    let image = crate::image::Image::empty(1 << 20);
    let backend = Setup::file(image.path()).start();
    let data = crate::image::pattern(1, 8192);
    backend.device(&packed()).queue().write(8, &data);
    assert_eq!(backend.device(&Profile::qemu()).queue().read(8, 8192), data);
    let answer = backend.device(&packed()).queue().request(&Request::read(8, 8192));
    assert_eq!((answer.status, answer.used_len), (OK, 8193));
    assert!(answer.data == data);
}
