//! Either side is killed between any two steps. The new process's death before it serves leaves the old one serving, and no
//! front-end notices; the old one's death is a crash until the new one knows everything, and nothing from then on.

use std::os::unix::net::UnixListener;

use super::relay::{COMMIT, MESSAGES, Peer, Relay, STATE};
use super::{Place, image, is_qsd, under_load};
use crate::backend::{Backend, Setup};
use crate::frontend::blk::{Framing, OK, Request};
use crate::frontend::device::Profile;
use crate::image::pattern;

/// The moments at which a process can die: after so many messages were passed on, and perhaps the next one was taken.
fn moments() -> impl Iterator<Item = (usize, bool)> {
    (0..MESSAGES).flat_map(|passed| [(passed, false), (passed, true)])
}

/// Has a process begin to take over; it is at that moment when this returns.
fn begin(place: &Place, setup: &Setup, (passed, taken): (usize, bool)) -> (Backend, Relay) {
    let path = place.path("relay");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    let new = place.taking_over(setup, "relay").launch();
    let mut relay = Relay::accept(&listener, &place.path("control"));
    relay.pass(passed);
    if taken {
        // It goes no further.
        drop(relay.take());
    }
    (new, relay)
}

#[test]
fn the_new_process_may_die_at_any_step_before_it_serves() {
    if is_qsd() {
        return;
    }
    let (place, image) = (Place::new(), image(2));
    let setup = place.setup(Setup::file(image.path()).export("num-queues=2").iothreads(2));
    let backend = setup.start();
    let mut device = backend.device(&Profile::queues(2));
    let deaths = || {
        // Once it has sent the last message, it serves.
        for moment in moments().filter(|moment| *moment != (COMMIT, true)) {
            let (new, relay) = begin(&place, &setup, moment);
            new.kill();
            drop(relay);
        }
    };
    let load = under_load(&mut device, deaths, |offset, bytes| image.read(offset, bytes));
    println!("{load:?}");
    // And in the end somebody succeeds.
    let _backend = place.upgrade(&setup, backend);
    device.queue().works();
}

#[test]
fn the_new_process_may_leave_at_any_step() {
    if is_qsd() {
        return;
    }
    let (place, image) = (Place::new(), image(1));
    let setup = place.setup(Setup::file(image.path()));
    let backend = setup.start();
    let mut device = backend.device(&Profile::qemu());
    let failures = || {
        for moment in moments().filter(|moment| *moment < (COMMIT, true)) {
            let (new, relay) = begin(&place, &setup, moment);
            // It finds nobody at the other end.
            if moment < (STATE + 1, false) {
                drop(relay);
                let (status, said) = new.ended();
                assert_eq!(status.code(), Some(1), "{moment:?}: {said}");
            } else {
                new.kill();
                drop(relay);
            }
        }
    };
    under_load(&mut device, failures, |offset, bytes| image.read(offset, bytes));
    backend.stop();
}

#[test]
fn the_old_process_may_die_at_any_step() {
    if is_qsd() {
        return;
    }
    let image = image(1);
    for moment in moments() {
        let place = Place::new();
        let setup = place.setup(Setup::file(image.path()));
        let old = setup.start();
        let mut device = old.device(&Profile::qemu());
        device.queue().write(0, &pattern(moment.0 as u32, 4096));
        let (new, relay) = begin(&place, &setup, moment);
        // Guests go on asking.
        let ticket = device.queue().start(&Request::read(0, 4096), &Framing::default());
        old.kill();
        drop(relay);
        let _new = if moment > (STATE, true) {
            // It knows everything, and goes on: no front-end notices.
            new
        } else {
            let (status, said) = new.ended();
            assert_eq!(status.code(), Some(1), "{moment:?}: {said}");
            let next = setup.start();
            device.reconnect(next.connect());
            next
        };
        let answers = device.queue().finish(&[ticket]);
        assert_eq!(answers[0].status, OK, "{moment:?}");
        assert!(answers[0].data == pattern(moment.0 as u32, 4096), "{moment:?}");
        device.queue().works();
    }
}

#[test]
fn the_old_process_touches_nothing_once_the_new_one_serves() {
    if is_qsd() {
        return;
    }
    let (place, image) = (Place::new(), image(1));
    let setup = place.setup(Setup::file(image.path()));
    let old = setup.start();
    let mut device = old.device(&Profile::qemu());
    let (new, relay) = begin(&place, &setup, (MESSAGES, false));
    // It is still there, as it waits for the other to say goodbye, and it hears the same kicks.
    for round in 0..60 {
        device.queue().write(8 * (round % 16), &pattern(round as u32, 4096));
        assert!(device.queue().read(8 * (round % 16), 4096) == pattern(round as u32, 4096));
        assert!(!device.queue().has_completion(), "something is completed twice");
    }
    drop(relay);
    old.ended_well();
    // It may die, too: what it has not done yet is in the in-flight region.
    device.queue().write(0, &pattern(7, 4096));
    new.kill();
    let next = setup.start();
    device.reconnect(next.connect());
    assert!(device.queue().read(0, 4096) == pattern(7, 4096));
}

#[test]
fn a_process_that_never_says_that_it_serves_is_not_waited_for_for_ever() {
    if is_qsd() {
        return;
    }
    let (place, image) = (Place::new(), image(1));
    let setup = place.setup(Setup::file(image.path()));
    let old = setup.start();
    let mut device = old.device(&Profile::qemu());
    let peer = Peer::connect(&place.path("control"));
    peer.say(serde_json::json!({"message": "hello", "version": 1, "program": "a test"}));
    assert_eq!(peer.receive().expect("an offer").0["message"], "offer");
    peer.say(serde_json::json!({"message": "ready"}));
    assert_eq!(peer.receive().expect("a state").0["message"], "state");
    let ticket = device.queue().start(&Request::read(0, 512), &Framing::default());
    assert!(peer.refusal().contains("too long"));
    let commit = serde_json::json!({"message": "commit", "sockets": [], "pidfile": false}).to_string();
    assert!(peer.send_bytes(commit.as_bytes()).is_err(), "it cannot serve any more");
    assert_eq!(device.queue().finish(&[ticket])[0].status, OK);
    old.stop();
}
