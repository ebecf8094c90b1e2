//! Two daemons and one image, as in a migration: the one that comes later waits, inactive, until the one before has given
//! the image up, and takes it when its first ring starts. Neither ever writes while the other may.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::backend::{Backend, Setup};
use crate::frontend::device::{Device, MemoryBy, Profile};
use crate::frontend::wait;
use crate::image::{Image, pattern};
use crate::monitor::client::Monitored;

const DISK: u64 = 4 << 20;

/// An image of either format, and how a daemon serves it.
struct Shared {
    image: Image,
    format: &'static str,
}

impl Shared {
    fn raw() -> Self {
        Self { image: Image::empty(DISK), format: "raw" }
    }

    fn qcow2() -> Self {
        let shared = Self { image: Image::empty(0), format: "qcow2" };
        let options = blockport_block::drivers::qcow2::CreateOptions { size: DISK, ..Default::default() };
        let bytes = blockport_block::drivers::qcow2::new_image(&options).expect("valid options");
        std::fs::write(shared.image.path(), bytes).expect("the directory is writable");
        shared
    }

    fn setup(&self, options: &str, export: &str) -> Setup {
        let (format, path) = (self.format, self.image.path().display());
        let node = format!("driver={format},node-name=d0,discard=unmap,file.driver=file,file.filename={path}{options}");
        Setup::new("d0", &[&node]).export(export)
    }
}

/// All that a front-end does before its rings start.
#[track_caller]
fn prepared(backend: &Backend) -> Device {
    let mut device = backend.device(&Profile::unstarted());
    device.announce(MemoryBy::Table);
    device
}

#[track_caller]
fn refused_start(device: &Device) {
    use std::os::fd::AsFd;
    device.set_up_queue(0);
    device.session.set_vring_kick(0, Some(device.queues[0].kick.as_fd())).refused();
}

fn moves_back_and_forth(shared: &Shared) {
    let source = shared.setup("", "hand-over=on").start();
    let mut there = source.device(&Profile::qemu());
    there.queue().write(8, &pattern(1, 65536));
    let destination = shared.setup(",active=off", "hand-over=on").start();
    let mut here = prepared(&destination);
    assert_eq!(here.config, there.config, "what it is told before it has the image");
    assert_eq!(here.offered, there.offered);
    // The source still runs.
    refused_start(&here);
    wait::until("it says why", || destination.said().contains("the \"write\" lock"));
    there.queue().write(8, &pattern(2, 65536));

    there.stop_queue(0);
    here.start_queue(0);
    assert_eq!(here.queue().read(8, 65536), pattern(2, 65536), "what the source wrote last");
    here.queue().write(8, &pattern(3, 65536));
    refused_start(&there);

    // Back, as after a second migration, or one that failed.
    here.stop_queue(0);
    there.queue().reset();
    there.start_queue(0);
    assert_eq!(there.queue().read(8, 65536), pattern(3, 65536));
    // Who leaves gives the image up, too.
    drop(there);
    here.queue().reset();
    wait::until("the image is free", || source.said().matches("free for others").count() == 2);
    here.start_queue(0);
    here.queue().works();
}

#[test]
fn a_raw_image_moves_between_daemons() {
    moves_back_and_forth(&Shared::raw());
}

#[test]
fn a_qcow2_image_moves_between_daemons() {
    moves_back_and_forth(&Shared::qcow2());
}

#[test]
fn management_gives_an_image_up_and_never_from_under_a_ring() {
    let shared = Shared::raw();
    let source = Monitored::start(shared.setup("", "allow-inactive=on"));
    let destination = Monitored::start(shared.setup(",active=off", "allow-inactive=on"));
    let (mut there, mut here) = (source.backend.device(&Profile::qemu()), prepared(&destination.backend));
    there.queue().write(0, &pattern(1, 4096));
    let give_up = json!({"node-name": "d0", "active": false});
    let why = source.client().refused("blockdev-set-active", give_up.clone());
    assert!(why.contains("e0"), "{why}");
    there.stop_queue(0);
    // Still the source's.
    refused_start(&here);
    source.client().ok("blockdev-set-active", give_up);
    assert_eq!(there.read_config().capacity(), DISK / 512);
    here.start_queue(0);
    assert_eq!(here.queue().read(0, 4096), pattern(1, 4096));
    let why = source.client().refused("blockdev-set-active", json!({"node-name": "d0", "active": true}));
    assert!(why.contains("lock"), "{why}");
}

