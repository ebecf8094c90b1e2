//! Random valid sequences on a packed ring: a driver written from the specification offers chains, the device pops,
//! pushes in any order, publishes, suppresses and enables. Each chain comes back once, nothing is seen early, memory
//! changes where it should and nowhere else, and each side is told when it asked for it.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::packed_features;
use crate::testing::cases;
use crate::testing::guest::{BORDER, BUFFERS, Buffer, joined};
use crate::testing::packed_driver::{Count, Event, PackedDescriptor, PackedDriver};
use crate::virtqueue::{Chain, Head, VirtQueue};

/// Indirect tables are written over both sides of the border, from here on and as many bytes.
const TABLES: (u64, u64) = (BORDER - 0x100, 0x1000);

#[derive(Clone, Debug)]
enum Step {
    Offer {
        readable: Vec<(usize, u64, u32)>,
        writable: Vec<(usize, u64, u32)>,
        indirect: bool,
        id: usize,
    },
    Pop,
    Push {
        which: usize,
        written: u32,
    },
    Publish,
    Take,
    SuppressKicks,
    EnableKicks,
    CallAlways,
    CallNever,
    /// At so many entries from the next completion to take.
    CallAt(i64),
}

fn buffers() -> impl Strategy<Value = Vec<(usize, u64, u32)>> {
    let len = prop_oneof![1 => Just(0), 3 => 1..64u32, 3 => 1..0x9000u32];
    prop::collection::vec((0..BUFFERS.len() + 1, 0..0x8000u64, len), 0..6)
}

fn step() -> impl Strategy<Value = Step> {
    let offer = (buffers(), buffers(), prop::bool::weighted(0.3), any::<usize>());
    let written = prop_oneof![1 => Just(0), 3 => any::<u32>()];
    prop_oneof![
        6 => offer.prop_map(|(readable, writable, indirect, id)| Step::Offer { readable, writable, indirect, id }),
        6 => Just(Step::Pop),
        5 => (any::<usize>(), written).prop_map(|(which, written)| Step::Push { which, written }),
        4 => Just(Step::Publish),
        4 => Just(Step::Take),
        1 => Just(Step::SuppressKicks),
        2 => Just(Step::EnableKicks),
        1 => Just(Step::CallAlways),
        1 => Just(Step::CallNever),
        3 => (-4..8i64).prop_map(Step::CallAt),
    ]
}

/// A planned buffer in one region, or (one region number more than there are) across the border.
fn place(&(region, at, len): &(usize, u64, u32), writable: bool) -> Buffer {
    let (addr, len) = match BUFFERS.get(region) {
        None => (BORDER - 1 - at % 0x4000, len.min(0x7000)),
        Some(region) => {
            let at = at % region.size;
            (region.guest + at, len.min((region.size - at) as u32))
        }
    };
    Buffer { addr, len: len.into(), writable }
}

struct Run {
    driver: PackedDriver,
    device: VirtQueue,
    event_idx: bool,
    indirect: bool,
    /// What memory must hold.
    expected: Vec<Vec<u8>>,
    /// Offered and not popped: id, buffers, entries.
    waiting: VecDeque<(u16, Vec<Buffer>)>,
    /// Popped and not pushed.
    popped: Vec<Head>,
    /// Pushed and not published, published and not taken.
    pushed: VecDeque<(u16, u32)>,
    shown: VecDeque<(u16, u32)>,
    call: Event,
    first: bool,
    /// Up to where the guest was shown completions.
    published: Count,
    /// Whether kicks were enabled with nothing waiting, and nothing came since.
    armed: bool,
    table_at: u64,
    chain: Chain,
}

impl Run {
    fn new(size: u16, event_idx: bool, indirect: bool, start: Count, skew: u64) -> Self {
        let driver = PackedDriver::new(size, skew, start);
        let device = driver.guest.device_at(packed_features(event_idx, indirect), driver.base(start, start));
        Self {
            expected: driver.guest.content(),
            driver,
            device,
            event_idx,
            indirect,
            waiting: VecDeque::new(),
            popped: Vec::new(),
            pushed: VecDeque::new(),
            shown: VecDeque::new(),
            call: Event::Enable,
            first: true,
            published: start,
            armed: true,
            table_at: TABLES.0,
            chain: Chain::default(),
        }
    }

