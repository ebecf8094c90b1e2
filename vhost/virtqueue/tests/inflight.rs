//! The in-flight region: a device that dies after any of its stores, to the region or to the ring, is followed by one that
//! goes on. No request is lost, none is completed twice, and those that were taken come first, in their order.

use std::fs::File;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::packed_features;
use crate::inflight::InflightRegion;
use crate::testing::cases;
use crate::testing::guest::{BUFFERS, Descriptor, Guest, NEXT};
use crate::testing::packed_driver::{PackedDescriptor, PackedDriver};
use crate::testing::{memfd, step};
use crate::virtqueue::{Chain, Head, RingError, RingFeatures, VirtQueue};

const SIZE: u16 = 8;
const SPLIT: RingFeatures = RingFeatures { event_idx: false, indirect: false, packed: false };
const A: u64 = BUFFERS[0].guest;

/// A region in a file of ours, which outlives any device.
struct Region(File);

impl Region {
    fn new() -> Self {
        Self(memfd(InflightRegion::bytes(1, SIZE)))
    }

    fn map(&self, packed: bool) -> Arc<InflightRegion> {
        let range = (0, InflightRegion::bytes(1, SIZE));
        let file = self.0.try_clone().expect("a descriptor");
        Arc::new(InflightRegion::map(file, range, 1, SIZE, packed).expect("as it was made"))
    }

    fn content(&self) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; InflightRegion::bytes(1, SIZE) as usize];
        self.0.read_exact_at(&mut bytes, 0).expect("all of it");
        bytes
    }

    fn set_content(&self, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        self.0.write_all_at(bytes, 0).expect("all of it");
    }
}

/// A guest driver of either layout: it offers chains, each with the number of its request as the length of its first
/// buffer, and takes completions.
enum Driver {
    Split { guest: Guest, free: Vec<u16>, chains: Vec<(u32, Vec<u16>)>, avail: u16, used: u16 },
    Packed { driver: PackedDriver, requests: Vec<u32> },
}

impl Driver {
    /// In a ring that is somewhere in its life, by the number of an entry.
    fn new(packed: bool, start: u16) -> Self {
        if packed {
            let driver = PackedDriver::new(SIZE, 0, u64::from(SIZE) + u64::from(start % (2 * SIZE)));
            return Self::Packed { driver, requests: vec![0; SIZE.into()] };
        }
        let guest = Guest::new(SIZE, 0);
        guest.set_used_idx(start);
        guest.set_avail_idx(start);
        let chains = vec![(0, Vec::new()); SIZE.into()];
        Self::Split { guest, free: (0..SIZE).collect(), chains, avail: start, used: start }
    }

    fn guest(&self) -> &Guest {
        match self {
            Self::Split { guest, .. } => guest,
            Self::Packed { driver, .. } => &driver.guest,
        }
    }

    fn is_packed(&self) -> bool {
        matches!(self, Self::Packed { .. })
    }

    fn free(&self) -> u16 {
        match self {
            Self::Split { free, .. } => free.len() as u16,
            Self::Packed { driver, .. } => driver.free(),
        }
    }

    fn offer(&mut self, request: u32, len: u16) {
        let first = 1 + request;
        match self {
            Self::Split { guest, free, chains, avail, .. } => {
                let numbers: Vec<u16> = free.drain(..usize::from(len)).collect();
                for (at, number) in numbers.iter().enumerate() {
                    let next = numbers.get(at + 1).copied();
                    let descriptor = Descriptor {
                        addr: A,
                        len: if at == 0 { first } else { 1 },
                        flags: next.map_or(0, |_| NEXT),
                        next: next.unwrap_or(0),
                    };
                    guest.set_descriptor(guest.desc, *number, descriptor);
                }
                let head = numbers[0];
                chains[usize::from(head)] = (request, numbers);
                guest.offer(*avail, &[head]);
                *avail = avail.wrapping_add(1);
            }
            Self::Packed { driver, requests } => {
                let id = driver.slots.iter().rposition(Option::is_none).expect("a free id") as u16;
                let buffer = |at| PackedDescriptor { addr: A, len: if at == 0 { first } else { 1 }, id: 0, flags: 0 };
                driver.offer(id, &(0..len).map(buffer).collect::<Vec<_>>());
                requests[usize::from(id)] = request;
            }
        }
    }

