//! Nodes come, go and change under exports, and so do sizes and media.

use serde_json::{Value, json};

use super::client::{Client, Monitored};
use crate::backend::Setup;
use crate::frontend::blk::{Framing, IOERR, OK, Request};
use crate::frontend::device::Profile;
use crate::frontend::wait::{Stop, until};
use crate::image::{Image, pattern};

const MIB: u64 = 1 << 20;

fn node(client: &mut Client, name: &str) -> Option<Value> {
    let list = client.ok("query-named-block-nodes", json!({}));
    list.as_array().expect("a list").iter().find(|node| node["node-name"] == name).cloned()
}

fn device(client: &mut Client) -> Value {
    client.ok("query-block", json!({}))[0].clone()
}

fn file(image: &Image) -> Value {
    json!({"driver": "file", "filename": image.path(), "locking": "off"})
}

#[test]
fn a_node_is_added_told_and_removed() {
    let image = Image::empty(MIB);
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let definition = json!({"driver": "raw", "node-name": "n1", "read-only": true, "discard": "unmap",
                            "detect-zeroes": "unmap", "cache": {"direct": false}, "file": file(&image)});
    client.ok("blockdev-add", definition.clone());
    let told = node(&mut client, "n1").expect("it is there");
    assert_eq!((&told["drv"], &told["ro"], &told["detect_zeroes"]), (&json!("raw"), &json!(true), &json!("unmap")));
    assert_eq!(told["image"]["virtual-size"], MIB);
    assert_eq!(told["file"].as_str(), image.path().to_str());
    assert_eq!(told["children"][0]["child"], "file");
    let taken = client.refused("blockdev-add", definition);
    assert!(taken.contains("n1"), "{taken}");
    let child = told["children"][0]["node-name"].as_str().expect("a name").to_owned();
    let refused = client.refused("blockdev-del", json!({"node-name": child}));
    assert!(refused.contains("n1"), "it names the user: {refused}");
    client.ok("blockdev-del", json!({"node-name": "n1"}));
    assert_eq!((node(&mut client, "n1"), node(&mut client, &child)), (None, None));
    let used = client.refused("blockdev-del", json!({"node-name": "d0"}));
    assert!(used.contains("e0"), "it names the user: {used}");
}

#[test]
fn a_node_that_cannot_be_opened_leaves_nothing_behind() {
    let image = Image::empty(MIB);
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let before = client.ok("query-named-block-nodes", json!({}));
    let fds = daemon.backend.open_fds();
    for (definition, named) in [
        (json!({"driver": "raw", "node-name": "n1", "file": file(&image), "no": 1}), "no"),
        (json!({"driver": "raw", "node-name": "n1", "file": "no"}), "no"),
        (
            json!({"driver": "raw", "node-name": "n1", "file": {"driver": "file", "filename": "/no/such/file"}}),
            "/no/such",
        ),
        (json!({"driver": "raw", "node-name": "n1", "offset": 1, "file": file(&image)}), "offset"),
        (json!({"driver": "raw", "node-name": "n1", "offset": "x", "file": file(&image)}), "offset"),
        (json!({"driver": "nbd", "node-name": "n1"}), "nbd"),
        (json!({"driver": "null-co", "node-name": "#n"}), "node-name"),
    ] {
        let refusal = client.refused("blockdev-add", definition.clone());
        assert!(refusal.contains(named), "{definition}: {refusal}");
    }
    assert_eq!(client.ok("query-named-block-nodes", json!({})), before);
    until("no descriptor is left", || daemon.backend.open_fds() <= fds);
}

#[test]
fn a_resize_is_seen_by_the_guest_at_once() {
    let image = Image::empty(MIB);
    let daemon = Monitored::start(Setup::file(image.path()));
    let mut client = daemon.client();
    let mut device = daemon.backend.device(&Profile::qemu());
    let read_end = |device: &mut crate::frontend::device::Device, bytes: u64| {
        device.queue().request(&Request::read(bytes / 512 - 8, 4096)).status
    };
    assert_eq!((read_end(&mut device, MIB), read_end(&mut device, 2 * MIB)), (OK, IOERR));
    client.ok("block_resize", json!({"device": "e0", "size": 2 * MIB}));
    assert_eq!(device.read_config().capacity(), 2 * MIB / 512);
    assert_eq!(read_end(&mut device, 2 * MIB), OK);
    client.ok("block_resize", json!({"node-name": "d0", "size": MIB}));
    assert_eq!(device.read_config().capacity(), MIB / 512);
    assert_eq!(read_end(&mut device, 2 * MIB), IOERR);
    for arguments in [
        json!({"size": 1}),
        json!({"device": "e0", "node-name": "d0", "size": 1}),
        json!({"device": "no", "size": 1}),
        json!({"device": "e0", "size": -1}),
    ] {
        client.refused("block_resize", arguments);
    }
    let huge = client.refused("block_resize", json!({"device": "e0", "size": u64::MAX}));
    assert!(huge.contains("d0"), "{huge}");
    assert_eq!(device.read_config().capacity(), MIB / 512);
}

