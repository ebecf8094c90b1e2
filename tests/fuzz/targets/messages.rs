//! Sequences of vhost-user messages as the session's handlers take them, with descriptors of every kind. A model says of
//! the simple ones whether they are accepted; of all, that no sequence of them breaks the session or leaks a descriptor.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use blockport_block::aio::{Iothread, PollSettings};
use blockport_block::options::Options;
use blockport_block::{BlockBackend, Graph, OnErrorPolicy, Permissions};
use blockport_vhost::{Endpoint, ExportSettings, SocketAddress, VhostUserBlkExport};
use libfuzzer_sys::fuzz_target;
use vhost::vhost_user::VhostUserBackendReqHandler;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
};

const QUEUES: u16 = 2;
const QUEUE_SIZE_MAX: u16 = 64;
const USER: u64 = 0x7000_0000;
const REGION: u64 = 0x4000;

struct Bench {
    export: VhostUserBlkExport,
    _iothread: Iothread,
    _graph: Graph,
    _dir: tempfile::TempDir,
    memory: File,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().expect("a folder");
    let graph = Graph::default();
    let options = r#"{"driver": "memory", "node-name": "n", "size": 65536}"#;
    let node = graph.blockdev_add(Options::parse_json(options).expect("JSON")).expect("a node");
    let backend = BlockBackend::new("b");
    backend.insert(node, Permissions::device(true)).expect("a medium");
    let iothread = Iothread::start("io", PollSettings { poll_max_ns: 0, ..PollSettings::default() }).expect("a loop");
    let settings = ExportSettings {
        id: "e".into(),
        num_queues: QUEUES,
        writable: true,
        logical_block_size: 512,
        serial: "s".into(),
        seg_max: 6,
        queue_size_max: QUEUE_SIZE_MAX,
        writethrough: false,
        packed: true,
        on_read_error: OnErrorPolicy::Report,
        on_write_error: OnErrorPolicy::Report,
        stop_timeout: None,
    };
    let address = SocketAddress::Unix { path: dir.path().join("socket"), mode: None, group: None };
    let iothreads = vec![iothread.remote().clone()];
    let endpoint = Endpoint::open(&address).expect("a socket");
    let export = VhostUserBlkExport::start(backend, settings, iothreads, endpoint, None, None, Box::new(|| {})).expect("an export");
    let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd"));
    memory.set_len(2 * REGION).expect("room");
    Bench { export, _iothread: iothread, _graph: graph, _dir: dir, memory }
}

thread_local! {
    // Never taken down: at the end of the thread, what that needs has gone before.
    static BENCH: &'static Bench = Box::leak(Box::new(bench()));
}

struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Mostly small or near a limit, sometimes anything.
    fn number(&mut self) -> u64 {
        let value = u64::from(self.byte());
        match self.byte() % 4 {
            0 => value % 4,
            1 => value,
            2 => 1 << (value % 64),
            _ => (0..8).fold(0, |number, _| number << 8 | u64::from(self.byte())),
        }
    }

    fn file(&mut self, memory: &File) -> File {
        let eventfd = || rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).expect("an eventfd");
        match self.byte() % 8 {
            0 => File::open("/dev/null").expect("/dev/null"),
            1 => memory.try_clone().expect("a descriptor"),
            2 => OwnedFd::from(std::os::unix::net::UnixStream::pair().expect("sockets").0).into(),
            _ => eventfd().into(),
        }
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("descriptors").count()
}

fuzz_target!(|data: &[u8]| {
    BENCH.with(|bench| {
        let before = open_descriptors();
        run(bench, &mut Source(data));
        // The iothread closes a kick when the kernel has let go of it, a moment later.
        let end = Instant::now() + Duration::from_secs(5);
        while open_descriptors() != before {
            assert!(Instant::now() < end, "{} descriptors were open, and {} are left", before, open_descriptors());
            std::thread::yield_now();
        }
    });
});

