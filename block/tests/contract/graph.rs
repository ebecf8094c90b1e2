//! Rows: permissions, quiesce, parked requests, drain, limits, activation, several iothreads, operation blockers; and
//! the graph under load: nodes replaced, filters put in and taken out.

use std::sync::Arc;

use blockport_block::{
    BlockBackend, BlockError, Child, Drained, Graph, Operation, PermissionSet, Permissions, RequestKind,
};

use crate::helpers::{Load, TestDevice, add, iothread, keep_channel, options, read, write};
use crate::testing::{TempDir, writer};

/// A backend of the graph over a node.
fn backend(graph: &Graph, label: &str, node: &str) -> Arc<BlockBackend> {
    let backend = graph.create_backend(label);
    backend.insert(graph.find(node).expect("it is there"), writer()).expect("nobody objects");
    backend
}

#[test]
fn a_drain_of_a_node_covers_every_backend_above_it_and_no_other() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=file,size=1M");
    add(&graph, "raw,node-name=filter,file=file");
    add(&graph, "memory,node-name=other,size=1M");
    let (low, high, other) =
        (backend(&graph, "low", "file"), backend(&graph, "high", "filter"), backend(&graph, "other", "other"));
    let drained = Drained::above(&graph.find("file").expect("it is there"));
    assert!(low.is_quiesced() && high.is_quiesced() && !other.is_quiesced());
    let nested = Drained::above(&graph.find("filter").expect("it is there"));
    drop(drained);
    assert!(!low.is_quiesced() && high.is_quiesced(), "sections nest");
    drop(nested);
    assert!(!high.is_quiesced());
    let all = graph.drain_all();
    assert!([&low, &high, &other].iter().all(|backend| backend.is_quiesced()));
    drop(all);
}

#[test]
fn a_drain_waits_for_every_backend_and_parks_what_arrives_at_each() {
    let graph = Graph::default();
    let delayed = "delay.0.iotype=write,delay.0.ns=30000000";
    add(&graph, &format!("blkdebug,node-name=slow,{delayed},image.driver=memory,image.size=1M"));
    let backends = [backend(&graph, "a", "slow"), backend(&graph, "b", "slow")];
    let threads = [iothread(), iothread()];
    let loads = [0, 1].map(|n| Load::start(&threads[n], &backends[n], 8 * n as u64, 4));
    loads.iter().for_each(|load| load.goes_on(1));
    let drained = Drained::above(&graph.find("slow").expect("it is there"));
    let done = || backends.each_ref().map(|backend| backend.statistics().of(RequestKind::Write).operations);
    let before = done();
    std::thread::sleep(std::time::Duration::from_millis(80));
    assert_eq!(done(), before, "nothing is in flight, nothing starts");
    drop(drained);
    loads.iter().for_each(|load| load.goes_on(16));
    assert_eq!(loads.map(Load::stop), [0, 0]);
}

#[test]
fn a_device_is_told_of_the_first_begin_and_the_last_end_only_and_is_polled_between() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=disk,size=1M");
    let backend = backend(&graph, "d", "disk");
    let device = Arc::new(TestDevice::new());
    let attached = backend.attach(device.clone()).expect("no other device");
    device.busy.store(2, std::sync::atomic::Ordering::SeqCst);
    let outer = Drained::new(vec![backend.clone()]);
    assert_eq!(device.told(), ["drained begin", "drained poll", "drained poll"]);
    let inner = Drained::new(vec![backend.clone()]);
    drop(inner);
    assert!(device.told().is_empty());
    drop(attached);
    let attached = backend.attach(device.clone()).expect("the other one is gone");
    assert_eq!(device.told(), ["drained begin"], "who comes while quiesced is told at once");
    drop(outer);
    assert_eq!(device.told(), ["drained end"]);
    drop(attached);
}

#[test]
fn a_drain_returns_also_without_a_medium() {
    let backend = BlockBackend::new("empty");
    let drained = Drained::new(vec![backend.clone()]);
    assert!(backend.is_quiesced());
    drop(drained);
    assert!(!backend.is_quiesced());
}

