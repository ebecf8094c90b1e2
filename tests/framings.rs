//! Any framing of header, data and status over descriptors is legal (virtio 1.3, 2.7.4): the same requests, cut in every
//! way, must do the same.

use crate::backend::{Backend, Setup};
use crate::frontend::blk::*;
use crate::frontend::device::{Device, MemoryBy, Profile};
use crate::frontend::memory::Placement;
use crate::frontend::queue::{Buffer, Descriptor, INDIRECT, NEXT, Table, WRITE};
use crate::image::{Image, pattern};

const DISK: usize = 1 << 20;
const BYTES: u32 = 4096;

fn start(options: &str, profile: &Profile) -> (Device, Backend, Image) {
    let image = Image::filled(DISK);
    let backend = Setup::file_with(image.path(), options).start();
    (backend.device(profile), backend, image)
}

/// Writes and reads with this framing, and looks at the image in between.
#[track_caller]
fn round_trip_with(framing: &Framing, options: &str, profile: &Profile) {
    let (mut device, _backend, image) = start(options, profile);
    let data = pattern(1, BYTES as usize);
    let written = device.queue().perform(&Request::write(16, &data), framing);
    assert_eq!((written.status, written.used_len), (OK, 1), "write");
    assert_eq!(image.read(16 * 512, data.len()), data, "on the host");
    let read = device.queue().perform(&Request::read(16, BYTES), framing);
    assert_eq!((read.status, read.used_len), (OK, BYTES + 1), "read");
    assert_eq!(read.data, data, "through the socket");
    assert_eq!(device.queue().perform(&Request::read(0, BYTES), framing).data, pattern(0, BYTES as usize));
}

#[track_caller]
fn round_trip(framing: &Framing) {
    round_trip_with(framing, "", &Profile::qemu());
}

#[test]
fn a_header_may_be_split_in_two() {
    round_trip(&Framing::readable(&[8, 8]));
}

#[test]
fn a_header_may_be_split_inside_a_field() {
    round_trip(&Framing::readable(&[3, 10, 3]));
}

#[test]
fn a_header_may_come_byte_by_byte() {
    round_trip(&Framing::readable(&[1; 16]));
}

#[test]
fn header_and_data_may_share_a_descriptor() {
    round_trip(&Framing::readable(&[]));
}

#[test]
fn the_end_of_the_header_may_share_a_descriptor_with_data() {
    round_trip(&Framing::readable(&[12]));
}

#[test]
fn data_and_status_may_share_a_descriptor() {
    round_trip(&Framing::writable(&[]));
}

#[test]
fn the_end_of_the_data_may_share_a_descriptor_with_the_status() {
    let (mut device, _backend, _image) = start("", &Profile::qemu());
    let answer = device.queue().perform(&Request::read(0, BYTES), &Framing::writable(&[1000, 2000]));
    assert_eq!((answer.status, answer.used_len), (OK, BYTES + 1));
    assert_eq!(answer.data, pattern(0, BYTES as usize));
}

#[test]
fn data_may_be_cut_anywhere() {
    let (mut device, _backend, image) = start("", &Profile::qemu());
    let data = pattern(1, BYTES as usize);
    let answer = device.queue().perform(&Request::write(16, &data), &Framing::readable(&[16, 1, 511, 7, 3000]));
    assert_eq!((answer.status, answer.used_len), (OK, 1));
    assert_eq!(image.read(16 * 512, data.len()), data);
    let framing = Framing::writable(&[1, 511, 7, 3000, 577]);
    assert_eq!(device.queue().perform(&Request::read(16, BYTES), &framing).data, data);
}

#[test]
fn a_segment_may_be_split_over_descriptors() {
    let (mut device, _backend, image) = start("", &Profile::qemu());
    let request = Request::write_zeroes(&[Segment::new(8, 8)]);
    let answer = device.queue().perform(&request, &Framing::readable(&[16, 5, 10]));
    assert_eq!((answer.status, answer.used_len), (OK, 1));
    let mut expected = pattern(0, DISK);
    expected[8 * 512..16 * 512].fill(0);
    assert_eq!(image.read(0, DISK), expected);
}

