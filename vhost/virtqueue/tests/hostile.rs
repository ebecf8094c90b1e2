//! Hostile rings: descriptors, indirect tables and indices of any content, changed between pops. A model says, by the
//! letter of the specification, what each pop must give: a chain, nothing, or which error. It never panics, never names
//! a byte outside memory, and does bounded work. Where the model sees a chain, the oracle sees the same.

use proptest::prelude::*;

use super::next_avail;
use super::oracle::Oracle;
use crate::testing::cases;
use crate::testing::guest::{BORDER, BUFFERS, Buffer, Descriptor, Guest, INDIRECT, NEXT, WRITE, joined};
use crate::virtqueue::{Chain, RingError, RingFeatures, VirtQueue};

/// Where indirect tables are: over both sides of the border.
const TABLES: u64 = BORDER - 16 * 20 - 8;
const TABLE_ENTRIES: u16 = 40;

/// What a pop must give.
#[derive(Debug)]
enum Verdict {
    Nothing,
    Chain(u16, Vec<Buffer>),
    /// One of these: more than one where several rules are broken by the same descriptor.
    Lie(Vec<RingError>),
}

/// Whether all of it is guest memory.
pub(super) fn in_memory(guest: &Guest, addr: u64, len: u32) -> bool {
    let (mut at, end) = (u128::from(addr), u128::from(addr) + u128::from(len));
    while at < end {
        let region = guest.memory.regions().iter().find(|region| {
            let start = u128::from(region.guest_addr);
            (start..start + u128::from(region.size)).contains(&at)
        });
        let Some(region) = region else { return false };
        at = u128::from(region.guest_addr) + u128::from(region.size);
    }
    true
}

struct Model {
    indirect: bool,
    next_avail: u16,
    /// The available index as the device saw it last: it asks again only when it has popped all that it saw.
    seen: u16,
    /// Taken and not yet given back: a ring has no room for these and more new ones than the rest of its entries.
    outstanding: u16,
}

impl Model {
    fn judge(&mut self, guest: &Guest) -> Verdict {
        if self.seen == self.next_avail {
            let avail_idx = u16::from_le_bytes(guest.read(guest.avail + 2));
            if avail_idx.wrapping_sub(self.next_avail) > guest.size - self.outstanding {
                let (last_avail, size) = (self.next_avail, guest.size);
                return Verdict::Lie(vec![RingError::IndexJump { avail_idx, last_avail, size }]);
            }
            self.seen = avail_idx;
        }
        if self.seen == self.next_avail {
            return Verdict::Nothing;
        }
        let slot = guest.avail + 4 + 2 * u64::from(self.next_avail % guest.size);
        let head = u16::from_le_bytes(guest.read(slot));
        match self.chain(guest, head) {
            Ok(buffers) => {
                self.next_avail = self.next_avail.wrapping_add(1);
                self.outstanding += 1;
                Verdict::Chain(head, buffers)
            }
            Err(lies) => Verdict::Lie(lies),
        }
    }

    fn chain(&self, guest: &Guest, head: u16) -> Result<Vec<Buffer>, Vec<RingError>> {
        let (mut table, mut entries, mut nested) = (guest.desc, guest.size, None);
        let (mut index, mut visited) = (head, 0);
        let mut buffers: Vec<Buffer> = Vec::new();
        loop {
            if index >= entries {
                let mut lies = vec![RingError::DescriptorOutOfRange(index)];
                lies.extend((visited == entries).then_some(RingError::Loop));
                return Err(lies);
            }
            if visited == entries {
                return Err(vec![RingError::Loop]);
            }
            visited += 1;
            let Descriptor { addr, len, flags, next } =
                Descriptor::from_bytes(guest.read(table + 16 * u64::from(index)));
            if flags & INDIRECT != 0 {
                let long = len / 16 > u32::from(guest.size.max(128));
                if nested.is_some() || flags & NEXT != 0 || !self.indirect || len % 16 != 0 || len == 0 || long {
                    return Err(vec![RingError::IndirectTable(nested.unwrap_or(len))]);
                }
                if !in_memory(guest, addr, len) {
                    return Err(vec![RingError::BufferAddress { addr, len }]);
                }
                (table, entries, nested) = (addr, (len / 16) as u16, Some(len));
                (index, visited) = (0, 0);
                continue;
            }
            let writable = flags & WRITE != 0;
            if !writable && buffers.last().is_some_and(|last| last.writable) {
                return Err(vec![RingError::ReadAfterWrite]);
            }
            if !in_memory(guest, addr, len) {
                return Err(vec![RingError::BufferAddress { addr, len }]);
            }
            buffers.push(Buffer { addr, len: len.into(), writable });
            if flags & NEXT == 0 {
                return Ok(buffers);
            }
            index = next;
        }
    }
}