#[test]
fn the_medium_is_ejected_and_another_one_inserted() {
    let (first, second) = (Image::filled(MIB as usize), Image::empty(2 * MIB));
    let daemon = Monitored::start(Setup::file(first.path()));
    let mut client = daemon.client();
    let mut front_end = daemon.backend.device(&Profile::qemu());
    assert_eq!(front_end.queue().read(0, 4096), pattern(0, 4096));

    client.ok("eject", json!({"device": "e0"}));
    assert_eq!(front_end.read_config().capacity(), 0);
    assert_eq!(front_end.queue().request(&Request::read(0, 512)).status, IOERR);
    let empty = device(&mut client);
    assert_eq!((empty.get("inserted"), &empty["removable"]), (None, &json!(true)));
    // Without a medium, there is nothing to resize; ejecting once more changes nothing.
    client.refused("block_resize", json!({"device": "e0", "size": MIB}));
    client.ok("eject", json!({"id": "e0"}));
    // The node is free, but for those that were defined by themselves.
    assert!(node(&mut client, "d0").is_some());

    client.ok("blockdev-add", json!({"driver": "raw", "node-name": "n2", "file": file(&second)}));
    client.ok("blockdev-insert-medium", json!({"id": "e0", "node-name": "n2"}));
    assert_eq!(front_end.read_config().capacity(), 2 * MIB / 512);
    assert_eq!(front_end.queue().read(0, 4096), vec![0; 4096]);
    front_end.queue().write(0, &pattern(7, 4096));
    assert_eq!(second.read(0, 4096), pattern(7, 4096));
    let full = client.refused("blockdev-insert-medium", json!({"id": "e0", "node-name": "d0"}));
    assert!(full.contains("medium"), "{full}");

    client.ok("blockdev-remove-medium", json!({"id": "e0"}));
    client.ok("blockdev-insert-medium", json!({"id": "e0", "node-name": "d0"}));
    assert_eq!(front_end.queue().read(0, 4096), pattern(0, 4096));
    assert_eq!(client.ok("query-block-exports", json!({}))[0]["node-name"], "d0");
}

#[test]
fn the_medium_is_changed_for_a_file_or_stays_as_it_is() {
    let (first, second) = (Image::filled(MIB as usize), Image::empty(2 * MIB));
    let daemon = Monitored::start(Setup::file(first.path()));
    let mut client = daemon.client();
    let mut front_end = daemon.backend.device(&Profile::qemu());
    let change =
        |filename: &std::path::Path, mode: &str| json!({"device": "e0", "filename": filename, "read-only-mode": mode});
    let missing = client.refused("blockdev-change-medium", change("/no/such/file".as_ref(), "retain"));
    assert!(missing.contains("/no/such/file"), "{missing}");
    client.refused("blockdev-change-medium", json!({"device": "e0", "filename": second.path(), "format": "no"}));
    assert_eq!(front_end.queue().read(0, 4096), pattern(0, 4096));

    client.ok("blockdev-change-medium", change(second.path(), "read-only"));
    assert_eq!(front_end.read_config().capacity(), 2 * MIB / 512);
    let told = device(&mut client)["inserted"].clone();
    assert_eq!((&told["ro"], told["file"].as_str()), (&json!(true), second.path().to_str()));
    assert_eq!(front_end.queue().request(&Request::write(0, &[1; 512])).status, IOERR);
    client.ok("blockdev-change-medium", change(second.path(), "retain"));
    assert_eq!(device(&mut client)["inserted"]["ro"], true);
    client.ok("blockdev-change-medium", change(second.path(), "read-write"));
    assert_eq!(front_end.queue().request(&Request::write(0, &[1; 512])).status, OK);
    assert_eq!(second.read(0, 512), [1; 512]);
}

