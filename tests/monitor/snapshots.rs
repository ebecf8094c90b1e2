//! Snapshots by overlay under load, and transactions: all of it or nothing.

use std::path::PathBuf;

use blockport_block::drivers::qcow2::{CreateOptions, new_image};
use serde_json::{Value, json};

use super::client::{Client, Monitored};
use crate::backend::Setup;
use crate::frontend::blk::{OK, Request};
use crate::frontend::device::{Device, Profile};
use crate::image::{Image, pattern};

const DISK: u64 = 4 << 20;
/// What is written in one go.
const PIECE: usize = 64 << 10;
const SECTORS: u64 = PIECE as u64 / 512;

/// An empty qcow2 image.
fn empty(daemon: &Monitored, name: &str) -> PathBuf {
    let path = daemon.place(name);
    let bytes = new_image(&CreateOptions { size: DISK, ..CreateOptions::default() });
    std::fs::write(&path, bytes.expect("valid options")).expect("the directory is writable");
    path
}

/// Adds an overlay that waits for its snapshot.
fn add_overlay(daemon: &Monitored, client: &mut Client, name: &str) {
    let file = json!({"driver": "file", "filename": empty(daemon, &format!("{name}.qcow2"))});
    client.ok("blockdev-add", json!({"driver": "qcow2", "node-name": name, "backing": null, "file": file}));
}

fn write(device: &mut Device, at: u64, seed: u32) {
    let request = Request::write(at * SECTORS, &pattern(seed, PIECE));
    assert_eq!(device.queue().request(&request).status, OK);
}

#[track_caller]
fn reads(device: &mut Device, at: u64, seed: u32) {
    assert!(device.queue().read(at * SECTORS, PIECE as u32) == pattern(seed, PIECE), "piece {at}");
}

/// Which node each export has for its medium.
fn media(client: &mut Client) -> Vec<String> {
    let list = client.ok("query-block-exports", json!({}));
    let node = |export: &Value| export["node-name"].as_str().expect("a name").to_owned();
    list.as_array().expect("a list").iter().map(node).collect()
}

fn children(client: &mut Client, name: &str) -> Vec<String> {
    let list = client.ok("query-named-block-nodes", json!({}));
    let node = list.as_array().expect("a list").iter().find(|node| node["node-name"] == name).expect("the node");
    let child = |child: &Value| child["child"].as_str().expect("a role").to_owned();
    node["children"].as_array().expect("children").iter().map(child).collect()
}

#[test]
fn a_snapshot_keeps_what_was_there_and_takes_what_comes() {
    let image = Image::empty(DISK);
    let daemon = Monitored::start(Setup::file(image.path()));
    let mut client = daemon.client();
    let mut device = daemon.backend.device(&Profile::qemu());
    write(&mut device, 0, 1);
    write(&mut device, 1, 2);
    for (round, overlay) in ["o1", "o2", "o3"].into_iter().enumerate() {
        let seed = 10 * (round as u32 + 1);
        add_overlay(&daemon, &mut client, overlay);
        let below = media(&mut client);
        client.ok("blockdev-snapshot", json!({"node": below[0], "overlay": overlay}));
        assert_eq!(media(&mut client), [overlay]);
        assert_eq!(children(&mut client, overlay), ["file", "backing"]);
        reads(&mut device, 0, 1);
        reads(&mut device, 1, if round == 0 { 2 } else { seed - 10 });
        write(&mut device, 1, seed);
        reads(&mut device, 1, seed);
        // Who is below stays in use.
        let refusal = client.refused("blockdev-del", json!({"node-name": below[0]}));
        assert!(refusal.contains(overlay) || refusal.contains("in use"), "{refusal}");
    }
    assert!(image.read(0, PIECE) == pattern(1, PIECE) && image.read(PIECE as u64, PIECE) == pattern(2, PIECE));
    drop(device);
    daemon.backend.stop();
}

