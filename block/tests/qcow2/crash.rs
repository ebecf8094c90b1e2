//! Crashes: every write and flush of a run is logged (by `blklogwrites`), and the image is made as it may be found after a
//! crash at any place: all that was stable, and of what came later any part, sector by sector. Each such image must open,
//! have no error but leaks, and hold everything that the guest had flushed.

use std::cell::RefCell;
use std::rc::Rc;

use blockport_block::ChildChannel;
use blockport_block::driver::WriteFlags;
use blockport_block::drivers::qcow2::CreateOptions;
use blockport_block::iovec::AlignedBuffer;

use crate::images::{check_at_most_leaks, create, create_raw};
use crate::testing::oracle::read;
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, join_all, opened, user};

const SECTOR: usize = 512;

/// What the backing file has in every sector.
const BACKING: u64 = u64::MAX;

/// A request of the guest, as far as it matters afterwards.
struct Guest {
    /// For each sector of the disk what was written there, in order; the number of a write, or 0 for zeroes.
    written: Vec<Vec<Written>>,
    /// Completed flushes: how long the log was at the end, and how many requests had completed before the beginning.
    flushes: Vec<(u64, u64)>,
    /// Completed stable requests: how long the log was then, the first sector and the one behind the last, the request.
    stable: Vec<(u64, u64, u64, u64)>,
}

#[derive(Clone, Copy)]
struct Written {
    value: u64,
    /// The number of the request among all.
    request: u64,
    /// It may have been left undone: a discard.
    optional: bool,
}

/// One entry of the log.
struct Entry {
    /// Where it ends in the log, in bytes.
    end: u64,
    offset: u64,
    kind: Kind,
}

enum Kind {
    Write { data: Vec<u8>, stable: bool },
    Discard(u64),
    Flush,
}

fn parse(log: &[u8]) -> Vec<Entry> {
    let number = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().expect("8 bytes"));
    let entries = number(16);
    let (mut at, mut list) = (SECTOR, Vec::new());
    for _ in 0..entries {
        let (offset, bytes, flags) = (number(at) * SECTOR as u64, number(at + 8) as usize * SECTOR, number(at + 16));
        at += SECTOR;
        let kind = match flags {
            1 => Kind::Flush,
            4 => Kind::Discard(bytes as u64),
            _ => {
                // Zeroes at the end of the log's file are a hole past it.
                let data = log.iter().skip(at).take(bytes).copied().chain(std::iter::repeat(0)).take(bytes).collect();
                at += bytes;
                Kind::Write { data, stable: flags & 2 != 0 }
            }
        };
        list.push(Entry { end: at as u64, offset, kind });
    }
    list
}

/// The file after a crash.
struct Crashed(Vec<u8>);

impl Crashed {
    fn apply(&mut self, entry: &Entry, mut takes: impl FnMut() -> bool) {
        let start = entry.offset as usize;
        match &entry.kind {
            Kind::Write { data, .. } => {
                if self.0.len() < start + data.len() {
                    self.0.resize(start + data.len(), 0);
                }
                for (index, sector) in data.chunks(SECTOR).enumerate() {
                    if takes() {
                        let at = start + index * SECTOR;
                        self.0[at..at + sector.len()].copy_from_slice(sector);
                    }
                }
            }
            Kind::Discard(bytes) => {
                let end = (start + *bytes as usize).min(self.0.len());
                if start < end && takes() {
                    self.0[start..end].fill(0);
                }
            }
            Kind::Flush => {}
        }
    }
}

