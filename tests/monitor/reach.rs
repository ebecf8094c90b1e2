//! Where a monitor is reached: socket files, names without a file, inherited sockets, standard input and output.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::client::{Client, Monitored};

const PROGRAM: &str = env!("CARGO_BIN_EXE_blockport");

#[test]
fn a_socket_file_is_its_owners_alone_and_goes_away() {
    let daemon = Monitored::null();
    let mode = std::fs::metadata(daemon.path()).expect("a socket file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let path = daemon.path().to_owned();
    daemon.backend.stop();
    assert!(!path.exists());
}

#[test]
fn monitors_are_added_and_removed_by_command() {
    let daemon = Monitored::null();
    let mut client = daemon.client();
    let path = daemon.place("more");
    let backend = json!({"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": path}}, "wait": false}});
    client.ok("chardev-add", json!({"id": "more", "backend": backend}));
    let again = client.refused("chardev-add", json!({"id": "more", "backend": backend}));
    assert!(again.contains("already exists"), "{again}");
    client.ok("x-blockport-monitor-add", json!({"chardev": "more"}));
    let busy = client.refused("chardev-remove", json!({"id": "more"}));
    assert!(busy.contains("busy"), "{busy}");
    let busy = client.refused("x-blockport-monitor-add", json!({"chardev": "more"}));
    assert!(busy.contains("busy"), "{busy}");
    let mut second = Client::open(&path);
    let listed = second.ok("query-chardev", json!({}));
    let labels: Vec<&str> = listed.as_array().expect("a list").iter().filter_map(|c| c["label"].as_str()).collect();
    assert_eq!(labels, ["mon0", "more"]);
    // The client that asks for it gets its answer first.
    second.ok("x-blockport-monitor-remove", json!({"chardev": "more"}));
    assert!(second.line().is_none());
    client.ok("chardev-remove", json!({"id": "more"}));
    assert!(!path.exists());
}

#[test]
fn a_name_without_a_file() {
    let name = format!("blockport-test-{}", std::process::id());
    let chardev = format!("socket,id=c,path={name},abstract=on,server=on,wait=off");
    let mut child = Command::new(PROGRAM)
        .args(["--blockdev", "null-co,node-name=n", "--chardev", &chardev, "--monitor", "c"])
        .stderr(Stdio::null())
        .spawn()
        .expect("the daemon");
    let address = SocketAddr::from_abstract_name(&name).expect("an address");
    let mut stream = None;
    crate::frontend::wait::until("it listens", || {
        stream = UnixStream::connect_addr(&address).ok();
        stream.is_some()
    });
    let mut client = Client::over(stream.expect("a stream"));
    client.ok("qmp_capabilities", json!({}));
    client.ok("quit", json!({}));
    assert!(child.wait().expect("an end").success());
}

/// Starts the daemon with this socket as descriptor 3 and a monitor on it.
fn inheriting(socket: impl Into<OwnedFd>, options: &str) -> std::process::Child {
    Command::new("sh")
        .args(["-c", r#"exec "$@" 3<&0 </dev/null"#, "sh", PROGRAM, "--chardev"])
        .args([&format!("socket,id=c,fd=3,{options}"), "--monitor", "c"])
        .stdin(socket.into())
        .stderr(Stdio::null())
        .spawn()
        .expect("the daemon")
}

#[test]
fn an_inherited_listening_socket() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let mut child = inheriting(UnixListener::bind(&path).expect("a socket"), "server=on,wait=off");
    let mut client = Client::open(&path);
    client.ok("quit", json!({}));
    assert!(child.wait().expect("an end").success());
}

#[test]
fn an_inherited_connection() {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let mut child = inheriting(theirs, "server=off");
    let mut client = Client::over(ours);
    client.ok("qmp_capabilities", json!({}));
    client.ok("quit", json!({}));
    assert!(child.wait().expect("an end").success());
}

#[test]
fn a_socket_that_somebody_else_listens_on() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).expect("a socket");
    let chardev = format!("socket,id=c,path={}", path.display());
    let mut child = Command::new(PROGRAM).args(["--chardev", &chardev, "--monitor", "c"]).spawn().expect("the daemon");
    let mut client = Client::over(listener.accept().expect("a connection").0);
    client.ok("qmp_capabilities", json!({}));
    client.ok("quit", json!({}));
    assert!(child.wait().expect("an end").success());
}

#[test]
fn standard_input_and_output_also_pretty() {
    let mut child = Command::new(PROGRAM)
        .args(["--chardev", "stdio,id=c", "--monitor", "chardev=c,pretty=on"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the daemon");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit','id':7}").expect("send");
    assert!(child.wait().expect("an end").success());
    let output = BufReader::new(child.stdout.take().expect("a pipe"));
    let text: String = output.lines().map(|line| line.expect("text") + "\n").collect();
    let values: Vec<Value> =
        serde_json::Deserializer::from_str(&text).into_iter().map(|value| value.expect("JSON")).collect();
    assert!(values[0]["QMP"].is_object() && values[1] == json!({"return": {}}), "{text}");
    assert_eq!(values[2], json!({"return": {}, "id": 7}));
    assert!(text.contains("\n    \"QMP\": {\n"), "{text}");
}

#[test]
fn the_start_waits_for_the_first_client_if_told_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, pidfile) = (dir.path().join("s"), dir.path().join("pid"));
    let chardev = format!("socket,id=c,path={},server=on", path.display());
    let start = || {
        let mut command = Command::new(PROGRAM);
        command.args(["--chardev", &chardev, "--monitor", "c", "--pidfile"]).arg(&pidfile);
        command.stderr(Stdio::null()).spawn().expect("the daemon")
    };
    let mut child = start();
    let mut stream = None;
    crate::frontend::wait::until("it listens", || {
        assert!(!pidfile.exists(), "it goes on without a client");
        stream = UnixStream::connect(&path).ok();
        stream.is_some()
    });
    let mut client = Client::over(stream.expect("a stream"));
    client.ok("qmp_capabilities", json!({}));
    crate::frontend::wait::until("the start goes on", || pidfile.exists());
    client.ok("quit", json!({}));
    assert!(child.wait().expect("an end").success());

    // And it can be ended while it waits.
    let mut child = start();
    crate::frontend::wait::until("it listens", || path.exists());
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
    assert_eq!(child.wait().expect("an end").code(), Some(1));
}
