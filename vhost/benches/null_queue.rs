//! Queues over null-co, in one process: a guest driver's side of the rings and our queues take turns on one thread.
//! Under callgrind it counts what a request costs us, instruction for instruction (`scripts/instructions`); run plainly
//! it prints nanoseconds, as information. The first argument names a case, see [`CASES`].

use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockport_block::aio::{AioContext, PollSettings};
use blockport_block::options::Options;
use blockport_block::throttle::{Limited, Rate, ThrottleLimits};
use blockport_block::{BlockBackend, Graph, Permissions};
use blockport_vhost::internals::{
    Chain, GuestMemory, MemoryRegion, Queue, RingFeatures, RingLayout, VirtQueue, start_for_bench,
};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

/// What is counted: a name, and how much of everything there is.
struct Case {
    name: &'static str,
    /// Exports, each with a node and a BlockBackend of its own.
    exports: u16,
    /// Of these, how many have requests. The others have started rings.
    busy: u16,
    /// Queues of each export.
    queues: u16,
    /// Requests in a batch, on each queue.
    depth: u16,
    /// The node, as JSON without its name.
    node: &'static str,
    /// Whether the rings are packed.
    packed: bool,
    /// Whether an in-flight region is kept.
    inflight: bool,
}

const NULL: &str = r#""driver": "null-co", "size": 1073741824"#;
/// Filters without a rule or limit.
const BLKDEBUG: &str = r#""driver": "blkdebug", "image": {"driver": "null-co", "size": 1073741824}"#;
const THROTTLE: &str =
    r#""driver": "throttle", "throttle-group": "none", "file": {"driver": "null-co", "size": 1073741824}"#;
const THROTTLE_FAR: &str =
    r#""driver": "throttle", "throttle-group": "far", "file": {"driver": "null-co", "size": 1073741824}"#;
const RAW: &str = r#""driver": "raw", "file": {"driver": "null-co", "size": 1073741824}"#;

const fn case(name: &'static str, queues: u16, depth: u16) -> Case {
    Case { name, exports: 1, busy: 1, queues, depth, node: NULL, packed: false, inflight: false }
}

/// A bare ring takes the place of queue, device and block layer.
const BARE: &[Case] = &[case("bare-ring", 1, 32), Case { packed: true, ..case("bare-packed-ring", 1, 32) }];
const CASES: &[Case] = &[
    case("null-read", 1, 32),
    case("null-read-1", 1, 1),
    case("queues-1", 1, 256),
    case("queues-8", 8, 32),
    case("queues-64", 64, 4),
    Case { exports: 200, busy: 200, ..case("exports-200", 1, 32) },
    Case { exports: 200, busy: 1, ..case("exports-200-idle", 1, 32) },
    Case { packed: true, ..case("packed-read", 1, 32) },
    Case { inflight: true, ..case("inflight-read", 1, 32) },
    Case { inflight: true, packed: true, ..case("inflight-packed", 1, 32) },
    Case { node: RAW, ..case("raw", 1, 32) },
    Case { node: BLKDEBUG, ..case("blkdebug", 1, 32) },
    Case { node: THROTTLE, ..case("throttle", 1, 32) },
    Case { node: THROTTLE_FAR, ..case("throttle-far", 1, 32) },
];

/// Requests that are counted in a case, about. Callgrind is some fifty times slower than the machine.
const REQUESTS: u32 = 64_000;
/// Batches before that: workers and buffers are made in them. They are counted too, and told apart by nobody.
const WARM_UP: u32 = 4;
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7000_0000_0000;
/// A status byte that no device writes.
const NOT_ANSWERED: u8 = 0xff;
/// A queue serves a part of a large batch in a turn, and goes on in the next.
const TURNS_MAX: u32 = 4;
/// Where a queue's things are, from the start of its own part of the memory. The largest ring has 1024 entries.
const DESC: u64 = 0;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
const HEADERS: u64 = 0x8000;
const STATUS: u64 = 0xa000;
const DATA: u64 = 0xb000;
/// All requests of a queue read into the same buffer: a null disk leaves it as it is.
const PART: u64 = 0xc000;

/// A guest driver of one queue: a view of the memory that both sides share.
struct Driver {
    memory: Arc<GuestMemory>,
    /// Where the queue's part of the memory begins.
    part: u64,
    ring_size: u16,
    depth: u16,
    avail_idx: u16,
    /// Of a packed ring: descriptors made available so far.
    offered: Option<u64>,
    inflight: bool,
}

