//! Random valid sequences: a guest driver that keeps the rules offers chains, the device pops, pushes, publishes,
//! suppresses and enables, and after each step ours and the oracle, each on a guest memory of its own, agree.

use proptest::prelude::*;

use super::next_avail;
use super::oracle::Oracle;
use crate::testing::cases;
use crate::testing::guest::{BORDER, BUFFERS, Buffer, Descriptor, Guest, INDIRECT, NEXT, WRITE, joined};
use crate::virtqueue::{Chain, RingFeatures, VirtQueue};

/// One buffer; the numbers are made to fit where it is used.
#[derive(Clone, Debug)]
struct BufferPlan {
    region: usize,
    at: u64,
    len: u32,
}

/// Where a chain's descriptors stand.
#[derive(Clone, Copy, Debug)]
enum Table {
    Direct,
    Indirect,
    /// The first is direct, the rest in an indirect table.
    IndirectAfterOne,
}

#[derive(Clone, Debug)]
enum Step {
    Offer {
        readable: Vec<BufferPlan>,
        writable: Vec<BufferPlan>,
        table: Table,
        shuffle: usize,
    },
    Pop,
    Push {
        which: usize,
        written: u32,
    },
    Publish,
    SuppressKicks,
    EnableKicks,
    /// The guest wants to be called at this entry, counted from the last that it was shown.
    UsedEvent(i16),
    NoInterrupt(bool),
}

fn buffers() -> impl Strategy<Value = Vec<BufferPlan>> {
    let len = prop_oneof![1 => Just(0u32), 3 => 1..64u32, 3 => 1..0x9000u32];
    let buffer = (0..BUFFERS.len() + 1, 0..0x8000u64, len);
    prop::collection::vec(buffer.prop_map(|(region, at, len)| BufferPlan { region, at, len }), 0..6)
}

fn step() -> impl Strategy<Value = Step> {
    let table = prop_oneof![3 => Just(Table::Direct), 2 => Just(Table::Indirect), 1 => Just(Table::IndirectAfterOne)];
    let offer = (buffers(), buffers(), table, any::<usize>());
    prop_oneof![
        6 => offer.prop_map(|(readable, writable, table, shuffle)| Step::Offer { readable, writable, table, shuffle }),
        6 => Just(Step::Pop),
        5 => (any::<usize>(), any::<u32>()).prop_map(|(which, written)| Step::Push { which, written }),
        4 => Just(Step::Publish),
        1 => Just(Step::SuppressKicks),
        2 => Just(Step::EnableKicks),
        2 => (-3..6i16).prop_map(Step::UsedEvent),
        1 => any::<i16>().prop_map(Step::UsedEvent),
        1 => any::<bool>().prop_map(Step::NoInterrupt),
    ]
}

fn index() -> impl Strategy<Value = u16> {
    prop_oneof![2 => Just(0u16), 2 => 0xffe0u16.., 1 => any::<u16>()]
}

/// The place of a planned buffer: in one region, or (one region number more than there are) across the border.
fn place(plan: &BufferPlan) -> (u64, u32) {
    let Some(region) = BUFFERS.get(plan.region) else {
        let before = 1 + plan.at % 0x4000;
        return (BORDER - before, plan.len.min(0x7000));
    };
    let at = plan.at % region.size;
    (region.guest + at, plan.len.min((region.size - at) as u32))
}

/// A guest driver, with the same ring twice: for our device and for the oracle.
struct Pair {
    guests: [Guest; 2],
    ours: VirtQueue,
    oracle: Oracle,
    indirect: bool,
    /// Descriptors that no chain uses.
    free: Vec<u16>,
    /// The descriptors of the chain that each head began.
    chains: Vec<Vec<u16>>,
    /// Heads that were popped, and not pushed yet.
    popped: Vec<u16>,
    /// Heads that were pushed, and not published yet: the guest may not use them again.
    pushed: Vec<u16>,
    next_avail: u16,
    /// Chains offered and not popped.
    waiting: u16,
    /// Where the next indirect table goes.
    table_at: u64,
    chain: Chain,
}

