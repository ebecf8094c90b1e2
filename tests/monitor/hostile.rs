//! Clients that mean ill: bounded, dropped, logged once; the disks never notice.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::json;

use super::client::{Client, Monitored};
use crate::frontend::device::Profile;
use crate::frontend::wait::until;

/// What a hostile client may cost, in KiB.
const MEMORY_KIB_MAX: u64 = 16 << 10;

/// Does something to a daemon that serves a disk, and sees that nothing happened to it: the disk works, memory stays, other
/// clients are served, and the log has `complaints` lines of a client that was dropped.
#[track_caller]
fn survives(complaints: usize, attack: impl FnOnce(&Monitored)) {
    let daemon = Monitored::null();
    let mut device = daemon.backend.device(&Profile::qemu());
    device.queue().works();
    let (memory, fds) = (daemon.memory_kib(), daemon.backend.open_fds());
    attack(&daemon);
    device.queue().works();
    daemon.client().ok("query-version", json!({}));
    until("its descriptors are closed", || daemon.backend.open_fds() <= fds);
    let now = daemon.memory_kib();
    assert!(now <= memory + MEMORY_KIB_MAX, "{memory} KiB have become {now}");
    drop(device);
    let said = daemon.backend.stop();
    assert_eq!(said.matches("dropped").count(), complaints, "{said}");
}

/// Sends pieces until the daemon closes, or `bytes_max` are gone. Gives how many were.
fn pour(client: &mut Client, begin: &[u8], piece: &[u8], bytes_max: usize) -> usize {
    let mut sent = begin.len();
    let mut open = client.try_send(begin).is_ok();
    while open && sent < bytes_max {
        open = client.try_send(piece).is_ok();
        sent += piece.len();
    }
    sent
}

#[test]
fn a_message_without_end_is_dropped() {
    for begin in [&b"{\"execute\": \""[..], b"[", b"{\"a\": {\"b\": [1,"] {
        survives(1, |daemon| {
            let mut client = daemon.client();
            let sent = pour(&mut client, begin, &[b'1'; 1 << 16], 100 << 20);
            assert!(sent < 10 << 20, "{sent} bytes were taken");
            let error = client.answer().expect("it says why");
            assert!(error["error"]["desc"].as_str().expect("text").contains("1048576 bytes"), "{error}");
            assert!(client.line().is_none());
        });
    }
}

#[test]
fn garbage_is_answered_for_a_while_and_then_dropped() {
    survives(1, |daemon| {
        let mut client = daemon.client();
        let _ = client.try_send(&b"} nonsense\n".repeat(1000));
        let answers = std::iter::from_fn(|| client.line()).count();
        assert!((50..200).contains(&answers), "{answers} answers");
    });
}

#[test]
fn who_sends_and_never_reads_is_held_up() {
    survives(0, |daemon| {
        let mut client = daemon.client();
        client.stream().set_write_timeout(Some(Duration::from_millis(500))).expect("a timeout");
        let flood = b"{'execute': 'query-qmp-schema'}\n".repeat(1000);
        let mut sent = 0;
        while client.try_send(&flood).is_ok() {
            sent += flood.len();
            assert!(sent < 64 << 20, "{sent} bytes were taken from a client that reads nothing");
        }
    });
}

#[test]
fn who_reads_no_events_is_dropped() {
    survives(1, |daemon| {
        let mut lazy = daemon.client();
        let mut busy = daemon.client();
        let addr = json!({"type": "unix", "path": daemon.place("x")});
        let id = "e".repeat(4000);
        // What the socket itself holds comes on top of what the daemon does.
        for _ in 0..1200 {
            let export = json!({"type": "vhost-user-blk", "id": id, "node-name": "d0", "addr": addr, "iothread": "t0"});
            busy.ok("block-export-add", export);
            busy.ok("block-export-del", json!({"id": id}));
        }
        // What it was told before it was dropped may still be read.
        while lazy.line().is_some() {}
    });
}

