//! Requests and answers (specification of the device, section 4), row by row. What `used.len` must be is virtio 1.3,
//! 2.7.8.2: how much was written from the first device-writable byte on.

use crate::backend::{Backend, Setup};
use crate::frontend::blk::*;
use crate::frontend::device::{Device, Profile};
use crate::image::{Image, pattern};

const DISK: usize = 1 << 20;
const SECTORS: u64 = DISK as u64 / SECTOR;

/// A filled disk of a mebibyte with a device on it. Dropped from the front: the device goes before the back-end.
struct Fixture {
    device: Device,
    _backend: Backend,
    image: Image,
}

fn fixture_with(change: impl FnOnce(Setup) -> Setup) -> Fixture {
    let image = Image::filled(DISK);
    let backend = change(Setup::file(image.path())).start();
    Fixture { device: backend.device(&Profile::qemu()), _backend: backend, image }
}

fn fixture() -> Fixture {
    fixture_with(|setup| setup)
}

impl Fixture {
    /// Performs a request whose status and used.len are known; returns the data.
    #[track_caller]
    fn expect(&mut self, request: &Request, status: u8, used_len: u32) -> Vec<u8> {
        let answer = self.device.queue().request(request);
        assert_eq!((answer.status, answer.used_len), (status, used_len), "(status, used.len) of {request:?}");
        answer.data
    }

    /// Performs a read that fails: nothing is written, and there is no prefix.
    #[track_caller]
    fn expect_failed_read(&mut self, sector: u64, bytes: u32) {
        let data = self.expect(&Request::read(sector, bytes), IOERR, 0);
        assert!(data.iter().all(|&byte| byte == UNREAD), "data of a failed read");
    }

    #[track_caller]
    fn expect_unchanged(&self) {
        assert_eq!(self.image.read(0, DISK), pattern(0, DISK), "the image changed");
    }
}

#[test]
fn a_read_returns_the_data_and_counts_it_and_the_status() {
    let mut disk = fixture();
    let data = disk.expect(&Request::read(0, DISK as u32), OK, DISK as u32 + 1);
    assert_eq!(data, pattern(0, DISK));
}

#[test]
fn a_write_reaches_the_image_and_nothing_beside_it() {
    let mut disk = fixture();
    let data = pattern(1, 8192);
    disk.expect(&Request::write(64, &data), OK, 1);
    assert_eq!(disk.image.read(64 * 512, 8192), data);
    assert_eq!(disk.image.read(0, 64 * 512), pattern(0, 64 * 512));
    let after = 64 * 512 + 8192;
    assert_eq!(disk.image.read(after as u64, DISK - after), pattern(0, DISK)[after..]);
}

#[test]
fn the_last_sector_is_readable_and_writable() {
    let mut disk = fixture();
    let data = pattern(1, 512);
    disk.expect(&Request::write(SECTORS - 1, &data), OK, 1);
    assert_eq!(disk.expect(&Request::read(SECTORS - 1, 512), OK, 513), data);
}

#[test]
fn a_read_past_the_end_fails() {
    fixture().expect_failed_read(SECTORS, 512);
}

#[test]
fn a_read_straddling_the_end_fails_whole() {
    fixture().expect_failed_read(SECTORS - 1, 1024);
}

#[test]
fn a_read_at_the_last_sector_number_fails() {
    fixture().expect_failed_read(u64::MAX, 512);
}

#[test]
fn a_read_whose_byte_offset_wraps_to_zero_fails() {
    fixture().expect_failed_read(1 << 55, 512);
}

#[test]
fn writes_past_the_end_fail_and_change_nothing() {
    let mut disk = fixture();
    for sector in [SECTORS, SECTORS - 1, 1 << 55, u64::MAX] {
        disk.expect(&Request::write(sector, &pattern(1, 1024)), IOERR, 1);
    }
    disk.expect_unchanged();
    assert_eq!(std::fs::metadata(disk.image.path()).expect("the image").len(), DISK as u64, "the image grew");
}

#[test]
fn a_read_of_no_whole_number_of_sectors_fails() {
    fixture().expect_failed_read(0, 513);
    fixture().expect_failed_read(0, 511);
}

