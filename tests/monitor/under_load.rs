//! Resize, change of medium and of the graph while a guest keeps 32 requests in flight: no request is lost, none fails
//! where none may, none reaches the wrong medium, and nothing is left behind.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use super::client::{Client, Monitored};
use crate::backend::Setup;
use crate::frontend::blk::{Framing, IOERR, OK, Request};
use crate::frontend::device::{Device, Profile};
use crate::frontend::wait::{Stop, until};
use crate::image::{Image, pattern};

/// How often something is done: more with `scripts/test --deep`.
fn cycles(usual: usize) -> usize {
    if std::env::var_os("BLOCKPORT_TEST_DEEP").is_some() { 1000 } else { usual }
}

/// What the load has seen.
#[derive(Default)]
struct Seen {
    done: AtomicU64,
    failed: AtomicU64,
}

impl Seen {
    /// Waits until so many requests more are answered.
    fn goes_on(&self, count: u64) {
        let before = self.done.load(Ordering::SeqCst);
        until("requests are answered", || self.done.load(Ordering::SeqCst) >= before + count);
    }
}

/// Keeps 32 reads of 4 KiB from the first 128 KiB in flight until told to stop; `check` sees what each gave.
fn load(device: &mut Device, stop: &Stop, seen: &Seen, check: impl Fn(usize, &[u8])) {
    let queue = device.queue();
    while !stop.is_set() {
        let mark = queue.arena.mark();
        let start = |at: u64| queue.start(&Request::read(8 * at, 4096), &Framing::default());
        let tickets: Vec<_> = (0..32).map(start).collect();
        for (at, answer) in queue.finish(&tickets).into_iter().enumerate() {
            match answer.status {
                OK => check(at, &answer.data),
                IOERR => drop(seen.failed.fetch_add(1, Ordering::SeqCst)),
                other => panic!("status {other}"),
            }
            seen.done.fetch_add(1, Ordering::SeqCst);
        }
        queue.arena.release(&mark);
    }
}

/// Does something again and again under load, and sees that nothing is left behind. Returns how many requests failed.
fn under_load(
    daemon: &Monitored,
    count: usize,
    check: impl Fn(usize, &[u8]) + Sync,
    cycle: impl Fn(&mut Client),
) -> u64 {
    let mut client = daemon.client();
    let mut device = daemon.backend.device(&Profile::qemu());
    let (stop, seen) = (Stop::default(), Seen::default());
    std::thread::scope(|scope| {
        let _ends = stop.guard();
        scope.spawn(|| load(&mut device, &stop, &seen, &check));
        let mut cycles = |count: usize| {
            for _ in 0..count {
                cycle(&mut client);
                seen.goes_on(32);
            }
        };
        // Allocators keep some for themselves at first.
        cycles(count / 5 + 1);
        let (threads, fds, memory) = (daemon.threads(), daemon.backend.open_fds(), daemon.memory_kib());
        cycles(count);
        until("there are no more threads and descriptors than before", || {
            daemon.threads() <= threads && daemon.backend.open_fds() <= fds
        });
        let now = daemon.memory_kib();
        assert!(now <= memory + 2048, "{memory} KiB have become {now} in {count} cycles");
    });
    device.queue().works();
    seen.failed.load(Ordering::SeqCst)
}

#[test]
fn a_resize_under_load_fails_no_request() {
    let image = Image::filled(1 << 20);
    let daemon = Monitored::start(Setup::file(image.path()));
    let expected = pattern(0, 1 << 20);
    let failed = under_load(
        &daemon,
        cycles(50),
        |at, data| assert!(data == &expected[at * 4096..][..4096], "block {at}"),
        |client| {
            for size in [4 << 20, 1 << 20] {
                client.ok("block_resize", json!({"device": "e0", "size": size}));
            }
        },
    );
    assert_eq!(failed, 0);
}

#[test]
fn a_node_reopened_under_load_fails_no_request() {
    let image = Image::filled(1 << 20);
    let daemon = Monitored::start(Setup::file(image.path()));
    let expected = pattern(0, 1 << 20);
    let node = |no_flush: bool| {
        json!({"options": [{
            "driver": "raw", "node-name": "d0",
            "file": {"driver": "file", "filename": image.path(), "cache": {"no-flush": no_flush}},
        }]})
    };
    let failed = under_load(
        &daemon,
        cycles(50),
        |at, data| assert!(data == &expected[at * 4096..][..4096], "block {at}"),
        |client| {
            client.ok("blockdev-reopen", node(true));
            client.ok("blockdev-reopen", node(false));
        },
    );
    assert_eq!(failed, 0);
}

#[test]
fn a_change_of_medium_under_load_loses_no_request_and_mixes_no_media() {
    let (first, second) = (Image::filled(1 << 20), Image::filled(1 << 20));
    std::fs::write(second.path(), vec![2; 2 << 20]).expect("an image");
    let daemon = Monitored::start(Setup::file(first.path()));
    let mut client = daemon.client();
    client.ok("blockdev-add", json!({"driver": "file", "node-name": "second", "filename": second.path()}));
    let expected = pattern(0, 1 << 20);
    let failed = under_load(
        &daemon,
        cycles(50),
        |at, data| {
            let old = data == &expected[at * 4096..][..4096];
            assert!(old || data.iter().all(|byte| *byte == 2), "block {at} is of neither medium");
        },
        |client| {
            for node in ["second", "d0"] {
                client.ok("blockdev-remove-medium", json!({"id": "e0"}));
                client.ok("blockdev-insert-medium", json!({"id": "e0", "node-name": node}));
            }
        },
    );
    let said = daemon.backend.stop();
    assert!(said.contains(&format!("{failed} failed")), "{failed} requests found the drive empty: {said}");
}
