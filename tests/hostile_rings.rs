//! Guests that make mistakes or mean harm (specification of the device, section 10): malformed requests are completed,
//! rings that lie are broken, and nothing else is disturbed.

use crate::backend::{Backend, Setup};
use crate::frontend::blk::{NO_STATUS, OK};
use crate::frontend::device::{Device, Profile};
use crate::frontend::queue::{Buffer, Descriptor, INDIRECT, NEXT, Queue, Table, Used, WRITE};
use crate::frontend::wait::{DEADLINE, Stop};

fn start(profile: &Profile) -> (Device, Backend) {
    let backend = Setup::null(1 << 20).export("num-queues=2").start();
    (backend.device(profile), backend)
}

/// Cuts a buffer of `len` bytes, filled with `byte`.
fn buffer(queue: &mut Queue, len: u32, writable: bool, byte: u8) -> Buffer {
    let addr = queue.arena.cut(u64::from(len).max(1), 16, 0);
    queue.memory.write(addr, &vec![byte; len as usize]);
    Buffer { addr, len, writable }
}

/// Device-readable zeroes, of which 16 make the header of a read at sector 0.
fn readable(queue: &mut Queue, len: u32) -> Buffer {
    buffer(queue, len, false, 0)
}

fn writable(queue: &mut Queue, len: u32) -> Buffer {
    buffer(queue, len, true, NO_STATUS)
}

/// A chain with nothing wrong in its descriptors is completed; afterwards the queue still works. Returns the
/// completion and the last device-writable byte.
#[track_caller]
fn completes(queue: &mut Queue, buffers: &[Buffer]) -> (Used, Option<u8>) {
    queue.submit(buffers, Table::Direct);
    let used = queue.take();
    let last = buffers.iter().rfind(|buffer| buffer.writable && buffer.len > 0);
    let status = last.map(|buffer| queue.memory.read(buffer.addr + u64::from(buffer.len) - 1, 1)[0]);
    queue.works();
    assert!(!queue.reports_error(std::time::Duration::ZERO), "the queue is not broken");
    (used, status)
}

#[track_caller]
fn assert_failed(status: Option<u8>) {
    let status = status.expect("room for a status");
    assert!(status != OK && status != NO_STATUS, "status {status}");
}

#[test]
fn a_chain_without_a_header_gets_a_status() {
    let (mut device, _backend) = start(&Profile::qemu());
    let buffers = [writable(device.queue(), 1)];
    let (used, status) = completes(device.queue(), &buffers);
    assert_failed(status);
    assert_eq!(used.len, 1);
}

#[test]
fn a_short_header_gets_a_status() {
    let (mut device, _backend) = start(&Profile::qemu());
    for len in [1, 8, 15] {
        let buffers = [readable(device.queue(), len), writable(device.queue(), 1)];
        let (used, status) = completes(device.queue(), &buffers);
        assert_failed(status);
        assert_eq!(used.len, 1);
    }
}

#[test]
fn a_short_header_with_room_for_data_writes_only_a_status() {
    let (mut device, _backend) = start(&Profile::qemu());
    let buffers = [readable(device.queue(), 8), writable(device.queue(), 513)];
    let (used, status) = completes(device.queue(), &buffers);
    assert_failed(status);
    assert_eq!(used.len, 0, "nothing was written from the first byte on");
    assert_eq!(device.memory.read(buffers[1].addr, 512), [NO_STATUS; 512]);
}

#[test]
fn a_chain_without_room_for_a_status_is_returned() {
    let (mut device, _backend) = start(&Profile::qemu());
    let buffers = [readable(device.queue(), 16)];
    assert_eq!(completes(device.queue(), &buffers).0.len, 0);
}

#[test]
fn a_write_without_room_for_a_status_is_returned() {
    let (mut device, _backend) = start(&Profile::qemu());
    let buffers = [readable(device.queue(), 16), readable(device.queue(), 512)];
    device.memory.write(buffers[0].addr, &1u32.to_le_bytes());
    assert_eq!(completes(device.queue(), &buffers).0.len, 0);
}

#[test]
fn a_short_header_alone_is_returned() {
    let (mut device, _backend) = start(&Profile::qemu());
    let buffers = [readable(device.queue(), 3)];
    assert_eq!(completes(device.queue(), &buffers).0.len, 0);
}