#[test]
fn a_write_of_no_whole_number_of_sectors_fails_and_changes_nothing() {
    let mut disk = fixture();
    disk.expect(&Request::write(0, &pattern(1, 513)), IOERR, 1);
    disk.expect(&Request::write(0, &pattern(1, 100)), IOERR, 1);
    disk.expect_unchanged();
}

#[test]
fn a_length_that_is_no_multiple_of_the_logical_block_fails() {
    let mut disk = fixture_with(|setup| setup.export("logical-block-size=4096"));
    disk.expect_failed_read(0, 512);
    disk.expect(&Request::write(0, &pattern(1, 4096 + 512)), IOERR, 1);
    disk.expect_unchanged();
    disk.expect(&Request::read(0, 4096), OK, 4097);
}

#[test]
fn a_sector_inside_a_logical_block_fails() {
    let mut disk = fixture_with(|setup| setup.export("logical-block-size=4096"));
    disk.expect_failed_read(1, 4096);
    disk.expect(&Request::write(7, &pattern(1, 4096)), IOERR, 1);
    disk.expect_unchanged();
    disk.expect(&Request::read(8, 4096), OK, 4097);
}

#[test]
fn a_read_of_no_bytes_is_ok() {
    fixture().expect(&Request::read(0, 0), OK, 1);
}

#[test]
fn a_flush_is_ok() {
    fixture().expect(&Request::flush(), OK, 1);
}

#[test]
fn a_flush_with_a_sector_is_ok() {
    fixture().expect(&Request::new(kind::FLUSH, 12345), OK, 1);
}

#[test]
fn a_flush_of_a_read_only_export_is_ok() {
    fixture_with(Setup::read_only).expect(&Request::flush(), OK, 1);
}

#[test]
fn a_read_only_export_reads() {
    let mut disk = fixture_with(Setup::read_only);
    assert_eq!(disk.expect(&Request::read(8, 4096), OK, 4097), pattern(0, DISK)[4096..8192]);
}

#[test]
fn a_read_only_export_refuses_writes() {
    let mut disk = fixture_with(Setup::read_only);
    disk.expect(&Request::write(0, &pattern(1, 512)), IOERR, 1);
    disk.expect_unchanged();
}

#[test]
fn a_read_only_export_refuses_discards() {
    let mut disk = fixture_with(Setup::read_only);
    disk.expect(&Request::discard(&[Segment::new(0, 8)]), IOERR, 1);
    disk.expect_unchanged();
}

#[test]
fn a_read_only_export_refuses_write_zeroes() {
    let mut disk = fixture_with(Setup::read_only);
    disk.expect(&Request::write_zeroes(&[Segment::new(0, 8)]), IOERR, 1);
    disk.expect_unchanged();
}

