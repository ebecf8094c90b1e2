//! Limits on a disk as a front-end sees them: what they hold back, and what lets it go.

use std::time::{Duration, Instant};

use crate::backend::Setup;
use crate::frontend::blk::{Framing, OK, Request};
use crate::frontend::device::Profile;
use crate::frontend::wait;

/// A disk behind a limit of one operation a second, of which a read of 4 KiB counts as eight.
fn slow_disk() -> Setup {
    Setup::new(
        "n",
        &["throttle,node-name=n,throttle-group=g,file.driver=null-co,file.read-zeroes=on,file.size=1048576"],
    )
    .object("throttle-group,id=g,limits.iops-total=1,limits.iops-size=512")
}

#[test]
fn a_limit_holds_requests_back_until_the_ring_stops() {
    let backend = slow_disk().start();
    let mut device = backend.device(&Profile::qemu());
    let tickets: Vec<_> =
        (0..5).map(|n| device.queue().start(&Request::read(8 * n, 4096), &Framing::default())).collect();
    device.queue().wait_popped();
    wait::until("the first request", || device.queues[0].used_idx() == 1);
    // The second one would go after eight seconds, the last after 32.
    let start = Instant::now();
    device.stop_queue(0);
    assert!(start.elapsed() < Duration::from_secs(6), "the stop took {:?}", start.elapsed());
    assert_eq!(device.queues[0].used_idx(), 5);
    let answers = device.queue().finish(&tickets);
    assert!(answers.iter().all(|answer| answer.status == OK));
}

#[test]
fn a_front_end_that_leaves_is_followed_by_the_next_whatever_waits() {
    let backend = slow_disk().start();
    for _ in 0..3 {
        let mut device = backend.device(&Profile::qemu());
        for n in 0..5 {
            let _left = device.queue().start(&Request::read(8 * n, 4096), &Framing::default());
        }
        device.queue().wait_popped();
    }
    let start = Instant::now();
    let device = backend.device(&Profile::qemu());
    drop(device);
    assert!(start.elapsed() < Duration::from_secs(6), "the next front-end waited {:?}", start.elapsed());
}
