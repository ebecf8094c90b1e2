//! Rows: create, reference count, names, removal by the monitor, attach and detach, setting callbacks, insert and remove
//! root, notifiers, root state, flush.

use std::sync::{Arc, Mutex};

use blockport_block::{
    BackendNotice, BlockBackend, BlockError, Graph, IoStatus, OnErrorPolicy, Operation, Permissions,
};

use crate::helpers::{Load, TestDevice, add, iothread, options, read, write};
use crate::testing::writer;

#[test]
fn a_new_backend_has_its_write_cache_on_and_stands_in_the_list_of_all() {
    let graph = Graph::default();
    let backend = graph.create_backend("d0");
    assert!(backend.write_cache() && backend.root().is_none() && backend.name().is_none());
    assert_eq!(Arc::strong_count(&backend), 1);
    assert_eq!((backend.on_error(true), backend.on_error(false)), (OnErrorPolicy::Report, OnErrorPolicy::Enospc));
    assert_eq!(backend.iostatus(), IoStatus::Ok);
    let second = graph.create_backend("d1");
    let labels: Vec<_> = graph.all_backends().iter().map(|backend| backend.label().to_owned()).collect();
    assert_eq!(labels, ["d0", "d1"]);
    drop(backend);
    assert_eq!(graph.all_backends().len(), 1);
    drop(second);
}

#[test]
fn names_are_identifiers_unique_over_backends_and_nodes() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=node,size=1M");
    let (a, b) = (graph.create_backend("a"), graph.create_backend("b"));
    for wrong in ["", "1st", "a b", "#x", "ü"] {
        assert!(graph.name_backend(&a, wrong).is_err(), "{wrong:?}");
    }
    assert!(graph.name_backend(&a, "node").expect_err("a node has it").0.contains("\"node\""));
    graph.name_backend(&a, "drive0").expect("it is free");
    assert!(graph.name_backend(&b, "drive0").expect_err("taken").0.contains("\"drive0\""));
    assert!(graph.name_backend(&a, "drive1").expect_err("it has one").0.contains("\"drive0\""));
    let taken = graph.blockdev_add(options("memory,node-name=drive0,size=1M")).err().expect("a backend has it");
    assert!(taken.0.contains("\"drive0\""), "{taken}");
    assert_eq!(a.name().as_deref(), Some("drive0"));
    assert!(Arc::ptr_eq(&graph.find_backend("drive0").expect("it is named"), &a));
    assert!(graph.find_backend("drive1").is_none());
    graph.unname_backend(&a);
    assert_eq!(a.name(), None);
    graph.name_backend(&b, "drive0").expect("free again");
    graph.unname_backend(&b);
}

#[test]
fn named_backends_are_listed_in_order_and_the_list_stays_as_it_is_while_they_change() {
    let graph = Graph::default();
    let backends: Vec<_> = (0..4).map(|n| graph.create_backend(&format!("d{n}"))).collect();
    for (backend, name) in backends.iter().zip(["z", "a", "m", "b"]) {
        graph.name_backend(backend, name).expect("it is free");
    }
    let names = || graph.named_backends().iter().filter_map(|backend| backend.name()).collect::<Vec<_>>();
    assert_eq!(names(), ["z", "a", "m", "b"], "in the order of naming");
    let mut seen = Vec::new();
    for backend in graph.named_backends() {
        seen.push(backend.label().to_owned());
        graph.unname_backend(&backends[1]);
        graph.unname_backend(&backends[2]);
    }
    assert_eq!(seen, ["d0", "d1", "d2", "d3"]);
    assert_eq!(names(), ["z", "b"]);
    graph.unname_backend(&backends[0]);
    graph.unname_backend(&backends[3]);
}

#[test]
fn the_last_release_drains_first() {
    let graph = Graph::default();
    add(&graph, "null-co,node-name=slow,size=1M,latency-ns=20000000");
    let backend = graph.create_backend("d");
    backend.insert(graph.find("slow").expect("it is there"), writer()).expect("nobody objects");
    let io = iothread();
    let channel = backend.clone();
    let (sender, done) = std::sync::mpsc::channel();
    io.remote().post(move |context| {
        let channel = channel.channel(context).expect("the node is active");
        context.spawn(async move {
            let buffer = blockport_block::iovec::AlignedBuffer::new(512, 512);
            let _ = sender.send(channel.pwritev(0, &[buffer.iov()]).await);
        });
        // Once the request is on its way.
        context.spawn(async {});
    });
    io.remote().call(|context, answer| context.spawn(async move { answer.give(()) }));
    drop(backend);
    assert_eq!(done.try_recv(), Ok(Ok(())), "what was in flight has ended");
    assert!(graph.find("slow").expect("it is there").users().is_empty());
}

