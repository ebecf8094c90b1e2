//! The dirty log: a front-end that migrates its guest learns of every page that the device writes, in time, and of no
//! other; switching it on, off and over to another log is a barrier (specification of the device, section 8).

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::backend::{Backend, Setup};
use crate::frontend::blk::{Framing, IOERR, OK, Request, Ticket, feature};
use crate::frontend::device::{Device, MemoryBy, Profile};
use crate::frontend::queue::Queue;
use crate::frontend::session::{Ack, protocol};
use crate::frontend::wait::{self, DEADLINE};
use crate::image::{Image, pattern};

const PAGE: u64 = 4096;
/// VHOST_VRING_F_LOG.
const F_LOG: u32 = 1;
/// Where the ring is logged: no guest memory is there.
const RING_LOG: u64 = 0x2_0000_0000;
/// Bytes of a log with room for all of that.
const LOG_BYTES: u64 = (RING_LOG + (16 << 20)) / PAGE / 8;

type Pages = BTreeSet<u64>;

struct Log(File);

impl Log {
    fn new(bytes: u64) -> Self {
        let file = File::from(rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(bytes).expect("room");
        Self(file)
    }

    fn pages(&self) -> Pages {
        let mut bytes = vec![0; self.0.metadata().expect("a memfd").len() as usize];
        self.0.read_exact_at(&mut bytes, 0).expect("a memfd");
        let set = bytes.iter().enumerate().filter(|(_, byte)| **byte != 0);
        set.flat_map(|(at, byte)| (0..8).filter(move |bit| byte & 1 << bit != 0).map(move |bit| 8 * at as u64 + bit))
            .collect()
    }

    /// Waits until exactly these pages are marked; one that is none of them fails at once.
    #[track_caller]
    fn holds(&self, expected: &Pages) {
        wait::until("the log holds all that was written", || {
            let pages = self.pages();
            let more: Vec<_> = pages.difference(expected).collect();
            assert!(more.is_empty(), "pages {more:x?} are marked, and were not written; {expected:x?} were");
            &pages == expected
        });
    }

    fn clear(&self) {
        self.0.set_len(0).and_then(|()| self.0.set_len(LOG_BYTES)).expect("a memfd");
    }
}

fn pages_of(addr: u64, bytes: u64) -> Pages {
    (addr / PAGE..=(addr + bytes - 1) / PAGE).collect()
}

/// The pages that the device may write for a request.
fn written_for(ticket: &Ticket) -> Pages {
    let writable = ticket.buffers.iter().filter(|buffer| buffer.writable);
    writable.flat_map(|buffer| pages_of(buffer.addr, buffer.len.into())).collect()
}

/// The pages that the device writes into a ring when it completes the `count` chains, of one entry each, from `from` on.
fn written_in_ring(queue: &Queue, from: u64, count: u64) -> Pages {
    let ring = &queue.ring;
    let size = u64::from(ring.size);
    let mut pages = Pages::new();
    for at in from..from + count {
        pages.extend(match ring.packed {
            true => pages_of(ring.descriptors + 16 * (at % size), 16),
            false => pages_of(RING_LOG + 4 + 8 * (at % size), 8),
        });
    }
    match (ring.packed, queue.event_idx) {
        (true, _) => pages.extend(pages_of(RING_LOG, 4)),
        // The index, and our wish for kicks.
        (false, true) => pages.extend([RING_LOG / PAGE, (RING_LOG + 4 + 8 * size) / PAGE]),
        (false, false) => pages.extend(pages_of(RING_LOG, 4)),
    }
    pages
}

/// Begins to log to `log`, as QEMU does: the log, then the feature, then the rings.
#[track_caller]
fn begin(device: &mut Device, log: &Log) {
    device.session.set_log_base(log.0.as_fd(), LOG_BYTES, 0).accepted();
    switch(device, true);
}

#[track_caller]
fn switch(device: &mut Device, on: bool) {
    let features = device.session.features & !feature::LOG_ALL | if on { feature::LOG_ALL } else { 0 };
    device.session.set_features(features).accepted();
    for queue in 0..device.queues.len() {
        let mut addresses = device.addresses(queue);
        (addresses.flags, addresses.log) = if on { (F_LOG, RING_LOG) } else { (0, 0) };
        device.session.set_vring_addr(queue as u32, &addresses).accepted();
    }
}

/// One chain, one entry, whatever the layout.
fn indirect() -> Framing {
    Framing::table(crate::frontend::queue::Table::Indirect)
}

/// A queue large enough that its used ring has several pages.
fn large() -> Profile {
    Profile { queue_size: 1024, ..Profile::qemu() }
}

fn marks_all_and_no_more(profile: &Profile) {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(profile);
    let log = Log::new(LOG_BYTES);
    for _ in 0..5 {
        device.queue().perform(&Request::read(0, 512), &indirect());
    }
    begin(&mut device, &log);
    let mut expected = Pages::new();
    for n in 0..600 {
        let request = match n % 4 {
            0 => Request::read(0, 512),
            1 => Request::read(8, 12 * 4096),
            2 => Request::write(8, &pattern(n, 8192)),
            _ => Request::get_id(),
        };
        let mark = device.queue().arena.mark();
        let framing = Framing { skew: u64::from(n) * 8 % 512, ..indirect() };
        let ticket = device.queue().start(&request, &framing);
        let used = device.queue().take();
        assert_eq!(device.queue().answer(&ticket, used).status, OK);
        expected.extend(written_for(&ticket));
        device.queue().arena.release(&mark);
    }
    expected.extend(written_in_ring(device.queue(), 5, 600));
    log.holds(&expected);
    device.stop_queue(0);
    assert_eq!(log.pages(), expected, "the stop wrote something else");
}

#[test]
fn the_pages_that_are_written_are_marked_and_no_others() {
    marks_all_and_no_more(&large());
}

#[test]
fn so_are_they_without_event_indices() {
    marks_all_and_no_more(&Profile { queue_size: 1024, ..Profile::without(feature::EVENT_IDX) });
}

#[test]
fn so_are_they_without_an_inflight_region() {
    let wanted = Profile::qemu().protocol_features & !protocol::INFLIGHT_SHMFD;
    marks_all_and_no_more(&Profile { protocol_features: wanted, ..large() });
}

#[test]
fn a_ring_that_is_not_to_be_logged_is_not() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&large());
    let log = Log::new(LOG_BYTES);
    device.session.set_log_base(log.0.as_fd(), LOG_BYTES, 0).accepted();
    let features = device.session.features | feature::LOG_ALL;
    device.session.set_features(features).accepted();
    let ticket = device.queue().start(&Request::read(0, 8192), &indirect());
    device.queue().finish(std::slice::from_ref(&ticket));
    device.stop_queue(0);
    assert_eq!(log.pages(), written_for(&ticket));
}