/// Indirect tables are written over both sides of the border, from here on and as many bytes.
const TABLES: (u64, u64) = (BORDER - 0x100, 0x1000);

impl Pair {
    fn new(size: u16, features: RingFeatures, base: u16, used: u16, skew: u64) -> Self {
        let guests = [Guest::new(size, skew), Guest::new(size, skew)];
        for guest in &guests {
            guest.set_used_idx(used);
            guest.set_avail_idx(base);
        }
        Self {
            ours: guests[0].device(features, base),
            oracle: Oracle::new(&guests[1], features, base),
            guests,
            indirect: features.indirect,
            free: (0..size).collect(),
            chains: vec![Vec::new(); usize::from(size)],
            popped: Vec::new(),
            pushed: Vec::new(),
            next_avail: base,
            waiting: 0,
            table_at: TABLES.0,
            chain: Chain::default(),
        }
    }

    fn both(&self, write: impl Fn(&Guest)) {
        self.guests.iter().for_each(write);
    }

    fn offer(&mut self, buffers: &[Buffer], table: Table, shuffle: usize) {
        let direct = match table {
            Table::Direct => buffers.len(),
            Table::Indirect => 0,
            Table::IndirectAfterOne => 1,
        };
        let table_bytes = 16 * (buffers.len() - direct.min(buffers.len())) as u64;
        let is_indirect = direct < buffers.len();
        if is_indirect && self.table_at + table_bytes > TABLES.0 + TABLES.1 {
            if !self.free_of_chains() {
                return;
            }
            // Odd, as a table may lie at any address.
            self.table_at = TABLES.0 + shuffle as u64 % 37;
        }
        let needed = direct.min(buffers.len()) + usize::from(is_indirect);
        if buffers.is_empty() || needed > self.free.len() || (is_indirect && !self.indirect) {
            return;
        }
        let numbers: Vec<u16> = (0..needed).map(|_| self.free.swap_remove(shuffle % self.free.len())).collect();
        let to_descriptor = |buffer: &Buffer, next: Option<u16>| Descriptor {
            addr: buffer.addr,
            len: buffer.len as u32,
            flags: if buffer.writable { WRITE } else { 0 } | next.map_or(0, |_| NEXT),
            next: next.unwrap_or(shuffle as u16),
        };
        for (at, number) in numbers.iter().enumerate() {
            let next = numbers.get(at + 1).copied();
            let descriptor = match buffers.get(at).filter(|_| at < direct) {
                Some(buffer) => to_descriptor(buffer, next),
                None => Descriptor { addr: self.table_at, len: table_bytes as u32, flags: INDIRECT, next: 0 },
            };
            self.both(|guest| guest.set_descriptor(guest.desc, *number, descriptor));
        }
        if is_indirect {
            // The entries stand in reverse order but for the first.
            let rest = &buffers[direct..];
            let slot = |at: usize| if at == 0 { 0 } else { rest.len() - at };
            let mut entries = vec![Descriptor::default(); rest.len()];
            for (at, buffer) in rest.iter().enumerate() {
                entries[slot(at)] = to_descriptor(buffer, (at + 1 < rest.len()).then(|| slot(at + 1) as u16));
            }
            self.both(|guest| guest.set_table(self.table_at, &entries));
            self.table_at += table_bytes;
        }
        let (head, at) = (numbers[0], self.next_avail);
        self.chains[usize::from(head)] = numbers;
        self.both(|guest| guest.offer(at, &[head]));
        self.next_avail = at.wrapping_add(1);
        self.waiting += 1;
    }

    fn free_of_chains(&self) -> bool {
        self.free.len() == self.chains.len()
    }

    fn pop(&mut self) {
        let ours = self.ours.pop(&mut self.chain).expect("the guest keeps the rules");
        let oracle = self.oracle.pop().expect("the guest keeps the rules");
        assert_eq!(ours, oracle.is_some());
        assert_eq!(next_avail(&self.ours), self.oracle.next_avail());
        assert_eq!(ours, self.waiting > 0);
        if let Some((head, buffers)) = oracle {
            self.waiting -= 1;
            assert_eq!(self.chain.head.number, head);
            assert_eq!(joined(&self.guests[0].buffers_of(&self.chain)), joined(&buffers));
            self.popped.push(head);
        }
    }