impl Driver {
    fn new(memory: &Arc<GuestMemory>, index: u16, &Case { depth, packed, inflight, .. }: &Case) -> Self {
        let (part, ring_size) = (u64::from(index) * PART, ring_size(depth));
        let offered = packed.then_some(0);
        let driver = Self { memory: memory.clone(), part, ring_size, depth, avail_idx: 0, offered, inflight };
        driver.set_up();
        driver
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        use vm_memory::{Bytes, GuestAddress};
        self.memory.vm_memory().write_obj(value, GuestAddress(GUEST + self.part + at)).expect("inside guest memory");
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        use vm_memory::{Bytes, GuestAddress};
        self.memory.vm_memory().read_obj(GuestAddress(GUEST + self.part + at)).expect("inside guest memory")
    }

    /// Header, data and status of a chain: place, length, flags.
    fn parts(n: u64) -> [(u64, u32, u16); 3] {
        [(HEADERS + 16 * n, 16, 1), (DATA, 4096, 3), (STATUS + n, 1, 2)]
    }

    /// Chains, which in a split ring stay the same over all rounds, and their headers.
    fn set_up(&self) {
        for n in 0..u64::from(self.depth) {
            let descriptors = if self.offered.is_none() { Self::parts(n).to_vec() } else { Vec::new() };
            for (i, (at, len, flags)) in descriptors.into_iter().enumerate() {
                let index = 3 * n + i as u64;
                let entry = DESC + 16 * index;
                self.put(entry, GUEST + self.part + at);
                self.put(entry + 8, len);
                self.put(entry + 12, flags);
                self.put(entry + 14, index as u16 + 1);
            }
            self.put(HEADERS + 16 * n, VIRTIO_BLK_T_IN);
            self.put(HEADERS + 16 * n + 8, 8 * n);
            self.put(STATUS + n, NOT_ANSWERED);
        }
    }

    /// The place of a packed ring's entry, and whether its wrap counter is 1.
    fn entry(&self, at: u64) -> (u64, bool) {
        let size = u64::from(self.ring_size);
        (DESC + 16 * (at % size), (at / size).is_multiple_of(2))
    }

    fn submit_packed(&mut self, mut at: u64) {
        for n in 0..u64::from(self.depth) {
            for (addr, len, flags) in Self::parts(n) {
                let (entry, wrap) = self.entry(at);
                self.put(entry, GUEST + self.part + addr);
                self.put(entry + 8, len);
                self.put(entry + 12, n as u16);
                self.put(entry + 14, flags | if wrap { 1 << 7 } else { 1 << 15 });
                at += 1;
            }
        }
        self.offered = Some(at);
    }

    fn submit(&mut self) {
        if let Some(at) = self.offered {
            return self.submit_packed(at);
        }
        for n in 0..self.depth {
            let slot = u64::from(self.avail_idx.wrapping_add(n) % self.ring_size);
            self.put(AVAIL + 4 + 2 * slot, 3 * n);
        }
        self.avail_idx = self.avail_idx.wrapping_add(self.depth);
        self.put(AVAIL + 2, self.avail_idx);
    }

    fn all_done(&self) -> bool {
        if let Some(at) = self.offered {
            // The last of the batch; what shows the batch is its first.
            let used = |back: u16| {
                let (entry, wrap) = self.entry(at - u64::from(back));
                self.get::<u16>(entry + 14) & 0x8080 == if wrap { 0x8080 } else { 0 }
            };
            return used(3) && used(3 * self.depth);
        }
        self.get::<u16>(USED + 2) == self.avail_idx
    }

    /// Whether every request of the batch succeeded.
    fn all_succeeded(&self) -> bool {
        (0..u64::from(self.depth)).all(|n| u32::from(self.get::<u8>(STATUS + n)) == VIRTIO_BLK_S_OK)
    }

    /// Our side of the same ring.
    fn ring(&self) -> VirtQueue {
        let layout = RingLayout {
            size: self.ring_size,
            desc: USER + self.part + DESC,
            avail: USER + self.part + AVAIL,
            used: USER + self.part + USED,
            indirect_max: 128,
        };
        let features = RingFeatures { event_idx: true, indirect: true, packed: self.offered.is_some() };
        if self.inflight {
            return VirtQueue::with_new_inflight(self.memory.clone(), layout, features);
        }
        VirtQueue::new(self.memory.clone(), layout, features, 0).expect("a ring in guest memory")
    }
}

/// Entries of a ring for so many requests of three descriptors.
fn ring_size(depth: u16) -> u16 {
    (3 * depth).next_power_of_two().max(128)
}

