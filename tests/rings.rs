//! The states of a ring (specification of the device, section 5): started, enabled, stopped, restarted, reset.

use std::os::fd::AsFd;
use std::time::Duration;

use crate::backend::Setup;
use crate::frontend::blk::{Framing, NO_STATUS, OK, Request, Ticket, feature};
use crate::frontend::device::{Device, MemoryBy, Profile};
use crate::frontend::queue::Queue;
use crate::frontend::session::VringAddresses;
use crate::frontend::wait::DEADLINE;

/// Long enough that a request is still in flight after some messages, short enough to wait for.
const LATENCY: Duration = Duration::from_millis(300);

pub(crate) fn null() -> Setup {
    Setup::null(1 << 20)
}

/// Two queues of which only the second runs; the first is set up but has neither kick nor enable.
pub(crate) fn half_started() -> (Device, crate::backend::Backend) {
    let backend = null().export("num-queues=2").start();
    let mut device = backend.device(&Profile { starts: false, ..Profile::queues(2) });
    device.announce(MemoryBy::Table);
    device.start_queue(1);
    device.set_up_queue(0);
    (device, backend)
}

fn start_reads(queue: &mut Queue, count: usize) -> Vec<Ticket> {
    (0..count).map(|_| queue.start(&Request::read(0, 512), &Framing::default())).collect()
}

/// Nothing of the first queue was popped, although there was every opportunity.
#[track_caller]
fn pops_nothing(device: &mut Device) {
    for _ in 0..20 {
        device.queues[0].kick.signal();
        device.queues[1].works();
        device.settle();
    }
    assert!(!device.queues[0].has_completion(), "a request was completed");
}

#[track_caller]
pub(crate) fn all_ok(queue: &mut Queue, tickets: &[Ticket]) {
    for answer in queue.finish(tickets) {
        assert_eq!((answer.status, answer.used_len), (OK, 513));
    }
}

#[test]
fn a_ring_starts_disabled_and_pops_nothing_until_it_is_enabled() {
    let (mut device, _backend) = half_started();
    device.set_kick(0);
    let tickets = start_reads(&mut device.queues[0], 3);
    pops_nothing(&mut device);
    device.enable(0, true);
    all_ok(&mut device.queues[0], &tickets);
}

#[test]
fn a_kick_that_came_before_enable_is_not_lost() {
    let (mut device, _backend) = half_started();
    device.queues[0].kick.signal();
    let ticket = device.queues[0].prepare(&Request::read(0, 512), &Framing::default());
    device.set_kick(0);
    device.enable(0, true);
    all_ok(&mut device.queues[0], &[ticket]);
}

#[test]
fn a_ring_that_is_enabled_before_it_has_a_kick_starts_with_the_kick() {
    let (mut device, _backend) = half_started();
    device.enable(0, true);
    let ticket = device.queues[0].prepare(&Request::read(0, 512), &Framing::default());
    device.set_kick(0);
    all_ok(&mut device.queues[0], &[ticket]);
}

#[test]
fn a_ring_starts_enabled_without_protocol_features() {
    let backend = null().start();
    let mut device = backend.device(&Profile::bare());
    device.queue().works();
}

#[test]
fn a_request_that_waits_in_the_ring_is_served_at_the_start_without_a_kick() {
    let (mut device, _backend) = half_started();
    let ticket = device.queues[0].prepare(&Request::read(0, 512), &Framing::default());
    device.set_kick(0);
    device.enable(0, true);
    all_ok(&mut device.queues[0], &[ticket]);
    assert_eq!(device.queues[0].kick.take(), 0, "nobody kicked");
}

#[test]
fn every_start_makes_an_unconditional_call() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    for _ in 0..3 {
        assert!(device.queue().call.wait(DEADLINE) > 0, "the call after the start");
        device.queue().works();
        device.stop_queue(0);
        device.queue().call.take();
        device.start_queue(0);
    }
}

#[test]
fn a_disabled_ring_pops_nothing_and_goes_on_when_it_is_enabled_again() {
    let backend = null().export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    device.queues[0].works();
    device.enable(0, false);
    let tickets = start_reads(&mut device.queues[0], 5);
    pops_nothing(&mut device);
    device.enable(0, true);
    all_ok(&mut device.queues[0], &tickets);
    device.queues[0].works();
}

