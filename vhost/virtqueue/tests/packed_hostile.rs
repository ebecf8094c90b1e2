//! Hostile packed rings: descriptors, tables and flags of any content, changed between pops. A model says, by the letter
//! of the specification, what each pop must give. It never panics, never names a byte outside memory, and does bounded
//! work.

use proptest::prelude::*;

use super::hostile::in_memory;
use super::packed_features;
use crate::testing::cases;
use crate::testing::guest::{BORDER, BUFFERS, Buffer, INDIRECT, NEXT, WRITE, joined};
use crate::testing::packed_driver::{AVAIL, Count, PackedDescriptor, PackedDriver, USED};
use crate::virtqueue::{Chain, Head, RingError, RingFeatures, VirtQueue};

const TABLES: u64 = BORDER - 16 * 20 - 8;
const TABLE_ENTRIES: u16 = 40;

/// What a pop must give: a chain with its id and entries, nothing, or one of these errors.
type Verdict = Result<Option<(u16, u64, Vec<Buffer>)>, RingError>;

fn judge(driver: &PackedDriver, features: RingFeatures, at: Count, in_flight: u64) -> Verdict {
    let size = u64::from(driver.size());
    let expected = if driver.wrap(at) { AVAIL } else { USED };
    if driver.peek(at).flags & (AVAIL | USED) != expected {
        return Ok(None);
    }
    if in_flight == size {
        return Err(RingError::Overrun(driver.size()));
    }
    let mut buffers: Vec<Buffer> = Vec::new();
    let mut add = |PackedDescriptor { addr, len, flags, .. }: PackedDescriptor| {
        let writable = flags & WRITE != 0;
        if !writable && buffers.last().is_some_and(|last| last.writable) {
            return Err(RingError::ReadAfterWrite);
        }
        if !in_memory(&driver.guest, addr, len) {
            return Err(RingError::BufferAddress { addr, len });
        }
        buffers.push(Buffer { addr, len: len.into(), writable });
        Ok(())
    };
    for number in 0..size - in_flight {
        let descriptor = driver.peek(at + number);
        let PackedDescriptor { addr, len, id, flags } = descriptor;
        if flags & INDIRECT != 0 {
            let refused = RingError::IndirectTable(len);
            let long = len / 16 > u32::from(driver.size().max(128));
            if number > 0 || flags & NEXT != 0 || !features.indirect || len % 16 != 0 || len == 0 || long {
                return Err(refused);
            }
            if !in_memory(&driver.guest, addr, len) {
                return Err(RingError::BufferAddress { addr, len });
            }
            for entry in 0..u64::from(len / 16) {
                let entry = PackedDescriptor::from_bytes(driver.guest.read(addr + 16 * entry));
                if entry.flags & INDIRECT != 0 {
                    return Err(refused);
                }
                add(entry)?;
            }
        } else {
            add(descriptor)?;
        }
        if flags & NEXT == 0 {
            return Ok(Some((id, number + 1, buffers)));
        }
    }
    Err(RingError::Loop)
}

#[derive(Clone, Debug)]
enum Step {
    Pop,
    /// Completes a chain that was popped; of all of them, the guest is shown some together.
    Complete(bool),
    /// Writes a descriptor so many entries from the next one, available or with its flags as they are.
    Descriptor(u64, PackedDescriptor, bool),
    TableEntry(u16, PackedDescriptor),
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
        1 => any::<u64>(),
    ]
}