#[test]
fn a_chain_of_one_empty_descriptor_is_returned() {
    let (mut device, _backend) = start(&Profile::qemu());
    for is_writable in [false, true] {
        let buffers = [Buffer { writable: is_writable, ..readable(device.queue(), 0) }];
        assert_eq!(completes(device.queue(), &buffers).0.len, 0);
    }
}

#[test]
fn an_empty_descriptor_may_point_anywhere() {
    let (mut device, _backend) = start(&Profile::qemu());
    let nowhere = Buffer { addr: 0xdead_0000_0000, len: 0, writable: false };
    let buffers = [readable(device.queue(), 16), nowhere, writable(device.queue(), 513)];
    let (used, status) = completes(device.queue(), &buffers);
    assert_eq!((used.len, status), (513, Some(OK)));
}

#[test]
fn a_write_with_data_past_its_status_s_descriptor_is_judged_by_its_length() {
    let (mut device, _backend) = start(&Profile::qemu());
    // 100 bytes of data are no sector.
    let buffers = [readable(device.queue(), 116), writable(device.queue(), 1)];
    device.memory.write(buffers[0].addr, &1u32.to_le_bytes());
    let (used, status) = completes(device.queue(), &buffers);
    assert_failed(status);
    assert_eq!(used.len, 1);
}

#[test]
fn more_malformed_requests_than_the_ring_holds_are_all_returned() {
    let (mut device, _backend) = start(&Profile { queue_size: 16, ..Profile::qemu() });
    let buffers = [readable(device.queue(), 8)];
    let free = device.queue().arena.mark();
    for _ in 0..40 {
        completes(device.queue(), &buffers);
        device.queue().arena.release(&free);
    }
}

#[test]
fn a_request_of_more_than_4_gib_is_answered() {
    let (mut device, _backend) = start(&Profile::qemu());
    let placement = crate::frontend::memory::Placement {
        guest: 0x20_0000_0000,
        user: 0x4000_0000_0000,
        size: 128 << 20,
        file_offset: 0,
    };
    device.memory.add(placement);
    device.tell_memory(crate::frontend::device::MemoryBy::Table);
    let big = Buffer { addr: placement.guest, len: 128 << 20, writable: true };
    let mut buffers = vec![readable(device.queue(), 16)];
    // 40 × 128 MiB: 5 GiB, or 1 GiB in 32 bits; the disk has a mebibyte.
    buffers.extend([big; 40]);
    buffers.push(writable(device.queue(), 1));
    assert_failed(completes(device.queue(), &buffers).1);
}

/// Lets `harm` write into the first queue of two and make something available. That queue is broken, the other and the
/// connection go on, and a stop and start of the ring heals it.
#[track_caller]
fn breaks_the_queue(harm: impl FnOnce(&mut Queue)) {
    let (mut device, _backend) = start(&Profile { queues: 2, queue_size: 64, ..Profile::qemu() });
    device.queues[0].works();
    let used = device.queues[0].used_idx();
    harm(&mut device.queues[0]);
    device.queues[0].kick.signal();
    assert!(device.queues[0].reports_error(DEADLINE), "no error event");
    assert_eq!(device.queues[0].used_idx(), used, "something was completed");
    device.queues[1].works();
    assert!(device.session.alive());
    assert!(!device.queues[1].reports_error(std::time::Duration::ZERO), "the other queue is not broken");
    device.stop_queue(0);
    device.queues[0].reset();
    device.start_queue(0);
    device.queues[0].works();
    device.queues[1].works();
}

/// Writes these descriptors from the front of the table and makes the first available.
fn offer_raw(queue: &mut Queue, descriptors: &[Descriptor]) {
    for (at, &descriptor) in descriptors.iter().enumerate() {
        queue.poke(at as u16, descriptor);
    }
    queue.push_head(0);
    queue.publish();
}

fn header(queue: &mut Queue, next: u16) -> Descriptor {
    Descriptor { addr: readable(queue, 16).addr, len: 16, flags: NEXT, next }
}

fn status(queue: &mut Queue) -> Descriptor {
    Descriptor { addr: writable(queue, 1).addr, len: 1, flags: WRITE, next: 0 }
}

/// Offers one buffer, otherwise good, at an address that is not.
#[track_caller]
fn bad_address_breaks_the_queue(addr: u64, len: u32, flags: u16) {
    breaks_the_queue(|queue| {
        let chain = [header(queue, 1), Descriptor { addr, len, flags: flags | NEXT, next: 2 }, status(queue)];
        offer_raw(queue, &chain);
    });
}