#[test]
fn what_was_popped_before_disable_is_completed_and_called() {
    let backend = Setup::slow(LATENCY).start();
    let mut device = backend.device(&Profile::qemu());
    let tickets = start_reads(device.queue(), 4);
    device.queue().wait_popped();
    device.enable(0, false);
    assert!(!device.queue().has_completion(), "the requests are in flight");
    all_ok(device.queue(), &tickets);
}

#[test]
fn get_vring_base_finishes_every_request_before_it_answers() {
    let backend = Setup::slow(LATENCY).start();
    let mut device = backend.device(&Profile::qemu());
    let tickets = start_reads(device.queue(), 20);
    device.queue().wait_popped();
    let base = device.stop_queue(0);
    assert!(device.queue().finish_at_once(&tickets).iter().all(|answer| answer.status == OK));
    assert_eq!(base, device.queue().base());
}

#[test]
fn get_vring_base_drains_only_its_own_queue() {
    let backend = Setup::slow(LATENCY).export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    device.queues[0].works();
    let tickets = start_reads(&mut device.queues[1], 3);
    device.queues[1].wait_popped();
    assert_eq!(device.stop_queue(0), device.queue().base());
    all_ok(&mut device.queues[1], &tickets);
}

#[test]
fn get_vring_base_tells_what_was_not_popped() {
    let (mut device, _backend) = half_started();
    device.set_kick(0);
    let tickets = start_reads(&mut device.queues[0], 3);
    assert_eq!(device.session.get_vring_base(0), device.queue().base(), "nothing was popped while disabled");
    device.start_queue(0);
    all_ok(&mut device.queues[0], &tickets);
    assert_eq!(device.stop_queue(0), device.queue().base());
}

#[test]
fn get_vring_base_of_a_ring_that_never_started_is_what_was_set() {
    let backend = null().start();
    let mut device = backend.device(&Profile::unstarted());
    device.announce(MemoryBy::Table);
    device.session.set_vring_num(0, 128).accepted();
    device.session.set_vring_base(0, 77).accepted();
    assert_eq!(device.session.get_vring_base(0), 77);
}

#[test]
fn a_stopped_ring_s_memory_is_not_touched() {
    let backend = Setup::slow(LATENCY).start();
    let mut device = backend.device(&Profile::qemu());
    start_reads(device.queue(), 8).clear();
    device.queue().wait_popped();
    device.stop_queue(0);
    // The guest reuses everything for something else.
    let regions = device.memory.regions();
    let marked: Vec<(u64, Vec<u8>)> =
        regions.iter().map(|region| (region.placement.guest, vec![0xC3; 1 << 20])).collect();
    for (guest, bytes) in &marked {
        device.memory.write(*guest, bytes);
    }
    device.queue().kick.signal();
    // Longer than any of the requests took.
    assert_eq!(device.queue().err.wait(2 * LATENCY), 0, "a stopped ring reports no error");
    device.settle();
    for (guest, bytes) in &marked {
        assert!(device.memory.read(*guest, bytes.len()) == *bytes, "memory at {guest:#x} was written");
    }
}

#[test]
fn a_stopped_ring_ignores_kicks_and_serves_after_a_restart() {
    let backend = null().export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    device.queues[0].works();
    assert_eq!(device.stop_queue(0), device.queue().base());
    let tickets = start_reads(&mut device.queues[0], 3);
    pops_nothing(&mut device);
    device.start_queue(0);
    all_ok(&mut device.queues[0], &tickets);
}

#[test]
fn a_ring_goes_on_from_any_base() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    for base in [1, 127, 128, 0x7fff, 0x8000, 0xfffe] {
        device.stop_queue(0);
        device.queue().reset();
        device.queue().set_position(base);
        device.start_queue(0);
        for _ in 0..4 {
            device.queue().works();
        }
        assert_eq!(device.stop_queue(0), u32::from(base.wrapping_add(4)));
        device.start_queue(0);
    }
}