/// Runs a random guest and returns what it did. Requests of a batch are under way at once and do not overlap.
fn run(seed: u64, options: &str, log: &str, batches: u64) -> Guest {
    let (_graph, node) = opened(options);
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    let log = log.to_owned();
    context.run_until(async move {
        let sectors = (channel.length() as usize) / SECTOR;
        let mut random = Random::new(seed);
        let mut guest = Guest { written: vec![Vec::new(); sectors], flushes: Vec::new(), stable: Vec::new() };
        let mut request = 0;
        for _ in 0..batches {
            let stable = batch(&channel, &mut random, &mut guest, &mut request).await;
            let length = std::fs::metadata(&log).expect("it exists").len();
            guest.stable.extend(stable.into_iter().map(|(first, end, request)| (length, first, end, request)));
            if random.one_in(3) {
                assert_eq!(channel.flush().await, Ok(()));
                let length = std::fs::metadata(&log).expect("it exists").len();
                guest.flushes.push((length, request));
            }
        }
        guest
    })
}

/// Returns the sectors, the first and the one behind the last, of stable requests, and their numbers.
async fn batch(
    channel: &Rc<ChildChannel>,
    random: &mut Random,
    guest: &mut Guest,
    request: &mut u64,
) -> Vec<(u64, u64, u64)> {
    let mut stable = Vec::new();
    let sectors = guest.written.len() as u64;
    let count = 1 + random.below(8);
    let part = sectors / count;
    let (mut futures, buffers) = (Vec::new(), RefCell::new(Vec::new()));
    for index in 0..count {
        let longest = if random.one_in(4) { 300 } else { 20 };
        let length = 1 + random.below(part.min(longest));
        let first = index * part + random.below(part - length + 1);
        let (offset, bytes) = (first * SECTOR as u64, length * SECTOR as u64);
        *request += 1;
        let flags = WriteFlags { fua: random.one_in(12), may_unmap: random.one_in(2), ..Default::default() };
        let (future, value, optional) = match random.below(10) {
            0 => (channel.pdiscard(offset, bytes), 0, true),
            1 | 2 => (channel.pwrite_zeroes(offset, bytes, flags), 0, false),
            _ => {
                let mut buffer = AlignedBuffer::new(bytes as usize, 4096);
                buffer.fill_from(&request.to_le_bytes().repeat(bytes as usize / 8));
                let future = channel.pwritev(offset, &[buffer.iov()], WriteFlags { may_unmap: false, ..flags });
                buffers.borrow_mut().push(buffer);
                (future, *request, false)
            }
        };
        if flags.fua && !optional {
            stable.push((first, first + length, *request));
        }
        for written in &mut guest.written[first as usize..(first + length) as usize] {
            written.push(Written { value, request: *request, optional });
        }
        futures.push(future);
    }
    if random.one_in(3) {
        futures.push(channel.flush());
    }
    for result in join_all(futures).await {
        assert_eq!(result, Ok(()));
    }
    stable
}

/// Checks that the disk holds what was flushed when the log was `position` bytes long, or something newer.
fn check_content(guest: &Guest, content: &[u8], position: u64, old: u64) {
    let stable = guest.flushes.iter().filter(|(length, _)| *length <= position).map(|(_, request)| *request).max();
    let stable = stable.unwrap_or(0);
    for (sector, got) in content.chunks(SECTOR).enumerate() {
        let value = u64::from_le_bytes(got[..8].try_into().expect("8 bytes"));
        assert!(got.chunks(8).all(|word| word == value.to_le_bytes()), "sector {sector} is a mixture");
        let mut allowed = vec![old];
        let here = |&&(length, first, end, _): &&(u64, u64, u64, u64)| {
            length <= position && (first..end).contains(&(sector as u64))
        };
        let by_itself = guest.stable.iter().filter(here).map(|(.., request)| *request).max().unwrap_or(0);
        let flushed = guest.written[sector].iter().map(|written| written.request);
        let flushed = flushed.filter(|request| *request <= stable).max().unwrap_or(0);
        let stable = flushed.max(by_itself);
        for written in &guest.written[sector] {
            if written.request <= stable && !written.optional {
                allowed.clear();
            }
            allowed.push(written.value);
        }
        assert!(allowed.contains(&value), "sector {sector} holds {value:x}, and may hold {allowed:x?}");
    }
}