#[test]
fn a_loop_of_descriptors_breaks_the_queue() {
    breaks_the_queue(|queue| {
        let chain = [header(queue, 1), header(queue, 0)];
        offer_raw(queue, &chain);
    });
}

#[test]
fn a_descriptor_that_follows_itself_breaks_the_queue() {
    breaks_the_queue(|queue| {
        let chain = [header(queue, 0)];
        offer_raw(queue, &chain);
    });
}

#[test]
fn a_loop_of_empty_descriptors_breaks_the_queue() {
    breaks_the_queue(|queue| offer_raw(queue, &[Descriptor { addr: 0, len: 0, flags: NEXT, next: 0 }]));
}

#[test]
fn a_next_outside_the_table_breaks_the_queue() {
    for next in [64, 0xffff] {
        breaks_the_queue(|queue| {
            let chain = [header(queue, next)];
            offer_raw(queue, &chain);
        });
    }
}

#[test]
fn a_head_outside_the_table_breaks_the_queue() {
    for head in [64, 0xffff] {
        breaks_the_queue(|queue| {
            queue.push_head(head);
            queue.publish();
        });
    }
}

#[test]
fn an_available_index_that_jumps_breaks_the_queue() {
    for jump in [65, 0x7fff, 0xffff] {
        breaks_the_queue(|queue| queue.set_avail_idx(queue.next_avail().wrapping_add(jump)));
    }
}

#[test]
fn an_available_index_that_goes_back_breaks_the_queue() {
    breaks_the_queue(|queue| queue.set_avail_idx(queue.next_avail() - 1));
}

#[test]
fn a_readable_descriptor_after_a_writable_one_breaks_the_queue() {
    breaks_the_queue(|queue| {
        let chain =
            [Descriptor { flags: WRITE | NEXT, next: 1, ..status(queue) }, Descriptor { flags: 0, ..header(queue, 0) }];
        offer_raw(queue, &chain);
    });
}

#[test]
fn a_nested_indirect_table_breaks_the_queue() {
    breaks_the_queue(|queue| {
        let inner = [header(queue, 1), status(queue)];
        let inner = queue.raw_indirect_table(&inner);
        let outer = queue.raw_indirect_table(&[inner]);
        offer_raw(queue, &[outer]);
    });
}

#[test]
fn an_indirect_table_that_is_too_long_breaks_the_queue() {
    // Ring size 64 and seg_max 126: 128 descriptors are the most.
    for count in [129, 4096] {
        breaks_the_queue(|queue| {
            let mut entries: Vec<Descriptor> = (1..count).map(|next| header(queue, next)).collect();
            entries.push(status(queue));
            let table = queue.raw_indirect_table(&entries);
            offer_raw(queue, &[table]);
        });
    }
}

#[test]
fn an_indirect_table_of_no_whole_descriptors_breaks_the_queue() {
    for len in [1, 31, 33] {
        breaks_the_queue(|queue| {
            let entries = [header(queue, 1), status(queue)];
            let table = queue.raw_indirect_table(&entries);
            offer_raw(queue, &[Descriptor { len, ..table }]);
        });
    }
}

#[test]
fn an_indirect_table_outside_the_memory_breaks_the_queue() {
    for addr in [0, 0xdead_0000_0000, u64::MAX - 15] {
        breaks_the_queue(|queue| offer_raw(queue, &[Descriptor { addr, len: 32, flags: INDIRECT, next: 0 }]));
    }
}

#[test]
fn a_loop_in_an_indirect_table_breaks_the_queue() {
    breaks_the_queue(|queue| {
        let entries = [header(queue, 1), header(queue, 0)];
        let table = queue.raw_indirect_table(&entries);
        offer_raw(queue, &[table]);
    });
}

#[test]
fn a_next_outside_an_indirect_table_breaks_the_queue() {
    // 2 is inside the ring's own table, but not inside this one.
    for next in [2, 0xffff] {
        breaks_the_queue(|queue| {
            let entries = [header(queue, next), status(queue)];
            let table = queue.raw_indirect_table(&entries);
            offer_raw(queue, &[table]);
        });
    }
}

#[test]
fn an_address_in_no_region_breaks_the_queue() {
    bad_address_breaks_the_queue(0xdead_0000_0000, 512, WRITE);
    bad_address_breaks_the_queue(0, 512, WRITE);
}

