//! Requests that hang: they are told of, those that nothing was done for yet can be failed, and no command waits for them
//! for ever.

use std::time::{Duration, Instant};

use serde_json::json;

use super::client::Monitored;
use crate::backend::Setup;
use crate::frontend::blk::{Framing, IOERR, OK, Request};
use crate::frontend::device::Profile;
use crate::frontend::wait::until;
use crate::image::Image;

/// Longer than any test.
const AGES: Duration = Duration::from_secs(3600);

#[test]
fn a_request_that_hangs_is_told_of_and_holds_up_no_other_client_for_long() {
    let daemon = Monitored::start(Setup::slow(AGES));
    let mut client = daemon.client();
    let mut device = daemon.backend.device(&Profile::qemu());
    let _never = device.queue().start(&Request::read(8, 4096), &Framing::default());
    let under_way = || json!({"id": "e0"});
    until("it is under way", || client.ok("x-blockport-query-requests", under_way())[0]["operation"] == "read");
    let told = client.ok("x-blockport-query-requests", under_way())[0].clone();
    assert_eq!((&told["offset"], &told["bytes"], &told["waits-for"]), (&json!(4096), &json!(4096), &json!("host")));
    assert_eq!(client.ok("x-blockport-query-requests", json!({"min-age-ms": 3_600_000})), json!([]));
    // The host works on it.
    assert_eq!(client.ok("x-blockport-fail-requests", under_way()), json!({"failed": 0, "left": 1}));

    for (command, arguments) in [
        ("block_resize", json!({"device": "e0", "size": 2 << 20})),
        ("eject", json!({"id": "e0"})),
        ("block-export-del", json!({"id": "e0", "mode": "hard"})),
        ("x-blockport-drive-del", json!({"id": "e0"})),
    ] {
        let refusal = client.refused(command, arguments);
        assert!(refusal.contains("\"e0\" cannot be drained: a read of 4096 bytes at 4096"), "{command}: {refusal}");
        assert!(refusal.contains("waits for the host"), "{command}: {refusal}");
    }
    assert_eq!(client.ok("query-block", json!({}))[0]["inserted"]["image"]["virtual-size"], 1 << 20);
    // By now it is old enough to be told of by itself.
    let event = client.event("X_BLOCKPORT_REQUESTS_STUCK");
    assert_eq!(
        (&event["device"], &event["oldest"]["offset"], &event["count"]),
        (&json!("e0"), &json!(4096), &json!(1))
    );
    assert!(event["oldest"]["age-ms"].as_u64() >= Some(10_000), "{event}");
    assert!(daemon.backend.said().contains("a request hangs: a read of 4096 bytes at 4096"));
    daemon.backend.kill();
}

#[test]
fn what_waits_for_its_turn_can_be_failed() {
    let image = Image::empty(1 << 20);
    let path = image.path().display();
    let node = format!("driver=throttle,node-name=d0,throttle-group=g,file.driver=file,file.filename={path}");
    let setup = Setup::new("d0", &[&node]).object("throttle-group,id=g,limits.iops-total=1,limits.iops-total-max=1");
    let daemon = Monitored::start(setup);
    let mut client = daemon.client();
    client.ok(
        "block_set_io_throttle",
        json!({"id": "e0", "bps": 1, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}),
    );
    let mut device = daemon.backend.device(&Profile::qemu());
    let queue = device.queue();
    let start = Instant::now();
    let tickets: Vec<_> = (0..4).map(|at| queue.start(&Request::read(8 * at, 4096), &Framing::default())).collect();
    let mut waiting = Vec::new();
    until("all but those that were let through wait for their turn", || {
        let list = client.ok("x-blockport-query-requests", json!({"id": "e0"}));
        waiting = list.as_array().expect("a list").iter().filter(|one| one["waits-for"] == "limit").cloned().collect();
        waiting.len() >= 3
    });
    let failed = client.ok("x-blockport-fail-requests", json!({"id": "e0"}));
    assert_eq!(failed["failed"], waiting.len());
    let answers = queue.finish(&tickets);
    let ended = |status| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!((ended(IOERR), ended(OK)), (waiting.len(), 4 - waiting.len()));
    assert!(start.elapsed() < AGES);
    until("nothing is under way", || client.ok("x-blockport-query-requests", json!({})) == json!([]));
    // The next one is served: a byte a second is over with.
    client.ok(
        "block_set_io_throttle",
        json!({"id": "e0", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}),
    );
    device.queue().works();
    drop(device);
    daemon.backend.stop();
}

#[test]
fn what_a_stopped_device_keeps_can_be_failed() {
    let image = Image::empty(1 << 20);
    let rules = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28";
    let daemon = Monitored::start(Setup::faulty(image.path(), rules).export("werror=stop"));
    let mut client = daemon.client();
    let mut device = daemon.backend.device(&Profile::qemu());
    let queue = device.queue();
    let ticket = queue.start(&Request::write(0, &[1; 512]), &Framing::default());
    client.event("BLOCK_IO_ERROR");
    until("it has stopped", || client.ok("query-block-exports", json!({}))[0]["x-blockport-stopped"] == true);
    client.ok("x-blockport-fail-requests", json!({"id": "e0"}));
    assert_eq!(queue.finish(&[ticket])[0].status, IOERR);
    until("it goes on", || client.ok("query-block-exports", json!({}))[0]["x-blockport-stopped"] == false);
    let (class, _) = client.execute("x-blockport-fail-requests", json!({"id": "no"})).expect_err("refused");
    assert_eq!(class, "DeviceNotFound");
    drop(device);
    daemon.backend.stop();
}
