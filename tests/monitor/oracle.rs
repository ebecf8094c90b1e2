//! QEMU's answers as the oracle: the same commands to qemu-storage-daemon and to blockport, and, for commands that the
//! former lacks, a table of what a QEMU without a machine answers (made by `scripts/qmp-clients --make-table`).
//!
//! Compared are shapes: members with their types, and the classes of errors. Ours may have more members, not fewer.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::client::{Client, Monitored};
use crate::backend::{Program, Setup, skip};
use crate::image::Image;

/// Members that only QEMU has, and why.
const LACKING: &[(&str, &str)] = &[
    ("driver-specific", "no driver has counts of its own"),
    ("format-specific", "no driver has details that a client may need"),
    ("parent", "counts of nodes are flat"),
];

/// Where `ours` lacks something that `theirs` has, or has something else there.
fn differences(path: &str, theirs: &Value, ours: &Value, found: &mut Vec<String>) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            for (key, value) in theirs.iter().filter(|(key, _)| !LACKING.iter().any(|(lacking, _)| lacking == key)) {
                match ours.get(key) {
                    Some(our) => differences(&format!("{path}.{key}"), value, our, found),
                    None => found.push(format!("{path}.{key} is missing")),
                }
            }
        }
        (Value::Array(theirs), Value::Array(ours)) => match (theirs.first(), ours.first()) {
            (Some(their), Some(our)) => differences(&format!("{path}[]"), their, our, found),
            (Some(_), None) => found.push(format!("{path} is empty")),
            _ => {}
        },
        (theirs, ours) if theirs == ours => {}
        (theirs, ours) => found.push(format!("{path} is {ours}, not {theirs}")),
    }
}

/// Each value by the name of its type; of a list, its first entry.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), shape(value))).collect(),
        Value::Array(list) => list.iter().take(1).map(shape).collect(),
        Value::Bool(_) => "bool".into(),
        Value::Number(number) => if number.is_f64() { "number" } else { "int" }.into(),
        Value::String(_) => "str".into(),
        Value::Null => "null".into(),
    }
}

/// What a client learns from an answer: the class of the error, or the shape of what is returned.
fn learned(client: &mut Client, command: &str, arguments: &Value) -> Value {
    match client.execute(command, arguments.clone()) {
        Ok(answer) => json!({"return": shape(&answer)}),
        Err((class, _)) => json!({"error": class}),
    }
}

/// A name where there must be a node, an object and an export for the commands to mean something.
fn start(image: &Image) -> Monitored {
    let mut setup = Setup::file(image.path());
    setup = setup.program(Program::Blockport);
    Monitored::start(setup)
}