#[test]
fn a_header_in_no_region_breaks_the_queue() {
    breaks_the_queue(|queue| {
        let chain = [Descriptor { addr: 0xdead_0000_0000, ..header(queue, 1) }, status(queue)];
        offer_raw(queue, &chain);
    });
}

#[test]
fn a_front_end_address_in_a_descriptor_breaks_the_queue() {
    bad_address_breaks_the_queue(crate::frontend::memory::USUAL[0].user, 512, WRITE);
}

#[test]
fn a_buffer_that_leaves_its_region_breaks_the_queue() {
    let last = crate::frontend::memory::USUAL[2];
    bad_address_breaks_the_queue(last.guest + last.size - 100, 512, WRITE);
    bad_address_breaks_the_queue(last.guest + 4096, u32::MAX, WRITE);
    bad_address_breaks_the_queue(last.guest - 100, 512, WRITE);
}

#[test]
fn an_address_that_wraps_breaks_the_queue() {
    bad_address_breaks_the_queue(u64::MAX - 100, 512, WRITE);
    bad_address_breaks_the_queue(u64::MAX, 1, 0);
}

#[test]
fn a_broken_queue_stays_silent_however_often_it_is_kicked() {
    let (mut device, _backend) = start(&Profile::queues(2));
    let chain = [header(device.queue(), 0)];
    offer_raw(device.queue(), &chain);
    device.queue().kick.signal();
    assert!(device.queue().reports_error(DEADLINE));
    for _ in 0..100 {
        device.queues[0].kick.signal();
        device.queues[1].works();
    }
    assert_eq!(device.queues[0].used_idx(), 0);
    assert!(device.session.alive());
}

#[test]
fn requests_popped_before_the_queue_broke_are_completed() {
    let backend = Setup::slow(std::time::Duration::from_millis(100)).start();
    let mut device = backend.device(&Profile::qemu());
    let buffers = [readable(device.queue(), 16), writable(device.queue(), 513)];
    device.queue().submit(&buffers, Table::Direct);
    device.queue().wait_popped();
    device.queue().set_avail_idx(0x7000);
    device.queue().kick.signal();
    assert!(device.queue().reports_error(DEADLINE));
    // Drained before the answer, broken or not.
    assert_eq!(device.stop_queue(0), 1);
    assert_eq!(device.queue().used_idx(), 1);
    assert_eq!(device.memory.read(buffers[1].addr + 512, 1), [OK]);
}

#[test]
fn memory_that_changes_while_it_is_read_does_no_harm() {
    let (mut device, _backend) = start(&Profile::queues(2));
    let buffers = [readable(device.queue(), 16), writable(device.queue(), 512), writable(device.queue(), 1)];
    let (memory, ring) = (std::sync::Arc::clone(&device.memory), device.queues[0].ring);
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let _guard = stop.guard();
        scope.spawn(|| {
            let mut word = 1u64;
            while !stop.is_set() {
                word = word.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(17) | 1;
                memory.write(buffers[0].addr, &word.to_le_bytes());
                memory.write(ring.descriptors + (word % 128) * 16 + 8, &word.to_le_bytes()[..6]);
            }
        });
        for _ in 0..2000 {
            for (at, buffer) in (0u16..).zip(&buffers) {
                let flags = if buffer.writable { WRITE } else { 0 } | if at < 2 { NEXT } else { 0 };
                let descriptor = Descriptor { addr: buffer.addr, len: buffer.len, flags, next: at + 1 };
                device.queues[0].poke(at, descriptor);
            }
            let done = device.queues[0].used_idx();
            device.queues[0].set_avail_idx(done.wrapping_add(1));
            device.queues[0].kick.signal();
            device.queues[1].works();
            if device.queues[0].err.take() > 0 {
                device.stop_queue(0);
                device.queues[0].reset();
                device.start_queue(0);
            }
        }
    });
    device.stop_queue(0);
    device.queues[0].reset();
    device.start_queue(0);
    device.queues[0].works();
    device.queues[1].works();
}

crate::on_packed_rings! {
    a_chain_without_a_header_gets_a_status,
    a_chain_without_room_for_a_status_is_returned,
    an_empty_descriptor_may_point_anywhere,
    more_malformed_requests_than_the_ring_holds_are_all_returned,
}