#[test]
fn a_filter_goes_in_and_out_under_load_and_no_request_fails() {
    let (disk, graph) = (TempDir::on_disk(), Graph::default());
    add(&graph, &format!("file,node-name=file,filename={}", disk.file("image", 1 << 20)));
    let backend = backend(&graph, "disk", "file");
    let threads = [iothread(), iothread()];
    let loads: Vec<Load> = (0..).zip(&threads).map(|(n, t)| Load::start(t, &backend, n * 32, 32)).collect();
    for round in 0..40 {
        let filter = add(&graph, "blkdebug,node-name=filter,image=file");
        let file = graph.find("file").expect("it is there");
        match round % 2 {
            0 => graph.replace_node(&file, &filter),
            _ => graph.replace_root(&backend, &filter),
        }
        .expect("the filter goes in");
        assert_eq!(backend.root().expect("a medium").name(), "filter");
        assert!(graph.blockdev_del("filter").expect_err("it is used").0.contains("\"disk\""), "the user is named");
        loads.iter().for_each(|load| load.goes_on(64));
        graph.replace_node(&filter, &file).expect("the filter goes out");
        drop(filter);
        graph.blockdev_del("filter").expect("nobody uses it");
        loads.iter().for_each(|load| load.goes_on(64));
    }
    let failed: u64 = loads.into_iter().map(Load::stop).sum();
    assert_eq!(failed, 0);
}

#[test]
fn a_replacement_of_another_size_is_told_to_the_device() {
    let graph = Graph::default();
    let small = add(&graph, "memory,node-name=small,size=1M");
    let large = add(&graph, "memory,node-name=large,size=2M");
    let backend = backend(&graph, "d", "small");
    let device = Arc::new(TestDevice::new());
    let attached = backend.attach(device.clone()).expect("no other device");
    graph.replace_node(&small, &large).expect("nobody objects");
    assert_eq!(backend.length(), Ok(2 << 20));
    assert_eq!(device.told(), ["drained begin", "drained end", "resize"]);
    drop(attached);
}

#[test]
fn a_replacement_that_would_make_a_loop_is_refused() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=bottom,size=1M");
    let lower = add(&graph, "raw,node-name=lower,file=bottom");
    let upper = add(&graph, "raw,node-name=upper,file=lower");
    let refused = graph.replace_child(&lower, "file", &upper).expect_err("it would stand on itself");
    assert!(refused.0.contains("\"upper\"") && refused.0.contains("\"lower\""), "{refused}");
    assert!(graph.replace_child(&lower, "image", &upper).expect_err("no such child").0.contains("\"image\""));
}

/// Someone who writes and lets nobody else.
const ALONE: Permissions = Permissions { held: PermissionSet::WRITE, shared: PermissionSet::CONSISTENT_READ };

#[test]
fn permissions_are_changed_all_the_way_down_or_not_at_all_and_an_error_names_both_users() {
    let graph = Graph::default();
    let file = add(&graph, "memory,node-name=file,size=1M");
    let filter = add(&graph, "raw,node-name=filter,file=file");
    let alone = Child::attach(file.clone(), "job \"j0\"", ALONE, 512).expect("nobody else uses it");
    let backend = graph.create_backend("disk");
    let refused = backend.insert(filter.clone(), writer()).expect_err("the job does not share writing");
    assert!(refused.0.contains("job \"j0\"") && refused.0.contains("node \"filter\""), "{refused}");
    assert!(refused.0.contains("write"), "{refused}");
    assert_eq!(filter.total_permissions(), Permissions::UNUSED);
    assert_eq!(file.total_permissions(), ALONE, "as before");
    assert!(backend.root().is_none());

    backend.insert(filter.clone(), Permissions::device(false)).expect("reading is shared");
    let refused = backend.set_permissions(writer()).expect_err("still not shared");
    assert!(refused.0.contains("job \"j0\""), "{refused}");
    assert_eq!(filter.total_permissions(), Permissions::device(false), "as before");
    drop(alone);
    backend.set_permissions(writer()).expect("the job has gone");
    let refused = Child::attach(file, "job \"j1\"", ALONE, 512).err().expect("the filter writes now");
    assert!(refused.0.contains("job \"j1\"") && refused.0.contains("node \"filter\""), "{refused}");
}

#[test]
fn a_replacement_carries_what_users_hold_to_the_new_node_or_fails_as_a_whole() {
    let graph = Graph::default();
    let (old, new) = (add(&graph, "memory,node-name=old,size=1M"), add(&graph, "memory,node-name=new,size=1M"));
    let (a, b) = (backend(&graph, "a", "old"), backend(&graph, "b", "old"));
    let alone = Child::attach(new.clone(), "job \"j0\"", ALONE, 512).expect("nobody else uses it");
    let refused = graph.replace_node(&old, &new).expect_err("the job shares nothing");
    assert!(refused.0.contains("job \"j0\""), "{refused}");
    let io = iothread();
    for backend in [&a, &b] {
        assert_eq!(backend.root().expect("a medium").name(), "old");
        assert_eq!(write(&io, backend, 0, 512, 1), Ok(()));
    }
    assert_eq!(old.total_permissions(), writer());
    drop(alone);
    graph.replace_node(&old, &new).expect("the job has gone");
    assert_eq!((old.total_permissions(), new.total_permissions()), (Permissions::UNUSED, writer()));
    assert_eq!(write(&io, &a, 0, 512, 2), Ok(()));
    assert_eq!(read(&io, &b, 0, 512), Ok(vec![2; 512]), "both are over the new one");
}

