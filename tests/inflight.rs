//! The in-flight region over the socket: a daemon that is killed and started again loses no request, completes none
//! twice, and remembers the write cache; regions that are wrong are refused.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::backend::{Backend, Setup};
use crate::frontend::blk::{Framing, OK, Request, Ticket};
use crate::frontend::device::{Device, Profile};
use crate::frontend::session::{Inflight, protocol};
use crate::frontend::wait::{self, DEADLINE};
use crate::image::{Image, pattern};

/// Kills the daemon and starts another one, to which the front-end comes back.
#[track_caller]
fn dies(setup: &Setup, backend: Backend, device: &mut Device) -> Backend {
    backend.kill();
    let backend = setup.start();
    device.reconnect(backend.connect());
    backend
}

#[track_caller]
fn all_ok(device: &mut Device, queue: usize, tickets: &[Ticket]) {
    assert!(device.queues[queue].finish(tickets).iter().all(|answer| answer.status == OK));
    assert!(!device.queues[queue].has_completion(), "something is completed twice");
}

#[test]
fn requests_in_flight_when_the_daemon_dies_are_served_by_the_next() {
    let setup = Setup::slow(Duration::from_millis(300));
    let backend = setup.start();
    let mut device = backend.device(&Profile::qemu());
    let read = Request::read(0, 512);
    let tickets: Vec<_> = (0..20).map(|_| device.queue().start(&read, &Framing::default())).collect();
    device.queue().wait_popped();
    let backend = dies(&setup, backend, &mut device);
    all_ok(&mut device, 0, &tickets);
    device.queue().works();
    let base = device.stop_queue(0);
    assert!(device.queue().is_drained(base));
    drop(backend);
}

#[test]
fn the_next_daemon_is_quick() {
    let setup = Setup::slow(Duration::from_millis(100));
    let backend = setup.start();
    let mut device = backend.device(&Profile::qemu());
    let ticket = device.queue().start(&Request::read(0, 512), &Framing::default());
    device.queue().wait_popped();
    backend.kill();
    let start = Instant::now();
    let backend = setup.start();
    let listens = start.elapsed();
    device.reconnect(backend.connect());
    all_ok(&mut device, 0, &[ticket]);
    println!(
        "listens after {listens:?}, the first request is complete after {:?}, 100 ms of it its own",
        start.elapsed()
    );
}

/// Writes on two queues; the daemon is killed at any moment, `kills` times. What was answered, before or after, is there.
#[track_caller]
fn survives_kills(kills: u32) {
    let image = Image::empty(1 << 20);
    let setup = Setup::file(image.path()).export("num-queues=2").iothreads(2);
    let mut backend = setup.start();
    let mut device = backend.device(&Profile::queues(2));
    let free: Vec<_> = device.queues.iter().map(|queue| queue.arena.mark()).collect();
    for round in 0..kills {
        let sector = |queue: usize, n: u64| 512 * queue as u64 + 8 * n;
        let data = |queue: usize, n: u64| pattern(round << 8 | (queue as u32) << 6 | n as u32, 4096);
        let mut tickets = [Vec::new(), Vec::new()];
        // Some complete before the end, some are in flight, some not even seen.
        let pause = Duration::from_micros(u64::from(round * 7919 % 1500));
        let end = Instant::now() + pause;
        for n in 0..30 {
            for (queue, tickets) in tickets.iter_mut().enumerate() {
                let write = Request::write(sector(queue, n), &data(queue, n));
                tickets.push(device.queues[queue].start(&write, &Framing::default()));
            }
        }
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        backend = dies(&setup, backend, &mut device);
        for (queue, tickets) in tickets.iter().enumerate() {
            all_ok(&mut device, queue, tickets);
            device.queues[queue].arena.release(&free[queue]);
            for n in 0..30 {
                assert!(image.read(512 * sector(queue, n), 4096) == data(queue, n), "round {round}, write {n}");
            }
        }
    }
    device.queue().works();
}

fn kills() -> u32 {
    if std::env::var_os("BLOCKPORT_TEST_DEEP").is_some() { 500 } else { 8 }
}

