//! What a daemon costs that has nothing to do: no CPU at all, and little memory for each further disk.

use std::path::Path;
use std::time::Duration;

use crate::backend::{Backend, Setup};
use crate::frontend::device::{Device, Profile};
use crate::frontend::wire::Connection;
use crate::image::Image;
use crate::monitor::client::Monitored;

/// How long nothing may happen.
const IDLE: Duration = Duration::from_secs(10);
/// Enough for adaptive polling to give up, and for the kernel's own clean-up after the last I/O.
const SETTLE: Duration = Duration::from_secs(2);
/// What a further disk may add to the daemon's anonymous memory.
const RSS_PER_DISK_MAX_KIB: u64 = 1024;

/// Arguments for `count` further exports of images, each on its own socket in `dir`.
fn further_disks(dir: &Path, image: &Image, count: usize) -> Vec<String> {
    let image = image.path().display();
    let disk = |n| {
        let socket = dir.join(format!("{n}.sock"));
        let file = format!("driver=file,node-name=f{n},filename={image},locking=off,cache.direct=on");
        let raw = format!("driver=raw,node-name=r{n},file=f{n}");
        let socket = socket.display();
        let export = format!(
            "type=vhost-user-blk,id=x{n},node-name=r{n},addr.type=unix,addr.path={socket},writable=on,iothread=t0"
        );
        ["--blockdev".into(), file, "--blockdev".into(), raw, "--export".into(), export]
    };
    (0..count).flat_map(disk).collect()
}

/// A front-end that has done some I/O and keeps its rings started.
fn at_rest(socket: &Path) -> Device {
    let connection = Connection::open(socket, Duration::from_secs(10)).expect("connect");
    let mut device = Device::negotiate(connection, &Profile::qemu());
    device.queue().works();
    device
}

fn rss_anon_kib(backend: &Backend) -> u64 {
    let status = std::fs::read_to_string(backend.proc("status")).expect("status");
    let line = status.lines().find(|line| line.starts_with("RssAnon")).expect("RssAnon");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number of KiB")
}

#[test]
fn an_idle_daemon_with_connected_front_ends_and_a_monitor_uses_no_cpu() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = Image::empty(1 << 20);
    let backend = Monitored::start(Setup::null(1 << 20).more(further_disks(dir.path(), &image, 2)));
    let mut client = backend.client();
    let backend = &backend.backend;
    let _devices =
        [at_rest(backend.socket()), at_rest(&dir.path().join("0.sock")), at_rest(&dir.path().join("1.sock"))];
    std::thread::sleep(SETTLE);
    let (switches, ticks) = (backend.context_switches(), backend.cpu_ticks());
    std::thread::sleep(IDLE);
    assert_eq!((backend.context_switches(), backend.cpu_ticks()), (switches, ticks));
    client.ok("query-version", serde_json::json!({}));
}

#[test]
fn two_hundred_further_disks_take_little_memory() {
    const DISKS: usize = 200;
    let dir = tempfile::tempdir().expect("a directory");
    let image = Image::empty(1 << 20);
    let backend = Setup::null(1 << 20).more(further_disks(dir.path(), &image, DISKS)).start();
    let _first = at_rest(backend.socket());
    let before = rss_anon_kib(&backend);
    let devices: Vec<Device> = (0..DISKS).map(|n| at_rest(&dir.path().join(format!("{n}.sock")))).collect();
    let each = (rss_anon_kib(&backend) - before).div_ceil(devices.len() as u64);
    println!("{each} KiB of anonymous memory for each further connected disk");
    assert!(each <= RSS_PER_DISK_MAX_KIB, "{each} KiB for each further disk");
    drop(devices);
    let alone = Setup::null(1 << 20).start();
    let _device = at_rest(alone.socket());
    let each = (rss_anon_kib(&backend).saturating_sub(rss_anon_kib(&alone))).div_ceil(DISKS as u64);
    println!("{each} KiB with the disk's own start included");
    assert!(each <= RSS_PER_DISK_MAX_KIB, "{each} KiB for each further disk, its start included");
}