#[test]
fn logging_begins_with_requests_that_are_in_flight() {
    let backend = Setup::slow(Duration::from_millis(400)).iothreads(2).export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    let (old, new) = (Log::new(LOG_BYTES), Log::new(LOG_BYTES));
    let tickets: Vec<Ticket> =
        device.queues.iter_mut().map(|queue| queue.start(&Request::read(0, 8192), &indirect())).collect();
    device.queues.iter().for_each(Queue::wait_popped);
    begin(&mut device, &old);
    device.session.set_log_base(new.0.as_fd(), LOG_BYTES, 0).accepted();
    let before = old.pages();
    for (queue, ticket) in tickets.iter().enumerate() {
        // Nobody waited for them.
        device.queues[queue].finish(std::slice::from_ref(ticket));
        assert!(written_for(ticket).is_subset(&new.pages()), "queue {queue}");
    }
    assert_eq!(old.pages(), before, "the old log is no longer written to");
}

/// Ends the load when the test does, in whichever way.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Requests without end on a queue, each checked by what `judge` is told of it: its pages, and what the test said when it
/// began and when it had ended.
fn under_load(queue: &mut Queue, over: &AtomicBool, phase: &AtomicBool, judge: impl Fn(bool, bool, &Pages)) -> u32 {
    let mark = queue.arena.mark();
    let mut count = 0;
    while !over.load(Ordering::Acquire) {
        let began = phase.load(Ordering::Acquire);
        let ticket = queue.start(&Request::read(0, 4096), &indirect());
        let used = queue.take();
        assert_eq!(queue.answer(&ticket, used).status, OK);
        judge(began, phase.load(Ordering::Acquire), &written_for(&ticket));
        queue.arena.release(&mark);
        count += 1;
    }
    count
}

