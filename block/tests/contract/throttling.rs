//! The throttle of a backend: limits set while requests run, groups shared by several, and what lets requests go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockport_block::aio::Iothread;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::throttle::{Limited, Rate, ThrottleLimits};
use blockport_block::{BlockBackend, Graph, Permissions};

use crate::helpers::{add, eventually, iothread, keep_channel};

fn iops(average: u64) -> ThrottleLimits {
    let mut limits = ThrottleLimits::default();
    limits.set_rate(Limited::IopsTotal, Rate { average, ..Rate::default() });
    limits
}

/// One request of 512 bytes in 512 seconds.
fn slow() -> ThrottleLimits {
    let mut limits = iops(1);
    limits.iops_size = 1;
    limits
}

struct Disk {
    backend: Arc<BlockBackend>,
    iothread: Iothread,
    done: Arc<AtomicU64>,
}

impl Disk {
    fn new(graph: &Graph, label: &str) -> Self {
        let node = add(graph, &format!("memory,size=1M,node-name=node-{label}"));
        let backend = BlockBackend::with_root(label, node, Permissions::device(true)).expect("nobody else uses it");
        let iothread = iothread();
        keep_channel(&iothread, &backend);
        Self { backend, iothread, done: Arc::default() }
    }

    /// Starts requests of all kinds that count themselves when they are done.
    fn start(&self, count: u64) {
        let (backend, done) = (self.backend.clone(), self.done.clone());
        self.iothread.remote().post(move |context| {
            let channel = backend.channel(context).expect("the node is active");
            for n in 0..count {
                let (channel, done) = (channel.clone(), done.clone());
                context.spawn(async move {
                    let buffer = AlignedBuffer::new(512, 512);
                    let request = match n % 4 {
                        0 => channel.preadv(n * 512, &[buffer.iov()]),
                        1 => channel.pwritev(n * 512, &[buffer.iov()]),
                        2 => channel.pwrite_zeroes(n * 512, 512, false),
                        _ => channel.pdiscard(n * 512, 512),
                    };
                    assert_eq!(request.await, Ok(()));
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }

    fn waiting(&self) -> usize {
        self.backend.throttle_group().map_or(0, |group| group.waiting())
    }

    #[track_caller]
    fn expect(&self, done: u64, waiting: usize) {
        eventually(&format!("{done} done, {waiting} waiting"), || (self.done(), self.waiting()) == (done, waiting));
    }

    #[track_caller]
    fn set(&self, graph: &Graph, group: Option<&str>, limits: ThrottleLimits) {
        self.backend.set_io_limits(graph.throttle_groups(), group, limits).expect("sound");
    }
}

#[test]
fn limits_are_set_changed_and_lifted_while_requests_run() {
    let graph = Graph::default();
    let disk = Disk::new(&graph, "disk");
    disk.start(10);
    disk.expect(10, 0);
    disk.set(&graph, None, slow());
    assert_eq!(disk.backend.throttle_group().expect("in one").name(), "disk");
    disk.start(10);
    disk.expect(11, 9);
    disk.set(&graph, None, iops(100_000));
    disk.expect(20, 0);
    disk.set(&graph, None, slow());
    disk.start(4);
    disk.expect(20, 4);
    disk.set(&graph, None, ThrottleLimits::default());
    assert!(disk.backend.throttle_group().is_none());
    disk.expect(24, 0);
    disk.start(10);
    disk.expect(34, 0);
    let mut contradiction = iops(1);
    contradiction.set_rate(Limited::IopsRead, Rate { average: 1, ..Rate::default() });
    let refused = disk.backend.set_io_limits(graph.throttle_groups(), None, contradiction).expect_err("refused");
    assert!(refused.0.contains("iops-total"), "{refused}");
    assert!(disk.backend.throttle_group().is_none(), "nothing has changed");
}

#[test]
fn a_request_that_a_limit_holds_back_is_released_by_a_drain() {
    let graph = Graph::default();
    let disk = Disk::new(&graph, "disk");
    disk.set(&graph, None, slow());
    disk.start(8);
    disk.expect(1, 7);
    disk.backend.drain_begin();
    assert_eq!((disk.done(), disk.waiting()), (8, 0), "a drain returns with nothing in flight");
    // Those that come meanwhile are parked, and find the limit again afterwards.
    disk.start(5);
    disk.expect(8, 0);
    disk.backend.drain_end();
    disk.expect(8, 5);
    let hurry = disk.backend.hurry();
    disk.expect(13, 0);
    disk.start(2);
    disk.expect(15, 0);
    drop(hurry);
    disk.start(2);
    disk.expect(15, 2);
    disk.backend.remove();
    assert_eq!(disk.done(), 17, "they reached the medium that they were asked of");
}

#[test]
fn backends_share_a_group_by_its_name_and_leave_it_alone() {
    let graph = Graph::default();
    graph.throttle_groups().create("object", iops(100_000)).expect("the first");
    let disks = ["a", "b", "c"].map(|label| Disk::new(&graph, label));
    disks[0].set(&graph, Some("g"), slow());
    disks[1].set(&graph, Some("g"), slow());
    disks[2].set(&graph, Some("object"), iops(50_000));
    assert_eq!(graph.throttle_groups().find("object").expect("there").limits(), iops(50_000), "the last one wins");
    assert_eq!(graph.throttle_groups().names(), ["object"], "what is made for backends is no object");
    disks[0].start(4);
    eventually("one of four", || disks[0].done() == 1 && disks[0].waiting() == 3);
    disks[1].start(4);
    eventually("none of four more", || disks[1].waiting() == 7);
    assert_eq!(disks[1].done(), 0);
    disks[1].set(&graph, Some("object"), iops(60_000));
    disks[1].expect(4, 0);
    assert_eq!(disks[0].waiting(), 3, "the other one stays");
    disks[0].set(&graph, None, ThrottleLimits::default());
    disks[0].expect(4, 0);
    disks[2].set(&graph, None, ThrottleLimits::default());
    assert_eq!(graph.throttle_groups().find("object").expect("objects stay").limits(), iops(60_000));
    assert!(graph.throttle_groups().remove("object").is_err(), "b is in it");
}