    /// The next completed request.
    fn take(&mut self) -> Option<u32> {
        match self {
            Self::Split { guest, free, chains, used, .. } => {
                if guest.used_idx() == *used {
                    return None;
                }
                let (head, _) = guest.used(*used);
                *used = used.wrapping_add(1);
                let (request, numbers) = std::mem::take(&mut chains[head as usize]);
                assert!(!numbers.is_empty(), "head {head} is completed, and not on its way");
                free.extend(numbers);
                Some(request)
            }
            Self::Packed { driver, requests } => driver.take().map(|(id, _)| requests[usize::from(id)]),
        }
    }

    /// A device on this ring. What the front-end tells as the base is what it knew at the start of the first device.
    fn device(&self, region: &Region) -> Result<VirtQueue, RingError> {
        let guest = self.guest();
        let (features, base) = match self {
            Self::Split { used, .. } => (SPLIT, u32::from(*used)),
            Self::Packed { driver, .. } => (packed_features(false, false), driver.base(driver.used, driver.used)),
        };
        let part = region.map(self.is_packed()).part(0).expect("of the only queue");
        VirtQueue::with_inflight(guest.memory.clone(), guest.layout(), features, Some(base), part)
    }

    fn ring_content(&self) -> Vec<u8> {
        let region = &self.guest().memory.regions()[0];
        let mut bytes = vec![0; region.size as usize];
        let memory = self.guest().memory.vm_memory();
        memory.read_slice(&mut bytes, GuestAddress(region.guest_addr)).expect("the ring's region");
        bytes
    }

    fn set_ring_content(&self, bytes: &[u8]) {
        self.guest().write(self.guest().memory.regions()[0].guest_addr, bytes);
    }
}

impl Clone for Driver {
    /// The same driver, on memory of its own.
    fn clone(&self) -> Self {
        let clone = match self {
            Self::Split { free, chains, avail, used, .. } => Self::Split {
                guest: Guest::new(SIZE, 0),
                free: free.clone(),
                chains: chains.clone(),
                avail: *avail,
                used: *used,
            },
            Self::Packed { driver: from, requests } => {
                let mut driver = PackedDriver::new(SIZE, 0, from.avail);
                (driver.used, driver.slots) = (from.used, from.slots.clone());
                Self::Packed { driver, requests: requests.clone() }
            }
        };
        clone.set_ring_content(&self.ring_content());
        clone
    }
}

/// The number of the request that a chain was.
fn request_of(chain: &Chain) -> u32 {
    chain.iov[0].len() as u32 - 1
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Pop,
    Push(usize),
    Publish,
}

fn serve(device: &mut VirtQueue, steps: &[Step]) {
    let mut taken: Vec<Head> = Vec::new();
    let mut chain = Chain::default();
    for step in steps {
        match step {
            Step::Pop => {
                if device.pop(&mut chain).expect("the guest keeps the rules") {
                    taken.push(chain.head);
                }
            }
            Step::Push(which) if !taken.is_empty() => device.push(taken.swap_remove(which % taken.len()), 0),
            Step::Push(_) => {}
            Step::Publish => {
                device.publish();
            }
        }
    }
}

/// A device starts where another died. Everything that was offered and is not completed comes, in its order, once. The
/// guest has looked at its ring in between, or not.
fn goes_on(driver: &mut Driver, region: &Region, offered: &[u32], next: u32, guest_looks: bool) {
    let mut completed = Vec::new();
    let take_all = |driver: &mut Driver, completed: &mut Vec<u32>| {
        while let Some(request) = driver.take() {
            completed.push(request);
        }
    };
    // What the front-end tells as the base does not count, whatever it is.
    let mut device = None;
    if !guest_looks {
        device = Some(driver.device(region).expect("the region is as a device left it"));
    }
    take_all(driver, &mut completed);
    let mut device = device.unwrap_or_else(|| driver.device(region).expect("the region is as a device left it"));
    let missing: Vec<u32> = offered.iter().copied().filter(|request| !completed.contains(request)).collect();
    let mut chain = Chain::default();
    let mut heads = Vec::new();
    for expected in &missing {
        assert_eq!(device.pop(&mut chain), Ok(true), "request {expected} is lost");
        assert_eq!(request_of(&chain), *expected, "in the order in which they were offered");
        heads.push((*expected, chain.head));
    }
    assert_eq!(device.pop(&mut chain), Ok(false), "something comes twice");
    // In another order than they came, and one by one.
    for (request, head) in heads.into_iter().rev() {
        device.push(head, 0);
        device.publish();
        assert_eq!(driver.take(), Some(request));
        assert_eq!(driver.take(), None, "something is completed that was not");
        completed.push(request);
    }
    completed.sort_unstable();
    assert_eq!(completed, offered);
    // And the ring goes on for more than a lap.
    let mut request = next;
    for _ in 0..3 {
        let from = request;
        while driver.free() >= 2 {
            driver.offer(request, 1 + request as u16 % 2);
            request += 1;
        }
        for expected in from..request {
            assert_eq!(device.pop(&mut chain), Ok(true));
            assert_eq!(request_of(&chain), expected);
            device.push(chain.head, 0);
        }
        device.publish();
        (from..request).for_each(|expected| assert_eq!(driver.take(), Some(expected)));
    }
}

