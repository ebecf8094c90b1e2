//! A qcow2 image over a backing file, served to several queues on two iothreads: whole after the daemon's end, and without
//! errors after it was killed.

use std::path::Path;

use blockport_block::Graph;
use blockport_block::drivers::qcow2::{CheckReport, CreateOptions, check, new_image};
use blockport_block::options::parse_keyval;

use crate::backend::Setup;
use crate::frontend::blk::{Framing, OK, Request};
use crate::frontend::device::{Device, Profile};
use crate::frontend::queue::Queue;
use crate::image::{Image, pattern};

const QUEUES: u16 = 4;
const AREA: u64 = 1 << 20;
const DISK: u64 = QUEUES as u64 * AREA;

/// An overlay beside its backing file, which goes with it.
fn overlay(base: &Image) -> std::path::PathBuf {
    let name = base.path().file_name().expect("a file").to_string_lossy().into_owned();
    let path = base.path().with_extension("qcow2");
    let backing = Some((name, "raw".to_owned()));
    let bytes = new_image(&CreateOptions { size: DISK, backing, ..CreateOptions::default() });
    std::fs::write(&path, bytes.expect("valid options")).expect("the directory is writable");
    path
}

fn setup(path: &Path) -> Setup {
    let path = path.display();
    let node = format!("driver=qcow2,node-name=d0,discard=unmap,file.driver=file,file.filename={path}");
    Setup::new("d0", &[&node]).export(&format!("num-queues={QUEUES}")).iothreads(2)
}

pub fn checked(path: &Path) -> CheckReport {
    let graph = Graph::default();
    let path = path.display();
    let options = format!("qcow2,node-name=d0,read-only=on,file.driver=file,file.filename={path}");
    let node = graph.blockdev_add(parse_keyval(&options, Some("driver")).expect("syntax"));
    check(&node.expect("it opens"), false).expect("it can be read")
}

fn flush(queue: &mut Queue) {
    assert_eq!(queue.perform(&Request::flush(), &Framing::default()).status, OK);
}

/// Every queue writes pieces into its own area, with gaps and across clusters.
fn write(queue: &mut Queue, round: u32) {
    let area = u64::from(queue.index) * AREA / 512;
    let free = queue.arena.mark();
    for piece in 0..12u32 {
        let data = pattern(u32::from(queue.index) << 16 | round << 8 | piece, 20 << 10);
        let request = Request::write(area + u64::from(piece) * 160 + 3, &data);
        assert_eq!(queue.perform(&request, &Framing::default()).status, OK);
        queue.arena.release(&free);
    }
}

/// What the disk holds after a round.
fn expected(round: u32) -> Vec<u8> {
    let mut disk = pattern(0, DISK as usize);
    for queue in 0..u32::from(QUEUES) {
        for piece in 0..12u32 {
            let at = queue as usize * AREA as usize + (piece as usize * 160 + 3) * 512;
            disk[at..at + (20 << 10)].copy_from_slice(&pattern(queue << 16 | round << 8 | piece, 20 << 10));
        }
    }
    disk
}

fn all_queues(device: &mut Device, work: impl Fn(&mut Queue) + Sync) {
    std::thread::scope(|scope| {
        for queue in &mut device.queues {
            scope.spawn(|| work(queue));
        }
    });
}

fn read_disk(path: &Path) -> Vec<u8> {
    let backend = setup(path).export(&format!("writable=off,num-queues={QUEUES}")).start();
    let mut device = backend.device(&Profile::queues(QUEUES));
    let queue = device.queue();
    let free = queue.arena.mark();
    let mut disk = Vec::new();
    for at in (0..DISK).step_by(64 << 10) {
        let answer = queue.perform(&Request::read(at / 512, 64 << 10), &Framing::default());
        assert_eq!(answer.status, OK);
        disk.extend(answer.data);
        queue.arena.release(&free);
    }
    drop(device);
    backend.stop();
    disk
}

#[test]
fn an_overlay_that_several_queues_write_is_whole_after_the_end() {
    let base = Image::filled(DISK as usize);
    let path = overlay(&base);
    let backend = setup(&path).start();
    let mut device = backend.device(&Profile::queues(QUEUES));
    all_queues(&mut device, |queue| (0..3).for_each(|round| write(queue, round)));
    drop(device);
    backend.stop();
    let report = checked(&path);
    assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
    assert!(read_disk(&path) == expected(2));
    assert!(base.read(0, DISK as usize) == pattern(0, DISK as usize), "the backing file is left alone");
}

#[test]
fn a_killed_daemon_leaves_all_that_was_flushed_and_no_error() {
    let base = Image::filled(DISK as usize);
    let path = overlay(&base);
    let backend = setup(&path).start();
    let mut device = backend.device(&Profile::queues(QUEUES));
    all_queues(&mut device, |queue| {
        write(queue, 0);
        flush(queue);
    });
    // More that nobody flushes, and the end in the middle of it.
    let queue = device.queue();
    let data = pattern(99, 4096);
    let start = |piece| queue.start(&Request::write(1700 + piece * 8, &data), &Framing::default());
    let unanswered: Vec<_> = (0..8u64).map(start).collect();
    backend.kill();
    drop((unanswered, device));
    assert_eq!(checked(&path).errors, 0);
    let disk = read_disk(&path);
    let first = (11 * 160 + 3 + 40) * 512;
    let written = |disk: &[u8]| [&disk[..1700 * 512], &disk[first.max(1770 * 512)..]].concat();
    assert!(written(&disk) == written(&expected(0)));
}