#[test]
fn logging_goes_on_and_off_under_load() {
    let backend = Setup::null(1 << 20).iothreads(2).export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    let log = Log::new(LOG_BYTES);
    device.session.set_log_base(log.0.as_fd(), LOG_BYTES, 0).accepted();
    let mut queues = std::mem::take(&mut device.queues);
    let (over, on) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let _ends = Ends(&over);
        for queue in &mut queues {
            let (log, over, on) = (&log, &over, &on);
            scope.spawn(move || {
                under_load(queue, over, on, |began, ended, pages| {
                    if began && ended {
                        assert!(pages.is_subset(&log.pages()), "{pages:x?} are not marked");
                    }
                })
            });
        }
        for _ in 0..20 {
            switch(&mut device, true);
            on.store(true, Ordering::Release);
            std::thread::sleep(Duration::from_millis(5));
            on.store(false, Ordering::Release);
            switch(&mut device, false);
            let last = log.pages();
            assert!(!last.is_empty());
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(log.pages(), last, "it was switched off");
        }
    });
    device.queues = queues;
}

#[test]
fn the_log_before_is_not_written_to_once_the_next_one_is_taken() {
    let backend = Setup::null(1 << 20).iothreads(2).export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    let mut logs = vec![Log::new(LOG_BYTES)];
    begin(&mut device, &logs[0]);
    let mut queues = std::mem::take(&mut device.queues);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ends = Ends(&over);
        for queue in &mut queues {
            let over = &over;
            scope.spawn(move || under_load(queue, over, over, |_, _, _| {}));
        }
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(2));
            let next = Log::new(LOG_BYTES);
            device.session.set_log_base(next.0.as_fd(), LOG_BYTES, 0).accepted();
            let last = logs.last().expect("the first one");
            // What is cleared stays clear.
            rustix::fs::fallocate(
                &last.0,
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                0,
                LOG_BYTES,
            )
            .expect("a hole in a memfd");
            logs.push(next);
        }
        let last = logs.last().expect("the first one");
        wait::until("requests are logged in the last one", || !last.pages().is_empty());
    });
    let (_, others) = logs.split_last().expect("many");
    assert!(others.iter().all(|log| log.pages().is_empty()));
    device.queues = queues;
}

#[test]
fn a_read_that_fails_is_marked_too() {
    let image = Image::filled(1 << 20);
    let rule = "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,inject-error.0.sector=8";
    let backend = Setup::faulty(image.path(), rule).start();
    let mut device = backend.device(&Profile::qemu());
    let log = Log::new(LOG_BYTES);
    begin(&mut device, &log);
    let ticket = device.queue().start(&Request::read(0, 16384), &indirect());
    assert_eq!(device.queue().finish(std::slice::from_ref(&ticket)).remove(0).status, IOERR);
    assert!(written_for(&ticket).is_subset(&log.pages()));
}

#[test]
fn a_request_that_was_kept_is_marked_although_memory_has_changed() {
    let image = Image::filled(1 << 20);
    let rule = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.sector=8";
    let backend = Setup::faulty(image.path(), rule).export("werror=stop").start();
    let mut device = backend.device(&Profile::qemu());
    let log = Log::new(LOG_BYTES);
    let ticket = device.queue().start(&Request::write(8, &pattern(1, 4096)), &indirect());
    device.queue().wait_popped();
    // The same memory, mapped anew; the request still has the old one.
    device.tell_memory(MemoryBy::Table);
    begin(&mut device, &log);
    device.tell_memory(MemoryBy::Table);
    device.stop_queue(0);
    assert_eq!(device.queue().finish(std::slice::from_ref(&ticket)).remove(0).status, IOERR);
    assert!(written_for(&ticket).is_subset(&log.pages()));
}

/// The next front-end is served.
fn goes_on(backend: &Backend) {
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn a_log_that_does_not_cover_guest_memory_is_refused() {
    let backend = Setup::null(1 << 20).start();
    // The last byte of guest memory is in the last bit.
    let end: u64 = 0x1_0000_0000 + (16 << 20);
    let enough = end / PAGE / 8;
    for (size, offset, taken) in [
        (enough, 0, true),
        (enough, 4096, true),
        (enough - 1, 0, false),
        (1, 0, false),
        (0, 0, false),
        (enough + 4097, 0, false),
        (u64::MAX, 1, false),
        (1 << 62, 0, false),
    ] {
        let device = backend.device(&Profile::qemu());
        let log = Log::new(enough + 4096);
        let expected = if taken { Ack::Accepted } else { Ack::Closed };
        assert_eq!(device.session.set_log_base(log.0.as_fd(), size, offset), expected, "{size} bytes at {offset}");
    }
    goes_on(&backend);
}

#[test]
fn a_ring_that_the_log_does_not_cover_is_refused() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    let log = Log::new(LOG_BYTES);
    begin(&mut device, &log);
    for addr in [LOG_BYTES * 8 * PAGE - 1, u64::MAX] {
        let mut addresses = device.addresses(0);
        (addresses.flags, addresses.log) = (F_LOG, addr);
        device.session.set_vring_addr(0, &addresses).refused();
    }
    device.queue().works();
}

