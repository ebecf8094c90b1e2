//! Guest memory (specification of the device, section 6): regions told, refused, removed and replaced.

use std::os::fd::AsFd;

use crate::backend::Setup;
use crate::frontend::blk::{OK, UNREAD};
use crate::frontend::device::{MemoryBy, Profile};
use crate::frontend::memory::{Placement, Region, USUAL};
use crate::frontend::queue::{Buffer, Queue, Table};
use crate::frontend::wait::{DEADLINE, Stop};

const PAGE: u64 = 4096;

/// Far from the usual regions in every address space.
fn elsewhere(number: u64, size: u64) -> Placement {
    Placement {
        guest: 0x20_0000_0000 + number * (16 << 20),
        user: 0x4000_0000_0000 + number * (32 << 20),
        size,
        file_offset: 0,
    }
}

fn slots() -> Profile {
    Profile { memory_by: MemoryBy::Slots, ..Profile::qemu() }
}

/// Starts a read of a sector into a buffer at `guest`; returns where the status will be.
fn start_read_into(queue: &mut Queue, guest: u64) -> u64 {
    let header = queue.arena.cut(16, 16, 0);
    let status = queue.arena.cut(1, 1, 0);
    queue.memory.write(header, &[0; 16]);
    let buffers = [
        Buffer { addr: header, len: 16, writable: false },
        Buffer { addr: guest, len: 512, writable: true },
        Buffer { addr: status, len: 1, writable: true },
    ];
    queue.submit(&buffers, Table::Direct);
    status
}

/// Reads a sector into a buffer at `guest`.
#[track_caller]
fn read_into(queue: &mut Queue, guest: u64) {
    queue.memory.write(guest, &[UNREAD; 512]);
    let status = start_read_into(queue, guest);
    assert_eq!(queue.take().len, 513);
    assert_eq!(queue.memory.read(status, 1), [OK]);
    assert_eq!(queue.memory.read(guest, 512), [0; 512]);
}

/// A table of these placements, each with a file of its own that is as long as `file` says, is refused.
#[track_caller]
fn table_is_refused(placements: &[Placement]) {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::unstarted());
    let file = Region::new(elsewhere(0, 1 << 20));
    let fds = vec![file.as_fd(); placements.len()];
    device.session.set_mem_table_raw(placements, &fds).refused();
    device.announce(MemoryBy::Table);
    device.start_queue(0);
    device.queue().works();
}

/// A region with this placement is refused when the usual ones are there already.
#[track_caller]
fn region_is_refused(placement: Placement) {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let file = Region::new(elsewhere(0, 1 << 20));
    device.session.add_mem_reg_raw(&placement, file.as_fd()).refused();
    device.queue().works();
}

#[test]
fn a_table_with_overlapping_guest_addresses_is_refused() {
    let (one, two) = (elsewhere(0, 1 << 20), elsewhere(1, 1 << 20));
    table_is_refused(&[one, Placement { guest: one.guest + one.size - PAGE, ..two }]);
}

#[test]
fn a_table_longer_than_its_file_is_refused() {
    table_is_refused(&[Placement { size: (1 << 20) + PAGE, ..elsewhere(0, 0) }]);
}

#[test]
fn a_table_that_starts_past_the_end_of_its_file_is_refused() {
    table_is_refused(&[Placement { file_offset: 1 << 20, ..elsewhere(0, PAGE) }]);
}

#[test]
fn a_region_that_overlaps_another_is_refused() {
    region_is_refused(Placement { guest: USUAL[2].guest + USUAL[2].size - PAGE, ..elsewhere(0, 1 << 20) });
}

#[test]
fn a_region_inside_another_is_refused() {
    region_is_refused(Placement { guest: USUAL[2].guest + PAGE, ..elsewhere(0, PAGE) });
}

#[test]
fn a_region_around_another_is_refused() {
    let around = Placement { guest: USUAL[0].guest - PAGE, size: USUAL[0].size + 2 * PAGE, ..elsewhere(0, 0) };
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let file = Region::new(Placement { ..around });
    device.session.add_mem_reg(&file).refused();
    device.queue().works();
}

#[test]
fn a_region_longer_than_its_file_is_refused() {
    region_is_refused(elsewhere(0, (1 << 20) + PAGE));
}

#[test]
fn a_region_that_starts_past_the_end_of_its_file_is_refused() {
    region_is_refused(Placement { file_offset: 2 << 20, ..elsewhere(0, PAGE) });
}

#[test]
fn a_region_of_absurd_size_is_refused() {
    region_is_refused(elsewhere(0, 1 << 46));
}

#[test]
fn regions_that_wrap_or_are_empty_are_not_accepted() {
    // Some of these are refused while the message is parsed, which ends the connection.
    for placement in [
        Placement { guest: u64::MAX - PAGE + 1, ..elsewhere(0, 2 * PAGE) },
        Placement { user: u64::MAX - PAGE + 1, ..elsewhere(0, 2 * PAGE) },
        Placement { file_offset: u64::MAX - PAGE + 1, ..elsewhere(0, 2 * PAGE) },
        elsewhere(0, 0),
        elsewhere(0, u64::MAX),
    ] {
        let backend = Setup::null(1 << 20).start();
        let file = Region::new(elsewhere(0, 1 << 20));
        let device = backend.device(&slots());
        device.session.add_mem_reg_raw(&placement, file.as_fd()).not_accepted();
        drop(device);
        let device = backend.device(&Profile::unstarted());
        device.session.set_mem_table_raw(&[placement], &[file.as_fd()]).not_accepted();
        drop(device);
        backend.device(&Profile::qemu()).queue().works();
    }
}