#[test]
fn an_id_may_be_split_over_descriptors() {
    let (mut device, _backend, _image) = start("", &Profile::qemu());
    let whole = device.queue().request(&Request::get_id());
    let split = device.queue().perform(&Request::get_id(), &Framing::writable(&[1, 7, 12]));
    assert_eq!((split.status, &split.data), (OK, &whole.data));
}

#[test]
fn a_table_may_be_indirect() {
    round_trip(&Framing::table(Table::Indirect));
}

#[test]
fn a_header_may_be_split_in_an_indirect_table() {
    round_trip(&Framing { table: Table::Indirect, ..Framing::readable(&[1; 16]) });
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    round_trip(&Framing::table(Table::IndirectAfter(1)));
}

#[test]
fn the_write_flag_of_a_reference_to_an_indirect_table_is_ignored() {
    let (mut device, _backend, _image) = start("", &Profile::qemu());
    let queue = device.queue();
    let header = queue.arena.cut(16, 16, 0);
    let room = queue.arena.cut(513, 16, 0);
    queue.memory.write(header, &[0; 16]);
    queue.memory.write(room, &[NO_STATUS; 513]);
    let reference = queue.raw_indirect_table(&[
        Descriptor { addr: header, len: 16, flags: NEXT, next: 1 },
        Descriptor { addr: room, len: 513, flags: WRITE, next: 0 },
    ]);
    queue.poke(0, Descriptor { flags: INDIRECT | WRITE, ..reference });
    let since = queue.mark();
    queue.push_head(0);
    queue.publish();
    queue.notify(since);
    assert_eq!(queue.take().len, 513);
    assert_eq!(queue.memory.read(room + 512, 1), [OK]);
}

#[test]
fn an_indirect_table_need_not_be_in_order() {
    let (mut device, _backend, _image) = start("", &Profile::qemu());
    let queue = device.queue();
    let header = queue.arena.cut(16, 16, 0);
    let room = queue.arena.cut(513, 16, 0);
    queue.memory.write(header, &[0; 16]);
    let reference = queue.raw_indirect_table(&[
        Descriptor { addr: header, len: 16, flags: NEXT, next: 3 },
        Descriptor { addr: room + 512, len: 1, flags: WRITE, next: 0 },
        Descriptor::default(),
        Descriptor { addr: room, len: 512, flags: WRITE | NEXT, next: 1 },
    ]);
    queue.poke(5, reference);
    let since = queue.mark();
    queue.push_head(5);
    queue.publish();
    queue.notify(since);
    assert_eq!(queue.take().len, 513);
    assert_eq!(queue.memory.read(room + 512, 1), [OK]);
    assert_eq!(queue.memory.read(room, 512), pattern(0, 512));
}

#[test]
fn zero_length_descriptors_among_readable_ones_count_as_no_bytes() {
    round_trip(&Framing::readable(&[0, 8, 0, 8, 0]));
}

#[test]
fn zero_length_descriptors_before_the_status_count_as_no_bytes() {
    let (mut device, _backend, _image) = start("", &Profile::qemu());
    let answer = device.queue().perform(&Request::read(0, BYTES), &Framing::writable(&[0, BYTES, 0]));
    assert_eq!((answer.status, answer.used_len), (OK, BYTES + 1));
    assert_eq!(answer.data, pattern(0, BYTES as usize));
}

#[test]
fn a_zero_length_descriptor_after_the_status_leaves_it_the_last_byte() {
    let (mut device, _backend, _image) = start("", &Profile::qemu());
    let answer = device.queue().perform(&Request::read(0, BYTES), &Framing::writable(&[BYTES, 1, 0]));
    assert_eq!((answer.status, answer.used_len), (OK, BYTES + 1));
    assert_eq!(answer.data, pattern(0, BYTES as usize));
}

#[test]
fn unaligned_buffers_work_with_the_page_cache() {
    round_trip(&Framing { skew: 3, ..Framing::default() });
}

