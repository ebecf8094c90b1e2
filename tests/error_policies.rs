//! A host that runs out of space stops the device, and not the front-end: what becomes of the requests that it keeps, on
//! every way out (specification of the device, section 5; contract of the block backend, on-error policy).

use std::time::{Duration, Instant};

use crate::backend::{Backend, Setup};
use crate::frontend::blk::{Framing, IOERR, OK, Request};
use crate::frontend::device::Profile;
use crate::image::{Image, pattern};

/// How long a stopped device is watched doing nothing.
const A_WHILE: Duration = Duration::from_millis(100);

/// A disk of which the first `count` writes to sector 8 find no space.
fn full(image: &Image, count: usize, options: &str) -> Backend {
    let rule = |n: usize| {
        let (state, next) = (n + 1, n + 2);
        format!(
            "inject-error.{n}.event=none,inject-error.{n}.iotype=write,inject-error.{n}.errno=28,\
             inject-error.{n}.sector=8,inject-error.{n}.state={state},set-state.{n}.event=none,\
             set-state.{n}.iotype=write,set-state.{n}.state={state},set-state.{n}.new_state={next}"
        )
    };
    let rules: Vec<String> = (0..count).map(rule).collect();
    Setup::faulty(image.path(), &rules.join(",")).iothreads(2).export("num-queues=2").export(options).start()
}

#[test]
fn a_full_host_stops_the_device_until_its_timeout() {
    let image = Image::filled(1 << 20);
    let backend = full(&image, 1, "stop-timeout=300");
    let mut device = backend.device(&Profile::queues(2));
    let begin = Instant::now();
    let stuck = device.queue().start(&Request::write(8, &pattern(1, 4096)), &Framing::default());
    std::thread::sleep(A_WHILE);
    assert!(device.queue().try_take().is_none(), "the guest is told nothing");
    // Neither queue takes anything more.
    let waiting = device.queues[1].start(&Request::read(0, 512), &Framing::default());
    assert!(device.queues[1].try_take().is_none());
    let answer = device.queue().finish(&[stuck]).remove(0);
    assert_eq!((answer.status, answer.used_len), (IOERR, 1));
    assert!(begin.elapsed() >= Duration::from_millis(300));
    assert_eq!(device.queues[1].finish(&[waiting]).remove(0).status, OK, "then it goes on");
    device.queue().write(8, &pattern(2, 4096));
}

#[test]
fn a_ring_that_stops_does_not_wait_for_space() {
    let image = Image::filled(1 << 20);
    let backend = full(&image, 1, "werror=stop");
    let mut device = backend.device(&Profile::queues(2));
    let stuck = device.queue().start(&Request::write(8, &pattern(1, 4096)), &Framing::default());
    device.queue().wait_popped();
    std::thread::sleep(A_WHILE);
    let begin = Instant::now();
    device.stop_queue(0);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    assert_eq!(device.queue().finish(&[stuck]).remove(0).status, IOERR);
    device.queues[1].works();
    device.start_queue(0);
    device.queue().write(8, &pattern(2, 4096));
    assert_eq!(image.read(4096, 4096), pattern(2, 4096));
}

#[test]
fn a_front_end_that_leaves_a_stopped_device_makes_room_for_the_next() {
    let image = Image::filled(1 << 20);
    let backend = full(&image, 1, "stop-timeout=0");
    let mut device = backend.device(&Profile::queues(2));
    let _ = device.queue().start(&Request::write(8, &pattern(1, 4096)), &Framing::default());
    device.queue().wait_popped();
    std::thread::sleep(A_WHILE);
    drop(device);
    let mut device = backend.device(&Profile::queues(2));
    device.queue().write(8, &pattern(2, 4096));
    device.queues[1].works();
}

#[test]
fn a_daemon_that_ends_does_not_wait_for_space() {
    let image = Image::filled(1 << 20);
    let backend = full(&image, 1, "stop-timeout=0");
    let mut device = backend.device(&Profile::queues(2));
    let _ = device.queue().start(&Request::write(8, &pattern(1, 4096)), &Framing::default());
    device.queue().wait_popped();
    std::thread::sleep(A_WHILE);
    let said = backend.stop();
    assert!(said.contains("1 failed"), "{said}");
}

#[test]
fn memory_comes_and_goes_while_the_device_is_stopped() {
    let image = Image::filled(1 << 20);
    let backend = full(&image, 1, "stop-timeout=400");
    let mut device = backend.device(&Profile::queues(2));
    let stuck = device.queue().start(&Request::write(8, &pattern(1, 4096)), &Framing::default());
    device.queue().wait_popped();
    std::thread::sleep(A_WHILE);
    let begin = Instant::now();
    // The whole table once more, as QEMU sends it when memory is plugged in.
    device.tell_memory(crate::frontend::device::MemoryBy::Table);
    assert!(begin.elapsed() < Duration::from_millis(250), "{:?}", begin.elapsed());
    assert_eq!(device.queue().finish(&[stuck]).remove(0).status, IOERR, "its status reaches the guest nevertheless");
    device.queue().works();
}

#[test]
fn errors_that_are_ignored_are_answered_as_if_all_were_well() {
    let image = Image::filled(1 << 20);
    let backend = full(&image, 1, "werror=ignore");
    let mut device = backend.device(&Profile::queues(2));
    let answer = device.queue().request(&Request::write(8, &pattern(1, 4096)));
    assert_eq!((answer.status, answer.used_len), (OK, 1));
    assert_eq!(image.read(4096, 4096), pattern(0, 1 << 20)[4096..8192], "nothing was written");
}

#[test]
fn reads_have_a_policy_of_their_own() {
    let image = Image::filled(1 << 20);
    let rules = "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,inject-error.0.sector=8";
    let backend = Setup::faulty(image.path(), rules).export("rerror=stop,stop-timeout=200").start();
    let mut device = backend.device(&Profile::qemu());
    let begin = Instant::now();
    let answer = device.queue().request(&Request::read(8, 4096));
    assert_eq!((answer.status, answer.used_len), (IOERR, 0));
    assert!(begin.elapsed() >= Duration::from_millis(200), "it was kept for a while");
    device.queue().write(0, &pattern(1, 512));
}
