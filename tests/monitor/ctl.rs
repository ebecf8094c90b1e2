//! `blockport ctl`: what people type, what they see, and the exit status.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::client::Monitored;
use crate::frontend::device::Profile;
use crate::frontend::wait::until;
use crate::image::Image;

fn ctl(socket: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_blockport")).arg("ctl").arg(socket).args(words).output().expect("ctl")
}

/// What it prints; it must succeed.
#[track_caller]
fn said(socket: &Path, words: &[&str]) -> String {
    let output = ctl(socket, words);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && error.is_empty(), "{words:?}: {}: {error}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

/// What it complains; it must fail with status 1 and print nothing else.
#[track_caller]
fn complaint(socket: &Path, words: &[&str]) -> String {
    let output = ctl(socket, words);
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{words:?}");
    String::from_utf8(output.stderr).expect("text")
}

/// The cells of the row that begins with this name.
#[track_caller]
fn row(table: &str, name: &str) -> Vec<String> {
    let line = table.lines().find(|line| line.split_whitespace().next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{table}"));
    line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect()
}

#[test]
fn a_disk_from_its_node_to_its_end() {
    let image = Image::empty(1 << 20);
    let daemon = Monitored::null();
    let monitor = daemon.path();
    let file = image.path().to_str().expect("UTF-8");
    said(monitor, &["node", "add", &format!("raw,node-name=n1,file.driver=file,file.filename={file}")]);
    assert_eq!(row(&said(monitor, &["node", "list"]), "n1")[1..3], ["raw", "1 MiB"]);
    said(monitor, &["iothread", "add", "t1", "--poll-max-ns", "0"]);
    let socket = daemon.place("e1");
    let socket = socket.to_str().expect("UTF-8");
    let add = ["export", "add", "e1", "n1", "--socket", socket, "--writable", "--queues", "2", "--iothread", "t1"];
    said(monitor, &add);
    assert_eq!(row(&said(monitor, &["list"]), "e1")[1..6], ["n1", "raw", "1 MiB", "read-write", "no"]);

    let connection = crate::frontend::wire::Connection::open(Path::new(socket), crate::frontend::wait::DEADLINE);
    let mut device = crate::frontend::device::Device::negotiate(connection.expect("connect"), &Profile::qemu());
    device.queue().works();
    assert_eq!(row(&said(monitor, &["list"]), "e1")[5], "yes");
    assert_eq!(row(&said(monitor, &["stats", "e1"]), "e1")[1], "1");
    said(monitor, &["resize", "e1", "2M"]);
    assert_eq!(device.read_config().capacity(), 4096);
    assert!(complaint(monitor, &["export", "del", "e1"]).contains("connected"));
    said(monitor, &["eject", "e1"]);
    assert_eq!(device.read_config().capacity(), 0);
    said(monitor, &["insert", "e1", "n1"]);
    said(monitor, &["change", "e1", file, "--access", "read-only"]);
    assert_eq!(row(&said(monitor, &["list"]), "e1")[4], "read-only");
    said(monitor, &["export", "del", "e1", "--hard"]);
    said(monitor, &["iothread", "del", "t1"]);
    said(monitor, &["node", "reopen", &format!("raw,node-name=n1,read-only=on,file.driver=file,file.filename={file}")]);
    assert_eq!(row(&said(monitor, &["node", "list"]), "n1")[4], "read-only");
    said(monitor, &["node", "inactivate", "n1"]);
    said(monitor, &["node", "activate", "n1"]);
    said(monitor, &["node", "del", "n1"]);
    said(monitor, &["quit"]);
    daemon.backend.ended_well();
}

#[test]
fn throttle_groups_and_iothreads() {
    let daemon = Monitored::null();
    let monitor = daemon.path();
    said(monitor, &["throttle", "add", "g", "iops-total=100", "bps-read=1M"]);
    said(monitor, &["throttle", "set", "g", "iops-total=200"]);
    assert_eq!(row(&said(monitor, &["throttle", "list"]), "g")[1], "bps-read=1048576 iops-total=200");
    assert!(complaint(monitor, &["throttle", "set", "g", "nonsense=1"]).contains("nonsense"));
    assert!(complaint(monitor, &["throttle", "set", "g", "iops-total=x"]).contains("iops-total"));
    said(monitor, &["throttle", "del", "g"]);
    said(monitor, &["iothread", "set", "t0", "poll-max-ns", "7"]);
    assert_eq!(row(&said(monitor, &["iothread", "list"]), "t0")[2], "7");
    assert!(complaint(monitor, &["iothread", "del", "t0"]).contains("e0"));
}

#[test]
fn a_revoked_disk_frees_its_name_and_leaves_its_front_end_an_empty_drive() {
    let daemon = Monitored::null();
    let monitor = daemon.path();
    let mut device = daemon.backend.device(&Profile::qemu());
    device.queue().works();
    said(monitor, &["export", "revoke", "e0"]);
    assert_eq!(device.read_config().capacity(), 0);
    let gone = crate::frontend::blk::Request::read(0, 512);
    assert_eq!(device.queue().request(&gone).status, crate::frontend::blk::IOERR);
    assert!(!said(monitor, &["list"]).contains("e0"));
    // The iothread is still in use; the name is free at once.
    assert!(complaint(monitor, &["iothread", "del", "t0"]).contains("e0"));
    let again = daemon.place("again");
    said(monitor, &["export", "add", "e0", "d0", "--socket", again.to_str().expect("UTF-8")]);
    said(monitor, &["export", "revoke", "e0"]);
    assert!(!again.exists(), "without a front-end nothing is left");
    drop(device);
    until("what was revoked has ended", || ctl(monitor, &["iothread", "del", "t0"]).status.success());
}

#[test]
fn events_are_printed_as_they_come() {
    let daemon = Monitored::null();
    let monitor = daemon.path();
    for json in [false, true] {
        let mut words = vec!["events", "--count", "1"];
        words.extend(json.then_some("--json"));
        let mut listener = Command::new(env!("CARGO_BIN_EXE_blockport"))
            .arg("ctl")
            .arg(monitor)
            .args(words)
            .stdout(Stdio::piped())
            .spawn()
            .expect("ctl");
        // It says nothing when it has connected, so there are events until it has heard one.
        until("it has heard one", || {
            cause_an_event(&daemon);
            listener.try_wait().expect("ctl").is_some()
        });
        let output = listener.wait_with_output().expect("ctl");
        let text = String::from_utf8(output.stdout).expect("text");
        match json {
            true => {
                let event: Value = serde_json::from_str(&text).expect("JSON");
                assert_eq!(event["event"], "BLOCK_EXPORT_DELETED");
            }
            false => assert!(text.ends_with(" BLOCK_EXPORT_DELETED id=x\n"), "{text}"),
        }
    }

    fn cause_an_event(daemon: &Monitored) {
        let socket = daemon.place("x");
        let socket = socket.to_str().expect("UTF-8");
        said(daemon.path(), &["export", "add", "x", "d0", "--socket", socket, "--iothread", "t0"]);
        said(daemon.path(), &["export", "del", "x"]);
    }
}

#[test]
fn raw_commands_and_json() {
    let daemon = Monitored::null();
    let monitor = daemon.path();
    for words in [&["qmp", "query-version"][..], &["qmp", r#"{"execute": "query-version"}"#], &["--json", "version"]] {
        let answer: Value = serde_json::from_str(&said(monitor, words)).expect("JSON");
        assert_eq!(answer["package"], said(monitor, &["version"]).trim());
    }
    let answer = said(monitor, &["qmp", "qom-get", r#"{"path": "t0", "property": "type"}"#]);
    assert_eq!(answer, "\"iothread\"\n");
    assert!(complaint(monitor, &["qmp", "no-such-command"]).contains("no-such-command"));
    assert!(complaint(monitor, &["qmp", "{"]).contains("EOF"));
    let devices: Value = serde_json::from_str(&said(monitor, &["list", "--json"])).expect("JSON");
    assert_eq!(devices["exports"][0]["id"], "e0");
}

#[test]
fn what_is_no_monitor_is_told() {
    let daemon = Monitored::null();
    assert!(complaint(Path::new("/no/such/socket"), &["list"]).contains("/no/such/socket"));
    let output = ctl(daemon.path(), &["no-such-verb"]);
    assert_eq!(output.status.code(), Some(2));
    let output = ctl(daemon.path(), &["resize", "e0", "many"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn queues_tell_what_they_have_done() {
    let daemon = Monitored::start(crate::backend::Setup::null(1 << 20).export("num-queues=3"));
    let monitor = daemon.path();
    assert_eq!(said(monitor, &["queues"]).lines().count(), 1, "none is started");
    assert_eq!(said(monitor, &["queues", "--all"]).lines().count(), 4);
    let mut device = daemon.backend.device(&Profile::qemu());
    device.queue().works();
    let cells = row(&said(monitor, &["queues", "e0"]), "e0");
    assert_eq!(cells[..3], ["e0", "0", "t0"]);
    assert_eq!((cells[4].as_str(), cells[5].as_str()), ("0", "1"), "depth and requests: {cells:?}");
    let queues: Value = serde_json::from_str(&said(monitor, &["queues", "--json"])).expect("JSON");
    assert_eq!((&queues[0]["requests"], &queues[0]["polled-batches"]), (&1.into(), &0.into()), "{queues}");
    assert!(complaint(monitor, &["queues", "no"]).contains("no"));
}
