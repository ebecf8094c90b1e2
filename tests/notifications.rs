//! Who wakes whom (specification of the device, section 5; virtio 1.3, 2.7.7 and 2.7.10): calls and kicks, suppressed and
//! not, and none lost.

use crate::backend::{Backend, Setup};
use crate::frontend::blk::{Framing, Request, feature};
use crate::frontend::device::{Device, Profile};
use crate::frontend::wait::{self, DEADLINE};

/// A device whose call after the start has been taken.
fn start(profile: &Profile) -> (Device, Backend) {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(profile);
    assert!(device.queue().call.wait(DEADLINE) > 0, "the call after the start");
    calls(&mut device);
    (device, backend)
}

fn without_event_idx() -> Profile {
    Profile::without(feature::EVENT_IDX)
}

/// Completes `count` reads, one after another, found by looking, and takes them.
#[track_caller]
fn complete(device: &mut Device, count: u16) {
    for _ in 0..count {
        let mark = device.queue().arena.mark();
        let _ticket = device.queue().start(&Request::read(0, 512), &Framing::default());
        wait::until("a completion", || device.queue().try_take().is_some());
        device.queue().arena.release(&mark);
    }
}

/// How many calls came until everything at hand was done.
fn calls(device: &mut Device) -> u64 {
    device.settle();
    device.queue().call.take()
}

#[test]
fn completions_are_called_without_event_idx() {
    let (mut device, _backend) = start(&without_event_idx());
    complete(&mut device, 1);
    assert_eq!(device.queue().call.wait(DEADLINE), 1);
}

#[test]
fn no_interrupt_suppresses_calls_without_event_idx() {
    let (mut device, _backend) = start(&without_event_idx());
    device.queue().suppress_calls(true);
    complete(&mut device, 10);
    assert_eq!(calls(&mut device), 0);
    device.queue().suppress_calls(false);
    complete(&mut device, 1);
    assert_eq!(device.queue().call.wait(DEADLINE), 1);
}

#[test]
fn no_interrupt_is_ignored_with_event_idx() {
    let (mut device, _backend) = start(&Profile::qemu());
    device.queue().suppress_calls(true);
    device.queue().ask_for_call();
    complete(&mut device, 1);
    assert_eq!(device.queue().call.wait(DEADLINE), 1);
}

#[test]
fn used_event_suppresses_calls_until_it_is_reached() {
    let (mut device, _backend) = start(&Profile::qemu());
    // The first decision after a start is always to call.
    complete(&mut device, 1);
    assert_eq!(device.queue().call.wait(DEADLINE), 1);
    let event = device.queue().next_used() + 4;
    device.queue().set_used_event(event);
    complete(&mut device, 4);
    assert_eq!(calls(&mut device), 0, "before used_event");
    complete(&mut device, 1);
    assert_eq!(device.queue().call.wait(DEADLINE), 1, "at used_event");
    complete(&mut device, 5);
    assert_eq!(calls(&mut device), 0, "after used_event");
}

#[test]
fn the_first_completion_after_a_start_is_called_whatever_used_event_says() {
    let (mut device, _backend) = start(&Profile::qemu());
    for _ in 0..3 {
        let far = device.queue().next_used().wrapping_add(0x4000);
        device.queue().set_used_event(far);
        complete(&mut device, 1);
        assert_eq!(device.queue().call.wait(DEADLINE), 1);
        device.stop_queue(0);
        device.queue().call.take();
        device.start_queue(0);
        assert!(device.queue().call.wait(DEADLINE) > 0, "the call after the start");
        calls(&mut device);
    }
}

#[test]
fn used_flags_stay_zero_with_event_idx() {
    let (mut device, _backend) = start(&Profile::qemu());
    for _ in 0..50 {
        complete(&mut device, 1);
        assert_eq!(device.queue().used_flags(), 0);
    }
}

#[test]
fn a_batch_makes_fewer_calls_than_completions() {
    let (mut device, _backend) = start(&without_event_idx());
    let queue = device.queue();
    let tickets: Vec<_> = (0..40).map(|_| queue.prepare(&Request::read(0, 512), &Framing::default())).collect();
    queue.kick.signal();
    queue.polling = true;
    queue.finish(&tickets);
    let calls = calls(&mut device);
    assert!((1..=20).contains(&calls), "{calls} calls for 40 requests made available at once");
}

#[test]
fn kicks_may_be_left_out_where_the_device_says_so_and_none_is_missed() {
    for profile in [Profile::qemu(), without_event_idx()] {
        let (mut device, _backend) = start(&profile);
        // Bursts and pauses of all kinds, so that requests come while the device polls, goes to sleep and sleeps.
        for round in 0..2000u32 {
            device.queue().works();
            for _ in 0..(round * 37) % 1000 {
                std::hint::spin_loop();
            }
        }
    }
}

#[test]
fn a_device_that_sleeps_wants_kicks() {
    let (mut device, _backend) = start(&Profile::qemu());
    for _ in 0..20 {
        device.queue().works();
        device.queue().wait_popped();
    }
}

#[test]
fn superfluous_kicks_do_no_harm() {
    let (mut device, _backend) = start(&Profile::qemu());
    for _ in 0..1000 {
        device.queue().kick.signal();
    }
    device.queue().works();
    assert_eq!(device.queue().used_idx(), 1);
}

#[test]
fn a_full_call_eventfd_is_no_error() {
    let (mut device, _backend) = start(&without_event_idx());
    // One below the value at which a write would block.
    rustix::io::write(&device.queue().call, &(u64::MAX - 1).to_ne_bytes()).expect("write to an eventfd");
    complete(&mut device, 3);
    device.queue().call.take();
    device.queue().works();
    assert!(!device.queue().reports_error(std::time::Duration::ZERO));
}

#[test]
fn a_call_descriptor_that_is_no_eventfd_does_no_harm() {
    let (mut device, _backend) = start(&Profile::qemu());
    let (theirs, ours) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    device.session.set_vring_call(0, Some(std::os::fd::AsFd::as_fd(&theirs))).accepted();
    drop(ours);
    complete(&mut device, 3);
    device.session.set_vring_call(0, Some(std::os::fd::AsFd::as_fd(&device.queues[0].call))).accepted();
    device.queue().works();
}

#[test]
fn a_kick_descriptor_that_is_no_eventfd_does_no_harm() {
    let (device, backend) = start(&Profile::qemu());
    let (theirs, ours) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    // Readable for ever, as its other end is gone.
    let _ = device.session.set_vring_kick(0, Some(std::os::fd::AsFd::as_fd(&theirs)));
    drop((ours, device));
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn an_idle_device_burns_no_cpu() {
    let (mut device, backend) = start(&Profile::qemu());
    device.queue().works();
    device.queue().wait_popped();
    let before = backend.cpu_ticks();
    // A second in which nothing comes: no other way to see that nothing is done.
    assert_eq!(device.queue().err.wait(std::time::Duration::from_secs(1)), 0);
    let burnt = backend.cpu_ticks() - before;
    assert!(burnt <= 2, "{burnt} ticks in an idle second");
}

crate::on_packed_rings! {
    completions_are_called_without_event_idx,
    no_interrupt_suppresses_calls_without_event_idx,
    a_batch_makes_fewer_calls_than_completions,
    kicks_may_be_left_out_where_the_device_says_so_and_none_is_missed,
    a_device_that_sleeps_wants_kicks,
    an_idle_device_burns_no_cpu,
}