#[test]
fn unaligned_buffers_work_with_direct_io() {
    round_trip_with(&Framing { skew: 3, ..Framing::default() }, ",cache.direct=on", &Profile::qemu());
}

#[test]
fn buffers_of_odd_lengths_work_with_direct_io() {
    let (mut device, _backend, image) = start(",cache.direct=on", &Profile::qemu());
    let data = pattern(1, BYTES as usize);
    let answer = device.queue().perform(&Request::write(16, &data), &Framing::readable(&[16, 1, 511, 3071]));
    assert_eq!((answer.status, answer.used_len), (OK, 1));
    assert_eq!(image.read(16 * 512, data.len()), data);
    let answer = device.queue().perform(&Request::read(16, BYTES), &Framing::writable(&[13, 2000, 2083]));
    assert_eq!((answer.status, answer.used_len), (OK, BYTES + 1));
    assert_eq!(answer.data, data);
}

#[test]
fn a_buffer_may_span_two_regions_that_are_neighbours() {
    let (mut device, _backend, _image) = start("", &Profile::qemu());
    // Two regions of their own, so that the data overwrites nothing else.
    let border = 0x20_0010_0000;
    for (guest, user) in [(border - (1 << 20), 0x4000_0000_0000), (border, 0x3000_0000_0000)] {
        device.memory.add(Placement { guest, user, size: 1 << 20, file_offset: 0 });
    }
    device.tell_memory(MemoryBy::Table);
    let queue = device.queue();
    let header = queue.arena.cut(16, 16, 0);
    let status = queue.arena.cut(1, 16, 0);
    queue.memory.write(header, &[0; 16]);
    let buffers = [
        Buffer { addr: header, len: 16, writable: false },
        Buffer { addr: border - 1000, len: BYTES, writable: true },
        Buffer { addr: status, len: 1, writable: true },
    ];
    queue.submit(&buffers, Table::Direct);
    assert_eq!(queue.take().len, BYTES + 1);
    assert_eq!(queue.memory.read(status, 1), [OK]);
    let data = [queue.memory.read(border - 1000, 1000), queue.memory.read(border, BYTES as usize - 1000)].concat();
    assert_eq!(data, pattern(0, BYTES as usize));
}

#[test]
fn a_request_may_have_as_many_segments_as_seg_max_says() {
    let (mut device, _backend, _image) = start("", &Profile::qemu());
    let segments = device.config.as_ref().expect("config").seg_max() as u32;
    let answer =
        device.queue().perform(&Request::read(0, segments * 512), &Framing::writable(&vec![512; segments as usize]));
    assert_eq!((answer.status, answer.used_len), (OK, segments * 512 + 1));
    assert_eq!(answer.data, pattern(0, segments as usize * 512));
}

#[test]
fn an_indirect_table_may_hold_more_than_a_small_ring() {
    let (mut device, _backend, _image) = start("", &Profile { queue_size: 16, ..Profile::qemu() });
    let segments = device.config.as_ref().expect("config").seg_max() as u32;
    let framing = Framing { table: Table::Indirect, ..Framing::writable(&vec![512; segments as usize]) };
    let answer = device.queue().perform(&Request::read(0, segments * 512), &framing);
    assert_eq!((answer.status, answer.used_len), (OK, segments * 512 + 1));
    assert_eq!(answer.data, pattern(0, segments as usize * 512));
}

crate::on_packed_rings! {
    a_header_may_come_byte_by_byte,
    header_and_data_may_share_a_descriptor,
    data_and_status_may_share_a_descriptor,
    data_may_be_cut_anywhere,
    a_table_may_be_indirect,
    a_header_may_be_split_in_an_indirect_table,
    zero_length_descriptors_among_readable_ones_count_as_no_bytes,
    a_buffer_may_span_two_regions_that_are_neighbours,
    a_request_may_have_as_many_segments_as_seg_max_says,
    an_indirect_table_may_hold_more_than_a_small_ring,
}