fn guest_memory(queues: u16) -> Arc<GuestMemory> {
    let path = std::env::temp_dir().join(format!("blockport-null-queue-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("a temporary file");
    std::fs::remove_file(&path).expect("just made");
    let bytes = u64::from(queues) * PART;
    file.set_len(bytes).expect("room");
    let region = MemoryRegion::map(GUEST, USER, bytes, 0, file).expect("mapped");
    Arc::new(GuestMemory::new(vec![Arc::new(region)]).expect("one region"))
}

/// What is measured: callgrind is told to collect only inside this function.
#[inline(never)]
fn measured_turn(context: &AioContext) {
    context.turn();
}

/// The bare ring: what no device model can do without. Pop, match on the type of the request, push, publish.
#[inline(never)]
fn measured_bare(ring: &mut VirtQueue, chain: &mut Chain) {
    while ring.pop(chain).expect("a ring that does not lie") {
        let written = match (chain.iov.as_slice(), chain.readable) {
            ([header, data @ .., status], 1) => {
                let [kind, _sector] = header.read_two_le64().expect("a header of 16 bytes");
                let (code, written) = match kind as u32 {
                    VIRTIO_BLK_T_IN => (VIRTIO_BLK_S_OK, data.iter().map(|part| part.len() as u32).sum()),
                    VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_FLUSH => (VIRTIO_BLK_S_OK, 0),
                    _ => (VIRTIO_BLK_S_UNSUPP, 0),
                };
                status.write_byte(code as u8);
                written + 1
            }
            _ => 0,
        };
        ring.push(chain.head, written);
    }
    ring.publish();
}

/// Submits batches, has `serve` serve each, and prints how many requests that were and how long one took.
fn run(drivers: &mut [Driver], mut serve: impl FnMut()) {
    let batch: u32 = drivers.iter().map(|driver| u32::from(driver.depth)).sum();
    let rounds = REQUESTS.div_ceil(batch) + WARM_UP;
    let mut busy = Duration::ZERO;
    for _ in 0..rounds {
        drivers.iter_mut().for_each(Driver::submit);
        for turn in 0.. {
            assert!(turn < TURNS_MAX, "{batch} requests take more than {TURNS_MAX} turns");
            let start = Instant::now();
            serve();
            busy += start.elapsed();
            if drivers.iter().all(Driver::all_done) {
                break;
            }
        }
    }
    // What fails costs something else.
    assert!(drivers.iter().all(Driver::all_succeeded), "a request failed");
    let requests = rounds * batch;
    println!("{requests} requests, {:.1} ns each", busy.as_nanos() as f64 / f64::from(requests));
}

fn run_bare(case: &Case) {
    let memory = guest_memory(1);
    let mut drivers = [Driver::new(&memory, 0, case)];
    let (mut ring, mut chain) = (drivers[0].ring(), Chain::default());
    run(&mut drivers, || measured_bare(&mut ring, &mut chain));
}

fn run_queues(case: &Case) {
    let context = AioContext::new(PollSettings { poll_max_ns: 1_000_000_000, ..PollSettings::default() })
        .expect("io_uring works here");
    // Turns of a loop that is to stop do not sleep: here nobody kicks.
    context.stop();
    let graph = Graph::default();
    for (name, average) in [("none", 0), ("far", 1_000_000_000)] {
        let mut limits = ThrottleLimits::default();
        limits.set_rate(Limited::IopsTotal, Rate { average, ..Rate::default() });
        graph.throttle_groups().create(name, limits).expect("the first of its name");
    }
    let memory = guest_memory(case.exports * case.queues);
    // A backend that nobody holds lets its medium go.
    let (mut drivers, mut queues, mut backends) = (Vec::new(), Vec::<Rc<Queue>>::new(), Vec::new());
    for export in 0..case.exports {
        let options = format!(r#"{{"node-name": "n{export}", {}}}"#, case.node);
        let node = graph.blockdev_add(Options::parse_json(&options).expect("JSON")).expect("the node opens");
        let backend = BlockBackend::with_root(&format!("bench-{export}"), node, Permissions::device(true));
        let backend = backend.expect("nobody else uses it");
        for queue in 0..case.queues {
            let driver = Driver::new(&memory, export * case.queues + queue, case);
            // Without one, a task would look at the ring from time to time, and be counted.
            let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd");
            queues.push(start_for_bench(&context, &backend, driver.ring(), Arc::new(kick)));
            drivers.push(driver);
        }
        backends.push(backend);
    }
    let busy = usize::from(case.busy * case.queues);
    run(&mut drivers[..busy], || {
        queues[..busy].iter().for_each(|queue| queue.look());
        measured_turn(&context);
    });
}

fn main() {
    // `cargo test --benches` and `cargo bench` pass flags of their own.
    let asked: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let asked = |case: &&Case| asked.is_empty() || asked.iter().any(|name| name == case.name);
    let bare = BARE.iter().map(|case| (case, run_bare as fn(&Case)));
    let queues = CASES.iter().map(|case| (case, run_queues as fn(&Case)));
    for (case, run) in bare.chain(queues).filter(|(case, _)| asked(case)) {
        print!("{:<18}", case.name);
        run(case);
    }
}
