//! The daemon's sandbox from outside: what /proc says of its threads, which files it is left with, that the modes do what
//! they say. What is blocked is tested beside the code; all other tests run confined too, and fail if it shows.

use std::collections::BTreeMap;

use serde_json::json;

use crate::backend::{Backend, Program, Setup};
use crate::frontend::blk::{OK, Request};
use crate::frontend::device::Profile;
use crate::image::{Image, pattern};
use crate::monitor::client::Monitored;

/// The status of each thread, field by field.
fn threads(backend: &Backend) -> Vec<BTreeMap<String, String>> {
    let tasks = std::fs::read_dir(backend.proc("task")).expect("the threads of a running process");
    let status = tasks.map(|task| std::fs::read_to_string(task.expect("a thread").path().join("status")));
    let fields = |text: String| {
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        pairs.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()
    };
    status.filter_map(Result::ok).map(fields).collect()
}

fn with(setup: &Setup, options: &[&str]) -> Setup {
    setup.clone().more(options.iter().map(ToString::to_string).collect())
}

fn is_qsd() -> bool {
    Program::under_test() != Program::Blockport
}

#[test]
fn every_thread_is_confined_before_a_front_end_is_served() {
    if is_qsd() {
        return;
    }
    let image = Image::empty(1 << 20);
    for mode in [&[][..], &["--sandbox", "strict"]] {
        let backend = with(&Setup::file(image.path()).iothreads(2), mode).start();
        let mut device = backend.device(&Profile::qemu());
        device.queue().works();
        let threads = threads(&backend);
        assert!(threads.len() >= 4, "{threads:?}");
        for thread in threads {
            let name = thread["Name"].as_str();
            assert_eq!(thread["NoNewPrivs"], "1", "{name}");
            assert_eq!(thread["Seccomp"], "2", "{name}");
            for set in ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"] {
                assert_eq!(thread[set], "0000000000000000", "{name}: {set}");
            }
        }
    }
}

#[test]
fn off_gives_up_nothing() {
    if is_qsd() {
        return;
    }
    let backend = with(&Setup::null(1 << 20), &["--sandbox", "off"]).start();
    backend.device(&Profile::qemu()).queue().works();
    for thread in threads(&backend) {
        assert_eq!((thread["Seccomp"].as_str(), thread["NoNewPrivs"].as_str()), ("0", "0"), "{thread:?}");
    }
}

#[test]
fn a_front_end_that_comes_early_is_served_confined() {
    if is_qsd() {
        return;
    }
    let image = Image::empty(1 << 20);
    // The socket is there before the sandbox is: whoever connects at once waits.
    for _ in 0..20 {
        let backend = Setup::file(image.path()).start();
        let mut device = backend.device(&Profile::qemu());
        assert!(threads(&backend).iter().all(|thread| thread["Seccomp"] == "2"));
        device.queue().write(0, &pattern(1, 4096));
        assert_eq!(device.queue().request(&Request::flush()).status, OK);
    }
}

#[test]
fn as_another_user_it_serves_what_it_had_opened() {
    if is_qsd() || !rustix::process::geteuid().is_root() {
        return;
    }
    let image = Image::empty(1 << 20);
    let dir = tempfile::tempdir().expect("a directory for a socket");
    // Who is to remove the socket at the end must be able to.
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).expect("chown");
    let setup = Setup::file(image.path()).at(&dir.path().join("disk.sock"));
    for mode in ["on", "off", "strict"] {
        let backend = with(&setup, &["--runas", "nobody", "--sandbox", mode]).start();
        let mut device = backend.device(&Profile::qemu());
        device.queue().write(0, &pattern(1, 4096));
        for thread in threads(&backend) {
            assert_eq!(thread["Uid"], "65534\t65534\t65534\t65534", "{mode}");
            assert_eq!(thread["CapEff"], "0000000000000000", "{mode}");
        }
        drop(device);
        backend.stop();
        assert!(!dir.path().join("disk.sock").exists(), "{mode}: the socket is left");
    }
}

#[test]
fn a_start_that_cannot_be_confined_as_told_fails() {
    if is_qsd() {
        return;
    }
    for (options, complaint) in [
        (&["--runas", "no-such-user"][..], "--runas: there is no user"),
        (&["--sandbox", "strict", "--sandbox-allow", "/nowhere"], "--sandbox-allow /nowhere: "),
    ] {
        let (status, said) = with(&Setup::null(1 << 20), options).try_start().expect_err(complaint);
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(complaint), "{said}");
    }
}

#[test]
fn a_monitor_makes_things_where_it_was_allowed_to() {
    let elsewhere = tempfile::tempdir().expect("a folder");
    let far = elsewhere.path().join("e2");
    let export = |id: &str, socket: &std::path::Path| json!({"type": "vhost-user-blk", "id": id, "node-name": "d0", "addr": {"type": "unix", "path": socket}});
    let allow = elsewhere.path().display().to_string();
    let third = tempfile::tempdir().expect("a folder");
    let other = third.path().display().to_string();
    for (options, reaches) in [
        (&["--sandbox", "strict"][..], false),
        (&["--sandbox", "strict", "--sandbox-allow", &allow], true),
        // As with qemu-storage-daemon, unless somebody says where.
        (&[], true),
        (&["--sandbox-allow", &other], false),
    ] {
        let daemon = Monitored::start(with(&Setup::null(1 << 20), options));
        let mut client = daemon.client();
        client.ok("object-add", json!({"qom-type": "iothread", "id": "t9"}));
        client.ok("block-export-add", export("e1", &daemon.place("e1")));
        match reaches {
            true => drop(client.ok("block-export-add", export("e2", &far))),
            false => {
                let refusal = client.refused("block-export-add", export("e2", &far));
                assert!(refusal.contains("ermission denied"), "{options:?}: {refusal}");
            }
        }
        assert!(threads(&daemon.backend).iter().all(|thread| thread["Seccomp"] == "2"), "{options:?}");
    }
}
