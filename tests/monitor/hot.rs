//! Exports and iothreads come and go while others work.

use serde_json::{Value, json};

use super::client::{Client, Monitored};
use crate::backend::Setup;
use crate::frontend::blk::{Framing, Request};
use crate::frontend::device::{Device, Profile};
use crate::frontend::wait::{DEADLINE, Stop, until};
use crate::frontend::wire::Connection;

fn add(client: &mut Client, daemon: &Monitored, id: &str, more: Value) -> Device {
    let socket = daemon.place(id);
    let mut arguments = json!({
        "type": "vhost-user-blk", "id": id, "node-name": "d0", "writable": true,
        "addr": {"type": "unix", "path": socket},
    });
    for (key, value) in more.as_object().expect("an object") {
        arguments[key.as_str()] = value.clone();
    }
    client.ok("block-export-add", arguments);
    Device::negotiate(Connection::open(&socket, DEADLINE).expect("connect"), &Profile::qemu())
}

fn exports(client: &mut Client) -> Vec<(String, bool)> {
    let list = client.ok("query-block-exports", json!({}));
    let of = |export: &Value| {
        assert_eq!((&export["type"], &export["shutting-down"]), (&json!("vhost-user-blk"), &json!(false)));
        let connected = export["x-blockport-connected"].as_bool().expect("a boolean");
        (export["id"].as_str().expect("an id").to_owned(), connected)
    };
    list.as_array().expect("a list").iter().map(of).collect()
}

#[test]
fn an_export_that_is_added_serves_and_one_that_is_removed_is_gone() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let mut device = add(&mut client, &daemon, "e1", json!({}));
    device.queue().works();
    assert_eq!(exports(&mut client), [("e0".to_owned(), false), ("e1".to_owned(), true)]);
    // Its name is taken, and nothing of the second one stays.
    let taken = client.refused(
        "block-export-add",
        json!({"type": "vhost-user-blk", "id": "e1", "node-name": "d0",
               "addr": {"type": "unix", "path": daemon.place("other")}}),
    );
    assert!(taken.contains("e1"), "{taken}");
    assert!(!daemon.place("other").exists());

    let connected = client.refused("block-export-del", json!({"id": "e1"}));
    assert!(connected.contains("connected"), "{connected}");
    device.queue().works();
    drop(device);
    until("the front-end has gone", || exports(&mut client)[1] == ("e1".to_owned(), false));
    client.ok("block-export-del", json!({"id": "e1", "mode": "safe"}));
    assert_eq!(client.event("BLOCK_EXPORT_DELETED"), json!({"id": "e1"}));
    assert!(!daemon.place("e1").exists());
    assert_eq!(exports(&mut client).len(), 1);
    assert!(client.refused("block-export-del", json!({"id": "e1"})).contains("e1"));
    // The name is free at once.
    add(&mut client, &daemon, "e1", json!({})).queue().works();
}

#[test]
fn an_export_that_cannot_start_leaves_nothing_behind() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let before = (exports(&mut client), daemon.threads(), daemon.backend.open_fds());
    let good = json!({
        "type": "vhost-user-blk", "id": "e1", "node-name": "d0",
        "addr": {"type": "unix", "path": daemon.place("e1")}, "iothread": "t0",
    });
    for (key, value, named) in [
        ("node-name", json!("no"), "no"),
        ("iothread", json!("no"), "no"),
        ("id", json!("9"), "id"),
        ("addr", json!({"type": "unix", "path": daemon.place("no/such/directory")}), "directory"),
        ("addr", json!({"type": "fd", "str": "77"}), "77"),
        ("type", json!("nbd"), "type"),
        ("num-queues", json!(0), "num-queues"),
    ] {
        let mut arguments = good.clone();
        arguments[key] = value;
        let refusal = client.refused("block-export-add", arguments.clone());
        assert!(refusal.contains(named), "{arguments}: {refusal}");
    }
    assert_eq!(exports(&mut client), before.0);
    // A thread that was joined may be seen a moment longer.
    until("nothing is left", || daemon.threads() <= before.1 && daemon.backend.open_fds() <= before.2);
    client.ok("block-export-add", good);
}

#[test]
fn an_export_is_removed_hard_under_load_and_the_others_go_on() {
    let daemon = Monitored::start(Setup::slow(std::time::Duration::from_millis(2)));
    let mut client = daemon.client();
    let mut other = daemon.backend.device(&Profile::qemu());
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let _ends = stop.guard();
        scope.spawn(|| {
            while !stop.is_set() {
                other.queue().works();
            }
        });
        for _ in 0..20 {
            let mut device = add(&mut client, &daemon, "e1", json!({}));
            let (request, framing) = (Request::read(0, 4096), Framing::default());
            // Nobody will see their answers.
            let _tickets: Vec<_> = (0..16).map(|_| device.queue().start(&request, &framing)).collect();
            client.ok("block-export-del", json!({"id": "e1", "mode": "hard"}));
            assert_eq!(client.event("BLOCK_EXPORT_DELETED"), json!({"id": "e1"}));
        }
    });
    let said = daemon.backend.stop();
    assert!(said.contains("export e1: "), "its counts are logged: {said}");
}

#[test]
fn adding_and_removing_leaks_nothing() {
    let cycles = if std::env::var_os("BLOCKPORT_TEST_DEEP").is_some() { 1000 } else { 100 };
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let mut cycle = |count: usize| {
        for _ in 0..count {
            client.ok("object-add", json!({"qom-type": "iothread", "id": "t1"}));
            let mut device = add(&mut client, &daemon, "e1", json!({"iothread": ["t1", "t0"], "num-queues": 2}));
            device.queue().works();
            client.ok("block-export-del", json!({"id": "e1", "mode": "hard"}));
            client.ok("object-del", json!({"id": "t1"}));
        }
    };
    // Allocators keep some for themselves at first.
    cycle(20);
    let before = (daemon.threads(), daemon.backend.open_fds());
    let memory = daemon.memory_kib();
    cycle(cycles);
    // A thread that was joined may be seen a moment longer.
    until("there are no more threads and descriptors than before", || {
        daemon.threads() <= before.0 && daemon.backend.open_fds() <= before.1
    });
    let now = daemon.memory_kib();
    assert!(now <= memory + 2048, "{memory} KiB have become {now} in {cycles} cycles");
}
