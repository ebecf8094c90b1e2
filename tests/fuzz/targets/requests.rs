//! Requests of every kind in any framing, whole and damaged, through a started queue, the device model and the block
//! layer to a disk in memory. A model of the disk says what each whole request must answer; a damaged one may answer
//! anything, once.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use blockport_block::aio::{AioContext, PollSettings};
use blockport_block::options::Options;
use blockport_block::{BlockBackend, Graph, Permissions};
use blockport_vhost::internals::{GuestMemory, MemoryRegion, RingFeatures, RingLayout, VirtQueue, start_for_bench};
use libfuzzer_sys::fuzz_target;

const DISK: usize = 16 << 10;
const MEMORY: u64 = 0x2_0000;
const GUEST: u64 = 0x1000;
const USER: u64 = 0x7000_0000;
const ENTRIES: u16 = 128;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x4000;

struct Bench {
    context: AioContext,
    _graph: Graph,
    backend: Arc<BlockBackend>,
    memory: Arc<GuestMemory>,
    file: File,
}

fn bench() -> Bench {
    let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(MEMORY).expect("room");
    let region = MemoryRegion::map(GUEST, USER, MEMORY, 0, file.try_clone().expect("a descriptor")).expect("a region");
    let memory = Arc::new(GuestMemory::new(vec![Arc::new(region)]).expect("regions"));
    let graph = Graph::default();
    let options = format!(r#"{{"driver": "memory", "node-name": "n", "discard": "unmap", "size": {DISK}}}"#);
    let node = graph.blockdev_add(Options::parse_json(&options).expect("JSON")).expect("a node");
    let backend = BlockBackend::new("b");
    backend.insert(node, Permissions::device(true)).expect("a medium");
    let context = AioContext::new(PollSettings { poll_max_ns: 0, ..PollSettings::default() }).expect("a loop");
    Bench { context, _graph: graph, backend, memory, file }
}

thread_local! {
    static BENCH: Bench = bench();
}

/// The next bytes, zeroes when there are none.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(u16::from_le_bytes([self.byte(), self.byte()])) % end
    }
}

/// What a request must answer: its status, the bytes used, and what is read. `None`: it is damaged.
type Answer = Option<(u8, u32, Vec<u8>)>;

struct Sent {
    head: u16,
    answer: Answer,
    /// Where its device-writable bytes are.
    writable: Vec<(u64, usize)>,
}

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// What the device answers to a whole request, and what becomes of the disk.
fn perform(disk: &mut [u8], kind: u32, sector: u64, payload: &[u8], room: usize) -> (u8, u32, Vec<u8>) {
    let unread = vec![0x5A; room];
    let failed = |status: u8, writes: bool| (status, if writes { 1 } else { 0 }, unread.clone());
    let range = |bytes: usize| {
        let start = sector.checked_mul(512).and_then(|start| usize::try_from(start).ok())?;
        let end = start.checked_add(bytes)?;
        (bytes % 512 == 0 && end <= DISK).then_some(start..end)
    };
    match kind {
        0 => match range(room) {
            Some(range) => (OK, room as u32 + 1, disk[range].to_vec()),
            None if room == 0 => failed(IOERR, true),
            None => failed(IOERR, false),
        },
        1 => match range(payload.len()) {
            Some(range) => {
                disk[range].copy_from_slice(payload);
                (OK, 1, unread)
            }
            None => failed(IOERR, true),
        },
        _ => failed(UNSUPP, true),
    }
}

fuzz_target!(|data: &[u8]| {
    BENCH.with(|bench| run(bench, &mut Source(data)));
});

