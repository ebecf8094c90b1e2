//! Rows: AioContext, sync helpers, geometry and block sizes.

use std::sync::{Arc, Mutex};

use blockport_block::aio::{AioRemote, Iothread, is_iothread};
use blockport_block::{BackendNotice, BlockBackend, BlockError, Graph, Notifier};

use crate::helpers::{Load, TestDevice, add, iothread, on_channel};
use crate::testing::loop_device::LoopDevice;
use crate::testing::{TempDir, writer};

fn backend(graph: &Graph, label: &str, node: &str) -> Arc<BlockBackend> {
    let backend = graph.create_backend(label);
    backend.insert(graph.find(node).expect("it is there"), writer()).expect("nobody objects");
    backend
}

fn is_at(backend: &BlockBackend, iothread: &Iothread) -> bool {
    backend.aio_context().is_some_and(|home| home.same(iothread.remote()))
}

type Told = Arc<Mutex<Vec<(&'static str, AioRemote)>>>;

/// Writes down which contexts come and go.
fn watch(backend: &Arc<BlockBackend>) -> (Notifier, Told) {
    let told = Told::default();
    let (log, weak) = (told.clone(), Arc::downgrade(backend));
    let notifier = backend.notify(move |notice| {
        let mut log = log.lock().expect("no panic");
        match notice {
            BackendNotice::ContextAttached(remote) => log.push(("attached", remote.clone())),
            BackendNotice::ContextDetaching(remote) => {
                assert!(weak.upgrade().is_some_and(|backend| backend.is_quiesced()), "it is drained");
                log.push(("detaching", remote.clone()));
            }
            BackendNotice::InsertRoot | BackendNotice::RemoveRoot => {}
        }
    });
    (notifier, told)
}

#[track_caller]
fn assert_told(told: &Told, expected: &[(&str, &Iothread)]) {
    let told = std::mem::take(&mut *told.lock().expect("no panic"));
    let words: Vec<_> = told.iter().map(|(word, _)| *word).collect();
    assert_eq!(words, expected.iter().map(|(word, _)| *word).collect::<Vec<_>>());
    for ((word, remote), (_, iothread)) in told.iter().zip(expected) {
        assert!(remote.same(iothread.remote()), "{word} another context");
    }
}

#[test]
fn a_move_takes_the_whole_connected_graph_and_no_other() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=file,size=1M");
    add(&graph, "raw,node-name=left,file=file");
    add(&graph, "raw,node-name=right,file=file");
    add(&graph, "memory,node-name=other,size=1M");
    let (left, right, other) =
        (backend(&graph, "left", "left"), backend(&graph, "right", "right"), backend(&graph, "other", "other"));
    let (first, second) = (iothread(), iothread());
    let device = Arc::new(TestDevice::new());
    let attached = right.attach(device.clone()).expect("no other device");
    let (notifier, told) = watch(&right);

    left.set_aio_context(first.remote()).expect("nobody objects");
    assert!(is_at(&left, &first) && is_at(&right, &first) && other.aio_context().is_none());
    assert_eq!(device.told(), ["drained begin", "drained end"], "inside a drained section");
    assert_told(&told, &[("attached", &first)]);
    let load = Load::start(&first, &left, 0, 8);
    load.goes_on(16);
    right.set_aio_context(second.remote()).expect("nobody objects");
    assert!(is_at(&left, &second) && is_at(&right, &second));
    assert_told(&told, &[("detaching", &first), ("attached", &second)]);
    right.set_aio_context(second.remote()).expect("it is there");
    assert_told(&told, &[]);
    load.goes_on(16);
    assert_eq!(load.stop(), 0, "a device's own channels stay where they are");
    let mut data = [0; 512];
    left.write_blocking(0, &[7; 512]).expect("it can be written");
    right.read_blocking(0, &mut data).expect("it can be read");
    assert_eq!(data, [7; 512]);
    drop((notifier, attached));
}

#[test]
fn a_move_that_a_device_forbids_or_that_fails_leaves_all_where_they_are() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=file,size=1M");
    add(&graph, "raw,node-name=top,file=file");
    let (low, high) = (backend(&graph, "low", "file"), backend(&graph, "high", "top"));
    let (first, second) = (iothread(), iothread());
    low.set_aio_context(first.remote()).expect("nobody objects");
    let device = Arc::new(TestDevice::new());
    let attached = high.attach(device.clone()).expect("no other device");
    device.stays.store(true, std::sync::atomic::Ordering::SeqCst);
    let refused = low.set_aio_context(second.remote()).expect_err("the device of another backend forbids it");
    assert!(refused.0.contains("\"high\"") && refused.0.contains("the device does not move"), "{refused}");
    assert!(is_at(&low, &first) && is_at(&high, &first));
    assert!(device.told().is_empty(), "nothing was drained for it");

    device.stays.store(false, std::sync::atomic::Ordering::SeqCst);
    let (notifier, told) = watch(&low);
    let gone = second.remote().clone();
    drop(second);
    let refused = low.set_aio_context(&gone).expect_err("the iothread has ended");
    assert!(refused.0.contains("iothread"), "{refused}");
    assert!(is_at(&low, &first) && is_at(&high, &first));
    assert_told(&told, &[]);
    assert_eq!(low.write_blocking(0, &[1; 512]), Ok(()));
    drop((notifier, attached));
}