#[test]
fn users_who_write_in_small_units_are_kept_apart_from_those_that_were_there_before() {
    let graph = Graph::default();
    add(&graph, "blkdebug,node-name=blocks,align=4096,image.driver=memory,image.size=1M");
    let node = graph.find("blocks").expect("it is there");
    let large = graph.create_backend("large");
    large.set_block_size(4096);
    large.insert(node.clone(), writer()).expect("nobody objects");
    let io = iothread();
    let load = Load::start(&io, &large, 0, 8);
    load.goes_on(32);
    // From now on writes may be padded, which the channel that is there must learn of.
    let small = graph.create_backend("small");
    small.insert(node, writer()).expect("nobody objects");
    load.goes_on(32);
    assert_eq!(write(&io, &small, 64 << 10, 512, 7), Ok(()));
    assert_eq!(load.stop(), 0);
}

#[test]
fn a_resize_drains_and_tells_every_backend_above_the_node() {
    let graph = Graph::default();
    let file = add(&graph, "memory,node-name=file,size=1M");
    add(&graph, "raw,node-name=whole,file=file");
    let (low, high) = (backend(&graph, "low", "file"), backend(&graph, "high", "whole"));
    let devices = [Arc::new(TestDevice::new()), Arc::new(TestDevice::new())];
    let attached = [low.attach(devices[0].clone()), high.attach(devices[1].clone())];
    let io = iothread();
    assert_eq!(read(&io, &high, 2 << 20, 512), Err(BlockError::OutOfRange));
    file.block_resize(4 << 20).expect("memory grows");
    for (backend, device) in [(&low, &devices[0]), (&high, &devices[1])] {
        assert_eq!(backend.length(), Ok(4 << 20));
        assert_eq!(device.told(), ["drained begin", "drained end", "resize"]);
        assert_eq!(read(&io, backend, 2 << 20, 512), Ok(vec![0; 512]));
    }
    high.resize(2 << 20).expect("and shrinks through the filter");
    assert_eq!((low.length(), high.length()), (Ok(2 << 20), Ok(2 << 20)));
    drop(attached);
}

#[test]
fn a_blocked_operation_is_refused_with_the_name_of_the_blocker() {
    let graph = Graph::default();
    let node = add(&graph, "memory,node-name=disk,size=1M");
    let other = add(&graph, "memory,node-name=other,size=1M");
    let blocker = node.block_operations(&Operation::ALL, "job \"j0\" copies it");
    let refusals = [
        node.block_resize(4096),
        graph.blockdev_del("disk"),
        graph.reopen(vec![options("memory,node-name=disk,size=1M")]),
        graph.replace_node(&node, &other),
        node.inactivate(),
        node.check_operation(Operation::JobTarget),
    ];
    for refused in refusals {
        let refused = refused.expect_err("it is blocked");
        assert!(refused.0.contains("job \"j0\"") && refused.0.contains("\"disk\""), "{refused}");
    }
    assert_eq!(node.length(), 1 << 20);
    drop(blocker);
    node.block_resize(4096).expect("the job has gone");
}

#[test]
fn a_node_is_inactive_only_with_all_that_stands_on_it_and_gives_its_locks_up() {
    let (disk, graph) = (TempDir::on_disk(), Graph::default());
    let path = disk.file("image", 1 << 20);
    let file = add(&graph, &format!("file,node-name=file,filename={path}"));
    let top = add(&graph, "raw,node-name=top,file=file");
    let backend = backend(&graph, "disk", "top");
    let io = iothread();
    keep_channel(&io, &backend);
    assert_eq!(write(&io, &backend, 0, 4096, 5), Ok(()));
    assert!(file.inactivate().expect_err("the node above is active").0.contains("\"top\""));
    top.inactivate().expect("nothing is in the way");
    assert!(!top.is_active() && !file.is_active(), "its file goes with it");
    assert_eq!(read(&io, &backend, 0, 4096), Err(BlockError::NoMedium));
    // Somebody else may have the image meanwhile.
    let elsewhere = Graph::default();
    let other = add(&elsewhere, &format!("file,node-name=file,filename={path}"));
    let user = Child::attach(other, "another process", ALONE, 512).expect("it is not locked");
    let refused = top.activate().expect_err("it is locked");
    assert!(refused.0.contains("image"), "{refused}");
    assert!(!top.is_active());
    drop((user, elsewhere));
    top.activate().expect("it is free again");
    assert_eq!(read(&io, &backend, 0, 4096), Ok(vec![5; 4096]));
}