fn run(bench: &Bench, source: &mut Source<'_>) {
    let file = &bench.file;
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).expect("guest memory");
    put(0, &[0; BUFFERS as usize]);
    let flags = source.byte();
    // Known content, written by the first request.
    let mut disk: Vec<u8> = (0..DISK).map(|at| (at / 512) as u8 ^ flags).collect();
    let (mut next, mut room) = (0u16, BUFFERS);
    let mut sent: Vec<Sent> = Vec::new();
    let mut send =
        |kind: u32, sector: u64, payload: &[u8], room_bytes: usize, source: &mut Source<'_>, answer: Answer| {
            let mut readable = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), payload].concat();
            let mut writable = vec![0x5A; room_bytes];
            writable.push(0xEE);
            let mut parts: Vec<(u64, Vec<u8>, bool)> = Vec::new();
            for (bytes, is_writable) in [(&mut readable, false), (&mut writable, true)] {
                while !bytes.is_empty() {
                    // The last of each side takes all that is left.
                    let cut = if parts.len() % 4 == 3 { bytes.len() } else { 1 + source.below(bytes.len().max(1)) };
                    let part: Vec<u8> = bytes.drain(..cut.min(bytes.len())).collect();
                    let at = room + u64::from(source.byte() % 8);
                    room = at + part.len() as u64;
                    parts.push((at, part, is_writable));
                }
            }
            if usize::from(next) + parts.len() > usize::from(ENTRIES) || room >= MEMORY {
                return false;
            }
            let head = next;
            let count = parts.len();
            let mut places = Vec::new();
            for (index, (at, part, is_writable)) in parts.into_iter().enumerate() {
                put(at, &part);
                let chained = index + 1 < count;
                let bits = u16::from(chained) | u16::from(is_writable) << 1;
                let descriptor = [
                    &(GUEST + at).to_le_bytes()[..],
                    &(part.len() as u32).to_le_bytes(),
                    &bits.to_le_bytes(),
                    &(next + 1).to_le_bytes(),
                ];
                put(u64::from(next) * 16, &descriptor.concat());
                if is_writable {
                    places.push((at, part.len()));
                }
                next += 1;
            }
            put(AVAIL + 4 + 2 * sent.len() as u64, &head.to_le_bytes());
            sent.push(Sent { head, answer, writable: places });
            true
        };
    let first = disk.clone();
    send(1, 0, &first, 0, source, Some((OK, 1, Vec::new())));
    // Requests are answered in the order in which they stand: nothing here waits.
    for _ in 0..source.byte() % 12 {
        let kind = u32::from(source.byte() % 4);
        let wild = source.byte() % 8 == 0;
        let sector = if wild { u64::MAX >> (source.byte() % 64) } else { source.below(DISK / 512 + 2) as u64 };
        let bytes = if wild { source.below(3000) } else { 512 * source.below(5) };
        let fill = source.byte();
        let (payload, room_bytes) = match kind {
            1 => (vec![fill; bytes], 0),
            0 => (Vec::new(), bytes),
            _ => (Vec::new(), 0),
        };
        let kind = if kind < 2 { kind } else { 100 + kind };
        let answer = perform(&mut disk, kind, sector, &payload, room_bytes);
        if !send(kind, sector, &payload, room_bytes, source, Some(answer)) {
            break;
        }
    }
    let count = sent.len();
    put(AVAIL + 2, &(count as u16).to_le_bytes());
    // Damage: anything in the rings and descriptors. No answer is sure then.
    let damaged = source.byte() % 4 == 0;
    if damaged {
        for _ in 0..1 + source.byte() % 6 {
            let at = source.below(USED as usize) as u64;
            let byte = source.byte();
            put(at, &[byte]);
        }
    }
    let features = RingFeatures { event_idx: flags & 1 != 0, indirect: flags & 2 != 0, packed: false };
    let layout = RingLayout { size: ENTRIES, desc: USER, avail: USER + AVAIL, used: USER + USED, indirect_max: 128 };
    let ring = VirtQueue::new(bench.memory.clone(), layout, features, 0).expect("a ring in memory");
    let kick: OwnedFd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd");
    let queue = start_for_bench(&bench.context, &bench.backend, ring, Arc::new(kick));
    bench.context.run_until(async move {
        for _ in 0..8 {
            AioContext::breathe().await;
        }
        queue.stop().await;
    });
    let mut index = [0; 2];
    file.read_exact_at(&mut index, USED + 2).expect("guest memory");
    let used = usize::from(u16::from_le_bytes(index));
    if damaged {
        return;
    }
    assert_eq!(used, count, "requests answered");
    for (at, request) in sent.iter().enumerate() {
        let mut element = [0; 8];
        file.read_exact_at(&mut element, USED + 4 + 8 * at as u64).expect("guest memory");
        let word =
            |from: usize| u32::from_le_bytes([element[from], element[from + 1], element[from + 2], element[from + 3]]);
        assert_eq!(word(0), u32::from(request.head), "the order of answers");
        let mut written = Vec::new();
        for (at, bytes) in &request.writable {
            let mut part = vec![0; *bytes];
            file.read_exact_at(&mut part, *at).expect("guest memory");
            written.extend(part);
        }
        let status = written.pop().expect("a status");
        let (expected, used_len, data) = request.answer.as_ref().expect("no request is damaged");
        assert_eq!((status, word(4)), (*expected, *used_len), "request {at}");
        assert!(*expected != OK || written == *data, "what request {at} read");
    }
}
