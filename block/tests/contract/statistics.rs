//! What a backend counts: how long requests take, in which intervals, what is under way, and since when nothing was done.

use std::sync::Arc;
use std::time::Duration;

use blockport_block::aio::Iothread;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockBackend, BlockResult, Graph, LatencyHistogram, Permissions, RequestKind};

use crate::helpers::{add, eventually, iothread, keep_channel, read, write};

const MILLISECOND: u64 = 1_000_000;

fn disk(options: &str) -> (Graph, Arc<BlockBackend>, Iothread) {
    let graph = Graph::default();
    let node = add(&graph, &format!("{options},node-name=n"));
    let backend = BlockBackend::with_root("disk", node, Permissions::device(true)).expect("nobody else uses it");
    let iothread = iothread();
    keep_channel(&iothread, &backend);
    (graph, backend, iothread)
}

#[test]
fn requests_take_as_long_as_they_do() {
    let (_graph, backend, iothread) = disk("null-co,size=1M,latency-ns=5000000");
    assert_eq!((backend.idle_time_ns(), backend.in_flight()), (None, 0));
    for _ in 0..4 {
        read(&iothread, &backend, 0, 512).expect("it can be read");
    }
    write(&iothread, &backend, 0, 4096, 1).expect("it can be written");
    let statistics = backend.statistics();
    let (reads, writes) = (statistics.of(RequestKind::Read), statistics.of(RequestKind::Write));
    assert_eq!((reads.operations, writes.operations), (4, 1));
    assert!(reads.total_time_ns >= 4 * 5 * MILLISECOND, "{reads:?}");
    assert!(writes.total_time_ns >= 5 * MILLISECOND && writes.total_time_ns < reads.total_time_ns, "{writes:?}");
    assert_eq!(statistics.of(RequestKind::Flush).total_time_ns, 0);
    let idle = backend.idle_time_ns().expect("something was done");
    eventually("time passes", || backend.idle_time_ns().expect("still") > idle);
}

#[test]
fn what_is_under_way_is_counted_and_what_is_parked_too() {
    let (_graph, backend, iothread) = disk("null-co,size=1M,latency-ns=2000000");
    backend.drain_begin();
    let shared = backend.clone();
    iothread.remote().post(move |context| {
        let channel = shared.channel(context).expect("the node is active");
        for _ in 0..7 {
            let channel = channel.clone();
            context.spawn(async move {
                let buffer = AlignedBuffer::new(512, 512);
                let done: BlockResult = channel.preadv(0, &[buffer.iov()]).await;
                assert_eq!(done, Ok(()));
            });
        }
    });
    eventually("seven wait", || backend.in_flight() == 7);
    std::thread::sleep(Duration::from_millis(5));
    backend.drain_end();
    eventually("all are done", || backend.in_flight() == 0);
    let reads = backend.statistics().of(RequestKind::Read);
    assert!(reads.operations == 7 && reads.total_time_ns >= 7 * 5 * MILLISECOND, "the wait counts: {reads:?}");
}

#[test]
fn histograms_count_from_the_moment_they_are_set_in_the_intervals_that_were_asked_for() {
    let (_graph, backend, iothread) = disk("null-co,size=1M,latency-ns=2000000");
    assert_eq!(backend.latency_histogram(RequestKind::Read), None);
    read(&iothread, &backend, 0, 512).expect("it can be read");
    // 2 ms at least; who knows how long on a machine with other work.
    backend.set_latency_histogram(RequestKind::Read, Some(&[1000, MILLISECOND, 2 * MILLISECOND])).expect("sound");
    let bins = || backend.latency_histogram(RequestKind::Read).expect("set").bins;
    assert_eq!(bins(), [0; 4]);
    for _ in 0..3 {
        read(&iothread, &backend, 0, 512).expect("it can be read");
        write(&iothread, &backend, 0, 512, 1).expect("it can be written");
    }
    assert_eq!(bins(), [0, 0, 0, 3]);
    assert_eq!(backend.latency_histogram(RequestKind::Write), None, "each kind for itself");
    // An iothread that comes later counts as well.
    let other = crate::helpers::iothread();
    keep_channel(&other, &backend);
    read(&other, &backend, 0, 512).expect("it can be read");
    assert_eq!(bins(), [0, 0, 0, 4]);
    let minute = 60_000 * MILLISECOND;
    backend.set_latency_histogram(RequestKind::Read, Some(&[minute])).expect("sound");
    read(&other, &backend, 0, 512).expect("it can be read");
    let LatencyHistogram { boundaries, bins: one, sum_ns } =
        backend.latency_histogram(RequestKind::Read).expect("it is set");
    assert_eq!((boundaries, one), (vec![minute], vec![1, 0]), "begun anew");
    assert!(sum_ns < minute, "of one request: {sum_ns} ns");
    for wrong in [&[][..], &[0, 1], &[2, 1], &[1, 1]] {
        assert!(backend.set_latency_histogram(RequestKind::Read, Some(wrong)).is_err(), "{wrong:?}");
    }
    assert_eq!(bins(), [1, 0], "nothing has changed");
    backend.set_latency_histogram(RequestKind::Read, None).expect("always");
    assert_eq!(backend.latency_histogram(RequestKind::Read), None);
}
