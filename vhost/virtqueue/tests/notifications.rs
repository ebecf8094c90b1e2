//! What the used ring shows and when, and who tells whom: publishing, calls and kicks (virtio 1.3 §2.7.7, §2.7.8,
//! §2.7.10).

use super::next_avail;
use crate::testing::guest::{BUFFERS, Descriptor, Guest};
use crate::virtqueue::{Chain, RingFeatures, VirtQueue};

const FLAGS: RingFeatures = RingFeatures { event_idx: false, indirect: false, packed: false };
const EVENTS: RingFeatures = RingFeatures { event_idx: true, indirect: false, packed: false };
const SIZE: u16 = 8;

/// A ring whose indices stand at `base`, with all chains offered, and its device, which has published one before.
fn started(features: RingFeatures, base: u16) -> (Guest, VirtQueue) {
    let guest = Guest::new(SIZE, 0);
    let before = base.wrapping_sub(1);
    guest.set_used_idx(before);
    for at in 0..SIZE {
        guest.set_descriptor(guest.desc, at, Descriptor { addr: BUFFERS[0].guest, len: 8, flags: 0, next: 0 });
    }
    guest.offer(before, &[0]);
    let mut device = guest.device(features, before);
    complete(&mut device, 1);
    assert!(device.publish());
    guest.offer(base, &std::array::from_fn::<u16, { SIZE as usize }, _>(|at| at as u16));
    (guest, device)
}

/// Completes the next `count` chains.
fn complete(device: &mut VirtQueue, count: u16) {
    let mut chain = Chain::default();
    for _ in 0..count {
        assert_eq!(device.pop(&mut chain), Ok(true));
        device.push(chain.head, 1);
    }
}

#[test]
fn with_event_indices_the_first_publish_calls_whatever_the_guest_says() {
    let guest = Guest::new(SIZE, 0);
    guest.set_avail_flags(1);
    guest.set_used_event(1000);
    for _restart in 0..2 {
        let mut device = guest.device(EVENTS, 0);
        assert!(!device.publish(), "there is nothing to show");
        device.push(3.into(), 1);
        assert!(device.publish());
        device.push(3.into(), 1);
        assert!(!device.publish(), "the second is as the guest says");
    }
}

#[test]
fn without_event_indices_the_guest_s_flag_decides_from_the_first_on() {
    let guest = Guest::new(SIZE, 0);
    guest.set_avail_flags(1);
    let mut device = guest.device(FLAGS, 0);
    device.push(3.into(), 1);
    assert!(!device.publish());
}

#[test]
fn nothing_is_shown_before_it_is_published_and_then_all_at_once() {
    let (guest, mut device) = started(FLAGS, 65534);
    device.push(5.into(), 4097);
    device.push(2.into(), 0);
    device.push(7.into(), u32::MAX);
    assert_eq!(guest.used_idx(), 65534);
    assert!(device.publish());
    assert_eq!(guest.used_idx(), 1);
    assert_eq!([65534, 65535, 0].map(|at| guest.used(at)), [(5, 4097), (2, 0), (7, u32::MAX)]);
    assert!(!device.publish(), "nothing was pushed since");
    assert_eq!(guest.used_idx(), 1);
}

#[test]
fn a_restarted_ring_goes_on_where_the_guest_s_used_index_stands() {
    let (guest, mut device) = started(FLAGS, 7);
    complete(&mut device, 3);
    device.publish();
    let mut device = guest.device(FLAGS, next_avail(&device));
    complete(&mut device, 1);
    device.publish();
    assert_eq!((guest.used_idx(), guest.used(10)), (11, (3, 1)));
}

#[test]
fn a_restart_without_completions_leaves_the_used_ring_alone() {
    let (guest, _) = started(EVENTS, 65535);
    let before = guest.content();
    assert!(!guest.device(EVENTS, 65535).publish());
    assert!(guest.content() == before);
}

#[test]
fn without_event_indices_the_guest_s_flag_decides() {
    let (guest, mut device) = started(FLAGS, 0);
    guest.set_used_event(100);
    guest.set_avail_flags(1);
    complete(&mut device, 1);
    assert!(!device.publish());
    guest.set_avail_flags(0);
    complete(&mut device, 1);
    assert!(device.publish());
    guest.set_avail_flags(0xfffe);
    complete(&mut device, 1);
    assert!(device.publish(), "other flags mean nothing");
}

#[test]
fn with_event_indices_the_guest_s_flag_means_nothing() {
    let (guest, mut device) = started(EVENTS, 0);
    guest.set_avail_flags(1);
    guest.set_used_event(0);
    complete(&mut device, 1);
    assert!(device.publish());
}

#[test]
fn the_guest_is_called_when_its_event_is_among_those_published() {
    // The ring stands at `base`, and three are published: entries base, base + 1 and base + 2.
    for base in [0, 65533, 65534, 65535, 32767] {
        for distance in -3..6i16 {
            let (guest, mut device) = started(EVENTS, base);
            guest.set_used_event(base.wrapping_add_signed(distance));
            complete(&mut device, 3);
            assert_eq!(device.publish(), (0..3).contains(&distance), "{base} and {distance}");
        }
    }
}

#[test]
fn an_event_that_was_passed_is_not_announced_again() {
    let (guest, mut device) = started(EVENTS, 65535);
    guest.set_used_event(65535);
    complete(&mut device, 1);
    assert!(device.publish());
    complete(&mut device, 1);
    assert!(!device.publish());
    guest.set_used_event(1);
    complete(&mut device, 1);
    assert!(device.publish());
}

#[test]
fn without_event_indices_kicks_are_suppressed_by_flag() {
    let (guest, mut device) = started(FLAGS, 0);
    device.suppress_kicks();
    assert_eq!(guest.used_flags(), 1);
    complete(&mut device, SIZE);
    device.publish();
    assert_eq!(guest.used_flags(), 1);
    assert!(!device.enable_kicks());
    assert_eq!(guest.used_flags(), 0);
    assert_eq!(guest.avail_event(), 0, "the event field is not ours to use");
    device.suppress_kicks();
    assert_eq!(guest.used_flags(), 1, "once more");
}

#[test]
fn with_event_indices_kicks_are_asked_for_by_index_and_the_flag_stays_0() {
    let (guest, mut device) = started(EVENTS, 65533);
    device.suppress_kicks();
    complete(&mut device, SIZE);
    assert_eq!((guest.used_flags(), guest.avail_event()), (0, 0), "an old index is enough to suppress");
    assert!(!device.enable_kicks());
    assert_eq!((guest.used_flags(), guest.avail_event()), (0, 5));
}

#[test]
fn what_came_before_kicks_were_enabled_is_not_lost() {
    for features in [FLAGS, EVENTS] {
        let (guest, mut device) = started(features, 65530);
        device.suppress_kicks();
        complete(&mut device, SIZE);
        assert_eq!(device.pop(&mut Chain::default()), Ok(false));
        guest.offer(next_avail(&device), &[0]);
        assert!(device.enable_kicks(), "a chain came after the last look");
        complete(&mut device, 1);
        assert!(!device.enable_kicks());
    }
}

#[test]
fn what_is_left_of_a_batch_is_not_lost() {
    let (_guest, mut device) = started(EVENTS, 0);
    complete(&mut device, SIZE - 1);
    assert!(device.enable_kicks());
}
