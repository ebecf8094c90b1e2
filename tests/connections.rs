//! The socket and who is behind it: one front-end at a time, one after another, whatever they do (specification of the
//! device, sections 10 and 11).

use std::time::Duration;

use crate::backend::Setup;
use crate::frontend::blk::{Framing, Request};
use crate::frontend::device::Profile;
use crate::frontend::session::Session;
use crate::frontend::wait::{self, DEADLINE};
use crate::frontend::wire::{Connection, NoReply, VERSION, code, header};
use crate::image::pattern;

fn null() -> Setup {
    Setup::null(1 << 20)
}

#[test]
fn a_second_front_end_waits_and_is_served_when_the_first_goes() {
    let backend = null().start();
    let mut first = backend.device(&Profile::qemu());
    let second = backend.connect();
    second.send(code::GET_FEATURES, 0, &[], &[]).expect("send");
    for _ in 0..50 {
        first.queue().works();
        first.settle();
    }
    let answer = second.receive_within(Duration::ZERO);
    assert_eq!(answer.err(), Some(NoReply::Silent), "two front-ends at once");
    drop(first);
    assert_eq!(second.receive().expect("features").code, code::GET_FEATURES);
    crate::frontend::device::Device::negotiate(second, &Profile::qemu()).queue().works();
}

#[test]
fn front_ends_are_served_one_after_another_any_number_of_times() {
    let backend = null().start();
    for _ in 0..100 {
        backend.device(&Profile::qemu()).queue().works();
    }
}

#[test]
fn what_one_front_end_wrote_the_next_one_reads() {
    let image = crate::image::Image::empty(1 << 20);
    let backend = Setup::file(image.path()).start();
    let data = pattern(1, 4096);
    backend.device(&Profile::qemu()).queue().write(8, &data);
    assert_eq!(backend.device(&Profile::qemu()).queue().read(8, 4096), data);
}

#[test]
fn three_hundred_connections_one_after_another_leave_nothing_behind() {
    let backend = null().start();
    backend.device(&Profile::qemu()).queue().works();
    let quiet = || {
        let _device = backend.device(&Profile::qemu());
        backend.open_fds()
    };
    let before = quiet();
    for number in 0..300 {
        let connection = backend.connect();
        match number % 3 {
            // Gone at once, in the midst of a message, with an answer on its way.
            0 => {}
            1 => connection.send_bytes(&header(code::SET_FEATURES, VERSION, 8), &[]).expect("send"),
            _ => connection.send(code::GET_FEATURES, 0, &[], &[]).expect("send"),
        }
    }
    assert_eq!(quiet(), before, "descriptors are left open");
}

#[test]
fn three_hundred_connections_at_once_do_not_hinder_the_first() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    let connect = |_| Connection::open(backend.socket(), Duration::from_millis(1)).ok();
    let crowd: Vec<Connection> = (0..300).filter_map(connect).collect();
    assert!(!crowd.is_empty(), "{} connections wait", crowd.len());
    for _ in 0..100 {
        device.queue().works();
    }
    assert!(device.session.alive());
    drop(device);
    // The whole crowd leaves; who comes afterwards is served.
    drop(crowd);
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn every_one_of_a_waiting_crowd_is_served_in_turn() {
    let backend = null().start();
    let crowd: Vec<Connection> = (0..20).map(|_| backend.connect()).collect();
    for connection in crowd {
        Session::new(connection).get_features();
    }
}

#[test]
fn a_front_end_gone_with_requests_in_flight_is_followed_by_the_next() {
    let backend = Setup::slow(Duration::from_millis(200)).start();
    let mut device = backend.device(&Profile::qemu());
    let tickets: Vec<_> = (0..20).map(|_| device.queue().start(&Request::read(0, 4096), &Framing::default())).collect();
    device.queue().wait_popped();
    let memory = std::sync::Arc::clone(&device.memory);
    let placement = memory.regions()[0].placement;
    drop((device, tickets));
    // When the next one is answered, nobody writes into the memory of the one before.
    let mut next = backend.device(&Profile::qemu());
    memory.write(placement.guest, &vec![0xC3; 1 << 20]);
    next.queue().works();
    assert!(memory.read(placement.guest, 1 << 20).iter().all(|&byte| byte == 0xC3));
}

#[test]
fn the_back_end_stops_with_requests_in_flight() {
    let backend = Setup::slow(Duration::from_millis(200)).start();
    let mut device = backend.device(&Profile::qemu());
    let _ticket = device.queue().start(&Request::read(0, 4096), &Framing::default());
    device.queue().wait_popped();
    backend.stop();
}

