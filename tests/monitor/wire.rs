//! How clients talk to a monitor: greeting, negotiation, order, several at once.

use serde_json::json;

use super::client::{Client, Monitored};

#[test]
fn a_client_is_greeted_and_must_negotiate_first() {
    let daemon = Monitored::null();
    let mut client = Client::connect(daemon.path());
    assert_eq!(client.greeting()["QMP"]["capabilities"], json!(["oob"]));
    assert!(client.greeting()["QMP"]["version"]["qemu"]["major"].is_u64());
    let (class, description) = client.execute("query-version", json!({})).expect_err("too early");
    assert_eq!(class, "CommandNotFound");
    assert!(description.contains("qmp_capabilities"), "{description}");
    let early = client.refused("qmp_capabilities", json!({"enable": ["telepathy"]}));
    assert!(early.contains("enable.0"), "{early}");
    client.ok("qmp_capabilities", json!({"enable": ["oob"]}));
    assert_eq!(client.ok("query-version", json!({})), client.greeting()["QMP"]["version"]);
    let (class, _) = client.execute("qmp_capabilities", json!({})).expect_err("twice");
    assert_eq!(class, "CommandNotFound");
}

#[test]
fn a_command_may_come_in_any_pieces_and_several_at_once() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    for byte in br#"{"execute": "query-version", "id": {"a": [null, 1.5, "x"]}}"# {
        client.send(&[*byte]);
    }
    assert_eq!(client.answer().expect("an answer")["id"], json!({"a": [null, 1.5, "x"]}));
    let many: String = (0..100).map(|id| format!("{{'execute':'query-version','id':{id}}}")).collect();
    client.send(many.as_bytes());
    for id in 0..100 {
        assert_eq!(client.answer().expect("an answer")["id"], id);
    }
}

#[test]
fn what_is_wrong_is_answered_in_its_place() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    client.send(b"{'execute':'query-version','id':0}{'execute':5,'id':1} nonsense {'execute':'query-version','id':2}");
    let answers: Vec<_> = (0..4).map(|_| client.answer().expect("an answer")).collect();
    assert!(answers[0]["return"].is_object() && answers[3]["return"].is_object());
    assert_eq!((&answers[1]["id"], &answers[1]["error"]["class"]), (&json!(1), &json!("GenericError")));
    assert!(answers[2].get("id").is_none() && answers[2]["error"].is_object());
}

#[test]
fn a_reset_byte_drops_what_was_begun() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    client.send(b"{'execute': 'quit', 'arguments': {\xff{'execute': 'query-version'}");
    assert!(client.answer().expect("a complaint")["error"].is_object());
    assert!(client.answer().expect("an answer")["return"].is_object());
}

#[test]
fn out_of_band_commands_overtake_and_others_may_not_be_sent_so() {
    let daemon = Monitored::null();
    let mut client = Client::connect(daemon.path());
    client.send(b"{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}");
    client.answer().expect("agreed");
    client.send(
        b"{'execute':'query-block-exports','id':0}{'execute':'query-block-exports','id':1}\
          {'exec-oob':'query-version','id':'x'}{'exec-oob':'query-commands','id':'y'}",
    );
    let ids: Vec<_> = (0..4).map(|_| client.answer().expect("an answer")["id"].clone()).collect();
    assert_eq!(ids, [json!("x"), json!("y"), json!(0), json!(1)]);
    client.send(b"{'exec-oob':'quit'}");
    let answer = client.answer().expect("an answer");
    assert_eq!(answer["error"]["desc"], "The command quit does not support OOB");
    // Without having agreed on it, it is no request at all.
    let mut other = daemon.client();
    other.send(b"{'exec-oob':'query-version'}");
    assert!(other.answer().expect("an answer")["error"].is_object());
}

#[test]
fn clients_have_a_state_each_and_all_hear_events() {
    let daemon = Monitored::null();
    let mut first = daemon.client();
    let mut second = daemon.client();
    let mut silent = Client::connect(daemon.path());
    let socket = daemon.place("second");
    first.ok(
        "block-export-add",
        json!({"type": "vhost-user-blk", "id": "e1", "node-name": "d0", "addr": {"type": "unix", "path": socket}}),
    );
    first.ok("block-export-del", json!({"id": "e1"}));
    for client in [&mut first, &mut second] {
        assert_eq!(client.event("BLOCK_EXPORT_DELETED"), json!({"id": "e1"}));
    }
    silent.ok("qmp_capabilities", json!({}));
    assert_eq!(silent.events_seen(), [""; 0], "nothing is told before the negotiation");
}

#[test]
fn the_end_of_the_daemon_is_told_and_then_seen() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let mut other = daemon.client();
    client.ok("quit", json!({}));
    for client in [&mut client, &mut other] {
        assert_eq!(client.event("SHUTDOWN"), json!({"guest": false, "reason": "host-qmp-quit"}));
        assert!(client.line().is_none());
    }
    daemon.backend.ended_well();
}

#[test]
fn a_signal_is_told_as_the_reason() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    daemon.backend.stop();
    assert_eq!(client.event("SHUTDOWN"), json!({"guest": false, "reason": "host-signal"}));
}
