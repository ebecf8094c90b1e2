//! The engine without io_uring, in a whole daemon: that it is chosen where it must be, and that a front-end cannot tell.

use std::collections::BTreeMap;
use std::time::Duration;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

use crate::backend::{Backend, Setup};
use crate::frontend::blk::{Framing, OK, Request, Segment};
use crate::frontend::device::Profile;
use crate::image::{Image, pattern};

/// Runs on a thread, and in the processes that it starts, without io_uring, as in a container.
fn without_io_uring<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    let calls = [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
    let calls = BTreeMap::from(calls.map(|call| (call, vec![])));
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = TargetArch::try_from(std::env::consts::ARCH).expect("seccomp knows it");
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, refuse, arch).expect("two actions");
    let filter = BpfProgram::try_from(filter).expect("a short program");
    let limited = || {
        apply_filter(&filter).expect("a thread may always have less");
        run()
    };
    std::thread::scope(|scope| scope.spawn(limited).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// Every kind of request, judged by what it reads and by what is on the image.
fn serves(backend: &Backend, image: &Image) {
    let mut device = backend.device(&Profile::qemu());
    let queue = device.queue();
    let data: Vec<Vec<u8>> = (0..32u32).map(|n| pattern(n, 16 << 10)).collect();
    let writes: Vec<_> = data
        .iter()
        .zip(0u64..)
        .map(|(data, n)| queue.start(&Request::write(n * 32, data), &Framing::default()))
        .collect();
    assert!(queue.finish(&writes).iter().all(|answer| answer.status == OK));
    assert_eq!(queue.request(&Request::flush()).status, OK);
    for (data, n) in data.iter().zip(0u64..) {
        assert!(image.read(n * (16 << 10), 16 << 10) == *data, "write {n}");
        assert!(queue.read(n * 32, 16 << 10) == *data, "read {n}");
    }
    assert_eq!(queue.request(&Request::write_zeroes(&[Segment::new(32, 32)])).status, OK);
    assert_eq!(queue.request(&Request::discard(&[Segment::new(64, 32)])).status, OK);
    assert_eq!(queue.read(32, 16 << 10), vec![0; 16 << 10]);
    assert_eq!(image.read(16 << 10, 16 << 10), vec![0; 16 << 10]);
    // A request that no image can answer is answered.
    assert_ne!(queue.request(&Request::read(1 << 40, 512)).status, OK);
    let completed = queue.used_idx();
    assert_eq!(device.stop_queue(0), u32::from(completed));
}

#[test]
fn where_io_uring_is_forbidden_the_daemon_serves_all_the_same_and_says_why() {
    let image = Image::empty(1 << 20);
    let setup = Setup::file_with(image.path(), ",cache.direct=on").engine("auto").iothreads(2);
    let backend = without_io_uring(|| setup.start());
    serves(&backend, &image);
    let said = backend.stop();
    for iothread in ["t0", "t1"] {
        let why = format!("{iothread}: io_uring is forbidden");
        assert_eq!(said.matches(&why).count(), 1, "one line for {iothread}:\n{said}");
    }
}

#[test]
fn io_uring_that_is_demanded_and_forbidden_is_an_error_that_names_the_iothread() {
    let setup = Setup::null(1 << 20).engine("io_uring");
    let (status, said) = without_io_uring(|| setup.try_start()).expect_err("there is no io_uring");
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("iothread \"t0\": io_uring is forbidden"), "{said}");
    assert!(said.contains("aio-engine=threads"), "{said}");
}

#[test]
fn the_threads_engine_uses_no_io_uring_at_all() {
    let image = Image::empty(1 << 20);
    let setup = Setup::file(image.path()).engine("threads");
    let backend = without_io_uring(|| setup.start());
    serves(&backend, &image);
    assert!(!backend.stop().contains("io_uring"));
}

#[test]
fn where_io_uring_works_auto_takes_it() {
    let backend = Setup::null(1 << 20).engine("auto").start();
    let fds = std::fs::read_dir(backend.proc("fd")).expect("descriptors").flatten();
    let rings = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    assert_eq!(rings.filter(|link| link.as_os_str() == "anon_inode:[io_uring]").count(), 1);
}

/// Threads by the beginning of their name.
fn threads(backend: &Backend, name: &str) -> usize {
    let tasks = std::fs::read_dir(backend.proc("task")).expect("threads").flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|found| found.starts_with(name)).count()
}

#[test]
fn worker_threads_are_few_named_and_shared() {
    let image = Image::empty(8 << 20);
    let setup = Setup::file_with(image.path(), ",cache.direct=on").engine("threads");
    let backend = setup.export("num-queues=4").iothreads(2).start();
    let mut device = backend.device(&Profile { queue_size: 256, ..Profile::queues(4) });
    for _ in 0..4 {
        let started: Vec<Vec<_>> = device
            .queues
            .iter_mut()
            .map(|queue| (0..64).map(|n| queue.start(&Request::read(n * 8, 4096), &Framing::default())).collect())
            .collect();
        for (queue, tickets) in device.queues.iter_mut().zip(&started) {
            let free = queue.arena.mark();
            assert!(queue.finish(tickets).iter().all(|answer| answer.status == OK));
            queue.arena.release(&free);
        }
    }
    let workers = threads(&backend, "aio-worker");
    assert!((1..=64).contains(&workers), "{workers} workers");
}

#[test]
fn a_daemon_on_threads_that_has_nothing_to_do_uses_no_cpu() {
    let image = Image::empty(1 << 20);
    let backend = Setup::file(image.path()).engine("threads").start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().write(0, &pattern(1, 4096));
    std::thread::sleep(Duration::from_secs(1));
    let before = backend.context_switches();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(backend.context_switches(), before);
}