fn descriptor() -> impl Strategy<Value = PackedDescriptor> {
    let len = prop_oneof![
        1 => Just(0),
        6 => 1..200u32,
        12 => (1..20u32).prop_map(|entries| 16 * entries),
        1 => (120..140u32).prop_map(|entries| 16 * entries),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        4 => Just(0u16),
        3 => Just(WRITE),
        4 => Just(NEXT),
        3 => Just(NEXT | WRITE),
        4 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    (address(), len, any::<u16>(), flags).prop_map(|(addr, len, id, flags)| PackedDescriptor { addr, len, id, flags })
}

fn step() -> impl Strategy<Value = Step> {
    let entry = (0..16u64, descriptor(), prop::bool::weighted(0.9));
    prop_oneof![
        10 => Just(Step::Pop),
        4 => any::<bool>().prop_map(Step::Complete),
        12 => entry.prop_map(|(at, descriptor, available)| Step::Descriptor(at, descriptor, available)),
        6 => (0..TABLE_ENTRIES, descriptor()).prop_map(|(at, descriptor)| Step::TableEntry(at, descriptor)),
        1 => (0..0x300u64, prop::collection::vec(any::<u8>(), 1..64)).prop_map(|(at, bytes)| Step::Bytes(at, bytes)),
    ]
}

struct Attack {
    driver: PackedDriver,
    device: VirtQueue,
    features: RingFeatures,
    next: Count,
    used: Count,
    popped: Vec<(Head, u64)>,
    pushed: u64,
}

impl Attack {
    fn pop(&mut self) {
        let in_flight = self.popped.iter().map(|(_, slots)| slots).sum::<u64>() + self.pushed;
        let mut chain = Chain::default();
        let popped = self.device.pop(&mut chain);
        match judge(&self.driver, self.features, self.next, in_flight) {
            Ok(None) => assert_eq!(popped, Ok(false)),
            Err(error) => assert_eq!(popped, Err(error)),
            Ok(Some((id, slots, buffers))) => {
                assert_eq!(popped, Ok(true));
                assert_eq!(chain.head.number, id);
                assert_eq!(joined(&self.driver.guest.buffers_of(&chain)), joined(&buffers));
                self.next += slots;
                self.popped.push((chain.head, slots));
            }
        }
        let base = self.driver.base(self.next, self.used + self.pushed);
        assert_eq!(self.device.base(), base, "nothing else is taken");
    }

    fn run(&mut self, steps: &[Step]) {
        for step in steps {
            match step {
                Step::Pop => self.pop(),
                Step::Complete(show) => {
                    if let Some((head, slots)) = self.popped.pop() {
                        self.device.push(head, 1);
                        self.pushed += slots;
                    }
                    if *show {
                        self.device.publish();
                        self.used += std::mem::take(&mut self.pushed);
                    }
                    self.device.enable_kicks();
                    self.device.suppress_kicks();
                }
                Step::Descriptor(ahead, descriptor, available) => {
                    let at = self.next + ahead % u64::from(self.driver.size());
                    let own = if *available { self.driver.available(at) } else { 0 };
                    let mask = if *available { !(AVAIL | USED) } else { !0 };
                    self.driver.poke(at, PackedDescriptor { flags: descriptor.flags & mask | own, ..*descriptor });
                }
                Step::TableEntry(at, descriptor) => {
                    self.driver.guest.write(TABLES + 16 * u64::from(*at), &descriptor.to_bytes());
                }
                Step::Bytes(at, bytes) => {
                    let region = &self.driver.guest.memory.regions()[0];
                    let at = at % region.size;
                    let len = bytes.len().min((region.size - at) as usize);
                    self.driver.guest.write(region.guest_addr + at, &bytes[..len]);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(600))]

    #[test]
    fn a_hostile_packed_ring_gives_what_the_specification_says(
        size in 1..20u16,
        event_idx: bool,
        indirect in prop::bool::weighted(0.8),
        start in 20..60u64,
        table in prop::collection::vec(descriptor(), usize::from(TABLE_ENTRIES)),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let start = u64::from(size) + start % (2 * u64::from(size));
        let driver = PackedDriver::new(size, 0, start);
        let features = packed_features(event_idx, indirect);
        let device = driver.guest.device_at(features, driver.base(start, start));
        for (at, entry) in table.iter().enumerate() {
            driver.guest.write(TABLES + 16 * at as u64, &entry.to_bytes());
        }
        let (next, used) = (start, start);
        Attack { driver, device, features, next, used, popped: Vec::new(), pushed: 0 }.run(&steps);
    }
}