    fn offer(&mut self, buffers: &[Buffer], indirect: bool, id: usize) {
        let indirect = indirect && self.indirect;
        let needed = if indirect { 1 } else { buffers.len() };
        let free: Vec<usize> = (0..self.driver.slots.len()).filter(|at| self.driver.slots[*at].is_none()).collect();
        if buffers.is_empty() || free.is_empty() || usize::from(self.driver.free()) < needed {
            return;
        }
        let id = free[id % free.len()] as u16;
        let descriptors: Vec<_> = buffers.iter().map(PackedDescriptor::of).collect();
        let before = self.driver.avail;
        if indirect {
            let bytes = 16 * descriptors.len() as u64;
            if self.table_at + bytes > TABLES.0 + TABLES.1 {
                if !self.waiting.is_empty() {
                    return;
                }
                // Odd, as a table may lie at any address.
                self.table_at = TABLES.0 + u64::from(id) % 37;
            }
            self.driver.offer_table(id, self.table_at, &descriptors);
            self.table_at += bytes;
        } else {
            self.driver.offer(id, &descriptors);
        }
        self.waiting.push_back((id, buffers.to_vec()));
        self.expected = self.driver.guest.content();
        if std::mem::take(&mut self.armed) {
            let event = self.driver.device_event();
            assert!(self.driver.is_due(event, before, self.driver.avail), "{event:?} at {before}");
        }
    }

    fn pop(&mut self) {
        let popped = self.device.pop(&mut self.chain).expect("the guest keeps the rules");
        assert_eq!(popped, !self.waiting.is_empty());
        if let Some((id, buffers)) = self.waiting.pop_front() {
            assert_eq!(self.chain.head.number, id);
            assert_eq!(joined(&self.driver.guest.buffers_of(&self.chain)), joined(&buffers));
            self.popped.push(self.chain.head);
        }
    }

    fn push(&mut self, which: usize, written: u32) {
        if self.popped.is_empty() {
            return;
        }
        let head = self.popped.swap_remove(which % self.popped.len());
        self.device.push(head, written);
        self.pushed.push_back((head.number, written));
        assert_eq!(self.driver.peek(self.published).flags & (1 << 15) != 0, self.unused_bit(), "it shows too early");
    }

    /// The USED bit of an entry that is not used, at the place of the next completion.
    fn unused_bit(&self) -> bool {
        !self.driver.wrap(self.published)
    }

    fn publish(&mut self) {
        let old = self.published;
        let new = old + self.pushed.iter().map(|(id, _)| self.slots(*id)).sum::<u64>();
        let mut due = new > old && self.driver.is_due(self.call, old, new);
        due |= new > old && self.event_idx && std::mem::take(&mut self.first);
        assert_eq!(self.device.publish(), due, "whether to call: {:?} in {old}..{new}", self.call);
        self.published = new;
        let mut at = old;
        for (id, written) in self.pushed.clone() {
            let wrap = self.driver.wrap(at);
            let flags = if wrap { 0x8080 } else { 0 } | if written > 0 { 2 } else { 0 };
            let entry = PackedDescriptor { len: written, id, flags, ..self.driver.peek(at) };
            self.expect_at(self.driver.address(at), &entry.to_bytes());
            at += self.slots(id);
        }
        self.shown.append(&mut self.pushed);
        let event = self.driver.guest.read::<4>(self.driver.guest.used);
        self.expect_at(self.driver.guest.used, &event);
        assert!(self.driver.guest.content() == self.expected, "something else was written");
    }

