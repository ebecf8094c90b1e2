//! The filter `throttle` on real iothreads: who waits, what lets go, and that limits are kept across threads. How exact
//! they are is tested on a simulated clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockport_block::aio::Iothread;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::throttle::{Limited, Rate, ThrottleLimits};
use blockport_block::{BlockBackend, Graph};

use crate::testing::{opened_in, settings, writer};

/// Longer than any test may take.
const DEADLINE: Duration = Duration::from_secs(20);

fn iops(average: u64) -> ThrottleLimits {
    let mut limits = ThrottleLimits::default();
    limits.set_rate(Limited::IopsTotal, Rate { average, ..Rate::default() });
    limits
}

/// One read of 512 bytes in 512 seconds: it counts as so many.
fn slow() -> ThrottleLimits {
    let mut limits = iops(1);
    limits.iops_size = 1;
    limits
}

/// A disk behind a throttle node, with one iothread.
struct Disk {
    backend: Arc<BlockBackend>,
    iothread: Iothread,
    done: Arc<AtomicU64>,
}

impl Disk {
    fn new(graph: &Graph, name: &str) -> Self {
        let options = "throttle,throttle-group=g,file.driver=null-co,file.read-zeroes=on";
        let node = opened_in(graph, &format!("{options},node-name={name}"));
        let backend = BlockBackend::with_root(name, node, writer()).expect("nobody else uses the node");
        let iothread = Iothread::start(name, settings()).expect("the engine works here");
        Self { backend, iothread, done: Arc::default() }
    }

    /// Starts reads, all at once, that count themselves when they are done.
    fn start(&self, count: u64) {
        let (backend, done) = (self.backend.clone(), self.done.clone());
        self.iothread.remote().post(move |context| {
            let channel = backend.channel(context).expect("the node is active");
            for n in 0..count {
                let (channel, done) = (channel.clone(), done.clone());
                context.spawn(async move {
                    let buffer = AlignedBuffer::new(512, 512);
                    assert_eq!(channel.preadv(n * 512, &[buffer.iov()]).await, Ok(()));
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }

    #[track_caller]
    fn wait_for(&self, count: u64) {
        let start = Instant::now();
        while self.done() < count {
            assert!(start.elapsed() < DEADLINE, "{} of {count} are done", self.done());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn group(limits: ThrottleLimits) -> Graph {
    let graph = Graph::default();
    graph.throttle_groups().create("g", limits).expect("the first one");
    graph
}

#[track_caller]
fn wait_until_waiting(graph: &Graph, count: usize) {
    let start = Instant::now();
    while graph.throttle_groups().find("g").expect("made above").waiting() != count {
        assert!(start.elapsed() < DEADLINE, "{count} requests should wait");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_drain_lets_what_waits_go_and_holds_nothing_back_until_its_end() {
    let graph = group(slow());
    let (one, other) = (Disk::new(&graph, "one"), Disk::new(&graph, "other"));
    one.start(1);
    one.wait_for(1);
    one.start(10);
    wait_until_waiting(&graph, 10);
    other.start(3);
    wait_until_waiting(&graph, 13);
    assert_eq!((one.done(), other.done()), (1, 0));
    one.backend.drain_begin();
    assert_eq!(one.done(), 11, "a drain returns when all is done");
    assert_eq!(other.done(), 0, "the other member is not drained");
    one.backend.drain_end();
    one.start(1);
    wait_until_waiting(&graph, 4);
    let hurry = other.backend.hurry();
    other.wait_for(3);
    other.start(5);
    other.wait_for(8);
    drop(hurry);
    other.start(1);
    wait_until_waiting(&graph, 2);
    // So that the iothreads can end.
    graph.throttle_groups().find("g").expect("it is there").set_limits(ThrottleLimits::default()).expect("sound");
    one.wait_for(12);
    other.wait_for(9);
}

#[test]
fn other_limits_wake_what_waits() {
    let graph = group(slow());
    let disk = Disk::new(&graph, "disk");
    disk.start(100);
    disk.wait_for(1);
    wait_until_waiting(&graph, 99);
    let group = graph.throttle_groups().find("g").expect("made above");
    group.set_limits(iops(2000)).expect("sound");
    disk.wait_for(100);
    let contradiction = group.set_limits({
        let mut limits = iops(1);
        limits.set_rate(Limited::IopsRead, Rate { average: 1, ..Rate::default() });
        limits
    });
    assert!(contradiction.expect_err("refused").0.contains("throttle group \"g\""));
    assert_eq!(group.limits(), iops(2000));
}

#[test]
fn members_on_different_iothreads_keep_the_limit_together() {
    let graph = group(iops(100));
    let disks = ["a", "b", "c"].map(|name| Disk::new(&graph, name));
    let start = Instant::now();
    disks.iter().for_each(|disk| disk.start(20));
    disks.iter().for_each(|disk| disk.wait_for(20));
    // The first tenth of a second's worth goes at once. Slower than that it may be, on a machine with other work.
    assert!(start.elapsed() >= Duration::from_millis(500), "60 operations took {:?}", start.elapsed());
}

#[test]
fn a_group_in_use_stays_and_an_unknown_one_is_refused_by_name() {
    let graph = group(iops(100));
    let disk = Disk::new(&graph, "disk");
    let groups = graph.throttle_groups();
    assert!(groups.create("g", ThrottleLimits::default()).err().expect("taken").0.contains("exists already"));
    assert!(groups.remove("g").expect_err("in use").0.contains("in use"));
    assert!(groups.remove("h").expect_err("unknown").0.contains("\"h\""));
    drop(disk);
    graph.clear();
    groups.remove("g").expect("nobody uses it");
    let error = crate::testing::open("throttle,throttle-group=h,file.driver=null-co").err().expect("unknown");
    assert!(error.0.contains("throttle-group") && error.0.contains("\"h\""), "{error}");
}
