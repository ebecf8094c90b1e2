//! Who may not take over, and what cannot be taken over: the process that serves goes on, and no front-end notices.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::json;

use super::relay::{HELLO, OFFER, Peer, Relay};
use super::{Place, image, is_qsd};
use crate::backend::{Backend, Setup};
use crate::frontend::device::{Device, Profile};

/// A process that serves, and a front-end of its.
struct Serving {
    place: Place,
    backend: Backend,
    device: Device,
}

impl Serving {
    #[track_caller]
    fn start(setup: Setup) -> Self {
        let place = Place::new();
        let backend = place.setup(setup).start();
        let mut device = backend.device(&Profile::qemu());
        device.queue().works();
        Self { place, backend, device }
    }

    /// Another process, with this setup, does not take over, and says why.
    #[track_caller]
    fn refuses(&mut self, setup: Setup, why: &str) {
        let said = self.place.fails(&self.place.setup(setup), "control");
        assert!(said.contains(why), "{why:?} is not in:\n{said}");
        self.goes_on();
    }

    #[track_caller]
    fn goes_on(&mut self) {
        assert!(self.backend.is_running(), "{}", self.backend.said());
        self.device.queue().works();
        self.device.session.get_features();
    }
}

#[test]
fn another_disk_or_other_settings_are_not_taken_over() {
    if is_qsd() {
        return;
    }
    let (one, two) = (image(1), image(1));
    let mut serving = Serving::start(Setup::file(one.path()).export("num-queues=2"));
    let same = |path: &std::path::Path| Setup::file(path).export("num-queues=2");
    serving.refuses(same(two.path()), "it is another disk");
    serving.refuses(Setup::file(one.path()), "num-queues is 2 there, and 1 here");
    serving.refuses(same(one.path()).export("serial=other"), "serial is");
    serving.refuses(same(one.path()).export("packed=off"), "packed is true there");
    serving.refuses(same(one.path()).export("seg-max=8"), "seg-max is 126 there, and 8 here");
    serving.refuses(same(one.path()).export("logical-block-size=4096"), "logical-block-size is 512 there");
    serving.refuses(same(one.path()).node_options("offset=512"), "it is another disk");
    serving.refuses(same(one.path()).node_options("size=4096"), "bytes there, and 4096 here");
    serving.refuses(same(one.path()).node_options("file.read-only=on"), "read-only");
    let elsewhere = same(one.path()).at(&serving.place.path("elsewhere"));
    let elsewhere = elsewhere.more(super::arguments("--control", &serving.place.path("control")));
    let said = serving.place.fails(&elsewhere, "control");
    assert!(said.contains("its socket is"), "{said}");
    serving.goes_on();
    assert!(serving.place.path("disk").exists() && serving.place.path("control").exists());
    // With other options as far as guests see nothing of them, it is.
    let setup = serving.place.setup(same(one.path()).iothreads(2).export("werror=stop"));
    let Serving { place, backend, mut device } = serving;
    let _backend = place.upgrade(&setup, backend);
    device.queue().works();
}

#[test]
fn what_is_kept_in_the_process_cannot_be_taken_over() {
    if is_qsd() {
        return;
    }
    let setup = Setup::new("d0", &["driver=memory,node-name=d0,size=1M"]);
    Serving::start(setup.clone()).refuses(setup, "what the driver \"memory\" keeps");
}

#[test]
fn another_version_is_told_so_and_refused() {
    if is_qsd() {
        return;
    }
    let mut serving = Serving::start(Setup::null(1 << 20));
    let setup = serving.place.setup(Setup::null(1 << 20));
    for at in [HELLO, OFFER] {
        let path = serving.place.path("relay");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        let new = serving.place.taking_over(&setup, "relay").launch();
        let mut relay = Relay::accept(&listener, &serving.place.path("control"));
        relay.pass(at);
        let (mut message, descriptors) = relay.take();
        message["version"] = json!(2);
        relay.give(&(message, descriptors));
        if at == HELLO {
            relay.pass_refusal();
        }
        let (status, said) = new.ended();
        assert_eq!(status.code(), Some(1));
        assert!(said.contains("version 2 of the hand-over"), "{said}");
        drop(relay);
        serving.goes_on();
    }
}

#[test]
fn another_user_is_refused() {
    if is_qsd() {
        return;
    }
    let mut serving = Serving::start(Setup::null(1 << 20));
    let control = serving.place.path("control");
    let mode = |path: &std::path::Path| std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode(&control), 0o600);
    // Were it not for the mode, the kernel would still say who asks.
    for (path, mode) in [(&control, 0o666), (&control.parent().expect("a folder").to_owned(), 0o755)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("our own");
    }
    let nobody = rustix::fs::Uid::from_raw(65534);
    let connected = std::thread::spawn(move || {
        // Of this thread only.
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).expect("root may");
        UnixStream::connect(control)
    });
    let peer = Peer::new(connected.join().expect("no panic").expect("the mode lets everyone in"));
    assert!(peer.refusal().contains("user 65534 asks"));
    serving.goes_on();
}

#[test]
fn nonsense_and_messages_out_of_turn_are_refused() {
    if is_qsd() {
        return;
    }
    let mut serving = Serving::start(Setup::null(1 << 20));
    let control = serving.place.path("control");
    for message in [json!({"message": "ready"}), json!({"message": "commit", "sockets": [], "pidfile": true})] {
        let peer = Peer::connect(&control);
        peer.say(message);
        assert!(peer.refusal().contains("turn"));
    }
    for bytes in [&[0xff; 64][..], b"\x02\0\0\0\0\0\0\0{}", b"\x05\0\0\0\x01\0\0\0hello", b"\x03\0\0\0\0\0\0\0abc"] {
        let peer = Peer::connect(&control);
        peer.send_bytes(bytes).expect("room");
        peer.refusal();
    }
    // Half a message, and nobody who waits for the rest.
    let peer = Peer::connect(&control);
    peer.send_bytes(b"\xff\0").expect("room");
    serving.goes_on();
    let second = Peer::connect(&control);
    assert!(second.refusal().contains("another process is taking over"));
    drop(peer);
    serving.goes_on();
    let monitor_less = serving.place.path("nobody");
    let (status, said) =
        serving.place.taking_over(&Setup::null(1 << 20), "nobody").try_start().expect_err("nobody is there");
    assert!(status.code() == Some(1) && said.contains(&monitor_less.display().to_string()), "{said}");
}