    fn expect_at(&mut self, addr: u64, bytes: &[u8]) {
        let regions = self.driver.guest.memory.regions();
        let (number, region) = regions.iter().enumerate().rfind(|(_, region)| region.guest_addr <= addr).expect("one");
        let at = (addr - region.guest_addr) as usize;
        self.expected[number][at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn set_call(&mut self, event: Event) {
        self.call = event;
        self.driver.set_driver_event(event);
        let bytes: [u8; 4] = self.driver.guest.read(self.driver.guest.avail);
        self.expect_at(self.driver.guest.avail, &bytes);
    }

    fn run(&mut self, steps: &[Step]) {
        for step in steps {
            match step {
                Step::Offer { readable, writable, indirect, id } => {
                    let readable = readable.iter().map(|plan| place(plan, false));
                    let buffers: Vec<_> = readable.chain(writable.iter().map(|plan| place(plan, true))).collect();
                    self.publish();
                    self.offer(&buffers, *indirect, *id);
                }
                Step::Pop => self.pop(),
                Step::Push { which, written } => self.push(*which, *written),
                Step::Publish => self.publish(),
                Step::Take => assert_eq!(self.driver.take(), self.shown.pop_front()),
                Step::SuppressKicks => {
                    self.device.suppress_kicks();
                    self.armed = false;
                    assert_eq!(self.driver.device_event(), Event::Disable);
                }
                Step::EnableKicks => {
                    assert_eq!(self.device.enable_kicks(), !self.waiting.is_empty());
                    self.armed = self.waiting.is_empty();
                    let at = self.device.base() as u16;
                    let position = Event::At(at & 0x7fff, at >> 15 == 1);
                    let expected = if self.event_idx { position } else { Event::Enable };
                    assert_eq!(self.driver.device_event(), expected);
                }
                Step::CallAlways => self.set_call(Event::Enable),
                Step::CallNever => self.set_call(Event::Disable),
                Step::CallAt(distance) if self.event_idx => {
                    let at = self.driver.used.saturating_add_signed(*distance);
                    self.set_call(Event::At(self.driver.index(at), self.driver.wrap(at)));
                }
                Step::CallAt(_) => {}
            }
        }
        self.publish();
        while let Some(shown) = self.shown.pop_front() {
            assert_eq!(self.driver.take(), Some(shown));
        }
        assert_eq!(self.driver.take(), None);
        let popped = self.driver.avail - self.waiting.iter().map(|(id, _)| self.slots(*id)).sum::<u64>();
        assert_eq!(self.device.base(), self.driver.base(popped, self.published), "where it stands");
    }

    fn slots(&self, id: u16) -> u64 {
        self.driver.slots[usize::from(id)].expect("on its way").into()
    }
}

proptest! {
    #![proptest_config(cases(500))]

    #[test]
    fn every_chain_comes_back_once_and_each_side_is_told(
        size in prop_oneof![8 => 1..40u16, 1 => 1..=32768u16],
        event_idx: bool,
        indirect: bool,
        lap in 1..4u64,
        start in 0..40u64,
        skew in 0..70u64,
        steps in prop::collection::vec(step(), 1..160),
    ) {
        let lap = lap * u64::from(size);
        let start = lap + start % u64::from(size);
        Run::new(size, event_idx, indirect, start, skew).run(&steps);
    }
}

/// Offers as many one-buffer chains as the ring holds, and returns them all in one batch.
fn fill_and_empty(size: u16, rounds: u32, start: Count) {
    let mut run = Run::new(size, true, false, start, 0);
    let buffer = Buffer { addr: BUFFERS[2].guest, len: 512, writable: true };
    for round in 0..rounds {
        (0..usize::from(size)).for_each(|at| run.offer(&[buffer], false, at));
        assert_eq!(run.driver.free(), 0);
        (0..=size).for_each(|_| run.pop());
        (0..usize::from(size)).for_each(|at| run.push(at, round));
        run.publish();
        (0..size).for_each(|_| assert_eq!(run.driver.take(), run.shown.pop_front()));
        assert!(!run.device.enable_kicks());
    }
}

#[test]
fn the_largest_ring_may_be_full_across_its_wrap() {
    let buffer = Buffer { addr: BUFFERS[2].guest, len: 512, writable: true };
    let mut driver = PackedDriver::new(32768, 0, 32768 + 32760);
    let mut device = driver.guest.device_at(packed_features(true, false), driver.base(driver.avail, driver.used));
    let mut heads = Vec::new();
    for id in 0..32768u16 {
        driver.offer(id, &[PackedDescriptor::of(&buffer)]);
        let mut chain = Chain::default();
        assert_eq!(device.pop(&mut chain), Ok(true));
        heads.push(chain.head);
    }
    heads.iter().for_each(|head| device.push(*head, 1));
    assert!(device.publish());
    assert_eq!(device.base(), driver.base(driver.avail, driver.avail));
    assert_eq!((0..32768).map(|_| driver.take()).collect::<Vec<_>>().len(), 32768);
}

#[test]
fn a_ring_of_one_entry_goes_on() {
    fill_and_empty(1, 9, 1);
}

#[test]
fn a_ring_of_no_power_of_two_goes_around_and_around() {
    fill_and_empty(100, 5, 100 + 63);
}
