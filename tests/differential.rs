//! The same chains to blockport and to qemu-storage-daemon, wherever that is right: status, used.len and data must be
//! the same. Where it is not right, `requests` says what must be.

use crate::backend::{Program, Setup, skip};
use crate::frontend::blk::*;
use crate::frontend::device::Profile;
use crate::frontend::queue::Table;
use crate::image::{Image, pattern};

const DISK: usize = 1 << 20;
const SECTORS: u64 = DISK as u64 / SECTOR;

/// How much of an answer qemu-storage-daemon gets right.
#[derive(Clone, Copy, PartialEq)]
enum Compare {
    All,
    /// Not used.len: it counts every writable byte, written or not.
    StatusAndData,
    /// Not data either: what a failed read leaves in the buffer is its own affair.
    Status,
}

fn chains() -> Vec<(Compare, Request, Framing)> {
    use Compare::{All, Status};
    let plain = Framing::default;
    let unknown_flag = Segment { flags: 2, ..Segment::new(0, 8) };
    let unmap = Segment { flags: Segment::UNMAP, ..Segment::new(40, 8) };
    vec![
        (All, Request::read(0, DISK as u32), plain()),
        (All, Request::read(SECTORS - 1, 512), plain()),
        (All, Request::read(0, 0), plain()),
        (All, Request::write(100, &pattern(1, 65536)), plain()),
        (All, Request::read(96, 81920), plain()),
        (All, Request::write(7, &pattern(2, 1024)), Framing::readable(&[3, 10, 3, 1, 500])),
        (All, Request::read(6, 2048), Framing::writable(&[])),
        (All, Request::read(6, 2048), Framing { skew: 5, ..Framing::writable(&[1, 700]) }),
        (All, Request::write(300, &pattern(3, 4096)), Framing { table: Table::Indirect, ..Framing::readable(&[]) }),
        (All, Request::read(300, 4096), Framing { table: Table::Indirect, ..Framing::writable(&[512; 8]) }),
        (All, Request::flush(), plain()),
        (All, Request::new(kind::FLUSH, 99), plain()),
        (All, Request::discard(&[Segment::new(0, 0)]), plain()),
        (All, Request::discard(&[unknown_flag]), plain()),
        (All, Request::discard(&[Segment { flags: 1, ..unknown_flag }]), plain()),
        (All, Request::discard(&[Segment::new(SECTORS, 8)]), plain()),
        (All, Request::discard(&[Segment::new(u64::MAX, 8)]), plain()),
        (All, Request::discard(&[]), plain()),
        (All, Request { payload: vec![0; 15], ..Request::new(kind::DISCARD, 0) }, plain()),
        (All, Request::write_zeroes(&[Segment::new(16, 8)]), plain()),
        (All, Request::write_zeroes(&[unmap]), plain()),
        (All, Request::write_zeroes(&[unknown_flag]), plain()),
        (All, Request::write_zeroes(&[Segment::new(SECTORS - 1, 2)]), plain()),
        (All, Request::write_zeroes(&[]), plain()),
        (All, Request { payload: vec![0; 8], ..Request::new(kind::WRITE_ZEROES, 0) }, plain()),
        (All, Request::write(SECTORS, &pattern(4, 512)), plain()),
        (All, Request::write(SECTORS - 1, &pattern(4, 1024)), plain()),
        (All, Request::write(u64::MAX, &pattern(4, 512)), plain()),
        (All, Request::write(0, &pattern(4, 513)), plain()),
        (Status, Request::read(SECTORS, 512), plain()),
        (Status, Request::read(SECTORS - 1, 1024), plain()),
        (Status, Request::read(u64::MAX, 512), plain()),
        (Status, Request::read(0, 513), plain()),
        (All, Request::new(kind::SCSI_CMD, 0), plain()),
        (All, Request::new(0x1234, 0), plain()),
        (All, Request::new(kind::SECURE_ERASE, 0), plain()),
        (Compare::StatusAndData, Request { room: 512, ..Request::new(0x1234, 0) }, plain()),
        (All, Request::read(0, DISK as u32), plain()),
    ]
}

fn answers(program: Program, change: impl Fn(Setup) -> Setup) -> (Vec<Answer>, Vec<u8>) {
    let image = Image::filled(DISK);
    let backend = change(Setup::file(image.path()).program(program)).start();
    let mut device = backend.device(&Profile::qemu());
    let answers = chains().iter().map(|(_, request, framing)| device.queue().perform(request, framing)).collect();
    drop(device);
    backend.stop();
    let disk = image.read(0, DISK);
    (answers, disk)
}

fn compare(test: &str, change: impl Fn(Setup) -> Setup + Copy) {
    if !Program::QemuStorageDaemon.is_there() {
        return skip(test, "there is no qemu-storage-daemon");
    }
    let (ours, our_disk) = answers(Program::under_test(), change);
    let (theirs, their_disk) = answers(Program::QemuStorageDaemon, change);
    for (((how, request, framing), ours), theirs) in chains().iter().zip(&ours).zip(&theirs) {
        let about = format!("type {} sector {} {framing:?}", request.kind, request.sector);
        assert_eq!(ours.status, theirs.status, "status of {about}");
        if *how == Compare::All {
            assert_eq!(ours.used_len, theirs.used_len, "used.len of {about}");
        }
        if *how != Compare::Status {
            assert!(ours.data == theirs.data, "data of {about}");
        }
    }
    assert!(our_disk == their_disk, "the images differ");
}

#[test]
fn a_writable_disk_answers_as_qemu_storage_daemon_does() {
    compare("a_writable_disk_answers_as_qemu_storage_daemon_does", |setup| setup);
}

#[test]
fn a_read_only_disk_answers_as_qemu_storage_daemon_does() {
    compare("a_read_only_disk_answers_as_qemu_storage_daemon_does", Setup::read_only);
}

#[test]
fn a_disk_behind_direct_io_answers_as_qemu_storage_daemon_does() {
    let test = "a_disk_behind_direct_io_answers_as_qemu_storage_daemon_does";
    compare(test, |setup| setup.node_options("cache.direct=on"));
}