/// Descriptor numbers from here on are written as they are, others cut to the table, so that chains grow long.
const WILD: u16 = 0x100;

fn tame(number: u16, entries: u16) -> u16 {
    if number < WILD { number % entries } else { number }
}

/// What a hostile guest does between two pops.
#[derive(Clone, Debug)]
enum Step {
    Pop,
    /// Completes a chain that was popped.
    Complete,
    Descriptor(u16, Descriptor),
    TableEntry(u16, Descriptor),
    Head(u16, u16),
    /// Makes so many more available.
    AvailIdx(u16),
    /// Writes any bytes into the ring's own region.
    Bytes(u64, Vec<u8>),
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        12 => (0..BUFFERS.len(), 0..0x4000u64).prop_map(|(region, at)| BUFFERS[region].guest + at),
        3 => (0..BUFFERS.len(), -40..20i64).prop_map(|(region, at)| {
            (BUFFERS[region].guest + BUFFERS[region].size).wrapping_add_signed(at)
        }),
        4 => (0..u64::from(TABLE_ENTRIES)).prop_map(|at| TABLES + 16 * at),
        1 => (0..0x400u64).prop_map(|at| 0x10_0000 + at),
        1 => (0..64u64).prop_map(|at| u64::MAX - at),
        1 => any::<u64>(),
    ]
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let len = prop_oneof![
        1 => Just(0u32),
        6 => 1..200u32,
        12 => (1..20u32).prop_map(|entries| 16 * entries),
        1 => (120..140u32).prop_map(|entries| 16 * entries),
        1 => 0..0x10000u32,
        1 => any::<u32>(),
    ];
    // Mostly links, so that chains grow long; any other bits mean nothing.
    let flags = prop_oneof![
        3 => Just(0u16),
        3 => Just(WRITE),
        6 => Just(NEXT),
        4 => Just(NEXT | WRITE),
        3 => Just(INDIRECT),
        1 => 0..8u16,
        1 => any::<u16>(),
    ];
    let next = prop_oneof![30 => 0..TABLE_ENTRIES, 1 => WILD..];
    (address(), len, flags, next).prop_map(|(addr, len, flags, next)| Descriptor { addr, len, flags, next })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => Just(Step::Pop),
        3 => Just(Step::Complete),
        6 => (0..16u16, descriptor()).prop_map(|(at, descriptor)| Step::Descriptor(at, descriptor)),
        6 => (0..TABLE_ENTRIES, descriptor()).prop_map(|(at, descriptor)| Step::TableEntry(at, descriptor)),
        4 => (any::<u16>(), prop_oneof![12 => 0..16u16, 1 => WILD..]).prop_map(|(at, head)| Step::Head(at, head)),
        5 => (0..20u16).prop_map(Step::AvailIdx),
        1 => any::<u16>().prop_map(Step::AvailIdx),
        1 => (0..0x300u64, prop::collection::vec(any::<u8>(), 1..64)).prop_map(|(at, bytes)| Step::Bytes(at, bytes)),
    ]
}

struct Attack {
    guest: Guest,
    device: VirtQueue,
    features: RingFeatures,
    model: Model,
    chain: Chain,
    popped: Vec<u16>,
}

impl Attack {
    fn new(size: u16, features: RingFeatures, base: u16) -> Self {
        let guest = Guest::new(size, 0);
        guest.set_avail_idx(base);
        let device = guest.device(features, base);
        let model = Model { indirect: features.indirect, next_avail: base, seen: base, outstanding: 0 };
        Self { guest, device, features, model, chain: Chain::default(), popped: Vec::new() }
    }

    fn pop(&mut self) {
        let before = next_avail(&self.device);
        let popped = self.device.pop(&mut self.chain);
        match self.model.judge(&self.guest) {
            Verdict::Nothing => assert_eq!(popped, Ok(false)),
            Verdict::Lie(lies) => {
                assert!(popped.is_err_and(|error| lies.contains(&error)), "{popped:?}, not {lies:?}");
                assert_eq!(next_avail(&self.device), before, "nothing is taken");
            }
            Verdict::Chain(head, buffers) => {
                assert_eq!(popped, Ok(true));
                assert_eq!(self.chain.head.number, head);
                let ours = joined(&self.guest.buffers_of(&self.chain));
                assert_eq!(ours, joined(&buffers));
                let most = usize::from(self.guest.size) + usize::from(self.guest.size.max(128));
                assert!(self.chain.iov.len() <= most * self.guest.memory.regions().len());
                let mut oracle = Oracle::new(&self.guest, self.features, before);
                // It looks at the index again, which may jump meanwhile; ours has seen it already.
                if let Ok(popped) = oracle.pop() {
                    let popped = popped.map(|(head, buffers)| (head, joined(&buffers)));
                    assert!(popped.is_none() || popped == Some((head, ours)), "{popped:?}");
                }
                self.popped.push(head);
            }
        }
    }

