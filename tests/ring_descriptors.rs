//! The descriptors of a ring (kick, call, error) while it runs: swapped, taken away, never there.

use std::os::fd::AsFd;

use crate::frontend::blk::{Framing, Request};
use crate::frontend::device::{MemoryBy, Profile};
use crate::frontend::wait::{self, DEADLINE};
use crate::rings::{all_ok, half_started, null};

#[test]
fn a_call_descriptor_is_swapped_on_a_running_ring_and_signalled_once() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    let new = wait::Event::new();
    device.session.set_vring_call(0, Some(new.as_fd())).accepted();
    let signals = new.wait(DEADLINE);
    device.settle();
    assert_eq!(signals + new.take(), 1, "the new descriptor is signalled once");
    let old = std::mem::replace(&mut device.queue().call, new);
    old.take();
    device.queue().works();
    assert_eq!(old.take(), 0, "the old descriptor is signalled no more");
}

#[test]
fn a_call_descriptor_changed_under_load_loses_no_call() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    for _ in 0..200 {
        let ticket = device.queue().start(&Request::read(0, 512), &Framing::default());
        device.queue().ask_for_call();
        let new = wait::Event::new();
        device.session.set_vring_call(0, Some(new.as_fd())).accepted();
        device.queue().call = new;
        all_ok(device.queue(), &[ticket]);
    }
}

#[test]
fn a_kick_descriptor_is_swapped_on_a_running_ring() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    for _ in 0..50 {
        device.queue().kick = wait::Event::new();
        device.set_kick(0);
        device.queue().works();
        device.queue().works();
    }
}

#[test]
fn a_ring_without_a_call_descriptor_is_served_without_calls() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    device.session.set_vring_call(0, None).accepted();
    device.queue().polling = true;
    device.queue().call.take();
    for _ in 0..20 {
        device.queue().works();
    }
    // Worker threads make calls, so one that was under way may come late there.
    if backend.uses_io_uring() {
        assert_eq!(device.queue().call.take(), 0, "the descriptor is given up");
    }
}

#[test]
fn a_ring_without_an_error_descriptor_is_served() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    device.session.set_vring_err(0, None).accepted();
    device.queue().works();
}

#[test]
fn a_ring_without_a_kick_descriptor_is_polled() {
    let (mut device, _backend) = half_started();
    device.session.set_vring_kick(0, None).accepted();
    device.enable(0, true);
    for _ in 0..20 {
        device.queues[0].works();
    }
}

#[test]
fn descriptors_may_come_before_set_features() {
    let backend = null().start();
    let mut device = backend.device(&Profile::unstarted());
    device.session.set_vring_call(0, Some(device.queues[0].call.as_fd())).accepted();
    device.session.set_vring_err(0, Some(device.queues[0].err.as_fd())).accepted();
    device.announce(MemoryBy::Table);
    device.start_queue(0);
    device.queue().works();
}

crate::on_packed_rings! {
    a_call_descriptor_is_swapped_on_a_running_ring_and_signalled_once,
    a_call_descriptor_changed_under_load_loses_no_call,
    a_kick_descriptor_is_swapped_on_a_running_ring,
    a_ring_without_a_call_descriptor_is_served_without_calls,
    a_ring_without_a_kick_descriptor_is_polled,
}