#[test]
fn an_export_that_says_nothing_of_it_has_an_active_medium() {
    let shared = Shared::raw();
    let daemon = Monitored::start(shared.setup(",active=off", "writable=on"));
    let node = || daemon.client().ok("query-named-block-nodes", json!({}))[0]["active"].clone();
    assert_eq!(node(), true);
    daemon.client().refused("blockdev-set-active", json!({"active": false}));
    daemon.backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn two_exports_keep_a_node_that_one_of_them_would_give_up() {
    let shared = Shared::raw();
    let daemon = Monitored::start(shared.setup("", "hand-over=on"));
    let socket: PathBuf = daemon.place("second");
    let address = json!({"type": "unix", "path": Path::new(&socket)});
    let export = json!({"type": "vhost-user-blk", "id": "e1", "node-name": "d0", "addr": address, "writable": true});
    daemon.client().ok("block-export-add", export);
    let device = daemon.backend.device(&Profile::qemu());
    device.stop_queue(0);
    let connection = crate::frontend::wire::Connection::open(&socket, wait::DEADLINE).expect("it listens");
    Device::negotiate(connection, &Profile::qemu()).queue().works();
    wait::until("it says why", || daemon.backend.said().contains("is used by \"e1\""));
}

#[test]
fn an_image_that_is_given_up_is_whole() {
    let shared = Shared::qcow2();
    let source = shared.setup("", "hand-over=on").start();
    let mut device = source.device(&Profile::qemu());
    device.queue().write(0, &pattern(7, 65536));
    // Never flushed.
    device.stop_queue(0);
    let graph = blockport_block::Graph::default();
    let path = shared.image.path().display();
    let options = format!("qcow2,node-name=d0,file.driver=file,file.filename={path}");
    let options = blockport_block::options::parse_keyval(&options, Some("driver")).expect("syntax");
    let node = graph.blockdev_add(options).expect("nobody else has it");
    let report = blockport_block::drivers::qcow2::check(&node, false).expect("it can be read");
    assert_eq!((report.errors, report.leaks), (0, 0));
}

/// Has a back-end read this as its state.
#[track_caller]
fn load(device: &Device, state: &[u8]) -> u64 {
    use std::io::Write;
    use std::os::fd::AsFd;
    let (read, mut write) = std::io::pipe().expect("a pipe");
    assert_eq!(device.session.set_device_state_fd(1, read.as_fd()), 0x100);
    write.write_all(state).expect("room in a pipe");
    drop(write);
    device.session.check_device_state()
}

#[test]
fn the_write_cache_goes_along_where_the_front_end_carries_it() {
    use std::io::Read;
    use std::os::fd::AsFd;
    let shared = Shared::raw();
    let source = shared.setup("", "hand-over=on").start();
    let there = source.device(&Profile::qemu());
    there.set_writeback(false).accepted();
    let (mut read, write) = std::io::pipe().expect("a pipe");
    assert_ne!(there.session.set_device_state_fd(0, write.as_fd()) & 0xff, 0, "its ring runs");
    there.stop_queue(0);
    assert_eq!(there.session.set_device_state_fd(0, write.as_fd()), 0x100);
    drop(write);
    assert_eq!(there.session.check_device_state(), 0);
    let mut state = Vec::new();
    read.read_to_end(&mut state).expect("a pipe");
    let destination = shared.setup(",active=off", "hand-over=on").start();
    let mut here = prepared(&destination);
    assert!(here.writeback());
    for bad in [&state[1..], &[], &[0; 16], &vec![7; 60_000]] {
        assert_ne!(load(&here, bad), 0);
    }
    assert_ne!(here.session.check_device_state(), 0, "nothing was begun");
    assert_eq!(load(&here, &state), 0);
    here.start_queue(0);
    assert!(!here.writeback());
    here.queue().works();
}