    fn set_descriptor(&self, at: u16, descriptor: Descriptor) {
        let Guest { desc, size, .. } = self.guest;
        self.guest.set_descriptor(desc, at % size, Descriptor { next: tame(descriptor.next, size), ..descriptor });
    }

    fn run(&mut self, steps: &[Step]) {
        for step in steps {
            match step {
                Step::Pop => self.pop(),
                Step::Complete => {
                    if let Some(head) = self.popped.pop() {
                        self.device.push(head.into(), 1);
                        self.model.outstanding -= 1;
                    }
                    self.device.publish();
                    self.device.enable_kicks();
                    self.device.suppress_kicks();
                }
                Step::Descriptor(at, descriptor) => self.set_descriptor(*at, *descriptor),
                Step::TableEntry(at, descriptor) => self.guest.set_descriptor(TABLES, *at, *descriptor),
                Step::Head(at, head) => self.guest.set_avail(*at, tame(*head, self.guest.size)),
                Step::AvailIdx(more) => self.guest.set_avail_idx(next_avail(&self.device).wrapping_add(*more)),
                Step::Bytes(at, bytes) => {
                    let region = &self.guest.memory.regions()[0];
                    let at = at % region.size;
                    let len = bytes.len().min((region.size - at) as usize);
                    self.guest.write(region.guest_addr + at, &bytes[..len]);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(600))]

    #[test]
    fn a_hostile_ring_gives_what_the_specification_says(
        exponent in 0..5u32,
        event_idx: bool,
        indirect in prop::bool::weighted(0.8),
        base in prop_oneof![Just(0u16), 0xfff0u16.., any::<u16>()],
        table in prop::collection::vec(descriptor(), 16),
        indirect_table in prop::collection::vec(descriptor(), usize::from(TABLE_ENTRIES)),
        heads in prop::collection::vec(0..16u16, 16),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut attack = Attack::new(1 << exponent, RingFeatures { event_idx, indirect, packed: false }, base);
        let size = attack.guest.size;
        for (at, descriptor) in (0..size).zip(&table) {
            attack.set_descriptor(at, *descriptor);
        }
        attack.guest.set_table(TABLES, &indirect_table);
        for (at, head) in (0..size).zip(&heads) {
            attack.guest.set_avail(base.wrapping_add(at), tame(*head, size));
        }
        attack.guest.set_avail_idx(base.wrapping_add(size));
        attack.run(&steps);
    }

    #[test]
    fn a_ring_of_any_bytes_gives_what_the_specification_says(
        exponent in 0..5u32,
        bytes in prop::collection::vec(any::<u8>(), 0x300),
        steps in prop::collection::vec(step(), 1..20),
    ) {
        let mut attack = Attack::new(1 << exponent, RingFeatures { event_idx: true, indirect: true, packed: false }, 0);
        let region = &attack.guest.memory.regions()[0];
        let len = bytes.len().min(region.size as usize);
        attack.guest.write(region.guest_addr, &bytes[..len]);
        attack.guest.set_avail_idx(1);
        attack.run(&steps);
    }
}

/// The most work that a ring can ask for with one chain: every descriptor of the longest indirect table, each over a
/// border.
#[test]
fn the_longest_chain_costs_no_more_than_its_table() {
    let guest = Guest::new(SIZE_MAX, 0);
    let ring = &guest.memory.regions()[0];
    let (table, entries) = (ring.guest_addr, SIZE_MAX);
    for at in 0..entries {
        let next = (at + 1) % entries;
        guest.set_descriptor(table, at, Descriptor { addr: BORDER - 1, len: 2, flags: NEXT, next });
    }
    guest.offer(0, &[1]);
    let mut device = guest.device(RingFeatures { event_idx: false, indirect: true, packed: false }, 0);
    let mut chain = Chain::default();
    assert_eq!(device.pop(&mut chain), Err(RingError::Loop));
    assert_eq!(chain.iov.len(), 2 * usize::from(entries));
}

const SIZE_MAX: u16 = 32768;