/// Serves rounds of requests, then dies after every store of the next ones. Returns how many states that made.
fn dies_after_every_store(packed: bool, start: u16, lens: &[u16], before: &[Step], steps: &[Step]) -> usize {
    let (mut driver, region) = (Driver::new(packed, start), Region::new());
    let mut request = 0;
    // A life before: with the same device, so that its lists are no longer as they were made.
    if !before.is_empty() {
        let mut device = driver.device(&region).expect("a new region");
        while driver.free() >= 2 {
            driver.offer(request, 1 + request as u16 % 2);
            request += 1;
        }
        serve(&mut device, before);
        drop(device);
        let mut device = driver.device(&region).expect("as it was left");
        let mut chain = Chain::default();
        while device.pop(&mut chain).expect("the guest keeps the rules") {
            device.push(chain.head, 0);
        }
        device.publish();
        while driver.take().is_some() {}
    }
    let first = request;
    for len in lens {
        if driver.free() >= *len {
            driver.offer(request, *len);
            request += 1;
        }
    }
    let offered: Vec<u32> = (first..request).collect();
    let look = || (driver.ring_content(), region.content());
    let states = step::states(look, || {
        let mut device = driver.device(&region).expect("as it was left");
        serve(&mut device, steps);
    });
    let Some(states) = states else {
        println!("SKIP dies_after_every_store: this machine allows no tracing");
        return usize::MAX;
    };
    let other = Region::new();
    for (ring, content) in &states {
        for guest_looks in [true, false] {
            let mut driver = driver.clone();
            driver.set_ring_content(ring);
            other.set_content(content);
            goes_on(&mut driver, &other, &offered, request, guest_looks);
        }
    }
    states.len()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Pop),
        3 => any::<usize>().prop_map(Step::Push),
        2 => Just(Step::Publish),
    ];
    prop::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn a_device_that_dies_after_any_store_loses_nothing_and_completes_nothing_twice(
        packed: bool,
        start in prop_oneof![Just(0u16), 0xfff8u16.., any::<u16>()],
        lens in prop::collection::vec(1..4u16, 1..8),
        before in prop_oneof![Just(Vec::new()), steps()],
        steps in steps(),
    ) {
        dies_after_every_store(packed, start, &lens, &before, &steps);
    }
}

const THOROUGH: [Step; 12] = [
    Step::Pop,
    Step::Pop,
    Step::Push(0),
    Step::Pop,
    Step::Push(1),
    Step::Publish,
    Step::Pop,
    Step::Push(0),
    Step::Push(0),
    Step::Publish,
    Step::Pop,
    Step::Push(0),
];

#[test]
fn a_split_ring_loses_nothing_whichever_store_is_the_last() {
    for start in [0, 65533] {
        assert!(dies_after_every_store(false, start, &[2, 1, 3, 1, 1], &[], &THOROUGH) > 30);
        dies_after_every_store(false, start, &[2, 1, 3, 1, 1], &THOROUGH, &THOROUGH);
    }
}

#[test]
fn a_packed_ring_loses_nothing_whichever_store_is_the_last() {
    for start in [0, 5, 13] {
        assert!(dies_after_every_store(true, start, &[2, 1, 3, 1, 1], &[], &THOROUGH) > 50);
        dies_after_every_store(true, start, &[2, 1, 3, 1, 1], &THOROUGH, &THOROUGH);
    }
}

#[test]
fn a_batch_of_the_whole_ring_is_not_taken_for_none() {
    let all: Vec<Step> = [Step::Pop; 8].into_iter().chain([Step::Push(0); 8]).chain([Step::Publish]).collect();
    for packed in [false, true] {
        dies_after_every_store(packed, 3, &[1; 8], &[], &all);
    }
}

