//! Disks of all kinds go from process to process: data, sessions, what belongs to them.

use std::time::Duration;

use blockport_block::drivers::qcow2::{CreateOptions, new_image};
use serde_json::json;

use super::{Place, arguments, image, is_qsd, under_load, until_gone};
use crate::backend::Setup;
use crate::frontend::blk::{OK, Request};
use crate::frontend::device::{Device, Profile};
use crate::image::{Image, pattern};
use crate::monitor::client::Client;

/// What is asserted of the gap; what it is without others on the machine is printed.
const GAP_MAX: Duration = Duration::from_secs(5);

#[test]
fn six_upgrades_under_load_lose_nothing() {
    if is_qsd() {
        return;
    }
    let (place, image) = (Place::new(), image(2));
    let setup = place.setup(Setup::file(image.path()).export("num-queues=2").iothreads(2));
    let mut backend = Some(setup.start());
    let mut device = backend.as_ref().expect("it runs").device(&Profile::queues(2));
    let upgrades = || {
        for _ in 0..6 {
            backend = backend.take().map(|old| place.upgrade(&setup, old));
        }
    };
    let load = under_load(&mut device, upgrades, |offset, bytes| image.read(offset, bytes));
    println!("longest gap between completions over six upgrades: {:?}, {} rounds", load.gap, load.rounds);
    assert!(load.gap < GAP_MAX, "{load:?}");
    let said = backend.take().expect("the last one").stop();
    assert!(!said.contains("WARN") && !said.contains("ERROR"), "{said}");
    assert!(!place.path("disk").exists() && !place.path("control").exists());
}

#[test]
fn every_kind_of_front_end_goes_on() {
    if is_qsd() {
        return;
    }
    let profiles =
        [Profile::libblkio(), Profile::cloud_hypervisor(), Profile::firecracker(), Profile::bare(), Profile::qemu()];
    for profile in profiles {
        let (place, image) = (Place::new(), image(1));
        let setup = place.setup(Setup::file(image.path()));
        let mut backend = setup.start();
        let mut device = backend.device(&profile);
        for round in 0..2 {
            device.queue().write(8, &pattern(round, 4096));
            backend = place.upgrade(&setup, backend);
            assert!(device.queue().read(8, 4096) == pattern(round, 4096));
            // The connection goes on, too, with all that was negotiated.
            assert_eq!(device.session.get_features(), device.offered);
            let base = device.stop_queue(0);
            assert!(device.queue().is_drained(base));
            device.start_queue(0);
            device.queue().works();
        }
        // And when it has ended, the next one.
        drop(device);
        backend.device(&profile).queue().works();
    }
}

#[test]
fn an_idle_export_and_one_whose_rings_are_stopped_go_on() {
    if is_qsd() {
        return;
    }
    let place = Place::new();
    let setup = place.setup(Setup::null(1 << 20));
    let backend = place.upgrade(&setup, setup.start());
    let mut device = backend.device(&Profile::unstarted());
    let backend = place.upgrade(&setup, backend);
    device.announce(crate::frontend::device::MemoryBy::Table);
    device.set_up_queue(0);
    let backend = place.upgrade(&setup, backend);
    device.set_kick(0);
    let backend = place.upgrade(&setup, backend);
    device.enable(0, true);
    device.queue().works();
    let _backend = place.upgrade(&setup, backend);
    device.queue().works();
}

#[test]
fn requests_in_flight_end_before_the_upgrade() {
    if is_qsd() {
        return;
    }
    let place = Place::new();
    let setup = place.setup(Setup::slow(Duration::from_millis(200)));
    let backend = setup.start();
    let mut device = backend.device(&Profile::qemu());
    let tickets: Vec<_> = (0..20).map(|_| device.queue().start(&Request::read(0, 512), &Default::default())).collect();
    device.queue().wait_popped();
    let _backend = place.upgrade(&setup, backend);
    assert!(device.queue().finish(&tickets).iter().all(|answer| answer.status == OK));
    device.queue().works();
}

/// An overlay over an overlay over a raw image; formats are stated.
fn chain(dir: &Image) -> (std::path::PathBuf, Vec<u8>) {
    let folder = dir.path().parent().expect("a folder");
    let base = folder.join("base.raw");
    let data = pattern(99, 1 << 20);
    std::fs::write(&base, &data).expect("a base image");
    let mut under = base;
    for name in ["middle.qcow2", "top.qcow2"] {
        let path = folder.join(name);
        let backing = under.display().to_string();
        let format = if under.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
        let options =
            CreateOptions { size: 1 << 20, backing: Some((backing, format.to_owned())), ..Default::default() };
        std::fs::write(&path, new_image(&options).expect("valid options")).expect("an image");
        under = path;
    }
    (under, data)
}

#[test]
fn a_chain_of_images_under_load_goes_on() {
    if is_qsd() {
        return;
    }
    let (place, folder) = (Place::new(), image(1));
    let (top, base) = chain(&folder);
    let node = format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={}", top.display());
    let filtered = "driver=throttle,node-name=t0,file=d0,throttle-group=g0";
    let setup = Setup::new("t0", &[&node, filtered]).object("throttle-group,id=g0");
    let setup = place.setup(setup);
    let mut backend = Some(setup.start());
    let mut device = backend.as_ref().expect("it runs").device(&Profile::qemu());
    let mut upgrades = || {
        for _ in 0..4 {
            backend = backend.take().map(|old| place.upgrade(&setup, old));
        }
    };
    let stop = crate::frontend::wait::Stop::default();
    let load = std::thread::scope(|scope| {
        let worker = scope.spawn(|| super::work(&mut device, &stop));
        let _guard = stop.guard();
        upgrades();
        stop.set();
        worker.join().expect("the load")
    });
    println!("longest gap with a chain of qcow2 images: {:?}, {} rounds", load.gap, load.rounds);
    // What was never written comes from the base.
    let offset = 1 << 19;
    assert!(device.queue().read(offset / 512, 4096) == base[offset as usize..offset as usize + 4096]);
    for block in 0..super::BLOCKS {
        let read = device.queue().read(super::sector(0, block), 4096);
        assert!(read == super::data(0, block, load.rounds - 1), "block {block}");
    }
    drop(device);
    backend.take().expect("the last one").stop();
    let report = crate::qcow2::checked(&top);
    assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
}

