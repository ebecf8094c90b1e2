//! The host fails: errors injected below the device and a full file system reach the guest as the right status of the
//! right request, and nothing else is lost (specification of the device, section 4).

use std::path::PathBuf;
use std::process::Command;

use crate::backend::{Setup, skip};
use crate::frontend::blk::{Framing, IOERR, OK, Request, Segment};
use crate::frontend::device::Profile;
use crate::image::{Image, pattern};

#[test]
fn a_read_error_is_told_for_the_request_that_met_it_alone() {
    let image = Image::filled(1 << 20);
    let rules = "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,inject-error.0.sector=8";
    let backend = Setup::faulty(image.path(), rules).start();
    let mut device = backend.device(&Profile::qemu());
    let queue = device.queue();
    let tickets: Vec<_> = (0..16).map(|at| queue.start(&Request::read(4 * at, 2048), &Framing::default())).collect();
    for (at, answer) in queue.finish(&tickets).iter().enumerate() {
        if at == 2 {
            assert_eq!((answer.status, answer.used_len), (IOERR, 0), "the request with sector 8");
        } else {
            assert_eq!((answer.status, answer.used_len), (OK, 2049), "request {at}");
            assert!(answer.data == pattern(0, 1 << 20)[at * 2048..][..2048], "data of request {at}");
        }
    }
}

#[test]
fn a_write_error_is_told_for_the_request_that_met_it_alone() {
    let image = Image::filled(1 << 20);
    let rules = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=5,inject-error.0.sector=8";
    let backend = Setup::faulty(image.path(), rules).start();
    let mut device = backend.device(&Profile::qemu());
    let queue = device.queue();
    let data = |at: u64| pattern(1 + at as u32, 2048);
    let tickets: Vec<_> =
        (0..16).map(|at| queue.start(&Request::write(4 * at, &data(at)), &Framing::default())).collect();
    for (at, answer) in (0..).zip(queue.finish(&tickets)) {
        let expected = if at == 2 { pattern(0, 1 << 20)[4096..6144].to_vec() } else { data(at) };
        assert_eq!((answer.status, answer.used_len), (if at == 2 { IOERR } else { OK }, 1), "request {at}");
        assert!(image.read(at * 2048, 2048) == expected, "data of request {at} on the host");
    }
}

#[test]
fn an_error_that_comes_once_is_told_once() {
    let image = Image::filled(1 << 20);
    let rules = "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,inject-error.0.once=on";
    let backend = Setup::faulty(image.path(), rules).start();
    let mut device = backend.device(&Profile::qemu());
    assert_eq!(device.queue().request(&Request::read(0, 512)).status, IOERR);
    assert_eq!(device.queue().read(0, 512), pattern(0, 512));
}

#[test]
fn an_error_below_the_format_is_told() {
    let image = Image::filled(1 << 20);
    let node = format!(
        "driver=raw,node-name=d0,file.driver=blkdebug,file.image.driver=file,\
         file.image.filename={},file.inject-error.0.event=read_aio,\
         file.inject-error.0.errno=5,file.inject-error.0.sector=8",
        image.path().display()
    );
    let backend = Setup::new("d0", &[&node]).start();
    let mut device = backend.device(&Profile::qemu());
    assert_eq!(device.queue().request(&Request::read(6, 2048)).status, IOERR);
    assert_eq!(device.queue().read(0, 4096), pattern(0, 4096));
}

#[test]
fn no_space_is_an_io_error_to_the_guest() {
    let image = Image::filled(1 << 20);
    let rules = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.once=on";
    let backend = Setup::faulty(image.path(), rules).reporting().start();
    let mut device = backend.device(&Profile::qemu());
    let data = pattern(1, 512);
    assert_eq!(device.queue().request(&Request::write(0, &data)).status, IOERR);
    device.queue().write(0, &data);
}

