//! Tests of the device model on descriptor chains of any shape, without a ring: what a request is cut into must not
//! matter, and what is too short is answered as far as there is room.

use std::rc::Rc;

use blockport_block::aio::AioContext;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::options::parse_keyval;
use blockport_block::{BackendChannel, BlockBackend, Graph, Permissions};
use proptest::prelude::*;

use super::*;
use crate::testing::{aio_settings, cases};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
/// What stands in writable bytes that the device has not written.
const UNTOUCHED: u8 = 0xee;

const SERIAL: [u8; 20] = *b"serial of 20 letters";
const DISK: usize = 64 << 10;

struct Disk {
    context: AioContext,
    channel: Rc<BackendChannel>,
    device: DeviceModel,
    _backend: std::sync::Arc<BlockBackend>,
}

impl Disk {
    /// A disk in memory, on which each byte of a sector is the sector's number.
    fn new() -> Self {
        let options = parse_keyval(&format!("memory,node-name=d,size={DISK},discard=unmap"), Some("driver"));
        let node = Graph::default().blockdev_add(options.expect("syntax")).expect("a disk in memory");
        let backend = BlockBackend::with_root("b", node, Permissions::device(true)).expect("nobody else uses it");
        let context = AioContext::new(aio_settings()).expect("the engine works here");
        let channel = backend.channel(&context).expect("the node is active");
        let ranges = RangeLimits::new(&backend.limits(), 512);
        let device = DeviceModel { serial: SERIAL, writable: true, can_discard: true, block_size: 512, ranges };
        let disk = Self { context, channel, device, _backend: backend };
        let content: Vec<u8> = (0..DISK).map(|at| (at / 512) as u8).collect();
        assert_eq!(disk.perform(&[&header(VIRTIO_BLK_T_OUT, 0), &content], &[1]), (1, vec![OK]));
        disk
    }

    /// Performs what these readable buffers, and writable ones of these lengths, ask for. Returns the used length and
    /// the writable bytes.
    fn perform(&self, readable: &[&[u8]], writable: &[usize]) -> (u32, Vec<u8>) {
        let mut buffers = Vec::new();
        for bytes in readable {
            let mut buffer = AlignedBuffer::new(bytes.len(), 1);
            buffer.fill_from(bytes);
            buffers.push(buffer);
        }
        for len in writable {
            let mut buffer = AlignedBuffer::new(*len, 1);
            buffer.fill_from(&vec![UNTOUCHED; *len]);
            buffers.push(buffer);
        }
        // As a ring gives them: without empty ones.
        let pieces = |buffers: &[AlignedBuffer]| -> Vec<IoVec> {
            buffers.iter().filter(|buffer| !buffer.is_empty()).map(AlignedBuffer::iov).collect()
        };
        let (front, back) = buffers.split_at(readable.len());
        let mut iov = pieces(front);
        let readable = iov.len();
        iov.extend(pieces(back));
        let mut chain = Chain { head: 7.into(), iov, readable, ..Chain::default() };
        let written = match start(&mut chain, &self.device, &self.channel) {
            Started::Done { written } => written,
            Started::Failed(failed) => {
                let written;
                (chain, written) = failed.report();
                written
            }
            Started::Pending(pending) => {
                let written;
                (chain, written) = self.context.run_until(pending).unwrap_or_else(Failed::report);
                written
            }
        };
        assert_eq!(chain.head.number, 7, "the chain comes back");
        (written, back.iter().flat_map(AlignedBuffer::to_vec).collect())
    }