#[test]
fn a_daemon_killed_at_random_loses_nothing() {
    survives_kills(kills());
}

#[test]
fn a_reconnect_without_a_death_goes_on() {
    let backend = Setup::slow(Duration::from_millis(50)).start();
    let mut device = backend.device(&Profile::qemu());
    for _ in 0..5 {
        let read = Request::read(0, 512);
        let tickets: Vec<_> = (0..10).map(|_| device.queue().start(&read, &Framing::default())).collect();
        device.reconnect(backend_after(&backend, &device));
        all_ok(&mut device, 0, &tickets);
    }
}

/// Another connection, the old one being shut down.
fn backend_after(backend: &Backend, device: &Device) -> crate::frontend::wire::Connection {
    rustix::net::shutdown(&device.session.connection, rustix::net::Shutdown::Both).expect("a connected socket");
    backend.connect()
}

#[test]
fn a_region_from_before_the_device_s_reset_is_forgotten() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    for _ in 0..3 {
        for _ in 0..5 {
            device.queue().works();
        }
        device.stop_queue(0);
        device.session.reset_device().accepted();
        device.queue().reset();
        device.start_queue(0);
    }
    device.queue().works();
}

#[test]
fn the_write_cache_outlives_the_daemon() {
    let image = Image::empty(1 << 20);
    let setup = Setup::file(image.path());
    for on in [true, false] {
        let backend = setup.start();
        let mut device = backend.device(&Profile::qemu());
        device.set_writeback(on).accepted();
        let backend = dies(&setup, backend, &mut device);
        assert_eq!(device.writeback(), on);
        device.queue().works();
        drop((device, backend));
    }
}

#[test]
fn a_ring_larger_than_the_region_is_refused() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::unstarted());
    device.announce(crate::frontend::device::MemoryBy::Table);
    let region = device.session.get_inflight_fd(1, 64);
    device.session.set_inflight_fd(&region).accepted();
    // Firmware makes rings that are larger than the front-end's device says.
    device.session.set_vring_num(0, 2048).refused();
    device.session.set_vring_num(0, 1024).accepted();
}

#[test]
fn a_region_that_is_wrong_is_refused() {
    let backend = Setup::null(1 << 20).export("num-queues=2").start();
    let mut device = backend.device(&Profile { starts: false, ..Profile::queues(2) });
    device.announce(crate::frontend::device::MemoryBy::Table);
    let good = device.session.get_inflight_fd(2, 128);
    let fd = || good.fd.try_clone().expect("a descriptor");
    let like = |fd: OwnedFd| Inflight { fd, size: good.size, offset: 0, num_queues: 2, queue_size: 128 };
    for bad in [
        Inflight { num_queues: 3, ..like(fd()) },
        Inflight { queue_size: 32768, ..like(fd()) },
        Inflight { size: 64, ..like(fd()) },
        Inflight { size: u64::MAX, ..like(fd()) },
        Inflight { offset: 32, ..like(fd()) },
        Inflight { offset: 4096, ..like(fd()) },
        like(device.queues[0].kick.as_fd().try_clone_to_owned().expect("a descriptor")),
    ] {
        device.session.set_inflight_fd(&bad).refused();
    }
    device.session.set_inflight_fd(&good).accepted();
    device.start_queue(0);
    device.queue().works();
    device.session.set_inflight_fd(&good).refused();
    device.queue().works();
}

#[test]
fn a_region_of_garbage_stops_no_other_queue() {
    let backend = Setup::null(1 << 20).export("num-queues=2").start();
    let mut device = backend.device(&Profile { starts: false, ..Profile::queues(2) });
    device.announce(crate::frontend::device::MemoryBy::Table);
    let file = std::fs::File::from(device.inflight.as_ref().expect("agreed").fd.try_clone().expect("a descriptor"));
    // The version is one that nobody knows, in the first queue's part.
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 16], 0).expect("a memfd");
    device.start_queue(1);
    device.set_up_queue(0);
    device.session.set_vring_kick(0, Some(device.queues[0].kick.as_fd())).refused();
    device.queues[1].works();
}

