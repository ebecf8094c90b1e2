//! Several queues of one disk, on one iothread and on several: nothing is mixed up and nothing is lost.

use crate::backend::{Backend, Program, Setup, skip};
use crate::frontend::blk::{Framing, OK, Request};
use crate::frontend::device::Profile;
use crate::frontend::queue::Queue;
use crate::frontend::wait::Stop;
use crate::image::{Image, pattern};

const AREA: u64 = 1 << 20;

/// Every queue writes its own area in rounds, several requests at a time, and reads it back.
fn write_and_verify(queue: &mut Queue) {
    let area = u64::from(queue.index) * AREA / 512;
    let free = queue.arena.mark();
    for round in 0..8u32 {
        let blocks = 0..16u32;
        let data = |block: u32| pattern(u32::from(queue.index) << 16 | round << 8 | block, 64 << 10);
        let expected: Vec<Vec<u8>> = blocks.clone().map(data).collect();
        let sector = |block: u32| area + u64::from(block) * 128;
        let writes: Vec<_> = blocks
            .clone()
            .map(|block| queue.start(&Request::write(sector(block), &expected[block as usize]), &Framing::default()))
            .collect();
        assert!(queue.finish(&writes).iter().all(|answer| answer.status == OK));
        queue.arena.release(&free);
        let reads: Vec<_> =
            blocks.map(|block| queue.start(&Request::read(sector(block), 64 << 10), &Framing::default())).collect();
        for (answer, expected) in queue.finish(&reads).iter().zip(&expected) {
            assert_eq!(answer.status, OK);
            assert!(answer.data == *expected, "queue {} reads what it did not write", queue.index);
        }
        queue.arena.release(&free);
    }
}

#[track_caller]
fn queues_do_not_mix(iothreads: usize, options: &str) {
    const QUEUES: u16 = 4;
    let image = Image::empty(u64::from(QUEUES) * AREA);
    let setup = Setup::file_with(image.path(), options).export(&format!("num-queues={QUEUES}"));
    let backend = setup.iothreads(iothreads).start();
    let mut device = backend.device(&Profile::queues(QUEUES));
    std::thread::scope(|scope| {
        for queue in &mut device.queues {
            scope.spawn(|| write_and_verify(queue));
        }
    });
    for queue in 0..QUEUES {
        let last = pattern(u32::from(queue) << 16 | 7 << 8, 64 << 10);
        assert!(image.read(u64::from(queue) * AREA, last.len()) == last, "queue {queue} on the host");
    }
}

#[test]
fn four_queues_on_one_iothread_do_not_mix() {
    queues_do_not_mix(1, "");
}

#[test]
fn four_queues_on_two_iothreads_do_not_mix() {
    queues_do_not_mix(2, "");
}

#[test]
fn four_queues_on_two_iothreads_with_direct_io_do_not_mix() {
    queues_do_not_mix(2, ",cache.direct=on");
}

/// How often the thread of an iothread was switched to.
fn switches(backend: &Backend, iothread: &str) -> String {
    let status = backend.thread_status(iothread);
    status.lines().filter(|line| line.contains("ctxt_switches")).collect()
}

#[test]
fn a_mapped_queue_is_served_by_its_iothread_and_by_no_other() {
    if Program::under_test() == Program::QemuStorageDaemon {
        return skip("a_mapped_queue_is_served_by_its_iothread_and_by_no_other", "its exports take no mapping");
    }
    let setup = Setup::null(1 << 20).export("num-queues=3").iothreads(2).iothread_options("poll-max-ns=0");
    let backend = setup.mapping(&[("t0", &[1]), ("t1", &[2, 0])]).start();
    let mut device = backend.device(&Profile::queues(3));
    for (queue, serving, resting) in [(1, "t0", "t1"), (0, "t1", "t0"), (2, "t1", "t0")] {
        device.queues[queue].works();
        device.settle();
        let before = [serving, resting].map(|iothread| switches(&backend, iothread));
        for _ in 0..10 {
            device.queues[queue].works();
        }
        let after = [serving, resting].map(|iothread| switches(&backend, iothread));
        assert_ne!(after[0], before[0], "queue {queue} on {serving}");
        assert_eq!(after[1], before[1], "queue {queue} on {resting}");
    }
}

#[test]
fn queues_that_are_mapped_unevenly_do_not_mix() {
    if Program::under_test() == Program::QemuStorageDaemon {
        return skip("queues_that_are_mapped_unevenly_do_not_mix", "its exports take no mapping");
    }
    let image = Image::empty(4 * AREA);
    let setup = Setup::file(image.path()).export("num-queues=4").iothreads(2);
    let backend = setup.mapping(&[("t1", &[3, 0, 2]), ("t0", &[1])]).start();
    let mut device = backend.device(&Profile::queues(4));
    std::thread::scope(|scope| {
        for queue in &mut device.queues {
            scope.spawn(|| write_and_verify(queue));
        }
    });
}

