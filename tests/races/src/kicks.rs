//! Polling against kick suppression (`vhost/virtqueue/`): the device turns kicks on and looks once more before it sleeps,
//! the guest makes a buffer available and then looks whether a kick is wanted. And the other way about: the device shows
//! what it used and looks whether a call is wanted, the guest wants calls and looks once more.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use loom::thread;

use crate::eventfd::Eventfd;
use crate::handoff::store_then_look;

#[derive(Default)]
struct Side {
    /// The index that one side moves.
    index: AtomicU16,
    /// Whether the other side wants to be told.
    wanted: AtomicBool,
}

struct Ring {
    side: Side,
    event: Eventfd,
}

/// One that shows `count` entries, one by one, and tells the other where it is wanted: a guest that makes buffers
/// available, a device that publishes.
fn show(ring: &Ring, count: u16) {
    for index in 1..=count {
        let wanted = store_then_look(
            || ring.side.index.store(index, Ordering::Release),
            || ring.side.wanted.load(Ordering::Relaxed),
        );
        if wanted {
            ring.event.write();
        }
    }
}

/// One that takes `count` entries: it polls with notifications off, and turns them on before it sleeps.
fn take(ring: &Ring, count: u16) {
    let mut next = 0;
    while next < count {
        ring.side.wanted.store(false, Ordering::Relaxed);
        let index = ring.side.index.load(Ordering::Acquire);
        if index != next {
            next = index;
            continue;
        }
        let more = store_then_look(
            || ring.side.wanted.store(true, Ordering::Relaxed),
            || ring.side.index.load(Ordering::Relaxed) != next,
        );
        if !more {
            ring.event.wait();
        }
    }
}

fn ring(count: u16) {
    let ring = Arc::new(Ring { side: Side::default(), event: Eventfd::new() });
    let guest = ring.clone();
    thread::spawn(move || show(&guest, count));
    take(&ring, count);
}

#[test]
fn no_kick_is_lost_between_polling_and_sleep() {
    loom::model(|| ring(1));
}

#[test]
fn no_kick_is_lost_over_two_buffers() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(4);
    model.check(|| ring(2));
}