#[test]
fn who_watches_contexts_follows_the_root_over_insert_and_remove() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=a,size=1M");
    add(&graph, "memory,node-name=b,size=1M");
    let drive = backend(&graph, "drive", "a");
    let (on_a, on_b) = (graph.create_backend("on-a"), backend(&graph, "on-b", "b"));
    let (first, second, third) = (iothread(), iothread(), iothread());
    let (notifier, told) = watch(&drive);
    drive.set_aio_context(first.remote()).expect("nobody objects");
    on_b.set_aio_context(second.remote()).expect("nobody objects");
    assert_told(&told, &[("attached", &first)]);
    drive.remove();
    // It stands alone now; the graphs of others move without it.
    on_a.insert(graph.find("a").expect("it is there"), writer()).expect("nobody objects");
    on_a.set_aio_context(third.remote()).expect("nobody objects");
    assert_told(&told, &[]);
    drive.insert(graph.find("b").expect("it is there"), writer()).expect("nobody objects");
    on_b.set_aio_context(third.remote()).expect("nobody objects");
    assert_told(&told, &[("detaching", &first), ("attached", &third)]);
    drop(notifier);
    on_b.set_aio_context(second.remote()).expect("nobody objects");
    assert_told(&told, &[]);
}

#[test]
fn a_backend_that_goes_gives_its_context_up() {
    let graph = Graph::default();
    let node = add(&graph, "memory,node-name=file,size=1M");
    let io = iothread();
    let drive = backend(&graph, "drive", "file");
    drive.set_aio_context(io.remote()).expect("nobody objects");
    drop(drive);
    assert!(node.users().is_empty());
    let again = backend(&graph, "drive", "file");
    again.set_aio_context(io.remote()).expect("nobody objects");
    // An iothread may end before those that use it.
    drop(io);
    assert_eq!(again.read_blocking(0, &mut [0; 512]), Err(BlockError::Invalid("no iothread uses the backend")));
}

#[test]
fn reads_writes_and_flushes_wait_for_their_end() {
    let graph = Graph::default();
    let delayed = "delay.0.iotype=flush,delay.0.ns=20000000";
    add(&graph, &format!("blkdebug,node-name=slow,{delayed},image.driver=memory,image.size=1M"));
    let drive = backend(&graph, "drive", "slow");
    assert!(matches!(drive.read_blocking(0, &mut [0; 512]), Err(BlockError::Invalid(_))), "there is no iothread");
    assert_eq!(drive.flush_blocking(), Ok(()), "and so nothing to make stable");
    let io = iothread();
    drive.set_aio_context(io.remote()).expect("nobody objects");
    // Any length and any place: the door pads.
    assert_eq!(drive.write_blocking(1000, &[3; 3000]), Ok(()));
    let mut data = [9; 4096];
    assert_eq!(drive.read_blocking(512, &mut data), Ok(()));
    let expected: Vec<u8> = [vec![0; 488], vec![3; 3000], vec![0; 608]].concat();
    assert_eq!(data[..], expected[..]);
    let begin = std::time::Instant::now();
    assert_eq!(drive.flush_blocking(), Ok(()));
    assert!(begin.elapsed().as_millis() >= 20);
    assert_eq!(drive.read_blocking(1 << 20, &mut data), Err(BlockError::OutOfRange));
    assert_eq!(drive.write_blocking((1 << 20) - 1, &[1; 2]), Err(BlockError::OutOfRange));
}

#[test]
fn an_iothread_must_not_wait_for_itself() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=file,size=1M");
    let drive = backend(&graph, "drive", "file");
    let io = iothread();
    assert!(!is_iothread());
    drive.set_aio_context(io.remote()).expect("nobody objects");
    let shared = drive.clone();
    let panics = on_channel(&io, &drive, move |_| {
        assert!(is_iothread());
        let waits = std::panic::AssertUnwindSafe(|| shared.flush_blocking());
        let panics = std::panic::catch_unwind(waits).is_err();
        drop(shared);
        Box::pin(std::future::ready(panics))
    });
    assert!(panics);
}

#[test]
fn block_sizes_are_those_of_the_host_device_and_so_is_geometry_where_there_is_one() {
    let place = TempDir::on_disk();
    let file = place.file("disk", 8 << 20);
    let graph = Graph::default();
    let node = add(&graph, &format!("file,node-name=file,filename={file}"));
    assert_eq!(node.limits().geometry, None, "a file has none");
    for unit in [512, 4096] {
        let device = match LoopDevice::new(&file, &["--sector-size", &unit.to_string()]) {
            Ok(device) => device,
            Err(error) => {
                eprintln!("SKIP block-sizes: no loop device: {error}");
                return;
            }
        };
        let graph = Graph::default();
        add(&graph, &format!("host_device,node-name=disk,filename={}", device.path()));
        let limits = backend(&graph, "drive", "disk").limits();
        assert_eq!((limits.request_alignment, limits.physical_block_size), (unit, unit));
        assert_eq!(limits.geometry, None, "a loop device has none; see `geometry_of` for those that have");
    }
}