#[test]
fn memory_that_grows_beyond_the_log_is_left_out_until_there_is_a_larger_one() {
    let backend = Setup::null(1 << 20).start();
    let mut device =
        backend.device(&Profile { placements: crate::frontend::memory::USUAL[..1].to_vec(), ..Profile::qemu() });
    let small = Log::new(((9 << 20) / PAGE / 8) + 1);
    let size = small.0.metadata().expect("a memfd").len();
    device.session.set_log_base(small.0.as_fd(), size, 0).accepted();
    let features = device.session.features | feature::LOG_ALL;
    device.session.set_features(features).accepted();
    let place = crate::frontend::memory::USUAL[2];
    let region = device.memory.add(place);
    device.session.add_mem_reg(&region).accepted();
    let far = |queue: &mut Queue| {
        queue.arena = crate::frontend::arena::Arena::new(vec![(place.guest, place.size)]);
        let ticket = queue.start(&Request::read(0, 512), &indirect());
        queue.finish(std::slice::from_ref(&ticket));
        ticket
    };
    let _ = far(device.queue());
    assert!(small.pages().is_empty());
    let log = Log::new(LOG_BYTES);
    device.session.set_log_base(log.0.as_fd(), LOG_BYTES, 0).accepted();
    let ticket = far(device.queue());
    device.stop_queue(0);
    assert_eq!(log.pages(), written_for(&ticket));
}

#[test]
fn a_truncated_log_fails_the_device_and_not_the_daemon() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    let log = Log::new(LOG_BYTES);
    begin(&mut device, &log);
    device.queue().works();
    log.0.set_len(0).expect("a memfd shrinks");
    let _ticket = device.queue().start(&Request::read(0, 512), &Framing::default());
    assert!(device.fails_within(DEADLINE), "neither an error event nor the end of the connection");
    drop(device);
    goes_on(&backend);
}

#[test]
fn without_a_log_or_the_feature_nothing_is_logged() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    // QEMU says so first when it comes back in the middle of a migration.
    switch(&mut device, true);
    device.queue().works();
    let log = Log::new(LOG_BYTES);
    switch(&mut device, false);
    device.session.set_log_base(log.0.as_fd(), LOG_BYTES, 0).accepted();
    device.queue().works();
    device.stop_queue(0);
    assert!(log.pages().is_empty());
    // A ring that starts while logging is on logs.
    switch(&mut device, true);
    log.clear();
    device.session.set_log_base(log.0.as_fd(), LOG_BYTES, 0).accepted();
    device.start_queue(0);
    device.queue().works();
    assert!(!log.pages().is_empty());
}

#[test]
fn a_log_is_taken_only_where_that_was_agreed() {
    let backend = Setup::null(1 << 20).start();
    let qemu = Profile::qemu();
    let profile = Profile { protocol_features: qemu.protocol_features & !protocol::LOG_SHMFD, ..qemu };
    let device = backend.device(&profile);
    let log = Log::new(LOG_BYTES);
    assert_eq!(device.session.set_log_base(log.0.as_fd(), LOG_BYTES, 0), Ack::Closed);
    goes_on(&backend);
}

#[test]
fn a_descriptor_to_be_signalled_is_taken_and_not_needed() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    device.session.set_log_fd(device.queues[0].err.as_fd()).accepted();
    device.queue().works();
}

crate::on_packed_rings! {
    the_pages_that_are_written_are_marked_and_no_others,
    so_are_they_without_event_indices,
    so_are_they_without_an_inflight_region,
    a_ring_that_is_not_to_be_logged_is_not,
    logging_begins_with_requests_that_are_in_flight,
    logging_goes_on_and_off_under_load,
    a_request_that_was_kept_is_marked_although_memory_has_changed,
    a_truncated_log_fails_the_device_and_not_the_daemon,
}