#[test]
fn tray_commands_have_nothing_to_do_without_a_tray() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    client.ok("blockdev-open-tray", json!({"device": "e0"}));
    client.ok("blockdev-close-tray", json!({"id": "e0"}));
    for command in ["blockdev-open-tray", "blockdev-close-tray", "eject"] {
        let (class, _) = client.execute(command, json!({"device": "no"})).expect_err("refused");
        assert_eq!(class, "DeviceNotFound");
        let both = client.refused(command, json!({"device": "e0", "id": "e0"}));
        assert!(both.contains("'device'") && both.contains("'id'"), "{both}");
        client.refused(command, json!({}));
    }
    assert!(client.events_seen().is_empty());
}

#[test]
fn a_node_is_reopened_or_stays_as_it_is() {
    let image = Image::empty(MIB);
    let daemon = Monitored::start(Setup::file(image.path()).read_only());
    let mut client = daemon.client();
    let options = |more: Value| {
        let mut options = json!({"driver": "raw", "node-name": "d0", "discard": "unmap", "file": file(&image)});
        for (key, value) in more.as_object().expect("an object") {
            options[key.as_str()] = value.clone();
        }
        json!({"options": [options]})
    };
    client.ok("blockdev-reopen", options(json!({"read-only": true})));
    assert_eq!(node(&mut client, "d0").expect("d0")["ro"], true);
    let before = client.ok("query-named-block-nodes", json!({}));
    for (more, named) in [
        (json!({"no": 1}), "no"),
        (json!({"driver": "null-co"}), "driver"),
        (json!({"node-name": "no"}), "no"),
        (json!({"offset": 3}), "offset"),
    ] {
        let refusal = client.refused("blockdev-reopen", options(more.clone()));
        assert!(refusal.contains(named), "{more}: {refusal}");
    }
    assert_eq!(client.ok("query-named-block-nodes", json!({})), before);
    client.ok("blockdev-reopen", options(json!({})));
    assert_eq!(node(&mut client, "d0").expect("d0")["ro"], false);
}

#[test]
fn inactive_nodes_let_their_locks_go() {
    let image = Image::empty(MIB);
    let daemon = Monitored::null();
    let mut client = daemon.client();
    client.ok("blockdev-add", json!({"driver": "file", "node-name": "f1", "filename": image.path(), "locking": "on"}));
    client.ok("blockdev-set-active", json!({"node-name": "f1", "active": false}));
    assert_eq!(node(&mut client, "f1").expect("f1")["active"], false);
    client.ok("blockdev-set-active", json!({"node-name": "f1", "active": true}));
    assert_eq!(node(&mut client, "f1").expect("f1")["active"], true);
    client.refused("blockdev-set-active", json!({"node-name": "no", "active": true}));
    let used = client.refused("blockdev-set-active", json!({"active": false}));
    assert!(used.contains("e0"), "it names the user: {used}");
    assert_eq!(node(&mut client, "f1").expect("f1")["active"], true);
}

#[test]
fn sizes_and_media_change_under_load_without_a_wrong_answer() {
    let cycles = if std::env::var_os("BLOCKPORT_TEST_DEEP").is_some() { 1000 } else { 60 };
    let (first, second) = (Image::filled(MIB as usize), Image::filled(MIB as usize));
    let daemon = Monitored::start(Setup::file(first.path()).iothreads(2).export("num-queues=2"));
    let mut client = daemon.client();
    let second = json!({"driver": "raw", "node-name": "n2", "file": file(&second)});
    client.ok("blockdev-add", second);
    let mut front_end = daemon.backend.device(&Profile::queues(2));
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let _ends = stop.guard();
        for (index, queue) in front_end.queues.iter_mut().enumerate() {
            let stop = &stop;
            scope.spawn(move || {
                let (request, framing) = (Request::read(8 * index as u64, 4096), Framing::default());
                let expected = pattern(0, 16384)[4096 * index..4096 * (index + 1)].to_vec();
                while !stop.is_set() {
                    let mark = queue.arena.mark();
                    let tickets: Vec<_> = (0..16).map(|_| queue.start(&request, &framing)).collect();
                    let answers = queue.finish(&tickets);
                    queue.arena.release(&mark);
                    for answer in answers {
                        // A request that finds no medium fails; none may see anything else than what is there.
                        match answer.status {
                            OK => assert_eq!(answer.data, expected),
                            status => assert_eq!(status, IOERR),
                        }
                    }
                }
            });
        }
        let before = (daemon.threads(), daemon.backend.open_fds());
        for cycle in 0..cycles {
            client.ok("block_resize", json!({"node-name": "d0", "size": MIB * (1 + cycle % 3)}));
            client.ok("eject", json!({"device": "e0"}));
            client.ok("blockdev-insert-medium", json!({"id": "e0", "node-name": "n2"}));
            client.ok("blockdev-remove-medium", json!({"id": "e0"}));
            client.ok("blockdev-insert-medium", json!({"id": "e0", "node-name": "d0"}));
        }
        until("nothing is left", || daemon.threads() <= before.0 && daemon.backend.open_fds() <= before.1);
    });
    assert!(client.ok("query-blockstats", json!({}))[0]["stats"]["rd_operations"].as_u64() > Some(0));
}

