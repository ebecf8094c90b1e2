//! What every command must hold, as the schema tells them; and the commands about objects.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::client::{Client, Monitored};

/// The schema by name.
fn schema(client: &mut Client) -> BTreeMap<String, Value> {
    let list = client.ok("query-qmp-schema", json!({}));
    let named = |info: &Value| (info["name"].as_str().expect("a name").to_owned(), info.clone());
    list.as_array().expect("a list").iter().map(named).collect()
}

fn names(list: &Value) -> BTreeSet<String> {
    let name = |entry: &Value| entry["name"].as_str().expect("a name").to_owned();
    list.as_array().expect("a list").iter().map(name).collect()
}

#[test]
fn the_schema_knows_the_commands_that_there_are() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let listed = names(&client.ok("query-commands", json!({})));
    let schema = schema(&mut client);
    let described = schema.iter().filter(|(_, info)| info["meta-type"] == "command");
    assert_eq!(described.map(|(name, _)| name.clone()).collect::<BTreeSet<_>>(), listed);
}

/// Commands, their required members, and all their members.
fn commands(schema: &BTreeMap<String, Value>) -> Vec<(String, Vec<String>, Vec<String>)> {
    let of = |(name, info): (&String, &Value)| {
        let arguments = &schema[info["arg-type"].as_str().expect("a type")];
        let members = arguments["members"].as_array().expect("members");
        let required = members.iter().filter(|member| member.get("default").is_none());
        let text = |member: &Value| member["name"].as_str().expect("a name").to_owned();
        (name.clone(), required.map(text).collect(), members.iter().map(text).collect())
    };
    schema.iter().filter(|(_, info)| info["meta-type"] == "command").map(of).collect()
}

/// All that could have changed.
fn state(client: &mut Client) -> Vec<Value> {
    ["query-block-exports", "query-iothreads", "query-named-block-nodes", "query-block", "query-chardev"]
        .map(|query| client.ok(query, json!({})))
        .to_vec()
}

#[test]
fn every_command_names_what_is_left_over_or_missing_or_of_a_wrong_type_and_changes_nothing() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let before = state(&mut client);
    let schema = schema(&mut client);
    for (name, required, members) in commands(&schema) {
        if name == "qmp_capabilities" {
            continue;
        }
        // Something for each required member, so that the surplus one is what is wrong. Of unions, only the tag is known.
        let refusal = client.refused(&name, json!({"no-such-argument": 1}));
        let named = required.iter().any(|member| refusal.contains(member.as_str()));
        assert!(refusal.contains("no-such-argument") || named, "{name}: {refusal}");
        if required.is_empty() {
            assert!(refusal.contains("no-such-argument"), "{name}: {refusal}");
        } else {
            let refusal = client.refused(&name, json!({}));
            assert!(required.iter().any(|member| refusal.contains(member.as_str())), "{name} {{}}: {refusal}");
        }
        for member in &members {
            // No argument of any command may be a list in a list; those of any type are refused for what is missing.
            let refusal = client.refused(&name, json!({member: [[7]]}));
            let named = members.iter().any(|member| refusal.contains(member.as_str()));
            assert!(named, "{name} {member}: {refusal}");
        }
    }
    assert_eq!(state(&mut client), before);
    let (class, description) = client.execute("no-such-command", json!({})).expect_err("refused");
    assert_eq!((class.as_str(), description.contains("no-such-command")), ("CommandNotFound", true));
}

#[test]
fn iothreads_come_and_go_and_change_how_they_poll() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    client.ok("object-add", json!({"qom-type": "iothread", "id": "t9", "poll-max-ns": 1000}));
    let taken = client.refused("object-add", json!({"qom-type": "iothread", "id": "t9"}));
    assert!(taken.contains("t9"), "{taken}");
    let threads = client.ok("query-iothreads", json!({}));
    let added = threads.as_array().expect("a list").iter().find(|thread| thread["id"] == "t9").expect("t9").clone();
    assert_eq!((&added["poll-max-ns"], &added["poll-grow"]), (&json!(1000), &json!(0)));
    let task = daemon.backend.proc(&format!("task/{}/comm", added["thread-id"]));
    assert_eq!(std::fs::read_to_string(task).expect("a thread").trim(), "t9");

    let path = |path: &str, property: &str| json!({"path": path, "property": property});
    client.ok("qom-set", json!({"path": "/objects/t9", "property": "poll-max-ns", "value": 0}));
    assert_eq!(client.ok("qom-get", path("t9", "poll-max-ns")), 0);
    assert_eq!(client.ok("qom-get", path("/objects/t9", "type")), "iothread");
    for value in [json!(-1), json!("1"), json!(null), json!(1.5), json!(9_223_372_036_854_775_808_u64)] {
        let refusal = client.refused("qom-set", json!({"path": "t9", "property": "poll-max-ns", "value": value}));
        assert!(refusal.contains("poll-max-ns"), "{refusal}");
    }
    let (class, _) = client.execute("qom-get", path("/objects/no", "type")).expect_err("refused");
    assert_eq!(class, "DeviceNotFound");
    let refusal = client.refused("qom-get", path("t9", "no"));
    assert!(refusal.contains("iothread.no"), "{refusal}");
    let children = names(&client.ok("qom-list", json!({"path": "/objects"})));
    assert!(children.contains("t9") && children.contains("t0"), "{children:?}");

    let used = client.refused("object-del", json!({"id": "t0"}));
    assert!(used.contains("e0"), "it names the user: {used}");
    let threads = daemon.threads();
    client.ok("object-del", json!({"id": "t9"}));
    assert_eq!(daemon.threads(), threads - 1);
    assert!(client.refused("object-del", json!({"id": "t9"})).contains("t9"));
    // The one in use still works.
    let mut device = daemon.backend.device(&crate::frontend::device::Profile::qemu());
    device.queue().works();
}

#[test]
fn throttle_groups_come_and_go_and_change_their_limits() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let limits = json!({"iops-total": 100, "iops-total-max": 200, "bps-read": 1 << 20});
    client.ok("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": limits}));
    for kind in ["throttle-group", "iothread"] {
        let taken = client.refused("object-add", json!({"qom-type": kind, "id": "g"}));
        assert!(taken.contains("\"g\" exists"), "{taken}");
    }
    client.ok("qom-set", json!({"path": "/objects/g", "property": "limits", "value": {"iops-total": 150}}));
    client.ok("qom-set", json!({"path": "/objects/g", "property": "x-bps-read", "value": 0}));
    let limits = client.ok("qom-get", json!({"path": "g", "property": "limits"}));
    assert_eq!(
        (&limits["iops-total"], &limits["iops-total-max"], &limits["bps-read"]),
        (&json!(150), &json!(200), &json!(0))
    );
    for value in
        [json!({"iops-total": 300}), json!({"no": 1}), json!({"iops-read": 1}), json!(7), json!({"iops-total": "x"})]
    {
        client.refused("qom-set", json!({"path": "g", "property": "limits", "value": value}));
    }
    assert_eq!(client.ok("qom-get", json!({"path": "g", "property": "limits"})), limits);
    assert!(names(&client.ok("qom-list", json!({"path": "g"}))).contains("x-iops-total"));
    client.ok("object-del", json!({"id": "g"}));
    assert!(client.refused("object-del", json!({"id": "g"})).contains("g"));
}
