//! Reopening nodes under load, as `blockdev-reopen` does: all of a list or nothing.

use std::sync::Arc;

use blockport_block::{BlockBackend, Graph, OpenResult};

use crate::helpers::{Load, add, iothread, options, read, write};
use crate::testing::{TempDir, writer};

fn reopen(graph: &Graph, list: &[&str]) -> OpenResult {
    graph.reopen(list.iter().map(|text| options(text)).collect())
}

fn backend(graph: &Graph, node: &str) -> Arc<BlockBackend> {
    let backend = graph.create_backend("disk");
    backend.insert(graph.find(node).expect("it is there"), writer()).expect("nobody objects");
    backend
}

#[test]
fn options_that_are_left_out_go_back_to_their_defaults() {
    let graph = Graph::default();
    let node = add(&graph, "memory,node-name=m,size=1M,discard=unmap,detect-zeroes=on");
    let backend = backend(&graph, "m");
    let io = iothread();
    assert_eq!(write(&io, &backend, 0, 4096, 9), Ok(()));
    reopen(&graph, &["memory,node-name=m,size=1M"]).expect("nothing is in the way");
    assert!(!node.options().discard);
    assert_eq!(node.options().detect_zeroes, Default::default());
    assert_eq!(read(&io, &backend, 0, 4096), Ok(vec![9; 4096]), "memory keeps its content");
    let refused = reopen(&graph, &["memory,node-name=m,size=2M"]).expect_err("a size is changed by resizing");
    assert!(refused.0.contains("size"), "{refused}");
    assert_eq!(read(&io, &backend, 0, 4096), Ok(vec![9; 4096]));
}

#[test]
fn a_file_goes_over_to_direct_and_read_only_and_back_under_load() {
    let (disk, graph) = (TempDir::on_disk(), Graph::default());
    let path = disk.file("image", 1 << 20);
    let node = add(&graph, &format!("file,node-name=f,filename={path}"));
    let backend = backend(&graph, "f");
    let io = iothread();
    let load = Load::start(&io, &backend, 0, 32);
    let refused = reopen(&graph, &[&format!("file,node-name=f,filename={path},read-only=on")]);
    assert!(refused.expect_err("the disk writes").0.contains("\"disk\" cannot write"));
    for direct in ["on", "off", "on"] {
        load.goes_on(64);
        let text = format!("file,node-name=f,filename={path},cache.direct={direct}");
        if let Err(error) = reopen(&graph, &[&text]) {
            assert!(error.0.contains("direct I/O"), "{error}");
        }
    }
    load.goes_on(64);
    assert_eq!(load.stop(), 0);
    backend.set_permissions(blockport_block::Permissions::device(false)).expect("less is always to be had");
    reopen(&graph, &[&format!("file,node-name=f,filename={path},read-only=on")]).expect("nobody writes");
    assert!(node.is_read_only());
}

#[test]
fn a_filter_goes_in_between_by_reopening_its_parent_under_load() {
    let graph = Graph::default();
    add(&graph, "memory,node-name=file,size=1M");
    add(&graph, "raw,node-name=top,file=file");
    add(&graph, "blkdebug,node-name=filter,image=file");
    let backend = backend(&graph, "top");
    let io = iothread();
    let load = Load::start(&io, &backend, 0, 32);
    for _ in 0..20 {
        load.goes_on(64);
        reopen(&graph, &["raw,node-name=top,file=filter"]).expect("in");
        assert!(graph.blockdev_del("filter").expect_err("used").0.contains("node \"top\""));
        load.goes_on(64);
        reopen(&graph, &["raw,node-name=top,file=file"]).expect("out");
    }
    assert_eq!(load.stop(), 0);
    graph.blockdev_del("filter").expect("nobody uses it");
}

#[test]
fn an_inline_child_is_reopened_where_it_is() {
    let (disk, graph) = (TempDir::on_disk(), Graph::default());
    let path = disk.file("image", 1 << 20);
    let text = |more: &str| format!("raw,node-name=top,file.driver=file,file.filename={path}{more}");
    let top = add(&graph, &text(""));
    let child = top.child("file").expect("it has one").node();
    reopen(&graph, &[&text(",file.cache.no-flush=on")]).expect("nothing is in the way");
    assert!(Arc::ptr_eq(&top.child("file").expect("it has one").node(), &child), "the same node");
    assert!(child.options().cache_no_flush);
    let name = child.name().to_owned();
    let refused = reopen(&graph, &[&text(",file.node-name=other")]).expect_err("names stay");
    assert!(refused.0.contains("node-name") && refused.0.contains(&name), "{refused}");
    drop(child);
    drop(top);
    graph.blockdev_del("top").expect("nobody uses it");
    assert!(graph.find(&name).is_none(), "an inline child goes with its parent");
}

#[test]
fn one_failure_restores_all_nodes_of_the_list() {
    let (disk, graph) = (TempDir::on_disk(), Graph::default());
    let path = disk.file("image", 1 << 20);
    let file = add(&graph, &format!("file,node-name=file,filename={path}"));
    let top = add(&graph, "raw,node-name=top,file=file,offset=4096");
    add(&graph, "memory,node-name=other,size=1M");
    let backend = backend(&graph, "top");
    let io = iothread();
    let load = Load::start(&io, &backend, 0, 16);
    let no_flush = format!("file,node-name=file,filename={path},cache.no-flush=on");
    for (second, named) in [
        ("raw,node-name=top,file=file,offset=100", "offset"),
        ("raw,node-name=top,file=nothing", "nothing"),
        ("raw,node-name=top,file=top", "itself"),
        ("raw,node-name=top,file=other,offset=4M", "offset"),
        ("raw,node-name=top,file=file,whatever=1", "whatever"),
        ("raw,node-name=top", "file"),
        ("memory,node-name=top,size=1M", "driver"),
        ("raw,node-name=nobody,file=file", "nobody"),
        (no_flush.as_str(), "twice"),
    ] {
        load.goes_on(16);
        let refused = reopen(&graph, &[&no_flush, second]).expect_err(second);
        assert!(refused.0.contains(named), "{second}: {refused}");
        assert!(!file.options().cache_no_flush, "{second}: the first is what it was");
        assert!(Arc::ptr_eq(&top.child("file").expect("it has one").node(), &file), "{second}");
        assert!(file.is_active() && top.is_active(), "{second}");
    }
    assert_eq!(load.stop(), 0);
    reopen(&graph, &[&no_flush, "raw,node-name=top,file=file,offset=8192"]).expect("both are right");
    assert!(file.options().cache_no_flush);
    assert_eq!(backend.length(), Ok((1 << 20) - 8192));
}
