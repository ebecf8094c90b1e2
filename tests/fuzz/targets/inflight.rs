//! In-flight regions of both layouts and of any content, with processes that die at any step. While only we and an honest
//! guest wrote, the next process takes again exactly what was taken and not shown as used, in its order, and then what
//! is new. After anything else was written: no panic, no chain out twice, never more out than the ring has entries.
#![no_main]

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use blockport_vhost::internals::{Chain, GuestMemory, Head, MemoryRegion, RingFeatures, RingLayout, VirtQueue};
use libfuzzer_sys::fuzz_target;

const MEMORY: u64 = 0x1000;
const GUEST: u64 = 0x1000;
const USER: u64 = 0x7000_0000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x600;
const BUFFERS: u64 = 0x800;
const SIZE: u16 = 8;
/// Room for either layout and the trailer.
const REGION: u64 = 32 + 32 * SIZE as u64 + 64;

struct Bench {
    memory: Arc<GuestMemory>,
    file: File,
    region: File,
}

fn memfd(bytes: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(bytes).expect("room");
    file
}

fn bench() -> Bench {
    let file = memfd(MEMORY);
    let region = MemoryRegion::map(GUEST, USER, MEMORY, 0, file.try_clone().expect("a descriptor")).expect("a region");
    let memory = Arc::new(GuestMemory::new(vec![Arc::new(region)]).expect("regions"));
    Bench { memory, file, region: memfd(REGION.next_multiple_of(64)) }
}

thread_local! {
    static BENCH: Bench = bench();
}

/// An honest guest driver: one descriptor a request, and what it knows to be its own.
struct Guest<'a> {
    file: &'a File,
    packed: bool,
    free: VecDeque<u16>,
    /// Descriptors made available so far.
    next: u32,
}

impl Guest<'_> {
    fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).expect("guest memory");
    }

    /// Makes one more request available, if a descriptor is free.
    fn send(&mut self) -> Option<u16> {
        let id = self.free.pop_front()?;
        let addr = GUEST + BUFFERS + u64::from(id) * 16;
        let mut descriptor = [addr.to_le_bytes(), [0; 8]].concat();
        descriptor[8] = 16;
        let slot = u64::from(self.next % u32::from(SIZE));
        if self.packed {
            let is_odd_lap = self.next / u32::from(SIZE) % 2 == 1;
            let flags: u16 = 2 | if is_odd_lap { 1 << 15 } else { 1 << 7 };
            descriptor[12..14].copy_from_slice(&id.to_le_bytes());
            descriptor[14..].copy_from_slice(&flags.to_le_bytes());
            self.put(slot * 16, &descriptor);
        } else {
            descriptor[12] = 2;
            self.put(u64::from(id) * 16, &descriptor);
            self.put(AVAIL + 4 + slot * 2, &id.to_le_bytes());
            self.put(AVAIL + 2, &(self.next as u16).wrapping_add(1).to_le_bytes());
        }
        self.next += 1;
        Some(id)
    }
}

fuzz_target!(|data: &[u8]| BENCH.with(|bench| run(bench, data)));

fn run(bench: &Bench, data: &[u8]) {
    let [flags, rest @ ..] = data else { return };
    let mut rest = rest;
    bench.file.write_all_at(&[0; MEMORY as usize], 0).expect("guest memory");
    bench.region.write_all_at(&vec![0; REGION.next_multiple_of(64) as usize], 0).expect("the region");
    let packed = flags & 1 != 0;
    let features = RingFeatures { event_idx: flags & 2 != 0, indirect: flags & 4 != 0, packed };
    let layout = RingLayout { size: SIZE, desc: USER, avail: USER + AVAIL, used: USER + USED, indirect_max: SIZE };
    let start = || {
        let region = bench.region.try_clone().expect("a descriptor");
        VirtQueue::with_inflight_file(bench.memory.clone(), layout, features, region)
    };
    let Ok(mut ring) = start() else { panic!("a new region is refused") };
    let mut guest = Guest { file: &bench.file, packed, free: (0..SIZE).collect(), next: 0 };
    // Whether nobody has lied so far.
    let mut honest = true;
    let mut available = VecDeque::new();
    // Taken and not pushed, and pushed and not shown, each with its place in the order of taking.
    let (mut out, mut pushed): (Vec<(u64, Head, u16)>, Vec<(u64, u16)>) = (Vec::new(), Vec::new());
    let mut again: VecDeque<u16> = VecDeque::new();
    let (mut chain, mut taken) = (Chain::default(), 0u64);
    while let [step, after @ ..] = rest {
        rest = after;
        match step % 8 {
            0 => available.extend(guest.send()),
            1 | 2 => match ring.pop(&mut chain) {
                Ok(true) => {
                    let id = chain.head.number;
                    if honest {
                        let expected = again.pop_front().or_else(|| available.pop_front());
                        assert_eq!(Some(id), expected, "another chain than the next one");
                    }
                    out.push((taken, chain.head, id));
                    taken += 1;
                    assert!(out.len() + pushed.len() <= usize::from(SIZE), "more out than there are");
                }
                Ok(false) => assert!(!honest || (again.is_empty() && available.is_empty()), "a chain is lost"),
                Err(error) => {
                    assert!(!honest, "an honest ring is called broken: {error}");
                    return;
                }
            },
            3 | 4 if !out.is_empty() => {
                let (order, head, id) = out.remove(usize::from(step >> 3) % out.len());
                ring.push(head, 0);
                pushed.push((order, id));
            }
            5 => {
                ring.publish();
                guest.free.extend(pushed.drain(..).map(|(_, id)| id));
            }
            // The process dies, and the next one begins.
            6 => {
                drop(ring);
                let mut lost: Vec<(u64, u16)> = out.drain(..).map(|(order, _, id)| (order, id)).collect();
                lost.append(&mut pushed);
                lost.sort_unstable();
                for (_, id) in lost.into_iter().rev() {
                    again.push_front(id);
                }
                ring = match start() {
                    Ok(ring) => ring,
                    Err(why) => {
                        assert!(!honest, "an honest region is refused: {why}");
                        return;
                    }
                };
            }
            // Somebody writes something somewhere.
            _ => {
                let [low, high, count, bytes @ ..] = rest else { return };
                let at = u64::from(u16::from_le_bytes([*low, *high]));
                let count = usize::from(count % 33).min(bytes.len());
                let (file, room) = if step & 8 == 0 { (&bench.region, REGION) } else { (&bench.file, MEMORY) };
                let at = at % room;
                let count = count.min((room - at) as usize);
                file.write_all_at(&bytes[..count], at).expect("written");
                rest = &bytes[count..];
                honest = false;
            }
        }
    }
}
