//! The client: many requests at once, as guests send them, with a book of what was promised. After each power failure it
//! looks at every sector. It never has two writes to one sector under way at once, so that each has an order.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockport_block::aio::{AioContext, PollSettings};
use blockport_block::iovec::AlignedBuffer;
use blockport_block::options::parse_keyval;
use blockport_block::{BackendChannel, BlockBackend, Graph, Permissions};

use crate::disk::{Behaviour, Disk, Lie, SECTOR, SimulatedDisk};
use crate::random::Random;

/// Sectors of the disk as the client sees it.
const SECTORS: usize = 64;
/// Clients at once.
const CLIENTS: usize = 6;
const POWER_FAILURES: u64 = 3;

/// What is known of a sector. Versions are numbered from 0, what was there at first.
#[derive(Clone, Copy, Default)]
struct Sector {
    /// The version that is stable for sure.
    stable: u32,
    /// The newest that was begun.
    begun: u32,
    /// The newest that reads must give, if that is known: its write was answered well.
    visible: Option<u32>,
    /// The newest that was answered well.
    completed: u32,
    busy: bool,
}

#[derive(Clone)]
struct Book {
    sectors: Vec<Sector>,
    /// Versions whose content is zeroes.
    zeroes: std::collections::HashSet<(usize, u32)>,
    requests: u64,
    /// The first promise that was broken.
    broken: Option<String>,
}

/// What a run did.
pub struct Done {
    pub requests: u64,
    pub crashes: u64,
}

pub struct Run {
    random: Random,
    lie: Lie,
}

/// Bytes that tell the sector and version they are of.
fn content(sector: usize, version: u32) -> Vec<u8> {
    let mark = (sector as u64) << 32 | u64::from(version);
    (0..SECTOR as u64 / 8).flat_map(|word| (mark ^ (word << 56)).to_le_bytes()).collect()
}

impl Book {
    fn expected(&self, sector: usize, version: u32) -> Vec<u8> {
        if self.zeroes.contains(&(sector, version)) { vec![0; SECTOR] } else { content(sector, version) }
    }

    /// Which version this is, of those from `oldest` to the newest begun.
    fn version_of(&self, sector: usize, bytes: &[u8], oldest: u32) -> Option<u32> {
        (oldest..=self.sectors[sector].begun).rev().find(|version| self.expected(sector, *version) == bytes)
    }
}

impl Run {
    pub fn new(seed: u64) -> Self {
        Self::over(seed, Lie::None)
    }

    pub fn over(seed: u64, lie: Lie) -> Self {
        Self { random: Random::new(seed), lie }
    }

    /// Runs to the end, or to a promise that was broken.
    pub fn run(mut self) -> Result<Done, String> {
        let random = &mut self.random;
        let write_cache = !random.one_in(3);
        let behaviour = Behaviour {
            alignment: [512, 512, 1024, 4096][random.below(4) as usize],
            max_transfer: [0, 0, 4096, 8192][random.below(4) as usize],
            failures: [0, 0, 30][random.below(3) as usize],
            lie: self.lie,
        };
        let mut image: Vec<u8> = (0..SECTORS).flat_map(|sector| content(sector, 0)).collect();
        let mut book = Book {
            sectors: vec![Sector { visible: Some(0), ..Sector::default() }; SECTORS],
            zeroes: Default::default(),
            requests: 0,
            broken: None,
        };
        let context = AioContext::new(PollSettings { poll_max_ns: 0, ..PollSettings::default() }).expect("a loop");
        for _ in 0..POWER_FAILURES {
            let disk = Disk::new(behaviour, image, Random::new(random.next()));
            (book, image) = live(&context, &disk, book, write_cache, random);
            check_after_power_failure(&mut book, &image);
            if let Some(broken) = book.broken {
                return Err(broken);
            }
        }
        Ok(Done { requests: book.requests, crashes: POWER_FAILURES })
    }
}

/// One life of the machine, from power-up to its failure: what was promised by then, and what the disk holds.
fn live(context: &AioContext, disk: &Disk, book: Book, write_cache: bool, random: &mut Random) -> (Book, Vec<u8>) {
    let graph = Graph::default();
    let options = parse_keyval("node-name=sim", None).expect("options");
    let mut node = graph.add_driver(options, Box::new(SimulatedDisk::new(disk.clone()))).expect("a node");
    if random.one_in(3) {
        node = graph
            .blockdev_add(parse_keyval("raw,node-name=top,file=sim", Some("driver")).expect("options"))
            .expect("raw");
    }
    let backend = BlockBackend::new("simulated");
    backend.set_write_cache(write_cache);
    backend.insert(node, Permissions::device(true)).expect("a medium");
    let channel = backend.channel(context).expect("a channel");
    let book = Rc::new(RefCell::new(book));
    // The power fails in the midst of everything, after so many completions.
    let left = Rc::new(Cell::new(20 + random.below(150)));
    let at_work = Rc::new(Cell::new(CLIENTS));
    for _ in 0..CLIENTS {
        let client = Client {
            channel: channel.clone(),
            book: book.clone(),
            random: RefCell::new(Random::new(random.next())),
            left: left.clone(),
            write_cache,
        };
        let at_work = at_work.clone();
        context.spawn(async move {
            client.work().await;
            at_work.set(at_work.get() - 1);
        });
    }
    let disk = disk.clone();
    context.run_until(async move {
        while left.get() > 0 {
            AioContext::breathe().await;
            if disk.step() {
                left.set(left.get() - 1);
            }
        }
        let found = (book.borrow().clone(), disk.after_power_failure());
        // Nobody will know what became of the rest; it is brought to an end, as nothing here may be cut off.
        while at_work.get() > 0 {
            AioContext::breathe().await;
            disk.step();
        }
        found
    })
}