/// The device that recovers dies in turn, after any of its stores.
#[test]
fn a_recovery_that_dies_is_recovered_from() {
    let steps = [Step::Pop, Step::Pop, Step::Pop, Step::Push(1), Step::Publish, Step::Push(0)];
    for packed in [false, true] {
        let (mut driver, region) = (Driver::new(packed, 6), Region::new());
        let lens = [2u16, 1, 3, 1];
        lens.iter().zip(0..).for_each(|(len, request)| driver.offer(request, *len));
        let look = || (driver.ring_content(), region.content());
        let serve_once = || serve(&mut driver.device(&region).expect("a new region"), &steps);
        let Some(states) = step::states(look, serve_once) else {
            return println!("SKIP a_recovery_that_dies_is_recovered_from: this machine allows no tracing");
        };
        // Those of the last part, where a batch is published, one after another.
        for (ring, content) in states.iter().rev().take(12) {
            let (driver, other) = (driver.clone(), Region::new());
            driver.set_ring_content(ring);
            other.set_content(content);
            let look = || (driver.ring_content(), other.content());
            let recover = || drop(driver.device(&other).expect("as it was left"));
            for (ring, content) in step::states(look, recover).expect("it was allowed before") {
                let (mut driver, third) = (driver.clone(), Region::new());
                driver.set_ring_content(&ring);
                third.set_content(&content);
                goes_on(&mut driver, &third, &[0, 1, 2, 3], 4, true);
            }
        }
    }
}

#[test]
fn a_region_of_any_bytes_is_refused_or_does_no_harm() {
    let mut runner = proptest::test_runner::TestRunner::new(cases(400));
    let small = prop_oneof![6 => Just(0u8), 3 => 0..10u8, 1 => any::<u8>()];
    let bytes = prop::collection::vec(small, InflightRegion::bytes(1, SIZE) as usize - 64);
    let any = (any::<bool>(), bytes, any::<bool>());
    let tried = runner.run(&any, |(packed, mut bytes, is_right)| {
        let (mut driver, region) = (Driver::new(packed, 3), Region::new());
        driver.offer(0, 2);
        if is_right {
            // So that more than the header is looked at.
            bytes[8..12].copy_from_slice(&[1, 0, SIZE as u8, 0]);
        }
        bytes.resize(InflightRegion::bytes(1, SIZE) as usize, 0);
        region.set_content(&bytes);
        if let Ok(mut device) = driver.device(&region) {
            let mut chain = Chain::default();
            for _ in 0..2 * SIZE {
                match device.pop(&mut chain) {
                    Ok(true) => device.push(chain.head, 1),
                    Ok(false) | Err(_) => break,
                }
            }
            device.publish();
        }
        Ok(())
    });
    tried.expect("no panic");
}

#[test]
fn a_region_is_forgotten_when_the_layout_of_the_rings_changes() {
    let region = Region::new();
    for packed in [false, true, false, true] {
        let mut driver = Driver::new(packed, 0);
        driver.offer(0, 2);
        let mut device = driver.device(&region).expect("a new region, or one of the other layout");
        let mut chain = Chain::default();
        assert_eq!(device.pop(&mut chain), Ok(true));
        assert_eq!(device.pop(&mut chain), Ok(false));
    }
}

#[test]
fn a_region_that_is_too_small_not_aligned_or_not_in_its_file_is_refused() {
    let needed = InflightRegion::bytes(2, 100);
    let file = memfd(needed);
    let map = |range, queues, size| {
        InflightRegion::map(file.try_clone().expect("a descriptor"), range, queues, size, true).err()
    };
    assert_eq!(map((0, needed), 2, 100), None);
    assert_eq!(map((0, needed - 64), 2, 100), None, "without a trailer");
    for (range, queues, size) in [
        ((0, needed - 128), 2, 100),
        ((0, needed), 3, 100),
        ((0, needed), 2, 200),
        ((32, needed - 64), 2, 100),
        ((64, needed), 2, 100),
        ((u64::MAX - 63, needed), 2, 100),
        ((0, u64::MAX), 2, 100),
        ((0, needed), 0, 100),
        ((0, needed), 2, 0),
    ] {
        assert!(map(range, queues, size).is_some(), "{range:?}, {queues} queues of {size}");
    }
}

#[test]
fn the_write_cache_is_kept_in_a_region() {
    let region = Region::new();
    assert_eq!(region.map(false).write_cache(), None);
    for on in [true, false] {
        region.map(false).set_write_cache(on);
        assert_eq!(region.map(true).write_cache(), Some(on));
    }
}

#[test]
fn a_region_of_ours_has_room_for_larger_rings_than_it_was_asked_for() {
    let range = (0, InflightRegion::size(3, 128));
    for packed in [false, true] {
        let file = InflightRegion::create(3, 128).expect("a memfd");
        let region = InflightRegion::map(file, range, 3, 128, packed).expect("as it was made");
        assert_eq!(region.queue_size(), 1024);
    }
}

#[test]
fn the_size_of_a_region_of_ours_is_sealed() {
    let file = InflightRegion::create(1, 8).expect("a memfd");
    assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
}