#[test]
fn counts_are_those_of_the_device() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let mut front_end = daemon.backend.device(&Profile::qemu());
    for _ in 0..3 {
        front_end.queue().read(0, 4096);
    }
    front_end.queue().write(0, &[1; 512]);
    assert_eq!(front_end.queue().request(&Request::flush()).status, OK);
    assert_eq!(front_end.queue().request(&Request::read(1 << 40, 512)).status, IOERR);
    let told = client.ok("query-blockstats", json!({}))[0].clone();
    assert_eq!((&told["device"], &told["node-name"]), (&json!("e0"), &json!("d0")));
    let stats = &told["stats"];
    for (key, value) in
        [("rd_operations", 3), ("rd_bytes", 3 * 4096), ("wr_operations", 1), ("wr_bytes", 512), ("flush_operations", 1)]
    {
        assert_eq!(stats[key], value, "{key}: {stats}");
    }
    let failed = stats["failed_rd_operations"].as_u64().expect("a count")
        + stats["invalid_rd_operations"].as_u64().expect("a count");
    assert_eq!(failed, 1, "{stats}");
    let nodes = client.ok("query-blockstats", json!({"query-nodes": true}));
    assert_eq!((&nodes[0]["node-name"], nodes[0].get("device")), (&json!("d0"), None));
}