struct Client {
    channel: Rc<BackendChannel>,
    book: Rc<RefCell<Book>>,
    random: RefCell<Random>,
    left: Rc<Cell<u64>>,
    write_cache: bool,
}

impl Client {
    fn below(&self, end: u64) -> u64 {
        self.random.borrow_mut().below(end)
    }

    async fn work(&self) {
        while self.left.get() > 0 {
            self.book.borrow_mut().requests += 1;
            match self.below(10) {
                0..=4 => self.write().await,
                5 | 6 => self.read().await,
                7 => self.write_zeroes().await,
                _ => self.flush().await,
            }
            AioContext::breathe().await;
        }
    }

    /// Takes a range that nobody writes.
    fn take(&self) -> Option<std::ops::Range<usize>> {
        let start = self.below(SECTORS as u64) as usize;
        let end = (start + 1 + self.below(12) as usize).min(SECTORS);
        let mut book = self.book.borrow_mut();
        if book.sectors[start..end].iter().any(|sector| sector.busy) {
            return None;
        }
        for sector in &mut book.sectors[start..end] {
            sector.busy = true;
        }
        Some(start..end)
    }

    fn begin(&self, range: &std::ops::Range<usize>, zeroes: bool) -> Vec<u8> {
        let mut book = self.book.borrow_mut();
        let mut data = Vec::new();
        for sector in range.clone() {
            let version = book.sectors[sector].begun + 1;
            book.sectors[sector].begun = version;
            book.sectors[sector].visible = None;
            if zeroes {
                book.zeroes.insert((sector, version));
            }
            data.extend(book.expected(sector, version));
        }
        data
    }

    fn end(&self, range: std::ops::Range<usize>, ok: bool) {
        let mut book = self.book.borrow_mut();
        for sector in &mut book.sectors[range] {
            sector.busy = false;
            if ok {
                sector.visible = Some(sector.begun);
                sector.completed = sector.begun;
                if !self.write_cache {
                    sector.stable = sector.begun;
                }
            }
        }
    }

    async fn write(&self) {
        let Some(range) = self.take() else { return };
        let data = self.begin(&range, false);
        let mut buffer = AlignedBuffer::new(data.len(), 4096);
        buffer.fill_from(&data);
        let result = self.channel.pwritev((range.start * SECTOR) as u64, &[buffer.iov()]).await;
        self.end(range, result.is_ok());
    }

    async fn write_zeroes(&self) {
        let Some(range) = self.take() else { return };
        let bytes = self.begin(&range, true).len();
        let result = self.channel.pwrite_zeroes((range.start * SECTOR) as u64, bytes as u64, false).await;
        self.end(range, result.is_ok());
    }

    async fn flush(&self) {
        let completed: Vec<u32> = self.book.borrow().sectors.iter().map(|sector| sector.completed).collect();
        if self.channel.flush().await.is_ok() {
            let mut book = self.book.borrow_mut();
            for (sector, completed) in book.sectors.iter_mut().zip(completed) {
                sector.stable = sector.stable.max(completed);
            }
        }
    }

    async fn read(&self) {
        let Some(range) = self.take() else { return };
        let buffer = AlignedBuffer::new(range.len() * SECTOR, 4096);
        let result = self.channel.preadv((range.start * SECTOR) as u64, &[buffer.iov()]).await;
        let mut book = self.book.borrow_mut();
        for (sector, bytes) in range.clone().zip(buffer.to_vec().chunks(SECTOR)) {
            book.sectors[sector].busy = false;
            if result.is_err() {
                continue;
            }
            let oldest = book.sectors[sector].stable.max(book.sectors[sector].completed);
            let visible = book.sectors[sector].visible;
            let right = match (book.version_of(sector, bytes, oldest), visible) {
                (Some(found), Some(visible)) => book.expected(sector, found) == book.expected(sector, visible),
                (found, _) => found.is_some(),
            };
            if !right {
                book.broken.get_or_insert(format!("sector {sector}: what is read is not version {visible:?}"));
            }
        }
    }
}

/// Every sector holds a version that is no older than the last promise, and becomes the one to go on from.
fn check_after_power_failure(book: &mut Book, image: &[u8]) {
    for (sector, bytes) in image.chunks(SECTOR).enumerate() {
        let Sector { stable, begun, .. } = book.sectors[sector];
        let Some(found) = book.version_of(sector, bytes, stable) else {
            let older = (0..stable).rev().find(|version| book.expected(sector, *version) == bytes);
            book.broken =
                Some(format!("sector {sector}: version {stable} of {begun} was promised, {older:?} is there"));
            return;
        };
        book.sectors[sector] = Sector { stable: found, begun, visible: Some(found), completed: found, busy: false };
    }
}