#[test]
fn get_id_is_the_export_s_serial_padded_with_zeroes() {
    let data = fixture_with(|setup| setup.export("serial=disk-7")).expect(&Request::get_id(), OK, ID_BYTES + 1);
    assert_eq!(data, *b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_serial_of_20_bytes_is_told_whole() {
    let serial = "12345678901234567890";
    let export = format!("serial={serial}");
    let data = fixture_with(|setup| setup.export(&export)).expect(&Request::get_id(), OK, ID_BYTES + 1);
    assert_eq!(data, serial.as_bytes());
}

#[test]
fn the_serial_is_the_export_s_id_unless_told() {
    let data = fixture().expect(&Request::get_id(), OK, ID_BYTES + 1);
    assert_eq!(data, *b"e0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_discard_touches_nothing_beside_its_segment() {
    let mut disk = fixture();
    disk.expect(&Request::discard(&[Segment::new(8, 8)]), OK, 1);
    let (image, before) = (disk.image.read(0, DISK), pattern(0, DISK));
    for sectors in [0..8, 16..SECTORS as usize] {
        let bytes = sectors.start * 512..sectors.end * 512;
        assert_eq!(image[bytes.clone()], before[bytes], "sectors {sectors:?}");
    }
}

#[test]
fn a_discard_with_the_unmap_flag_is_unsupported() {
    let mut disk = fixture();
    let segment = Segment { flags: Segment::UNMAP, ..Segment::new(0, 8) };
    disk.expect(&Request::discard(&[segment]), UNSUPP, 1);
    disk.expect_unchanged();
}

#[test]
fn an_unknown_flag_is_unsupported() {
    let mut disk = fixture();
    for flags in [2, 3, 1 << 31] {
        let segment = Segment { flags, ..Segment::new(0, 8) };
        disk.expect(&Request::discard(&[segment]), UNSUPP, 1);
        disk.expect(&Request::write_zeroes(&[segment]), UNSUPP, 1);
    }
    disk.expect_unchanged();
}

#[test]
fn a_bad_segment_after_a_good_one_fails_the_request() {
    let mut disk = fixture();
    let bad = Segment { flags: 2, ..Segment::new(16, 8) };
    disk.expect(&Request::discard(&[Segment::new(0, 8), bad]), UNSUPP, 1);
    disk.expect(&Request::write_zeroes(&[Segment::new(0, 8), Segment::new(SECTORS, 8)]), IOERR, 1);
}

#[test]
fn write_zeroes_makes_its_segment_read_as_zeroes() {
    let mut disk = fixture();
    disk.expect(&Request::write_zeroes(&[Segment::new(1, 300)]), OK, 1);
    let mut expected = pattern(0, DISK);
    expected[512..301 * 512].fill(0);
    assert_eq!(disk.image.read(0, DISK), expected, "on the host");
    assert_eq!(disk.expect(&Request::read(0, DISK as u32), OK, DISK as u32 + 1), expected, "through the socket");
}

#[test]
fn several_segments_are_all_discarded_or_zeroed() {
    let mut disk = fixture();
    let segments = [Segment::new(1, 3), Segment::new(100, 200)];
    disk.expect(&Request::write_zeroes(&segments), OK, 1);
    let mut expected = pattern(0, DISK);
    expected[512..4 * 512].fill(0);
    expected[100 * 512..300 * 512].fill(0);
    assert_eq!(disk.image.read(0, DISK), expected);
    disk.expect(&Request::discard(&segments), OK, 1);
    assert_eq!(disk.image.read(4 * 512, 96 * 512), expected[4 * 512..100 * 512]);
}

#[test]
fn write_zeroes_may_unmap() {
    let mut disk = fixture();
    let segment = Segment { flags: Segment::UNMAP, ..Segment::new(8, 64) };
    disk.expect(&Request::write_zeroes(&[segment]), OK, 1);
    let mut expected = pattern(0, DISK);
    expected[8 * 512..72 * 512].fill(0);
    assert_eq!(disk.image.read(0, DISK), expected);
}

#[test]
fn segments_past_the_end_fail() {
    let mut disk = fixture();
    for segment in
        [Segment::new(SECTORS, 1), Segment::new(SECTORS - 1, 2), Segment::new(u64::MAX, 8), Segment::new(1 << 55, 8)]
    {
        disk.expect(&Request::discard(&[segment]), IOERR, 1);
        disk.expect(&Request::write_zeroes(&[segment]), IOERR, 1);
    }
    disk.expect_unchanged();
}

#[test]
fn a_segment_of_no_sectors_is_ok() {
    let mut disk = fixture();
    disk.expect(&Request::discard(&[Segment::new(0, 0)]), OK, 1);
    disk.expect(&Request::write_zeroes(&[Segment::new(0, 0)]), OK, 1);
    disk.expect_unchanged();
}

#[test]
fn more_sectors_in_a_segment_than_the_maximum_fail() {
    // Large, so that the end of the disk is not what fails it.
    let backend = Setup::null(16 << 40).start();
    let mut device = backend.device(&Profile::qemu());
    let config = device.read_config();
    assert!(config.max_discard_sectors() > 0, "discard is offered");
    for (most, request) in [
        (config.max_discard_sectors(), Request::discard as fn(&[Segment]) -> Request),
        (config.max_write_zeroes_sectors(), Request::write_zeroes),
    ] {
        let Ok(over) = u32::try_from(most + 1) else {
            continue;
        };
        let answer = device.queue().request(&request(&[Segment::new(0, over)]));
        assert_eq!((answer.status, answer.used_len), (IOERR, 1), "{over} sectors");
    }
}

#[test]
fn more_segments_than_the_maximum_are_unsupported() {
    let mut disk = fixture();
    let config = disk.device.read_config();
    let too_many = |most: u64| vec![Segment::new(0, 1); most as usize + 1];
    disk.expect(&Request::discard(&too_many(config.max_discard_seg())), UNSUPP, 1);
    disk.expect(&Request::write_zeroes(&too_many(config.max_write_zeroes_seg())), UNSUPP, 1);
    disk.expect_unchanged();
}

#[test]
fn as_many_segments_as_the_maximum_are_ok() {
    let mut disk = fixture();
    let most = disk.device.read_config().max_write_zeroes_seg();
    let segments: Vec<Segment> = (0..most).map(|at| Segment::new(at * 4, 1)).collect();
    disk.expect(&Request::write_zeroes(&segments), OK, 1);
    let mut expected = pattern(0, DISK);
    for at in 0..most as usize {
        expected[at * 2048..at * 2048 + 512].fill(0);
    }
    assert_eq!(disk.image.read(0, DISK), expected);
}

#[test]
fn no_segments_fail() {
    let mut disk = fixture();
    disk.expect(&Request::discard(&[]), IOERR, 1);
    disk.expect(&Request::write_zeroes(&[]), IOERR, 1);
}

#[test]
fn part_of_a_segment_fails() {
    let mut disk = fixture();
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        for bytes in [1, 8, 15] {
            disk.expect(&Request { payload: vec![0; bytes], ..Request::new(kind, 0) }, IOERR, 1);
        }
    }
    disk.expect_unchanged();
}

#[test]
fn part_of_a_segment_after_a_whole_one_fails() {
    let mut disk = fixture();
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        for bytes in [17, 24, 31] {
            disk.expect(&Request { payload: vec![0; bytes], ..Request::new(kind, 0) }, IOERR, 1);
        }
    }
    disk.expect_unchanged();
}

#[test]
fn an_unknown_request_is_unsupported() {
    let mut disk = fixture();
    for kind in [3, 5, 15, 0x1234, u32::MAX] {
        disk.expect(&Request::new(kind, 0), UNSUPP, 1);
    }
}

#[test]
fn a_scsi_command_is_unsupported() {
    fixture().expect(&Request::new(kind::SCSI_CMD, 0), UNSUPP, 1);
}

#[test]
fn an_unknown_request_with_room_for_data_writes_only_its_status() {
    let mut disk = fixture();
    let data = disk.expect(&Request { room: 512, ..Request::new(0x1234, 0) }, UNSUPP, 0);
    assert!(data.iter().all(|&byte| byte == UNREAD), "data of an unsupported request");
}

#[test]
fn secure_erase_is_unsupported_while_it_is_not_offered() {
    let mut disk = fixture();
    let request = Request { kind: kind::SECURE_ERASE, ..Request::discard(&[Segment::new(0, 8)]) };
    disk.expect(&request, UNSUPP, 1);
    disk.expect_unchanged();
}

#[test]
fn the_tail_of_a_size_that_is_no_multiple_of_512_reads_as_zeroes() {
    let image = Image::filled(1000);
    let backend = Setup::file(image.path()).start();
    let mut device = backend.device(&Profile::qemu());
    let mut expected = pattern(0, 1000);
    expected.resize(1024, 0);
    assert_eq!(device.queue().read(0, 1024), expected);
}

crate::on_packed_rings! {
    a_read_returns_the_data_and_counts_it_and_the_status,
    a_write_reaches_the_image_and_nothing_beside_it,
    a_read_straddling_the_end_fails_whole,
    a_flush_is_ok,
    get_id_is_the_export_s_serial_padded_with_zeroes,
    several_segments_are_all_discarded_or_zeroed,
    an_unknown_request_is_unsupported,
}