#[test]
fn a_snapshot_that_cannot_be_taken_changes_nothing() {
    let image = Image::empty(DISK);
    let daemon = Monitored::start(Setup::file(image.path()));
    let mut client = daemon.client();
    let mut device = daemon.backend.device(&Profile::qemu());
    write(&mut device, 0, 1);
    add_overlay(&daemon, &mut client, "o1");
    for name in ["y", "z"] {
        client.ok("blockdev-add", json!({"driver": "null-co", "node-name": name, "size": DISK}));
    }
    let file = json!({"driver": "file", "filename": empty(&daemon, "ro.qcow2")});
    client.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "ro", "read-only": true, "backing": null, "file": file}),
    );
    let file = json!({"driver": "file", "filename": empty(&daemon, "full.qcow2")});
    client.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "full", "backing": "y", "file": file}));
    for (node, overlay, complaint) in [
        ("no", "o1", "no"),
        ("d0", "no", "no"),
        ("d0", "z", "does not support backing images"),
        ("d0", "d0", "in use"),
        ("d0", "full", "already has a backing image"),
        ("d0", "ro", "read-only"),
    ] {
        let refusal = client.refused("blockdev-snapshot", json!({"node": node, "overlay": overlay}));
        assert!(refusal.contains(complaint), "{node} {overlay}: {refusal}");
        assert_eq!(media(&mut client), ["d0"]);
        write(&mut device, 1, 2);
    }
    assert_eq!(children(&mut client, "o1"), ["file"]);
    assert!(image.read(PIECE as u64, PIECE) == pattern(2, PIECE));
    client.ok("blockdev-del", json!({"node-name": "o1"}));
}

#[test]
fn a_transaction_is_done_whole_or_not_at_all() {
    let image = Image::empty(DISK);
    let daemon = Monitored::start(Setup::file(image.path()));
    let mut client = daemon.client();
    let mut device = daemon.backend.device(&Profile::qemu());
    write(&mut device, 0, 1);
    client.ok("blockdev-add", json!({"driver": "memory", "node-name": "m", "size": DISK}));
    let socket = daemon.place("e1");
    let address = json!({"type": "unix", "path": socket});
    client.ok(
        "block-export-add",
        json!({"type": "vhost-user-blk", "id": "e1", "node-name": "m", "addr": address, "writable": true}),
    );
    add_overlay(&daemon, &mut client, "o1");
    add_overlay(&daemon, &mut client, "o2");
    let snapshot =
        |node: &str, overlay: &str| json!({"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}});
    let both = [snapshot("d0", "o1"), snapshot("m", "o2")];
    for last in [json!({"type": "abort", "data": {}}), snapshot("d0", "o1"), snapshot("no", "o1")] {
        let actions = [&both[..], std::slice::from_ref(&last)].concat();
        client.refused("transaction", json!({"actions": actions}));
        assert_eq!(media(&mut client), ["d0", "m"], "{last}");
        assert_eq!(
            (children(&mut client, "o1"), children(&mut client, "o2")),
            (vec!["file".into()], vec!["file".into()])
        );
        write(&mut device, 1, 2);
        assert!(image.read(PIECE as u64, PIECE) == pattern(2, PIECE), "{last}");
    }
    for (actions, complaint) in [
        (json!([{"type": "no-such-action", "data": {}}]), "actions.0.type"),
        (json!([{"type": "abort"}]), "actions.0.data"),
        (json!([{"type": "abort", "data": {"x": 1}}]), "actions.0.data.x"),
        (json!([{"type": "abort", "data": {}, "y": 1}]), "actions.0.y"),
        (json!([{"type": "blockdev-snapshot", "data": {"node": "d0"}}]), "overlay"),
        (json!(vec![json!({"type": "abort", "data": {}}); 257]), "at most 256"),
        (json!(7), "actions"),
    ] {
        let refusal = client.refused("transaction", json!({"actions": actions}));
        assert!(refusal.contains(complaint), "{complaint}: {refusal}");
    }
    client.ok("transaction", json!({"actions": []}));
    client.ok("transaction", json!({"actions": both}));
    assert_eq!(media(&mut client), ["o1", "o2"]);
    reads(&mut device, 1, 2);
    write(&mut device, 1, 3);
    assert!(image.read(PIECE as u64, PIECE) == pattern(2, PIECE), "it is kept");
    drop(device);
    daemon.backend.stop();
}
