//! One queue over null-co, in one process: a guest driver's side of the ring and our queue take turns on one thread.
//! Under callgrind it counts what a request costs us, instruction for instruction; run plainly it prints nanoseconds as
//! information. `--bare` runs the bare ring (pop, match, push, publish) that the whole is compared with.

use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use blockport_block::aio::{AioContext, PollSettings};
use blockport_block::options::Options;
use blockport_block::{BlockBackend, Graph, Permissions};
use blockport_vhost::internals::{
    Chain, GuestMemory, MemoryRegion, Queue, RingFeatures, RingLayout, VirtQueue, start_for_bench,
};

const RING: u16 = 128;
const DEPTH: u16 = 32;
const ROUNDS: u32 = 2_000;
const WARM_UP: u32 = 100;
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7000_0000_0000;
const MEMORY: u64 = 2 << 20;
const DESC: u64 = 0;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
const HEADERS: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STATUS: u64 = 0x1_8000;

/// The guest driver: a view of the memory that both sides share.
struct Driver {
    memory: Arc<GuestMemory>,
    avail_idx: u16,
}

impl Driver {
    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        use vm_memory::{Bytes, GuestAddress};
        self.memory.vm_memory().write_obj(value, GuestAddress(GUEST + at)).expect("inside guest memory");
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        use vm_memory::{Bytes, GuestAddress};
        self.memory.vm_memory().read_obj(GuestAddress(GUEST + at)).expect("inside guest memory")
    }

    /// DEPTH chains of header, data and status, which stay the same over all rounds.
    fn set_up(&self) {
        for n in 0..u64::from(DEPTH) {
            let parts = [(HEADERS + 16 * n, 16u32, 1u16), (DATA + 4096 * n, 4096, 3), (STATUS + n, 1, 2)];
            for (i, (at, len, flags)) in parts.into_iter().enumerate() {
                let index = 3 * n + i as u64;
                let entry = DESC + 16 * index;
                self.put(entry, GUEST + at);
                self.put(entry + 8, len);
                self.put(entry + 12, flags);
                self.put(entry + 14, index as u16 + 1);
            }
            self.put(HEADERS + 16 * n, 0u64);
            self.put(HEADERS + 16 * n + 8, 8 * n);
        }
    }

    fn submit(&mut self) {
        for n in 0..DEPTH {
            let slot = u64::from(self.avail_idx.wrapping_add(n) % RING);
            self.put(AVAIL + 4 + 2 * slot, 3 * n);
        }
        self.avail_idx = self.avail_idx.wrapping_add(DEPTH);
        self.put(AVAIL + 2, self.avail_idx);
    }

    fn all_done(&self) -> bool {
        self.get::<u16>(USED + 2) == self.avail_idx
    }
}

fn guest_memory() -> Arc<GuestMemory> {
    let path = std::env::temp_dir().join(format!("blockport-null-queue-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("a temporary file");
    std::fs::remove_file(&path).expect("just made");
    file.set_len(MEMORY).expect("room");
    let region = MemoryRegion::map(GUEST, USER, MEMORY, 0, file).expect("mapped");
    Arc::new(GuestMemory::new(vec![Arc::new(region)]).expect("one region"))
}

fn ring(memory: &Arc<GuestMemory>) -> VirtQueue {
    let layout =
        RingLayout { size: RING, desc: USER + DESC, avail: USER + AVAIL, used: USER + USED, indirect_max: 128 };
    let features = RingFeatures { event_idx: true, indirect: true };
    VirtQueue::new(memory.clone(), layout, features, 0).expect("a ring in guest memory")
}

/// What is measured: callgrind is told to collect only inside this function.
#[inline(never)]
fn measured_turn(context: &AioContext) {
    context.turn();
}

/// The bare ring: what no device model can do without.
#[inline(never)]
fn measured_bare(ring: &mut VirtQueue, chain: &mut Chain) {
    while ring.pop(chain).expect("a ring that does not lie") {
        let written = match chain.iov.last() {
            Some(last) if chain.iov.len() > chain.readable => last.len() as u32,
            _ => 0,
        };
        ring.push(chain.head, written);
    }
    ring.publish();
}

fn queue(context: &AioContext, memory: &Arc<GuestMemory>) -> Rc<Queue> {
    let graph = Graph::default();
    let options = Options::parse_json(r#"{"driver": "null-co", "node-name": "n", "size": 1073741824}"#).expect("JSON");
    let node = graph.blockdev_add(options).expect("null-co opens");
    let backend = BlockBackend::with_root("bench", node, Permissions::device(true)).expect("nobody else uses it");
    start_for_bench(context, &backend, ring(memory))
}

fn main() {
    // `cargo test --benches` and `cargo bench` pass flags of their own.
    let bare = std::env::args().any(|arg| arg == "--bare");
    let memory = guest_memory();
    let mut driver = Driver { memory: memory.clone(), avail_idx: 0 };
    driver.set_up();
    let requests = f64::from(ROUNDS) * f64::from(DEPTH);
    let mut busy = std::time::Duration::ZERO;
    if bare {
        let (mut ring, mut chain) = (ring(&memory), Chain::default());
        for round in 0..ROUNDS + WARM_UP {
            driver.submit();
            let start = Instant::now();
            measured_bare(&mut ring, &mut chain);
            assert!(driver.all_done());
            busy += if round < WARM_UP { Default::default() } else { start.elapsed() };
        }
    } else {
        let context = AioContext::new(PollSettings { poll_max_ns: 1_000_000_000, ..PollSettings::default() })
            .expect("io_uring works here");
        let queue = queue(&context, &memory);
        for round in 0..ROUNDS + WARM_UP {
            driver.submit();
            queue.look();
            let start = Instant::now();
            measured_turn(&context);
            assert!(driver.all_done(), "one turn serves a batch");
            busy += if round < WARM_UP { Default::default() } else { start.elapsed() };
        }
    }
    println!("{} requests, {:.1} ns each", ROUNDS * u32::from(DEPTH), busy.as_nanos() as f64 / requests);
}
