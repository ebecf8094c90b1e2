//! PackedDriver: the driver side of a packed ring (virtio 1.3 §2.8), straight from the specification. It shares no code
//! and no representation with the device's side.

use super::guest::{Buffer, Guest, INDIRECT, NEXT, WRITE};

pub(crate) const AVAIL: u16 = 1 << 7;
pub(crate) const USED: u16 = 1 << 15;

/// What an event suppression structure asks for (§2.8.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Enable,
    Disable,
    /// When the entry with this index and wrap counter is reached.
    At(u16, bool),
}

impl Event {
    fn to_bytes(self) -> [u8; 4] {
        let (position, flags) = match self {
            Self::Enable => (0, 0u16),
            Self::Disable => (0, 1),
            Self::At(index, wrap) => (index | u16::from(wrap) << 15, 2),
        };
        let ([a, b], [c, d]) = (position.to_le_bytes(), flags.to_le_bytes());
        [a, b, c, d]
    }

    fn from_bytes([a, b, c, d]: [u8; 4]) -> Self {
        let position = u16::from_le_bytes([a, b]);
        match u16::from_le_bytes([c, d]) {
            0 => Self::Enable,
            1 => Self::Disable,
            2 => Self::At(position & 0x7fff, position >> 15 == 1),
            other => panic!("event flags {other:#x}"),
        }
    }
}

/// A descriptor as it lies in a packed ring or in an indirect table of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PackedDescriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

impl PackedDescriptor {
    pub(crate) fn of(buffer: &Buffer) -> Self {
        let flags = if buffer.writable { WRITE } else { 0 };
        Self { addr: buffer.addr, len: buffer.len as u32, id: 0, flags }
    }

    pub(crate) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.id.to_le_bytes());
        bytes[14..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        let number = |from: usize, to: usize| {
            bytes[from..to].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        Self { addr: number(0, 8), len: number(8, 12) as u32, id: number(12, 14) as u16, flags: number(14, 16) as u16 }
    }
}

/// An entry of the ring, counted over all laps from lap 0, whose wrap counter is 0.
pub(crate) type Count = u64;

/// The driver of one ring.
pub(crate) struct PackedDriver {
    pub(crate) guest: Guest,
    /// The next entry to make available.
    pub(crate) avail: Count,
    /// The next entry in which a completion is looked for.
    pub(crate) used: Count,
    /// The entries that each buffer id takes, where it is on its way.
    pub(crate) slots: Vec<Option<u16>>,
}

impl PackedDriver {
    /// A driver whose ring stands at entry `start`, everything before it being done. A new ring stands at its size.
    pub(crate) fn new(size: u16, skew: u64, start: Count) -> Self {
        let guest = Guest::packed(size, skew);
        let driver = Self { guest, avail: start, used: start, slots: vec![None; usize::from(size)] };
        let lap = u64::from(size);
        for before in start.saturating_sub(lap)..start {
            // As the device left them; where nothing was ever, zeroes.
            if before >= lap {
                let flags = if driver.wrap(before) { AVAIL | USED } else { 0 };
                driver.poke(before, PackedDescriptor { flags, ..PackedDescriptor::default() });
            }
        }
        driver
    }

    pub(crate) fn size(&self) -> u16 {
        self.guest.size
    }

    pub(crate) fn index(&self, at: Count) -> u16 {
        (at % u64::from(self.size())) as u16
    }

    pub(crate) fn wrap(&self, at: Count) -> bool {
        at / u64::from(self.size()) % 2 == 1
    }

    /// Where the ring stands, as SET_VRING_BASE has it.
    pub(crate) fn base(&self, avail: Count, used: Count) -> u32 {
        let half = |at| u32::from(self.index(at)) | u32::from(self.wrap(at)) << 15;
        half(avail) | half(used) << 16
    }

    pub(crate) fn address(&self, at: Count) -> u64 {
        self.guest.desc + 16 * u64::from(self.index(at))
    }

    pub(crate) fn poke(&self, at: Count, descriptor: PackedDescriptor) {
        self.guest.write(self.address(at), &descriptor.to_bytes());
    }

    pub(crate) fn peek(&self, at: Count) -> PackedDescriptor {
        PackedDescriptor::from_bytes(self.guest.read(self.address(at)))
    }

    /// The flags of an available descriptor at an entry.
    pub(crate) fn available(&self, at: Count) -> u16 {
        if self.wrap(at) { AVAIL } else { USED }
    }

    /// How many entries are free.
    pub(crate) fn free(&self) -> u16 {
        self.size() - self.slots.iter().flatten().sum::<u16>()
    }

    /// Makes a list of descriptors available under an id that is free. There must be room.
    pub(crate) fn offer(&mut self, id: u16, descriptors: &[PackedDescriptor]) {
        let last = descriptors.len() - 1;
        let complete = |(number, descriptor): (usize, &PackedDescriptor)| {
            let at = self.avail + number as u64;
            let next = if number < last { NEXT } else { 0 };
            // Only the last id counts; the others are anything.
            let id = if number == last { id } else { !id };
            (at, PackedDescriptor { id, flags: descriptor.flags | next | self.available(at), ..*descriptor })
        };
        // The first becomes available last.
        for (at, descriptor) in descriptors.iter().enumerate().map(complete).rev() {
            self.poke(at, descriptor);
        }
        self.avail += descriptors.len() as u64;
        self.slots[usize::from(id)] = Some(descriptors.len() as u16);
    }

    /// Makes an indirect table available that was written at `addr`.
    pub(crate) fn offer_table(&mut self, id: u16, addr: u64, entries: &[PackedDescriptor]) {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_bytes()).collect();
        self.guest.write(addr, &bytes);
        let table = PackedDescriptor { addr, len: bytes.len() as u32, id: 0, flags: INDIRECT };
        self.offer(id, &[table]);
    }

    /// The next completion, if there is one: id, length.
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        let PackedDescriptor { len, id, flags, .. } = self.peek(self.used);
        let used = if self.wrap(self.used) { AVAIL | USED } else { 0 };
        if flags & (AVAIL | USED) != used {
            return None;
        }
        assert_eq!(flags & !(AVAIL | USED | WRITE), 0, "flags {flags:#x} of a used descriptor");
        assert_eq!(flags & WRITE != 0, len > 0, "whether the length counts");
        let slots = self.slots.get_mut(usize::from(id)).and_then(Option::take);
        self.used += u64::from(slots.unwrap_or_else(|| panic!("id {id} is completed, and not on its way")));
        Some((id, len))
    }

    pub(crate) fn set_driver_event(&self, event: Event) {
        self.guest.write(self.guest.avail, &event.to_bytes());
    }

    pub(crate) fn device_event(&self) -> Event {
        Event::from_bytes(self.guest.read(self.guest.used))
    }

    /// Whether an event is due when the entries from `old` up to `new` were passed.
    pub(crate) fn is_due(&self, event: Event, old: Count, new: Count) -> bool {
        match event {
            Event::Enable => true,
            Event::Disable => false,
            Event::At(index, wrap) => (old..new).any(|at| (self.index(at), self.wrap(at)) == (index, wrap)),
        }
    }
}