fn survive(seed: u64, create_options: CreateOptions, more: &str) {
    let place = TempDir::in_memory();
    let (path, log) = (place.path("disk"), place.path("log"));
    let has_backing = create_options.backing.is_some();
    if has_backing {
        create_raw(&place.path("base"), &BACKING.to_le_bytes().repeat((create_options.size / 8) as usize));
    }
    create(&path, &create_options);
    let before = std::fs::read(&path).expect("it was just made");
    create_raw(&log, &[]);
    let options = format!(
        "qcow2,discard=unmap{more},file.driver=blklogwrites,file.file.driver=file,file.file.filename={path},\
         file.log.driver=file,file.log.filename={log}"
    );
    let guest = run(seed, &options, &log, 30);
    let entries = parse(&std::fs::read(&log).expect("it exists"));
    let mut random = Random::new(seed + 1000);
    let crashed_path = place.path("crashed");
    let deep = std::env::var_os("BLOCKPORT_TEST_DEEP").is_some();
    let crashes = if deep { 400 } else { 36 };
    for crash in 0..crashes {
        let position = (crash * entries.len() / crashes + random.below(8) as usize).min(entries.len());
        let prefix = &entries[..position];
        let flushed = prefix.iter().rposition(|entry| matches!(entry.kind, Kind::Flush)).unwrap_or(0);
        let mut image = Crashed(before.clone());
        prefix[..flushed].iter().for_each(|entry| image.apply(entry, || true));
        // Of what came after the last flush: all, or any part in any order.
        let mut later: Vec<&Entry> = prefix[flushed..].iter().collect();
        let whole = crash % 3 == 0;
        if !whole {
            for at in (1..later.len()).rev() {
                later.swap(at, random.below(at as u64 + 1) as usize);
            }
        }
        for entry in &later {
            let must = whole || matches!(entry.kind, Kind::Write { stable: true, .. });
            let none = !must && random.one_in(3);
            image.apply(entry, || must || (!none && !random.one_in(4)));
        }
        create_raw(&crashed_path, &image.0);
        if crash % 3 != 1 || deep {
            check_at_most_leaks(&crashed_path);
        }
        let end = prefix.last().map_or(0, |entry| entry.end);
        let content = content_of(&crashed_path);
        check_content(&guest, &content, end, if has_backing { BACKING } else { 0 });
    }
}

fn content_of(path: &str) -> Vec<u8> {
    let (_graph, node) = opened(&format!("qcow2,read-only=on,file.driver=file,file.filename={path}"));
    let child = blockport_block::Child::attach(node, "the test", blockport_block::Permissions::device(false), 512);
    let child = child.expect("nobody else uses the node");
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move { read(&channel, 0, channel.length()).await })
}

const SIZE: u64 = 2 << 20;

#[test]
fn a_crash_leaves_leaks_at_worst_and_all_that_was_flushed() {
    for (seed, cluster_size) in [(1, 65536), (2, 4096), (3, 512)] {
        survive(seed, CreateOptions { size: SIZE, cluster_size, ..CreateOptions::default() }, "");
    }
}

#[test]
fn a_crash_over_a_backing_file_exposes_nothing_that_was_not_copied_up() {
    for (seed, cluster_size, version) in [(4, 65536, 3), (5, 4096, 2), (6, 512, 3)] {
        let backing = Some(("base".to_owned(), "raw".to_owned()));
        survive(seed, CreateOptions { size: SIZE, cluster_size, version, backing, ..CreateOptions::default() }, "");
    }
}

#[test]
fn a_crash_with_subclusters_or_small_caches_is_no_different() {
    let backing = Some(("base".to_owned(), "raw".to_owned()));
    let wide = CreateOptions { size: SIZE, cluster_size: 16384, extended_l2: true, backing, ..Default::default() };
    survive(7, wide, "");
    let small = ",l2-cache-size=2K,l2-cache-entry-size=512,refcount-cache-size=1K";
    survive(8, CreateOptions { size: SIZE, cluster_size: 512, refcount_bits: 64, ..Default::default() }, small);
}