#[test]
fn a_truncated_region_fails_the_device_and_not_the_daemon() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::unstarted());
    device.announce(crate::frontend::device::MemoryBy::Table);
    let own = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&own, 1 << 20).expect("room");
    let region = Inflight { fd: own, size: 1 << 20, offset: 0, num_queues: 1, queue_size: 128 };
    device.session.set_inflight_fd(&region).accepted();
    device.start_queue(0);
    device.queue().works();
    rustix::fs::ftruncate(&region.fd, 0).expect("ftruncate of a memfd");
    let _ticket = device.queue().start(&Request::read(0, 512), &Framing::default());
    assert!(device.fails_within(DEADLINE), "neither an error event nor the end of the connection");
    drop(device);
    wait::until("the daemon serves the next", || backend.is_running());
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn no_region_is_given_where_none_was_agreed() {
    let backend = Setup::null(1 << 20).start();
    let qemu = Profile::qemu();
    let profile = Profile { protocol_features: qemu.protocol_features & !protocol::INFLIGHT_SHMFD, ..qemu };
    let mut device = backend.device(&profile);
    assert!(device.inflight.is_none());
    device.queue().works();
}

/// A disk of which the first write to sector 8 finds no space, for a front-end that takes kept requests along.
fn full(image: &Image) -> (Setup, Profile) {
    let rule = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.sector=8,\
                inject-error.0.once=on";
    let qemu = Profile::qemu();
    let agreed = qemu.protocol_features | protocol::GET_VRING_BASE_INFLIGHT;
    (Setup::faulty(image.path(), rule).export("werror=stop"), Profile { protocol_features: agreed, ..qemu })
}

#[test]
fn what_a_full_host_keeps_goes_on_when_its_ring_does() {
    let image = Image::empty(1 << 20);
    let (setup, profile) = full(&image);
    let backend = setup.start();
    let mut device = backend.device(&profile);
    let ticket = device.queue().start(&Request::write(8, &pattern(1, 4096)), &Framing::default());
    device.queue().wait_popped();
    device.settle();
    device.stop_queue(0);
    assert!(!device.queue().has_completion(), "the guest is told nothing");
    device.start_queue(0);
    all_ok(&mut device, 0, &[ticket]);
    assert!(image.read(4096, 4096) == pattern(1, 4096));
    device.queue().works();
}

#[test]
fn what_a_full_host_keeps_goes_on_at_another_daemon() {
    let image = Image::empty(1 << 20);
    let (setup, profile) = full(&image);
    let backend = setup.start();
    let mut device = backend.device(&profile);
    let ticket = device.queue().start(&Request::write(8, &pattern(1, 4096)), &Framing::default());
    device.queue().wait_popped();
    device.settle();
    device.stop_queue(0);
    backend.stop();
    let other = Setup::file(image.path()).start();
    device.reconnect(other.connect());
    all_ok(&mut device, 0, &[ticket]);
    assert!(image.read(4096, 4096) == pattern(1, 4096));
}

#[test]
fn requests_stay_in_a_region_only_where_there_is_one() {
    let backend = Setup::null(1 << 20).start();
    let mut session = crate::frontend::session::Session::new(backend.connect());
    session.get_features();
    session.set_protocol_features(protocol::REPLY_ACK).accepted();
    session.set_protocol_features(protocol::REPLY_ACK | protocol::GET_VRING_BASE_INFLIGHT).refused();
}

crate::on_packed_rings! {
    what_a_full_host_keeps_goes_on_when_its_ring_does,
    what_a_full_host_keeps_goes_on_at_another_daemon,
    requests_in_flight_when_the_daemon_dies_are_served_by_the_next,
    a_daemon_killed_at_random_loses_nothing,
    a_reconnect_without_a_death_goes_on,
    a_region_from_before_the_device_s_reset_is_forgotten,
    the_write_cache_outlives_the_daemon,
    a_truncated_region_fails_the_device_and_not_the_daemon,
}