#[test]
fn a_stop_and_continue_in_the_midst_of_requests_loses_none() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    for _ in 0..50 {
        let tickets = start_reads(device.queue(), 20);
        let base = device.stop_queue(0);
        assert!(device.queue().is_drained(base), "what was popped is completed");
        device.session.set_vring_num(0, 128).accepted();
        device.session.set_vring_base(0, base).accepted();
        device.session.set_vring_addr(0, &device.addresses(0)).accepted();
        device.session.set_vring_call(0, Some(device.queues[0].call.as_fd())).accepted();
        device.set_kick(0);
        device.enable(0, true);
        all_ok(device.queue(), &tickets);
        let free = device.queue().arena.mark();
        device.queue().arena.release(&free);
    }
}

#[test]
fn the_index_of_a_ring_wraps() {
    let backend = null().start();
    let mut device = backend.device(&Profile { queue_size: 256, ..Profile::qemu() });
    let queue = device.queue();
    let free = queue.arena.mark();
    for _ in 0..(70_000 / 80) {
        let since = queue.mark();
        let tickets: Vec<Ticket> =
            (0..80).map(|_| queue.prepare(&Request::read(0, 512), &Framing::default())).collect();
        queue.notify(since);
        all_ok(queue, &tickets);
        queue.arena.release(&free);
    }
}

#[test]
fn any_power_of_two_up_to_32768_is_a_ring_size() {
    let backend = null().start();
    // The smallest holds the three descriptors of a read.
    for queue_size in [4, 16, 1024, 32768] {
        let mut device = backend.device(&Profile { queue_size, ..Profile::qemu() });
        for _ in 0..10 {
            device.queue().works();
        }
    }
}

#[test]
fn a_ring_size_that_is_no_power_of_two_or_too_large_is_refused() {
    let backend = null().start();
    let mut device = backend.device(&Profile::unstarted());
    for size in [0, 3, 100, 32769, 65536, u32::MAX] {
        device.session.set_vring_num(0, size).refused();
    }
    device.announce(MemoryBy::Table);
    device.start_queue(0);
    device.queue().works();
}

#[test]
fn ring_addresses_outside_the_memory_are_refused() {
    let backend = null().start();
    let mut device = backend.device(&Profile::unstarted());
    device.announce(MemoryBy::Table);
    device.session.set_vring_num(0, 128).accepted();
    let good = device.addresses(0);
    let guest_physical = device.queues[0].ring;
    let end = {
        let placement = device.memory.regions()[2].placement;
        placement.user + placement.size
    };
    for bad in [
        VringAddresses { descriptors: 0x1000, ..good },
        VringAddresses { avail: 0x1000, ..good },
        VringAddresses { used: 0x1000, ..good },
        // Guest-physical addresses are not the front-end's.
        VringAddresses { descriptors: guest_physical.descriptors, ..good },
        // They start inside and end outside.
        VringAddresses { descriptors: end - 128 * 16 + 16, ..good },
        VringAddresses { avail: end - 128, ..good },
        VringAddresses { used: end - 128 * 8, ..good },
        VringAddresses { descriptors: u64::MAX - 15, ..good },
    ] {
        device.session.set_vring_addr(0, &bad).refused();
    }
    device.start_queue(0);
    device.queue().works();
}

#[test]
fn set_features_with_the_same_bits_leaves_running_rings_alone() {
    let backend = Setup::slow(Duration::from_millis(50)).start();
    let mut device = backend.device(&Profile::qemu());
    let tickets = start_reads(device.queue(), 4);
    let features = device.session.features;
    device.session.set_features(features).accepted();
    all_ok(device.queue(), &tickets);
    device.queue().works();
}

#[test]
fn set_features_with_other_bits_is_refused_on_running_rings() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    let features = device.session.features;
    for changed in [features & !feature::EVENT_IDX, features & !feature::FLUSH] {
        device.session.set_features(changed).refused();
        device.queue().works();
    }
}

#[test]
fn set_vring_addr_with_the_same_addresses_leaves_a_running_ring_alone() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    // QEMU sets the log flag here when it starts to migrate.
    device.session.set_vring_addr(0, &VringAddresses { flags: 1, ..device.addresses(0) }).accepted();
    device.queue().works();
    device.session.set_vring_addr(0, &device.addresses(0)).accepted();
    device.queue().works();
}