    fn sector(&self, sector: u64) -> Vec<u8> {
        let (written, mut bytes) = self.perform(&[&header(VIRTIO_BLK_T_IN, sector)], &[513]);
        assert_eq!((written, bytes.pop()), (513, Some(OK)));
        bytes
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// The bytes cut at these places, which need not be in order or inside.
fn cut<'a>(bytes: &'a [u8], places: &[usize]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = places.iter().map(|place| place % (bytes.len() + 1)).collect();
    places.push(bytes.len());
    places.sort_unstable();
    let mut from = 0;
    places.into_iter().map(|to| &bytes[std::mem::replace(&mut from, to)..to]).collect()
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn a_write_does_not_depend_on_where_it_is_cut(places in prop::collection::vec(any::<usize>(), 0..24)) {
        let disk = Disk::new();
        let data: Vec<u8> = (0..1024).map(|at| (at % 251) as u8).collect();
        let request = [header(VIRTIO_BLK_T_OUT, 3), data.clone()].concat();
        prop_assert_eq!(disk.perform(&cut(&request, &places), &[1]), (1, vec![OK]));
        prop_assert_eq!([disk.sector(3), disk.sector(4)].concat(), data);
        prop_assert_eq!(disk.sector(2), [2; 512]);
        prop_assert_eq!(disk.sector(5), [5; 512]);
    }

    #[test]
    fn a_read_does_not_depend_on_where_it_is_cut(
        places in prop::collection::vec(any::<usize>(), 0..20),
        room in prop::collection::vec(any::<usize>(), 0..24),
    ) {
        let disk = Disk::new();
        let request = header(VIRTIO_BLK_T_IN, 9);
        let lengths: Vec<usize> = cut(&[0; 1025], &room).iter().map(|part| part.len()).collect();
        let expected = [vec![9; 512], vec![10; 512], vec![OK]].concat();
        prop_assert_eq!(disk.perform(&cut(&request, &places), &lengths), (1025, expected));
    }
}

#[test]
fn a_short_header_is_an_error_where_there_is_room_to_say_so() {
    let disk = Disk::new();
    for len in 0..HEADER_BYTES {
        let short = &header(VIRTIO_BLK_T_IN, 0)[..len];
        assert_eq!(disk.perform(&[short], &[1]), (1, vec![IOERR]), "{len} bytes");
        // Nothing was written in front of the status, so there is no prefix.
        assert_eq!(disk.perform(&[short], &[2, 1]), (0, vec![UNTOUCHED, UNTOUCHED, IOERR]), "{len} bytes");
        assert_eq!(disk.perform(&[&short[..len / 2], &short[len / 2..]], &[3]).1, [UNTOUCHED, UNTOUCHED, IOERR]);
    }
}

#[test]
fn a_short_header_without_room_for_a_status_is_returned_unanswered() {
    let disk = Disk::new();
    for len in 0..HEADER_BYTES {
        assert_eq!(disk.perform(&[&vec![0; len]], &[]), (0, Vec::new()), "{len} bytes");
    }
    assert_eq!(disk.perform(&[], &[]), (0, Vec::new()), "a chain of nothing");
}

#[test]
fn a_write_without_room_for_a_status_is_not_done() {
    let disk = Disk::new();
    assert_eq!(disk.perform(&[&header(VIRTIO_BLK_T_OUT, 3), &[0xff; 512]], &[]), (0, Vec::new()));
    assert_eq!(disk.sector(3), [3; 512]);
}

#[test]
fn a_header_in_writable_bytes_is_no_header() {
    let disk = Disk::new();
    assert_eq!(disk.perform(&[], &[1]), (1, vec![IOERR]));
    assert_eq!(disk.perform(&[], &[16, 1]).0, 0);
}

#[test]
fn the_status_is_the_last_writable_byte_wherever_that_is() {
    let disk = Disk::new();
    let read = header(VIRTIO_BLK_T_IN, 6);
    let expected = [vec![6; 512], vec![OK]].concat();
    for lengths in [&[513][..], &[512, 1], &[1, 512], &[511, 2], &[0, 512, 0, 1, 0]] {
        assert_eq!(disk.perform(&[&read], lengths), (513, expected.clone()), "{lengths:?}");
    }
    assert_eq!(disk.perform(&[&read], &[1]), (1, vec![OK]), "a read of nothing");
}

#[test]
fn a_failed_read_counts_nothing_unless_the_status_is_all() {
    let disk = Disk::new();
    let past_the_end = header(VIRTIO_BLK_T_IN, (DISK / 512) as u64);
    let (written, bytes) = disk.perform(&[&past_the_end], &[513]);
    assert_eq!((written, bytes.last()), (0, Some(&IOERR)));
    let (written, bytes) = disk.perform(&[&header(VIRTIO_BLK_T_IN, 0)], &[100, 1]);
    assert_eq!((written, bytes.last()), (0, Some(&IOERR)), "no whole sector");
}

#[test]
fn what_writes_nothing_but_a_status_claims_no_bytes_in_front_of_it() {
    let disk = Disk::new();
    let segment = [&8u64.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 4]].concat();
    let requests: [(u32, &[u8]); 4] = [
        (VIRTIO_BLK_T_OUT, &[1; 512]),
        (VIRTIO_BLK_T_FLUSH, &[]),
        (VIRTIO_BLK_T_DISCARD, &segment),
        (VIRTIO_BLK_T_WRITE_ZEROES, &segment),
    ];
    for (kind, payload) in requests {
        let request = [&header(kind, 0)[..], payload].concat();
        assert_eq!(disk.perform(&[&request], &[1]), (1, vec![OK]), "request {kind}");
        let with_room = disk.perform(&[&request], &[4, 1]);
        assert_eq!(with_room, (0, [vec![UNTOUCHED; 4], vec![OK]].concat()), "request {kind} with room to spare");
    }
}

#[test]
fn an_unknown_request_is_unsupported_whatever_comes_with_it() {
    let disk = Disk::new();
    for kind in [2, 3, 7, 9, 10, 12, 14, 15, 0x100, u32::MAX] {
        assert_eq!(disk.perform(&[&header(kind, 0)], &[1]), (1, vec![UNSUPP]), "request {kind}");
        let (written, bytes) = disk.perform(&[&header(kind, 0), &[0; 16]], &[512, 1]);
        assert_eq!((written, bytes.last()), (0, Some(&UNSUPP)), "request {kind} with data");
    }
}

#[test]
fn an_id_fills_what_room_there_is() {
    let disk = Disk::new();
    let request = header(VIRTIO_BLK_T_GET_ID, 0);
    assert_eq!(disk.perform(&[&request], &[20, 1]), (21, [&SERIAL[..], &[OK]].concat()));
    assert_eq!(disk.perform(&[&request], &[6]), (6, [&SERIAL[..5], &[OK]].concat()), "too little");
    assert_eq!(disk.perform(&[&request], &[1]), (1, vec![OK]), "none");
    let (written, bytes) = disk.perform(&[&request], &[30, 1]);
    assert_eq!((written, &bytes[..20], bytes.last()), (20, &SERIAL[..], Some(&OK)), "too much");
    assert!(bytes[20..30].iter().all(|byte| *byte == UNTOUCHED));
}

#[test]
fn a_segment_list_is_checked_before_any_of_it_takes_effect() {
    let disk = Disk::new();
    let segment = |sector: u64| [&sector.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 4]].concat();
    let header = header(VIRTIO_BLK_T_WRITE_ZEROES, 0);
    let beyond = u64::MAX / 512;
    let (_, status) = disk.perform(&[&header, &segment(5), &segment(beyond)], &[1]);
    assert_eq!(status, [IOERR]);
    assert_eq!(disk.sector(5), [5; 512]);
}