    fn push(&mut self, which: usize, written: u32) {
        if self.popped.is_empty() {
            return;
        }
        let head = self.popped.swap_remove(which % self.popped.len());
        self.ours.push(head.into(), written);
        self.oracle.push(head, written);
        self.pushed.push(head);
    }

    fn publish(&mut self) {
        assert_eq!(self.ours.publish(), self.oracle.publish(&self.guests[1]), "whether to call the guest");
        for head in self.pushed.drain(..) {
            self.free.append(&mut self.chains[usize::from(head)]);
        }
        // All of memory: the used ring, and that nothing else was written.
        assert!(self.guests[0].content() == self.guests[1].content(), "guest memory differs");
    }

    fn enable_kicks(&mut self) {
        let more = self.ours.enable_kicks();
        assert_eq!(more, self.oracle.enable_kicks());
        assert_eq!(more, self.waiting > 0);
    }

    fn run(&mut self, steps: &[Step]) {
        for step in steps {
            match step {
                Step::Offer { readable, writable, table, shuffle } => {
                    let piece = |plan: &BufferPlan, writable| {
                        let (addr, len) = place(plan);
                        Buffer { addr, len: len.into(), writable }
                    };
                    let readable = readable.iter().map(|plan| piece(plan, false));
                    let buffers: Vec<Buffer> = readable.chain(writable.iter().map(|plan| piece(plan, true))).collect();
                    self.offer(&buffers, *table, *shuffle);
                }
                Step::Pop => self.pop(),
                Step::Push { which, written } => self.push(*which, *written),
                Step::Publish => self.publish(),
                Step::SuppressKicks => {
                    self.ours.suppress_kicks();
                    self.oracle.suppress_kicks();
                }
                Step::EnableKicks => self.enable_kicks(),
                Step::UsedEvent(distance) => {
                    let event = self.guests[0].used_idx().wrapping_add_signed(*distance);
                    self.both(|guest| guest.set_used_event(event));
                }
                Step::NoInterrupt(on) => self.both(|guest| guest.set_avail_flags((*on).into())),
            }
            let [ours, oracle] = &self.guests;
            assert_eq!(
                (ours.used_flags(), ours.avail_event()),
                (oracle.used_flags(), oracle.avail_event()),
                "whether the guest kicks"
            );
        }
        self.publish();
    }
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn ours_and_the_oracle_agree_on_whatever_a_guest_may_do(
        exponent in prop_oneof![8 => 0..8u32, 1 => 8..16u32],
        event_idx: bool,
        indirect: bool,
        base in index(),
        used in index(),
        skew in 0..70u64,
        steps in prop::collection::vec(step(), 1..120),
    ) {
        Pair::new(1 << exponent, RingFeatures { event_idx, indirect, packed: false }, base, used, skew).run(&steps);
    }
}

/// Offers as many one-buffer chains as the ring holds, and returns them all in one batch, until its indices have wrapped.
fn fill_and_empty(size: u16, rounds: u32, base: u16) {
    let mut pair = Pair::new(size, RingFeatures { event_idx: true, indirect: false, packed: false }, base, base, 0);
    let buffer = Buffer { addr: BUFFERS[2].guest, len: 512, writable: true };
    for round in 0..rounds {
        (0..size).for_each(|at| pair.offer(&[buffer], Table::Direct, usize::from(at)));
        assert!(pair.free.is_empty());
        (0..size).for_each(|_| pair.pop());
        pair.pop();
        assert_eq!(pair.popped.len(), usize::from(size));
        (0..size).for_each(|at| pair.push(usize::from(at), round));
        pair.publish();
        pair.enable_kicks();
    }
}

#[test]
fn the_largest_ring_may_be_full_across_the_wrap_of_its_indices() {
    fill_and_empty(32768, 1, 65530);
}

#[test]
fn a_ring_of_one_entry_goes_on_past_the_wrap_of_its_indices() {
    fill_and_empty(1, 20, 65530);
}

#[test]
fn a_full_ring_goes_around_all_65536_indices_and_on() {
    fill_and_empty(2048, 33, 7);
}