#[test]
fn reset_device_stops_rings_and_keeps_the_memory_and_the_agreement() {
    let backend = null().export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    device.queues[0].works();
    device.session.reset_device().accepted();
    for queue in &mut device.queues {
        queue.reset();
    }
    let ticket = device.queues[0].start(&Request::read(0, 512), &Framing::default());
    device.queues[0].kick.signal();
    device.settle();
    assert!(!device.queues[0].has_completion(), "the ring is stopped");
    // No SET_MEM_TABLE, no SET_PROTOCOL_FEATURES, no call, no error descriptor: they are still there.
    let features = device.session.features;
    device.session.set_features(features).accepted();
    device.session.set_vring_num(0, 128).accepted();
    let base = device.queues[0].base();
    device.session.set_vring_base(0, base).accepted();
    device.session.set_vring_addr(0, &device.addresses(0)).accepted();
    device.set_kick(0);
    device.enable(0, true);
    all_ok(&mut device.queues[0], &[ticket]);
}

#[test]
fn reset_device_finishes_requests_in_flight_first() {
    let backend = Setup::slow(LATENCY).start();
    let mut device = backend.device(&Profile::qemu());
    let _tickets = start_reads(device.queue(), 5);
    device.queue().wait_popped();
    device.session.reset_device().accepted();
    let done = device.queue().used_idx();
    device.memory.write(device.queues[0].ring.used, &[0xC3; 6]);
    device.queue().err.wait(2 * LATENCY);
    assert_eq!(device.memory.read(device.queues[0].ring.used, 6), [0xC3; 6], "written after {done} completions");
}

#[test]
fn messages_are_answered_while_all_rings_are_stopped() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    device.stop_queue(0);
    assert_eq!(device.session.get_features(), device.offered);
    device.read_config();
    device.start_queue(0);
    device.queue().works();
}

#[test]
fn messages_are_answered_while_requests_are_in_flight() {
    let backend = Setup::slow(LATENCY).start();
    let mut device = backend.device(&Profile::qemu());
    let tickets = start_reads(device.queue(), 4);
    device.queue().wait_popped();
    device.read_config();
    assert!(!device.queue().has_completion(), "the requests are in flight");
    all_ok(device.queue(), &tickets);
}

#[test]
fn status_bytes_are_written_before_their_completion_is_seen() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().polling = true;
    let free = device.queue().arena.mark();
    for _ in 0..200 {
        let tickets = start_reads(device.queue(), 30);
        for answer in device.queue().finish(&tickets) {
            assert_ne!(answer.status, NO_STATUS);
            assert!(answer.data.iter().all(|&byte| byte == 0), "data after its completion");
        }
        device.queue().arena.release(&free);
    }
}

crate::on_packed_rings! {
    a_ring_starts_disabled_and_pops_nothing_until_it_is_enabled,
    a_kick_that_came_before_enable_is_not_lost,
    a_request_that_waits_in_the_ring_is_served_at_the_start_without_a_kick,
    every_start_makes_an_unconditional_call,
    a_disabled_ring_pops_nothing_and_goes_on_when_it_is_enabled_again,
    what_was_popped_before_disable_is_completed_and_called,
    get_vring_base_finishes_every_request_before_it_answers,
    get_vring_base_drains_only_its_own_queue,
    get_vring_base_tells_what_was_not_popped,
    a_stopped_ring_s_memory_is_not_touched,
    a_stopped_ring_ignores_kicks_and_serves_after_a_restart,
    a_stop_and_continue_in_the_midst_of_requests_loses_none,
    the_index_of_a_ring_wraps,
    any_power_of_two_up_to_32768_is_a_ring_size,
    set_features_with_the_same_bits_leaves_running_rings_alone,
    set_vring_addr_with_the_same_addresses_leaves_a_running_ring_alone,
    reset_device_stops_rings_and_keeps_the_memory_and_the_agreement,
    status_bytes_are_written_before_their_completion_is_seen,
}