#[test]
fn commands_about_devices_answer_as_a_qemu_without_a_machine() {
    let table = include_str!("device-commands.json");
    let table: Value = serde_json::from_str(table).expect("the table");
    let image = Image::empty(1 << 20);
    let daemon = start(&image);
    let mut client = daemon.client();
    client.ok("blockdev-add", json!({"driver": "null-co", "node-name": "n0", "size": 1 << 20}));
    let mut found = Vec::new();
    for row in table.as_array().expect("a list") {
        let command = row["execute"].as_str().expect("a name");
        let ours = learned(&mut client, command, &row["arguments"]);
        let mut theirs = row.clone();
        for key in ["execute", "arguments"] {
            theirs.as_object_mut().expect("an object").remove(key);
        }
        differences(&format!("{command} {}:", row["arguments"]), &theirs, &ours, &mut found);
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// A qemu-storage-daemon with the same disk and a monitor.
struct StorageDaemon(Child);

impl StorageDaemon {
    fn start(image: &Image, monitor: &Path, disk: &Path) -> Self {
        let child = Command::new("qemu-storage-daemon")
            .args(["--chardev", &format!("socket,id=mon0,path={},server=on,wait=off", monitor.display())])
            .args(["--monitor", "chardev=mon0", "--object", "iothread,id=t0"])
            .args([
                "--blockdev",
                &format!(
                    "driver=raw,node-name=d0,discard=unmap,file.driver=file,file.filename={}",
                    image.path().display()
                ),
            ])
            .args([
                "--export",
                &format!(
                    "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={},writable=on",
                    disk.display()
                ),
            ])
            .stdout(Stdio::null())
            .spawn();
        Self(child.expect("qemu-storage-daemon"))
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Commands for both, in this order.
fn common(place: &Path) -> Vec<(&'static str, Value)> {
    let socket = |name: &str| place.join(name).display().to_string();
    let export = |id: &str, node: &str, more: Value| {
        let mut export = json!({"type": "vhost-user-blk", "id": id, "node-name": node,
                                "addr": {"type": "unix", "path": socket(id)}});
        for (key, value) in more.as_object().expect("an object") {
            export[key.as_str()] = value.clone();
        }
        export
    };
    let chardev = |id: &str| {
        let addr = json!({"type": "unix", "data": {"path": socket(id)}});
        json!({"id": id, "backend": {"type": "socket", "data": {"addr": addr, "wait": false}}})
    };
    vec![
        ("query-version", json!({})),
        ("query-version", json!({"x": 1})),
        ("query-commands", json!({})),
        ("no-such-command", json!({})),
        ("qmp_capabilities", json!({})),
        ("query-named-block-nodes", json!({})),
        ("query-named-block-nodes", json!({"flat": true})),
        ("query-block-exports", json!({})),
        ("query-chardev", json!({})),
        ("query-blockstats", json!({"query-nodes": true})),
        ("blockdev-add", json!({"driver": "null-co", "node-name": "n1", "size": 1_048_576, "read-zeroes": true})),
        ("blockdev-add", json!({"driver": "null-co", "node-name": "n1"})),
        ("blockdev-add", json!({"driver": "null-co"})),
        ("blockdev-add", json!({"node-name": "n2"})),
        ("blockdev-add", json!({"driver": "no", "node-name": "n2"})),
        ("blockdev-add", json!({"driver": "null-co", "node-name": "n2", "no": 1})),
        ("blockdev-add", json!({"driver": "null-co", "node-name": "n2", "size": "x"})),
        ("blockdev-add", json!({"driver": "file", "node-name": "n2", "filename": "/no/such/file"})),
        ("blockdev-add", json!({"driver": "raw", "node-name": "n2", "file": "no"})),
        ("blockdev-del", json!({"node-name": "no"})),
        ("blockdev-del", json!({"node-name": "d0"})),
        ("blockdev-reopen", json!({"options": [{"driver": "raw", "node-name": "n1"}]})),
        ("blockdev-reopen", json!({"options": [{"driver": "null-co", "node-name": "no"}]})),
        ("blockdev-reopen", json!({})),
        ("block-export-add", export("e1", "n1", json!({"num-queues": 2}))),
        ("block-export-add", export("e1", "n1", json!({}))),
        ("block-export-add", export("e2", "no", json!({}))),
        ("block-export-add", export("e2", "n1", json!({"writable": true}))),
        ("block-export-add", export("e2", "n1", json!({"num-queues": 0}))),
        ("block-export-add", export("e2", "n1", json!({"iothread": "no"}))),
        ("block-export-add", export("e2", "n1", json!({"no": 1}))),
        ("block-export-del", json!({"id": "no"})),
        ("block-export-del", json!({"id": "e1", "mode": "no"})),
        ("block-export-del", json!({"id": "e1"})),
        ("blockdev-set-active", json!({"node-name": "n1", "active": false})),
        ("blockdev-set-active", json!({"node-name": "no", "active": false})),
        ("blockdev-del", json!({"node-name": "n1"})),
        // One that succeeds ends qemu-storage-daemon 10.0.
        ("block_resize", json!({"node-name": "d0", "size": -1})),
        ("block_resize", json!({"node-name": "no", "size": 1})),
        ("block_resize", json!({"node-name": "d0"})),
        ("object-add", json!({"qom-type": "iothread", "id": "t1", "poll-max-ns": 1000})),
        ("object-add", json!({"qom-type": "iothread", "id": "t1"})),
        ("object-add", json!({"qom-type": "no", "id": "t2"})),
        ("object-add", json!({"qom-type": "iothread", "id": "t2", "poll-max-ns": -1})),
        ("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 100}})),
        ("qom-list", json!({"path": "/objects"})),
        ("qom-list", json!({"path": "/objects/t1"})),
        ("qom-list", json!({"path": "/no"})),
        ("qom-get", json!({"path": "/objects/t1", "property": "poll-max-ns"})),
        ("qom-get", json!({"path": "/objects/t1", "property": "type"})),
        ("qom-get", json!({"path": "/objects/t1", "property": "no"})),
        ("qom-get", json!({"path": "/objects/no", "property": "type"})),
        ("qom-get", json!({"path": "/objects/g", "property": "limits"})),
        ("qom-set", json!({"path": "/objects/t1", "property": "poll-max-ns", "value": 7})),
        ("qom-set", json!({"path": "/objects/t1", "property": "poll-max-ns", "value": "x"})),
        ("qom-set", json!({"path": "/objects/g", "property": "limits", "value": {"iops-total": 7}})),
        ("object-del", json!({"id": "g"})),
        ("object-del", json!({"id": "t1"})),
        ("object-del", json!({"id": "t1"})),
        ("chardev-add", chardev("c1")),
        ("chardev-add", chardev("c1")),
        ("chardev-add", json!({"id": "c2"})),
        ("chardev-remove", json!({"id": "c1"})),
        ("chardev-remove", json!({"id": "c1"})),
        ("chardev-remove", json!({"id": "mon0"})),
        ("quit", json!({"x": 1})),
        ("quit", json!({})),
    ]
}

#[test]
fn common_commands_answer_as_qemu_storage_daemon() {
    if !Program::QemuStorageDaemon.is_there() {
        return skip("common_commands_answer_as_qemu_storage_daemon", "qemu-storage-daemon is not there");
    }
    let (ours, theirs) = (Image::empty(1 << 20), Image::empty(1 << 20));
    let daemon = start(&ours);
    let dir = tempfile::Builder::new().prefix("blockport-").tempdir().expect("a directory");
    let _other = StorageDaemon::start(&theirs, &dir.path().join("monitor"), &dir.path().join("disk"));
    let mut us = daemon.client();
    let mut them = Client::open(&dir.path().join("monitor"));
    let (our_place, their_place) = (daemon.place("x"), dir.path().join("x"));
    for place in [&our_place, &their_place] {
        std::fs::create_dir(place).expect("a directory");
    }
    let mut found = Vec::new();
    for ((command, arguments), (_, their_arguments)) in common(&our_place).into_iter().zip(common(&their_place)) {
        let (ours, theirs) = (learned(&mut us, command, &arguments), learned(&mut them, command, &their_arguments));
        differences(&format!("{command} {arguments}:"), &theirs, &ours, &mut found);
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
    daemon.backend.ended_well();
}