#[test]
fn the_back_end_stops_with_front_ends_connected_and_waiting() {
    let backend = null().start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    let _waiting = [backend.connect(), backend.connect()];
    backend.stop();
    assert!(device.session.connection.closed_within(DEADLINE));
}

#[test]
fn the_socket_file_is_gone_after_a_stop() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("sock");
    let backend = null().at(&socket).start();
    assert!(socket.exists());
    backend.stop();
    assert!(!socket.exists(), "the socket file is left behind");
}

#[test]
fn a_stale_socket_file_is_replaced() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("sock");
    null().at(&socket).start().kill();
    assert!(socket.exists(), "a killed back-end leaves its socket file");
    let backend = null().at(&socket).start();
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn a_socket_that_is_in_use_is_left_to_its_owner() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("sock");
    let first = null().at(&socket).start();
    let mut device = first.device(&Profile::qemu());
    let Err((status, said)) = null().at(&socket).try_start() else { panic!("two back-ends on one socket") };
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains(&socket.display().to_string()), "the message does not name the socket:\n{said}");
    device.queue().works();
    drop(device);
    first.device(&Profile::qemu()).queue().works();
}

#[test]
fn an_idle_connection_is_kept() {
    let backend = null().start();
    let idle = backend.connect();
    // Said nothing at all for longer than a message in the making may take to arrive.
    assert!(!wait::readable(&idle, Duration::from_secs(11)), "the connection was closed");
    crate::frontend::device::Device::negotiate(idle, &Profile::qemu()).queue().works();
}

#[test]
fn memory_truncated_under_the_rings_fails_the_device_and_not_the_daemon() {
    memory_truncated(&null(), &[0, 1, 2]);
}

#[test]
fn memory_truncated_under_the_data_fails_the_device_and_not_the_daemon() {
    // Rings and headers stay; a memory disk copies with the CPU, a file has the kernel do it.
    let image = crate::image::Image::filled(1 << 20);
    memory_truncated_under_data(&Setup::new("d0", &["driver=memory,node-name=d0,size=1048576"]));
    memory_truncated_under_data(&Setup::file(image.path()));
}

/// Truncates these of the usual regions, offers a request that needs them, and expects the device to fail alone.
#[track_caller]
fn memory_truncated(setup: &Setup, regions: &[usize]) {
    let backend = setup.start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    let ticket = device.queue().prepare(&Request::read(0, 4096), &Framing::default());
    for &region in regions {
        device.memory.regions()[region].truncate_file();
    }
    // From here on this process may not touch that memory either.
    device.queues[0].kick.signal();
    assert!(device.fails_within(DEADLINE), "neither an error event nor the end of the connection");
    drop((device, ticket));
    backend.device(&Profile::qemu()).queue().works();
    backend.stop();
}

/// Truncates a region of its own that holds nothing but the data of a read and of a write.
#[track_caller]
fn memory_truncated_under_data(setup: &Setup) {
    use crate::frontend::memory::Placement;
    use crate::frontend::queue::{Buffer, Table};
    let backend = setup.start();
    let mut device = backend.device(&Profile::qemu());
    let placement = Placement { guest: 0x20_0000_0000, user: 0x4000_0000_0000, size: 1 << 20, file_offset: 0 };
    let region = device.memory.add(placement);
    device.tell_memory(crate::frontend::device::MemoryBy::Table);
    region.truncate_file();
    for (kind, data) in [(0u32, true), (1, false)] {
        let queue = device.queue();
        let header = queue.arena.cut(16, 16, 0);
        let status = queue.arena.cut(1, 1, 0);
        queue.memory.write(header, &[&kind.to_le_bytes()[..], &[0; 12]].concat());
        queue.memory.write(status, &[crate::frontend::blk::NO_STATUS]);
        let buffers = [
            Buffer { addr: header, len: 16, writable: false },
            Buffer { addr: placement.guest, len: 4096, writable: data },
            Buffer { addr: status, len: 1, writable: true },
        ];
        queue.submit(&buffers, Table::Direct);
        // The request fails, or the whole device does.
        let mut failed = false;
        wait::until("the request or the device fails", || {
            failed = failed || device.fails_within(Duration::ZERO);
            failed || device.queue().try_take().is_some()
        });
        if failed {
            break;
        }
        assert_ne!(device.memory.read(status, 1), [crate::frontend::blk::OK], "the data is gone");
    }
    drop(device);
    backend.device(&Profile::qemu()).queue().works();
    backend.stop();
}

crate::on_packed_rings! {
    front_ends_are_served_one_after_another_any_number_of_times,
    a_front_end_gone_with_requests_in_flight_is_followed_by_the_next,
    memory_truncated_under_the_rings_fails_the_device_and_not_the_daemon,
}