fn run(bench: &Bench, source: &mut Source<'_>) {
    let session = bench.export.new_session();
    let offered = session.get_features().expect("features");
    let protocol = session.get_protocol_features().expect("protocol features").bits();
    let memory = || bench.memory.try_clone().expect("a descriptor");
    while !source.0.is_empty() {
        match source.byte() % 20 {
            0 => {
                let features = source.number();
                let accepted = session.set_features(features).is_ok();
                assert!(!accepted || features & !offered == 0, "features {features:#x} were never offered");
            }
            // What a guest driver may accept.
            1 => drop(session.set_features(offered & !(u64::from(source.byte()) << 28 & 0x3000_0000))),
            2 => {
                let features = source.number();
                // GET_VRING_BASE_INFLIGHT needs INFLIGHT_SHMFD.
                let fits = features & 1 << 20 == 0 || features & 1 << 12 != 0;
                assert_eq!(session.set_protocol_features(features).is_ok(), features & !protocol == 0 && fits);
            }
            3 => {
                let (index, size) = (source.number() as u32, source.number() as u32);
                if session.set_vring_num(index, size).is_ok() {
                    assert!(
                        index < u32::from(QUEUES) && (1..=u32::from(QUEUE_SIZE_MAX)).contains(&size),
                        "{index} {size}"
                    );
                }
            }
            4 => {
                let (index, base) = (source.number() as u32, source.number() as u32);
                assert!(session.set_vring_base(index, base).is_err() || index < u32::from(QUEUES));
            }
            // A ring that can be started.
            5 => {
                let index = u32::from(source.byte()) % 3;
                let at = USER + u64::from(source.byte() % 4) * 0x1000;
                let _ = session.set_vring_num(index, 1 << (source.byte() % 8));
                let _ = session.set_vring_addr(index, VhostUserVringAddrFlags::empty(), at, at + 0x800, at + 0x400, 0);
            }
            6 => {
                let index = source.number() as u32;
                let (desc, used, avail) = (source.number(), source.number(), source.number());
                let _ = session.set_vring_addr(index, VhostUserVringAddrFlags::empty(), desc, used, avail, 0);
            }
            7 => {
                let index = source.byte();
                let file = (source.byte() % 8 != 0).then(|| source.file(&bench.memory));
                assert!(session.set_vring_kick(index, file).is_err() || u16::from(index) < QUEUES);
            }
            8 => {
                let index = source.byte() % 3;
                let file = (source.byte() % 8 != 0).then(|| source.file(&bench.memory));
                let _ = session.set_vring_call(index, file);
            }
            9 => {
                let index = source.byte() % 3;
                let file = source.file(&bench.memory);
                let _ = session.set_vring_err(index, Some(file));
            }
            10 => {
                let index = u32::from(source.byte() % 3);
                assert_eq!(session.set_vring_enable(index, source.byte() & 1 != 0).is_ok(), index < u32::from(QUEUES));
            }
            11 => {
                let index = u32::from(source.byte() % 3);
                let stopped = session.get_vring_base(index);
                assert_eq!(stopped.is_ok(), index < u32::from(QUEUES));
            }
            // Memory as it should be.
            12 => {
                let region = |at: u64| VhostUserMemoryRegion {
                    guest_phys_addr: at * REGION,
                    memory_size: REGION,
                    user_addr: USER + at * REGION,
                    mmap_offset: at * REGION,
                };
                assert!(session.set_mem_table(&[region(0), region(1)], vec![memory(), memory()], None).is_ok());
            }
            13 => {
                let region = VhostUserSingleMemoryRegion::new(
                    source.number(),
                    source.number(),
                    source.number(),
                    source.number(),
                );
                let file = source.file(&bench.memory);
                let _ = session.add_mem_region(&region, file, None);
            }
            14 => {
                let region = VhostUserSingleMemoryRegion::new(
                    source.number(),
                    source.number(),
                    source.number(),
                    source.number(),
                );
                let _ = session.remove_mem_region(&region);
            }
            15 => {
                let (offset, size) = (source.number() as u32 % 0x1000, source.number() as u32 % 0x1000);
                let start = offset.checked_sub(0x100).unwrap_or(offset);
                let config = session.get_config(offset, size, VhostUserConfigFlags::empty());
                let fits = start + size <= 256;
                assert_eq!(config.ok().map(|bytes| bytes.len()), fits.then_some(size as usize), "{size} at {offset}");
            }
            16 => {
                let (offset, value) = (source.number() as u32, source.byte());
                let accepted = session.set_config(offset, &[value], VhostUserConfigFlags::empty()).is_ok();
                assert!(!accepted || (offset, value & !1) == (32, 0), "{value} at {offset}");
            }
            17 => session.reset_device().expect("a reset"),
            18 => session.set_owner().expect("an owner"),
            _ => assert!(session.get_queue_num().is_ok_and(|number| number == u64::from(QUEUES))),
        }
    }
    session.stop_all();
    drop(session);
}