#[test]
fn a_descriptor_that_cannot_be_mapped_is_refused() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    device.session.add_mem_reg_raw(&elsewhere(0, PAGE), socket.as_fd()).refused();
    device.queue().works();
}

#[test]
fn an_added_region_is_used() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let region = device.memory.add(elsewhere(0, 1 << 20));
    device.session.add_mem_reg(&region).accepted();
    read_into(device.queue(), region.placement.guest);
    read_into(device.queue(), region.placement.guest + region.placement.size - 512);
}

#[test]
fn a_removed_region_is_out_of_reach() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let region = device.memory.add(elsewhere(0, 1 << 20));
    device.session.add_mem_reg(&region).accepted();
    read_into(device.queue(), region.placement.guest);
    device.session.rem_mem_reg(&region.placement).accepted();
    device.queue().memory.write(region.placement.guest, &[UNREAD; 512]);
    start_read_into(device.queue(), region.placement.guest);
    assert!(device.queue().reports_error(DEADLINE), "an address outside the table breaks the queue");
    assert_eq!(device.memory.read(region.placement.guest, 512), [UNREAD; 512]);
}

#[test]
fn a_removed_region_leaves_the_others() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let region = device.memory.add(elsewhere(0, 1 << 20));
    device.session.add_mem_reg(&region).accepted();
    device.session.rem_mem_reg(&region.placement).accepted();
    device.queue().works();
    // The same place may be taken again.
    device.session.add_mem_reg(&region).accepted();
    read_into(device.queue(), region.placement.guest);
}

#[test]
fn a_region_removed_with_its_descriptor_is_removed() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let region = device.memory.add(elsewhere(0, 1 << 20));
    device.session.add_mem_reg(&region).accepted();
    device.session.rem_mem_reg_with_fd(&region).accepted();
    device.queue().works();
}

#[test]
fn removing_an_unknown_region_is_refused() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    device.session.rem_mem_reg(&elsewhere(0, 1 << 20)).refused();
    device.session.rem_mem_reg(&Placement { size: PAGE, ..USUAL[2] }).refused();
    device.queue().works();
}

#[test]
fn five_hundred_regions_are_served() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let taken = USUAL.len() as u64;
    for number in 0..500 - taken {
        let region = device.memory.add(elsewhere(number, 4 * PAGE));
        device.session.add_mem_reg(&region).accepted();
    }
    for number in [0, 1, 250, 499 - taken] {
        read_into(device.queue(), elsewhere(number, 0).guest + PAGE);
    }
}

#[test]
fn more_regions_than_slots_are_refused() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let most = device.session.get_max_mem_slots();
    assert!(most <= 4096, "{most} slots are more than this test can fill");
    let file = Region::new(elsewhere(0, PAGE));
    for number in 0..most - USUAL.len() as u64 {
        device.session.add_mem_reg_raw(&elsewhere(number, PAGE), file.as_fd()).accepted();
    }
    device.session.add_mem_reg_raw(&elsewhere(most, PAGE), file.as_fd()).refused();
    device.queue().works();
    device.session.rem_mem_reg(&elsewhere(7, PAGE)).accepted();
    device.session.add_mem_reg_raw(&elsewhere(most, PAGE), file.as_fd()).accepted();
}

#[test]
fn a_new_table_on_running_rings_is_used() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    let added = device.memory.add(elsewhere(0, 1 << 20));
    let regions = device.memory.regions();
    let regions: Vec<&Region> = regions.iter().map(AsRef::as_ref).collect();
    device.session.set_mem_table(&regions).accepted();
    read_into(device.queue(), added.placement.guest);
    device.queue().works();
}

#[test]
fn memory_added_and_removed_under_load_disturbs_no_request() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    let mut queue = device.queues.remove(0);
    let (session, memory) = (&device.session, &device.memory);
    let stop = Stop::default();
    let served = std::thread::scope(|scope| {
        let _guard = stop.guard();
        let load = scope.spawn(|| {
            let mut served = 0;
            while !stop.is_set() {
                queue.works();
                served += 1;
            }
            served
        });
        for number in 0..300 {
            let region = memory.add(elsewhere(number, 4 * PAGE));
            session.add_mem_reg(&region).accepted();
            if number % 2 == 1 {
                session.rem_mem_reg(&region.placement).accepted();
            }
        }
        stop.set();
        load.join().expect("the load goes on")
    });
    assert!(served > 0, "no request was served meanwhile");
}

#[test]
fn a_table_without_the_rings_that_run_in_it_harms_nobody_else() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    let other = Region::new(elsewhere(0, 1 << 20));
    // Refused, or the rings are broken; neither ends the daemon.
    let _ = device.session.set_mem_table(&[&other]);
    device.queue().kick.signal();
    drop(device);
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn the_region_of_a_running_ring_removed_harms_nobody_else() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&slots());
    device.queue().works();
    for placement in USUAL {
        let _ = device.session.rem_mem_reg(&placement);
    }
    device.queue().kick.signal();
    drop(device);
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn memory_is_not_held_after_the_front_end_is_gone() {
    let backend = Setup::null(1 << 20).start();
    let maps = || std::fs::read_to_string(backend.proc("maps")).expect("maps of a running process");
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    assert!(maps().contains("guest-memory"), "guest memory is mapped");
    drop(device);
    // The next front-end is answered when the one before is cleaned up.
    backend.device(&Profile::unstarted());
    assert!(!maps().contains("guest-memory"), "guest memory is still mapped");
}

crate::on_packed_rings! {
    a_new_table_on_running_rings_is_used,
    memory_added_and_removed_under_load_disturbs_no_request,
    the_region_of_a_running_ring_removed_harms_nobody_else,
}