#[test]
fn a_disk_is_limited_and_told_so() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let limits = |iops: u64, more: Value| {
        let mut limits =
            json!({"id": "e0", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": iops, "iops_rd": 0, "iops_wr": 0});
        for (key, value) in more.as_object().expect("an object") {
            limits[key.as_str()] = value.clone();
        }
        limits
    };
    client.ok("block_set_io_throttle", limits(50, json!({"group": "g"})));
    let told = device(&mut client)["inserted"].clone();
    assert_eq!((&told["iops"], &told["bps"], &told["group"]), (&json!(50), &json!(0), &json!("g")));
    // 50 a second: half a second's worth more than what may come at once takes about that long.
    let mut front_end = daemon.backend.device(&Profile::qemu());
    let start = std::time::Instant::now();
    for _ in 0..75 {
        front_end.queue().works();
    }
    let took = start.elapsed();
    assert!(took >= std::time::Duration::from_millis(300), "75 requests took {took:?}");
    for (limits, named) in [
        (limits(50, json!({"iops_rd": 1})), "iops"),
        (limits(0, json!({"iops_max": 1})), "iops"),
        (limits(50, json!({"id": "no"})), "no"),
        (limits(50, json!({"device": "e0"})), "device"),
    ] {
        let refusal = client.refused("block_set_io_throttle", limits.clone());
        assert!(refusal.contains(named), "{limits}: {refusal}");
    }
    client.ok("block_set_io_throttle", limits(0, json!({})));
    assert_eq!(device(&mut client)["inserted"].get("group"), None);
    client.ok("eject", json!({"id": "e0"}));
    let empty = client.refused("block_set_io_throttle", limits(50, json!({})));
    assert!(empty.contains("medium"), "{empty}");
}

#[test]
fn latencies_are_counted_in_intervals_that_can_be_set() {
    let daemon = Monitored::start(Setup::slow(std::time::Duration::from_millis(2)));
    let mut client = daemon.client();
    let mut front_end = daemon.backend.device(&Profile::qemu());
    client.ok("block-latency-histogram-set", json!({"id": "e0", "boundaries": [1_000_000, 1_000_000_000_000_u64]}));
    for _ in 0..3 {
        front_end.queue().works();
    }
    let stats = |client: &mut Client| client.ok("query-blockstats", json!({}))[0]["stats"].clone();
    let told = stats(&mut client);
    assert_eq!(told["rd_latency_histogram"]["bins"], json!([0, 3, 0]));
    assert_eq!(told["wr_latency_histogram"]["bins"], json!([0, 0, 0]));
    assert!(told["rd_total_time_ns"].as_u64() >= Some(6_000_000), "{told}");
    for wrong in [json!([2, 1]), json!([]), json!([1, "x"]), json!(1)] {
        client
            .refused("block-latency-histogram-set", json!({"id": "e0", "boundaries": [5], "boundaries-flush": wrong}));
    }
    assert_eq!(stats(&mut client)["rd_latency_histogram"]["bins"], json!([0, 3, 0]));
    let (class, _) = client.execute("block-latency-histogram-set", json!({"id": "no"})).expect_err("refused");
    assert_eq!(class, "DeviceNotFound");
    client.ok("block-latency-histogram-set", json!({"id": "e0"}));
    assert_eq!(stats(&mut client).get("rd_latency_histogram"), None);
}

#[test]
fn a_disk_that_stopped_over_an_error_tells_so_and_goes_on_when_it_is_told() {
    let image = Image::empty(MIB);
    let rules = "inject-error.0.event=write_aio,inject-error.0.errno=28,inject-error.0.once=on";
    let daemon = Monitored::start(Setup::faulty(image.path(), rules));
    let mut client = daemon.client();
    let mut front_end = daemon.backend.device(&Profile::qemu());
    let ticket = front_end.queue().start(&Request::write(0, &pattern(3, 4096)), &Framing::default());
    let event = client.event("BLOCK_IO_ERROR");
    assert_eq!((&event["device"], &event["operation"]), (&json!("e0"), &json!("write")));
    assert_eq!((&event["action"], &event["nospace"]), (&json!("stop"), &json!(true)));
    assert_eq!(device(&mut client)["io-status"], "nospace");
    assert_eq!(client.ok("query-block-exports", json!({}))[0]["x-blockport-stopped"], true);
    assert!(front_end.queue().try_take().is_none(), "the guest waits");
    client.ok("block-export-continue", json!({"id": "e0"}));
    assert_eq!(front_end.queue().finish(&[ticket])[0].status, OK);
    assert_eq!(image.read(0, 4096), pattern(3, 4096));
    assert_eq!(device(&mut client)["io-status"], "ok");
    client.ok("block-export-continue", json!({"id": "e0"}));
    assert!(client.refused("block-export-continue", json!({"id": "no"})).contains("no"));
}

#[test]
fn a_write_that_passes_the_threshold_is_told_once() {
    let image = Image::empty(MIB);
    let daemon = Monitored::start(Setup::file(image.path()));
    let mut client = daemon.client();
    let mut device = daemon.backend.device(&Profile::qemu());
    let mut write = |sector| {
        let request = Request::write(sector, &pattern(7, 4096));
        assert_eq!(device.queue().request(&request).status, OK);
    };
    let set = |bytes: u64| json!({"node-name": "d0", "write-threshold": bytes});
    client.ok("block-set-write-threshold", set(16 << 10));
    assert_eq!(node(&mut client, "d0").expect("d0")["write_threshold"], 16 << 10);
    // It ends right there.
    write(24);
    assert_eq!(node(&mut client, "d0").expect("d0")["write_threshold"], 16 << 10);
    write(25);
    let event = client.event("BLOCK_WRITE_THRESHOLD");
    assert_eq!(event, json!({"node-name": "d0", "amount-exceeded": 512, "write-threshold": 16 << 10}));
    assert_eq!(node(&mut client, "d0").expect("d0")["write_threshold"], 0);
    write(25);
    client.ok("block-set-write-threshold", set(512));
    client.ok("block-set-write-threshold", set(0));
    write(25);
    client.ok("query-block", json!({}));
    assert!(!client.events_seen().contains(&"BLOCK_WRITE_THRESHOLD"));
    let refusal = client.refused("block-set-write-threshold", json!({"node-name": "no", "write-threshold": 1}));
    assert!(refusal.contains("no"), "{refusal}");
}