#[test]
fn nobody_gets_the_image_in_between() {
    if is_qsd() {
        return;
    }
    let (place, image) = (Place::new(), image(1));
    let setup = place.setup(Setup::file(image.path()));
    let thief = |setup: Setup| {
        let (status, said) = setup.try_start().expect_err("the image is locked");
        assert!(!status.success() && said.contains("another process"), "{said}");
    };
    let mut backend = setup.start();
    for _ in 0..3 {
        thief(Setup::file(image.path()));
        backend = place.upgrade(&setup, backend);
        thief(Setup::file(image.path()));
    }
    backend.stop();
    Setup::file(image.path()).start();
}

#[test]
fn write_cache_config_and_statistics_go_along() {
    if is_qsd() {
        return;
    }
    let (place, image) = (Place::new(), image(1));
    let monitor = format!("socket,id=m0,path={},server=on,wait=off", place.path("monitor").display());
    let monitor = ["--chardev", &monitor, "--monitor", "m0"].map(str::to_owned).to_vec();
    let setup = place.setup(Setup::file(image.path()).more(monitor));
    let mut backend = setup.start();
    let mut device = backend.device(&Profile::qemu());
    device.set_writeback(false).accepted();
    device.queue().write(0, &pattern(1, 4096));
    for _ in 0..2 {
        backend = place.upgrade(&setup, backend);
        device.queue().works();
        assert!(!device.writeback(), "as the guest has set it");
    }
    let mut client = Client::open(&place.path("monitor"));
    let stats = client.ok("query-blockstats", json!({}));
    let writes = stats[0]["stats"]["wr_operations"].as_u64();
    assert_eq!(writes, Some(1), "{stats}");
    // A new size reaches the front-end by the channel that it gave to the first process.
    client.ok("block_resize", json!({"node-name": "d0", "size": 1 << 20}));
    assert_eq!(device.read_config().capacity(), (1 << 20) / 512);
}

#[test]
fn clients_of_the_monitor_are_told_and_find_the_next_one() {
    if is_qsd() {
        return;
    }
    let place = Place::new();
    let monitor = format!("socket,id=m0,path={},server=on,wait=off", place.path("monitor").display());
    let monitor = ["--chardev", &monitor, "--monitor", "m0"].map(str::to_owned).to_vec();
    let setup = place.setup(Setup::null(1 << 20)).more(monitor);
    let backend = setup.start();
    let mut client = Client::open(&place.path("monitor"));
    let with_other = place.setup(Setup::null(1 << 20));
    let next = place.upgrade(&setup, backend);
    assert_eq!(client.event("SHUTDOWN")["guest"], false);
    assert!(client.line().is_none(), "it is closed");
    Client::open(&place.path("monitor")).ok("query-chardev", json!({}));
    // The next one wants no monitor: its own options are what counts.
    let last = place.upgrade(&with_other, next);
    until_gone(&place.path("monitor"));
    last.stop();
}

#[test]
fn the_other_styles_of_command_line_take_over_too() {
    if is_qsd() {
        return;
    }
    let image = image(1);
    let (socket, path) = (|place: &Place| place.path("disk").display().to_string(), image.path().display().to_string());
    let serve = |place: &Place| vec!["serve".to_owned(), path.clone(), "--socket".to_owned(), socket(place)];
    let program = |place: &Place| vec![format!("--socket-path={}", socket(place)), format!("--blk-file={path}")];
    let (one, two) = (Place::new(), Place::new());
    for (words, place) in [(serve(&one), &one), (program(&two), &two)] {
        let control = place.path("control");
        let start = |more: Vec<String>| {
            let words = words.iter().cloned().chain(arguments("--control", &control)).chain(more).collect();
            Setup::bare(words).at(&place.path("disk")).start()
        };
        let old = start(Vec::new());
        let mut device: Device = old.device(&Profile::qemu());
        device.queue().write(0, &pattern(5, 512));
        let new = start(arguments("--take-over", &control));
        old.ended_well();
        assert!(device.queue().read(0, 512) == pattern(5, 512));
        drop(device);
        new.stop();
    }
}

#[test]
fn the_pidfile_goes_along() {
    if is_qsd() {
        return;
    }
    let place = Place::new();
    let pidfile = place.path("pid");
    let setup = place.setup(Setup::null(1 << 20)).more(arguments("--pidfile", &pidfile));
    let pid = || std::fs::read_to_string(&pidfile).unwrap_or_default();
    let old = setup.start();
    crate::frontend::wait::until("a process id", || !pid().is_empty());
    let before = pid();
    let new = place.upgrade(&setup, old);
    crate::frontend::wait::until("another process id", || !pid().is_empty() && pid() != before);
    assert_eq!(new.proc("").display().to_string(), format!("/proc/{}/", pid().trim()));
    new.stop();
    assert!(!pidfile.exists());
}

on_packed_rings! {
    six_upgrades_under_load_lose_nothing,
    every_kind_of_front_end_goes_on,
    requests_in_flight_end_before_the_upgrade,
}