#[test]
#[should_panic(expected = "has a name")]
#[cfg(debug_assertions)]
fn destroying_a_backend_that_has_a_name_is_a_bug_that_shows() {
    let graph = Graph::default();
    let backend = graph.create_backend("d");
    graph.name_backend(&backend, "drive").expect("it is free");
    drop(backend);
    // The register goes, with what it holds, and nobody took the name away.
    drop(graph);
}

#[test]
#[should_panic(expected = "wants to be told")]
#[cfg(debug_assertions)]
fn destroying_a_backend_that_somebody_watches_is_a_bug_that_shows() {
    let backend = BlockBackend::new("d");
    let _notifier = backend.notify(|_| {});
    drop(backend);
}

#[test]
#[should_panic(expected = "may have parked requests")]
#[cfg(debug_assertions)]
fn destroying_a_backend_inside_a_drained_section_is_a_bug_that_shows() {
    let backend = BlockBackend::new("d");
    backend.drain_begin();
    drop(backend);
}

#[test]
fn drive_del_revokes_access_frees_the_name_and_leaves_the_object_to_its_holders() {
    let graph = Graph::default();
    let node = add(&graph, "memory,node-name=disk,size=1M");
    let backend = graph.create_backend("e0");
    backend.insert(node.clone(), writer()).expect("nobody objects");
    graph.name_backend(&backend, "drive0").expect("it is free");
    let device = Arc::new(TestDevice::new());
    let attached = backend.attach(device.clone()).expect("no other device");
    let io = iothread();
    let load = Load::start(&io, &backend, 0, 8);
    load.goes_on(32);

    let blocker = node.block_operations(&[Operation::DriveDel], "job \"j0\" writes to it");
    assert!(graph.drive_del(&backend).expect_err("it is blocked").0.contains("job \"j0\""));
    assert!(backend.root().is_some() && graph.find_backend("drive0").is_some(), "nothing has changed");
    drop(blocker);

    graph.drive_del(&backend).expect("nothing is in the way");
    assert_eq!(read(&io, &backend, 0, 512), Err(BlockError::NoMedium));
    assert_eq!((backend.on_error(true), backend.on_error(false)), (OnErrorPolicy::Report, OnErrorPolicy::Report));
    let next = graph.create_backend("e1");
    graph.name_backend(&next, "drive0").expect("the name is free at once");
    graph.blockdev_del("disk").expect("nobody uses the node");
    assert!(load.stop() > 0, "its requests fail, and none waits for ever");
    drop(attached);
    let weak = Arc::downgrade(&backend);
    drop(backend);
    assert!(weak.upgrade().is_none(), "it goes with its last holder");
    graph.unname_backend(&next);
}

#[test]
fn a_second_device_is_told_busy_and_a_detached_one_leaves_nothing_behind() {
    let graph = Graph::default();
    let node = add(&graph, "memory,node-name=disk,size=1M");
    let backend = graph.create_backend("d");
    backend.insert(node.clone(), writer()).expect("nobody objects");
    let first = Arc::new(TestDevice::new());
    let attached = backend.attach(first.clone()).expect("no other device");
    assert_eq!(Arc::strong_count(&backend), 2, "attaching takes a reference");
    let refused = backend.attach(Arc::new(TestDevice::new())).err().expect("it is taken");
    assert!(refused.0.contains("busy"), "{refused}");
    drop(attached);
    assert_eq!(node.total_permissions(), Permissions { held: Default::default(), ..writer() });
    node.block_resize(4096).expect("memory shrinks");
    assert!(first.told().is_empty(), "it is told nothing any more");
    assert_eq!(Arc::strong_count(&backend), 1);
    drop(backend.attach(Arc::new(TestDevice::new())).expect("free again"));
}