#[test]
fn a_mapping_to_an_iothread_that_is_not_there_is_an_error_that_names_it() {
    let setup = Setup::null(1 << 20).mapping(&[("t9", &[0])]);
    let (status, said) = setup.try_start().expect_err("there is no such iothread");
    assert!(!status.success());
    assert!(Program::under_test() != Program::Blockport || said.contains("there is no iothread \"t9\""), "{said}");
}

#[test]
fn an_iothread_runs_on_the_cpus_it_is_bound_to() {
    if Program::under_test() == Program::QemuStorageDaemon {
        return skip("an_iothread_runs_on_the_cpus_it_is_bound_to", "its iothreads have no such option");
    }
    let status = std::fs::read_to_string("/proc/self/status").expect("our own status");
    let usable = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t")).expect("a list");
    // The last CPU of the last range.
    let cpu = usable.rsplit([',', '-']).next().expect("a CPU");
    let setup = Setup::null(1 << 20);
    let backend = setup.clone().iothread_options(&format!("cpu-affinity={cpu}")).start();
    backend.device(&Profile::qemu()).queue().works();
    let bound = format!("\nCpus_allowed_list:\t{cpu}\n");
    assert!(backend.thread_status("t0").contains(&bound));
    let (_, said) = setup.iothread_options("cpu-affinity=1023").try_start().expect_err("there is no such CPU");
    assert!(said.contains("iothread \"t0\": cpu-affinity 1023: the daemon cannot use CPU 1023"), "{said}");
}

#[test]
fn one_queue_stops_and_starts_while_the_others_are_busy() {
    let backend = Setup::null(1 << 20).export("num-queues=3").iothreads(2).start();
    let mut device = backend.device(&Profile::queues(3));
    let mut busy = device.queues.split_off(1);
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let _guard = stop.guard();
        for queue in &mut busy {
            scope.spawn(|| {
                while !stop.is_set() {
                    queue.works();
                }
            });
        }
        for _ in 0..100 {
            device.queue().works();
            assert_eq!(device.stop_queue(0), device.queue().base());
            device.start_queue(0);
        }
    });
}

#[test]
fn a_queue_is_served_while_another_of_its_thread_is_busy() {
    let backend = Setup::null(1 << 20).export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    let mut busy = device.queues.remove(1);
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let _guard = stop.guard();
        scope.spawn(|| {
            let free = busy.arena.mark();
            while !stop.is_set() {
                let tickets: Vec<_> =
                    (0..40).map(|_| busy.start(&Request::read(0, 4096), &Framing::default())).collect();
                busy.finish(&tickets);
                busy.arena.release(&free);
            }
        });
        for _ in 0..500 {
            device.queue().works();
        }
    });
}

/// Two queues on two iothreads, each writing its half of one 4 KiB block and reading it back at once: a write that is
/// padded to the whole block must not bring back the other half as it was.
#[track_caller]
fn halves_of_one_block_are_never_lost(setup: &Setup, image: &Image, writes_each: u32) {
    const HALF: usize = 2048;
    let setup = setup.clone().export("logical-block-size=512,num-queues=2").iothreads(2);
    let backend = setup.start();
    let mut device = backend.device(&Profile::queues(2));
    std::thread::scope(|scope| {
        for queue in &mut device.queues {
            scope.spawn(move || {
                let sector = 8 + 4 * u64::from(queue.index);
                for count in 0..writes_each {
                    let word = (u64::from(queue.index) << 32 | u64::from(count)).to_le_bytes();
                    let data = word.repeat(HALF / 8);
                    queue.write(sector, &data);
                    let read = queue.read(sector, HALF as u32);
                    assert!(read == data, "queue {}: write {count} is lost", queue.index);
                }
            });
        }
    });
    let word = |queue: u64| (queue << 32 | u64::from(writes_each - 1)).to_le_bytes().repeat(HALF / 8);
    assert!(image.read(4096, 2 * HALF) == [word(0), word(1)].concat(), "on the host");
}

#[test]
fn halves_of_one_block_written_by_two_iothreads_100_000_times_are_never_lost() {
    let image = Image::filled(1 << 20);
    let setup = Setup::file_with(image.path(), ",cache.direct=on");
    halves_of_one_block_are_never_lost(&setup, &image, 50_000);
}

#[test]
fn halves_of_one_block_that_must_be_padded_are_never_lost() {
    // blkdebug pretends that the disk below can only be reached 4 KiB at a time.
    let image = Image::filled(1 << 20);
    let setup = Setup::faulty(image.path(), "align=4096");
    halves_of_one_block_are_never_lost(&setup, &image, 10_000);
}

crate::on_packed_rings! {
    four_queues_on_two_iothreads_do_not_mix,
    four_queues_on_two_iothreads_with_direct_io_do_not_mix,
    one_queue_stops_and_starts_while_the_others_are_busy,
}