#[test]
fn errors_of_discard_and_write_zeroes_are_told() {
    for (kind, request) in [
        ("discard", Request::discard(&[Segment::new(0, 8)])),
        ("write-zeroes", Request::write_zeroes(&[Segment::new(0, 8)])),
    ] {
        let image = Image::filled(1 << 20);
        let rules = format!("inject-error.0.event=none,inject-error.0.iotype={kind},inject-error.0.errno=5");
        let backend = Setup::faulty(image.path(), &rules).start();
        let mut device = backend.device(&Profile::qemu());
        let answer = device.queue().request(&request);
        assert_eq!((answer.status, answer.used_len), (IOERR, 1), "{kind}");
        device.queue().works();
    }
}

#[test]
fn an_error_on_one_queue_is_not_told_on_another() {
    let image = Image::filled(1 << 20);
    let rules = "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,inject-error.0.sector=8";
    let backend = Setup::faulty(image.path(), rules).export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    std::thread::scope(|scope| {
        let (bad, good) = device.queues.split_at_mut(1);
        scope.spawn(|| {
            for _ in 0..200 {
                assert_eq!(bad[0].request(&Request::read(8, 512)).status, IOERR);
            }
        });
        for _ in 0..200 {
            good[0].works();
        }
    });
}

/// A back-end with its image on a tmpfs of a mebibyte that nobody else sees.
struct SmallDisk {
    backend: crate::backend::Backend,
    /// The tmpfs, seen through the back-end's process.
    dir: PathBuf,
    _mount_point: tempfile::TempDir,
}

fn small_disk(test: &str) -> Option<SmallDisk> {
    let allowed = Command::new("unshare").args(["--mount", "true"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        skip(test, "this user may not mount");
        return None;
    }
    let mount_point = tempfile::tempdir().expect("a directory");
    let path = mount_point.path().display().to_string();
    let prepare = "mount -t tmpfs -o size=1m none \"$0\" && truncate -s 8M \"$0/disk\" && exec \"$@\"";
    let backend = Setup::file(&mount_point.path().join("disk"))
        .reporting()
        .under(&["unshare", "--mount", "sh", "-c", prepare, &path])
        .start();
    let dir = backend.proc("root").join(path.trim_start_matches('/'));
    Some(SmallDisk { backend, dir, _mount_point: mount_point })
}

#[test]
fn a_full_disk_fails_writes_and_nothing_else() {
    let Some(disk) = small_disk("a_full_disk_fails_writes_and_nothing_else") else {
        return;
    };
    let mut device = disk.backend.device(&Profile::qemu());
    let queue = device.queue();
    let megabyte = |at: u64| pattern(at as u32, 64 << 10);
    let mut written = Vec::new();
    let mut refused = 0;
    for at in 0..32 {
        match queue.request(&Request::write(at * 128, &megabyte(at))) {
            answer if answer.status == OK => written.push(at),
            answer => {
                assert_eq!((answer.status, answer.used_len), (IOERR, 1));
                refused += 1;
            }
        }
    }
    assert!(refused >= 16, "{refused} of 32 writes failed where 16 fit");
    assert!(written.len() >= 8, "{} of 32 writes were done where 16 fit", written.len());
    for at in written {
        assert!(queue.read(at * 128, 64 << 10) == megabyte(at), "acknowledged data at {at}");
    }
    assert_eq!(queue.request(&Request::flush()).status, OK);
}

#[test]
fn writes_work_again_when_there_is_room_again() {
    let Some(disk) = small_disk("writes_work_again_when_there_is_room_again") else {
        return;
    };
    std::fs::write(disk.dir.join("ballast"), vec![1; 900 << 10]).expect("ballast");
    let mut device = disk.backend.device(&Profile::qemu());
    let data = pattern(1, 512 << 10);
    assert_eq!(device.queue().request(&Request::write(0, &data)).status, IOERR);
    std::fs::remove_file(disk.dir.join("ballast")).expect("the ballast");
    device.queue().write(0, &data);
    assert!(device.queue().read(0, data.len() as u32) == data);
}