#[test]
fn a_backend_outlives_its_medium_and_who_asked_is_told_of_each() {
    let graph = Graph::default();
    let first = add(&graph, "memory,node-name=first,size=1M,discard=unmap,detect-zeroes=unmap");
    let second = add(&graph, "memory,node-name=second,size=2M,read-only=on");
    let backend = BlockBackend::new("d");
    let notices: Arc<Mutex<Vec<String>>> = Arc::default();
    let (log, weak) = (notices.clone(), Arc::downgrade(&backend));
    let notifier = backend.notify(move |notice| {
        let root = weak.upgrade().and_then(|backend| backend.root()).map_or("none".into(), |n| n.name().to_owned());
        let what = match notice {
            BackendNotice::InsertRoot => "insert",
            BackendNotice::RemoveRoot => "remove",
            BackendNotice::ContextAttached(_) | BackendNotice::ContextDetaching(_) => "context",
        };
        log.lock().expect("no panic").push(format!("{what} {root}"));
    });
    let io = iothread();
    assert_eq!(read(&io, &backend, 0, 512), Err(BlockError::NoMedium));
    assert_eq!(backend.length(), Err(BlockError::NoMedium));
    backend.insert(first.clone(), writer()).expect("nobody objects");
    assert!(backend.insert(second.clone(), writer()).expect_err("it has one").0.contains("medium"));
    assert_eq!(write(&io, &backend, 0, 512, 3), Ok(()));
    backend.remove();
    backend.remove();
    let state = backend.root_state().expect("it is remembered");
    assert!(state.discard && !state.read_only && state.detect_zeroes == blockport_block::DetectZeroes::Unmap);
    assert_eq!(read(&io, &backend, 0, 512), Err(BlockError::NoMedium));
    assert!(backend.insert(second.clone(), writer()).expect_err("read-only").0.contains("\"second\""));
    assert!(backend.root().is_none() && second.users().is_empty(), "a refused medium leaves nothing behind");
    backend.insert(second, Permissions::device(false)).expect("for reading");
    assert_eq!(backend.length(), Ok(2 << 20));
    assert_eq!(*notices.lock().expect("no panic"), ["insert first", "remove first", "insert second"]);
    drop(notifier);
    backend.remove();
    assert!(backend.root_state().expect("it is remembered").read_only);
    assert_eq!(notices.lock().expect("no panic").len(), 3, "who has left is told no more");
}

#[test]
fn a_request_that_was_parked_for_one_medium_never_reaches_another() {
    let graph = Graph::default();
    let (old, new) = (add(&graph, "memory,node-name=old,size=1M"), add(&graph, "memory,node-name=new,size=1M"));
    let backend = BlockBackend::with_root("d", old, writer()).expect("nobody objects");
    let io = iothread();
    assert_eq!(write(&io, &backend, 0, 512, 1), Ok(()));
    backend.drain_begin();
    let channel = backend.clone();
    let (sender, done) = std::sync::mpsc::channel();
    io.remote().post(move |context| {
        let channel = channel.channel(context).expect("the node is active");
        context.spawn(async move {
            let buffer = blockport_block::iovec::AlignedBuffer::new(512, 512);
            let _ = sender.send(channel.pwritev(0, &[buffer.iov()]).await);
        });
    });
    io.remote().call(|context, answer| context.spawn(async move { answer.give(()) }));
    backend.remove();
    backend.insert(new, writer()).expect("nobody objects");
    assert!(done.try_recv().is_err(), "it is parked");
    backend.drain_end();
    let answer = done.recv_timeout(crate::helpers::DEADLINE).expect("it goes on");
    assert_eq!(answer, Err(BlockError::NoMedium));
    assert_eq!(read(&io, &backend, 0, 512), Ok(vec![0; 512]));
}

#[test]
fn all_backends_are_flushed_and_an_error_of_one_is_told() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=good,size=1M");
    add(&graph, "blkdebug,node-name=bad,inject-error.0.event=flush_to_disk,image.driver=memory,image.size=1M");
    let io = iothread();
    let backends: Vec<_> = ["bad", "good"]
        .iter()
        .map(|name| {
            let backend = graph.create_backend(name);
            backend.insert(graph.find(name).expect("it is there"), writer()).expect("nobody objects");
            assert_eq!(write(&io, &backend, 0, 512, 1), Ok(()));
            backend
        })
        .collect();
    assert_eq!(graph.flush_all(), Err(BlockError::Host(libc::EIO)));
    let flushes = |backend: &Arc<BlockBackend>| backend.statistics().of(blockport_block::RequestKind::Flush);
    assert_eq!((flushes(&backends[0]).failed, flushes(&backends[1]).operations), (1, 1), "the other one too");
}