#[test]
fn half_a_message_and_gone() {
    survives(0, |daemon| {
        for half in [&b""[..], b"{", b"{\"execute\": \"qmp_cap", b"\"", b"12"] {
            let mut client = Client::connect(daemon.path());
            client.send(half);
            client.stream().shutdown(Shutdown::Both).expect("shutdown");
        }
    });
}

#[test]
fn who_stops_sending_still_gets_answers() {
    survives(0, |daemon| {
        let mut client = daemon.client();
        client.send(&b"{'execute':'query-version'}".repeat(50));
        client.stream().shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(std::iter::from_fn(|| client.answer()).count(), 50);
    });
}

#[test]
fn clients_beyond_the_bound_wait_their_turn() {
    survives(0, |daemon| {
        let mut clients: Vec<Client> = (0..16).map(|_| daemon.client()).collect();
        let late = UnixStream::connect(daemon.path()).expect("the kernel takes it");
        late.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        assert!((&late).read(&mut [0]).is_err(), "nobody greets it");
        clients.pop();
        let mut late = Client::over(late);
        late.ok("qmp_capabilities", json!({}));
    });
}

#[test]
fn mutated_commands_never_end_the_daemon() {
    let rounds = if std::env::var_os("BLOCKPORT_TEST_DEEP").is_some() { 20_000 } else { 1500 };
    let daemon = Monitored::null();
    let mut device = daemon.backend.device(&Profile::qemu());
    let valid: Vec<String> = [
        r#"{"execute":"object-add","arguments":{"qom-type":"iothread","id":"t1","poll-max-ns":7}}"#,
        r#"{"execute":"object-del","arguments":{"id":"t1"}}"#,
        r#"{"execute":"qom-set","arguments":{"path":"/objects/t0","property":"poll-max-ns","value":0}}"#,
        r#"{"execute":"query-qmp-schema","id":[{"a":"\u00e9"}]}"#,
        r#"{"execute":"block-export-add","arguments":{"type":"vhost-user-blk","id":"e1","node-name":"d0","addr":{"type":"unix","path":"PLACE"},"num-queues":2}}"#,
        r#"{"execute":"block-export-del","arguments":{"id":"e1","mode":"hard"}}"#,
        r#"{"exec-oob":"query-version"}"#,
        r#"{"execute":"blockdev-add","arguments":{"driver":"null-co","node-name":"n1","size":512}}"#,
        r#"{"execute":"blockdev-del","arguments":{"node-name":"n1"}}"#,
        r#"{"execute":"block_resize","arguments":{"device":"e0","size":1048576}}"#,
        r#"{"execute":"chardev-add","arguments":{"id":"c1","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"PLACE"}}}}}}"#,
        r#"{"execute":"chardev-remove","arguments":{"id":"c1"}}"#,
        r#"{"execute":"transaction","arguments":{"actions":[{"type":"abort","data":{}}]}}"#,
    ]
    .iter()
    .map(|text| text.replace("PLACE", &daemon.place("p").display().to_string()))
    .collect();
    // xorshift: the same streams in every run.
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).expect("small")
    };
    let mut client = daemon.client();
    for round in 0..rounds {
        let mut bytes = valid[random(valid.len())].clone().into_bytes();
        for _ in 0..random(4) {
            let at = random(bytes.len());
            match random(5) {
                0 => bytes[at] = random(256) as u8,
                1 => drop(bytes.remove(at)),
                2 => bytes.insert(at, b"{}[]\"',:\\\xff0"[random(11)]),
                3 => bytes.truncate(at.max(1)),
                _ => bytes.splice(at..at, valid[random(valid.len())].bytes().take(30)).for_each(drop),
            }
        }
        let sent =
            client.try_send(&bytes).and_then(|()| client.try_send(b"\xff\n{'execute':'query-version','id':'step'}"));
        // A mutation may have been valid, and may have taken what the monitor or the disk stands on.
        let in_step = sent.is_ok()
            && loop {
                match client.line() {
                    Some(line) if line["id"] == "step" => break true,
                    Some(_) => {}
                    None => break false,
                }
            };
        assert!(daemon.backend.is_running(), "round {round}: {}", String::from_utf8_lossy(&bytes));
        if !in_step {
            client = daemon.client();
        }
    }
    device.queue().works();
}
