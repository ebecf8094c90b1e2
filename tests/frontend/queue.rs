//! The driver side of a virtqueue in guest memory: a split one (virtio 1.3, 2.7), with the freedom to write anything into
//! it, or a packed one (`packed.rs`).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::arena::Arena;
use super::memory::GuestMemory;
use super::packed::{Packed, Place};
use super::wait::{self, DEADLINE, Event};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// A descriptor, as raw as it lies in the table.
#[derive(Debug, Clone, Copy, Default)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub const SIZE: u64 = 16;

    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }

    /// As in a packed ring and its tables: without a link, with a buffer id.
    pub fn to_packed_bytes(self, id: u16) -> [u8; 16] {
        Self { flags: id, next: self.flags, ..self }.to_bytes()
    }
}

/// One buffer of a well-formed chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub addr: u64,
    pub len: u32,
    pub writable: bool,
}

/// Where the descriptors of a well-formed chain lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Table {
    /// In the ring's own table.
    #[default]
    Direct,
    /// In an indirect table.
    Indirect,
    /// That many in the ring's own table, the rest in an indirect one (virtio 1.3, 2.7.5.3.2 allows it last in a chain).
    IndirectAfter(usize),
}

/// An element of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    pub id: u32,
    pub len: u32,
}

/// Where the three parts of a ring lie, guest-physical. Of a packed one, `avail` is the driver event suppression
/// structure and `used` the device's.
#[derive(Debug, Clone, Copy)]
pub struct RingLayout {
    pub packed: bool,
    pub size: u16,
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
}

impl RingLayout {
    /// Room for a ring of `size`, its parts wherever the arena puts them.
    pub fn cut(arena: &mut Arena, size: u16, packed: bool) -> Self {
        let entries = u64::from(size);
        let (avail, used) = if packed { (4, 4) } else { (6 + 2 * entries, 6 + 8 * entries) };
        Self {
            packed,
            size,
            descriptors: arena.cut(Descriptor::SIZE * entries, 16, 0),
            avail: arena.cut(avail, if packed { 4 } else { 2 }, 0),
            used: arena.cut(used, 4, 0),
        }
    }
}

/// The driver side of one virtqueue.
#[derive(Debug)]
pub struct Queue {
    pub index: u16,
    pub ring: RingLayout,
    pub memory: Arc<GuestMemory>,
    pub arena: Arena,
    pub kick: Event,
    pub call: Event,
    pub err: Event,
    pub event_idx: bool,
    /// Nobody calls: completions are found by looking.
    pub polling: bool,
    /// Of a packed ring; the fields after it are of a split one.
    packed: Option<Packed>,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    next_avail: u16,
    next_used: u16,
}

impl Queue {
    pub fn new(index: u16, ring: RingLayout, memory: Arc<GuestMemory>, arena: Arena, event_idx: bool) -> Self {
        let mut queue = Self {
            index,
            ring,
            memory,
            arena,
            kick: Event::new(),
            call: Event::new(),
            err: Event::new(),
            event_idx,
            polling: false,
            packed: None,
            free: Vec::new(),
            chains: Vec::new(),
            next_avail: 0,
            next_used: 0,
        };
        queue.reset();
        queue
    }

    /// Empties the ring, as a guest driver does before it starts a queue.
    pub fn reset(&mut self) {
        let RingLayout { packed, size, descriptors, avail, used } = self.ring;
        let entries = usize::from(size);
        self.memory.write(descriptors, &vec![0; 16 * entries]);
        self.memory.write(avail, &vec![0; if packed { 4 } else { 6 + 2 * entries }]);
        self.memory.write(used, &vec![0; if packed { 4 } else { 6 + 8 * entries }]);
        self.packed = packed.then(|| Packed::new(size));
        // Not in table order, so that a chain is no run of neighbours.
        self.free = (0..size).step_by(2).chain((1..size).step_by(2)).collect();
        self.chains = vec![Vec::new(); entries];
        self.next_avail = 0;
        self.next_used = 0;
        self.kick.take();
        self.call.take();
        self.err.take();
    }

    // A split ring, raw.

    /// Writes a descriptor into the ring's table.
    pub fn poke(&self, at: u16, descriptor: Descriptor) {
        self.memory.write(self.ring.descriptors + Descriptor::SIZE * u64::from(at), &descriptor.to_bytes());
    }

    /// Puts `head` into the next slot of the available ring, without publishing it.
    pub fn push_head(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.ring.size);
        self.memory.write(self.ring.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Publishes all pushed heads.
    pub fn publish(&self) {
        self.set_avail_idx(self.next_avail);
    }

    pub fn set_avail_idx(&self, idx: u16) {
        self.memory.store_u16(self.ring.avail + 2, idx);
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.memory.store_u16(self.ring.avail, flags);
    }

    pub fn suppress_calls(&self, suppress: bool) {
        if self.ring.packed {
            return Packed::suppress_calls(&self.memory, &self.ring, suppress);
        }
        self.set_avail_flags(if suppress { AVAIL_F_NO_INTERRUPT } else { 0 });
    }

    pub fn set_used_event(&self, idx: u16) {
        self.memory.store_u16(self.ring.avail + 4 + 2 * u64::from(self.ring.size), idx);
        fence(Ordering::SeqCst);
    }

    /// Up to where the device looked when it last wanted kicks again.
    pub fn avail_event(&self) -> u16 {
        self.memory.load_u16(self.avail_event_address())
    }

    fn avail_event_address(&self) -> u64 {
        self.ring.used + 4 + 8 * u64::from(self.ring.size)
    }

    pub fn used_flags(&self) -> u16 {
        self.memory.load_u16(self.ring.used)
    }

    pub fn used_idx(&self) -> u16 {
        self.memory.load_u16(self.ring.used + 2)
    }

    /// The index after the last chain made available.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The index of the next completion to take.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Carries on a split ring from where a device that had it before stopped.
    pub fn set_position(&mut self, idx: u16) {
        self.next_avail = idx;
        self.next_used = idx;
        self.set_avail_idx(idx);
        self.memory.store_u16(self.ring.used + 2, idx);
        self.memory.store_u16(self.avail_event_address(), idx);
    }

    // The ring, well-formed, of either layout.

    /// Where the driver stands, as SET_VRING_BASE has it when nothing is in flight.
    pub fn base(&self) -> u32 {
        match &self.packed {
            None => self.next_used.into(),
            Some(packed) => u32::from(packed.used.bits()) * 0x1_0001,
        }
    }

    /// Whether a device that stopped at this base has completed everything that it popped.
    pub fn is_drained(&self, base: u32) -> bool {
        match &self.packed {
            None => base == u32::from(self.used_idx()),
            Some(_) => base & 0xffff == base >> 16,
        }
    }

    /// Whether a completion waits to be taken.
    pub fn has_completion(&self) -> bool {
        match &self.packed {
            None => self.used_idx() != self.next_used,
            Some(packed) => packed.has_completion(&self.memory, &self.ring),
        }
    }

    /// The place after the last chain made available: what [`Self::notify`] takes.
    pub fn mark(&self) -> Place {
        self.packed.as_ref().map_or(Place { index: self.next_avail, wrap: false }, |packed| packed.avail)
    }

    /// Makes a chain available without telling the device; returns its head.
    #[track_caller]
    pub fn offer(&mut self, buffers: &[Buffer], table: Table) -> u16 {
        let direct = match table {
            Table::Direct => buffers.len(),
            Table::Indirect => 0,
            Table::IndirectAfter(count) => count,
        };
        let (own, indirect) = buffers.split_at(direct);
        let mut descriptors: Vec<Descriptor> = own.iter().copied().map(plain).collect();
        if table != Table::Direct {
            let entries = indirect.iter().copied().map(plain).collect();
            descriptors.push(self.indirect_table(entries));
        }
        if let Some(packed) = &mut self.packed {
            return packed.offer(&self.memory, &self.ring, &descriptors);
        }
        let slots: Vec<u16> = descriptors.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (at, descriptor) in descriptors.iter_mut().enumerate() {
            if let Some(&next) = slots.get(at + 1) {
                descriptor.flags |= NEXT;
                descriptor.next = next;
            }
            self.poke(slots[at], *descriptor);
        }
        let head = slots[0];
        self.chains[usize::from(head)] = slots;
        self.push_head(head);
        self.publish();
        head
    }

    /// Writes an indirect table, linked in order; returns the descriptor that refers to it.
    pub fn indirect_table(&mut self, mut entries: Vec<Descriptor>) -> Descriptor {
        if self.ring.packed {
            // Entries follow each other, without links.
            return self.raw_indirect_table(&entries);
        }
        let last = entries.len().saturating_sub(1);
        for (at, entry) in entries.iter_mut().enumerate().take(last) {
            entry.flags |= NEXT;
            entry.next = at as u16 + 1;
        }
        self.raw_indirect_table(&entries)
    }

    /// Writes an indirect table as it is; returns the descriptor that refers to it.
    pub fn raw_indirect_table(&mut self, entries: &[Descriptor]) -> Descriptor {
        let packed = self.ring.packed;
        let to_bytes = |entry: &Descriptor| if packed { entry.to_packed_bytes(0) } else { entry.to_bytes() };
        let bytes: Vec<u8> = entries.iter().flat_map(to_bytes).collect();
        let addr = self.arena.cut(bytes.len() as u64, 16, 0);
        self.memory.write(addr, &bytes);
        Descriptor { addr, len: bytes.len() as u32, flags: INDIRECT, next: 0 }
    }

    /// Tells the device, unless it said that it need not be told: `since` is the mark before what is new.
    pub fn notify(&self, since: Place) {
        fence(Ordering::SeqCst);
        let wanted = if let Some(packed) = &self.packed {
            packed.wants_kick(&self.memory, &self.ring, since)
        } else if self.event_idx {
            let new = self.next_avail;
            new.wrapping_sub(self.avail_event()).wrapping_sub(1) < new.wrapping_sub(since.index)
        } else {
            self.used_flags() & USED_F_NO_NOTIFY == 0
        };
        if wanted {
            self.kick.signal();
        }
    }

    /// Offers a chain and tells the device.
    #[track_caller]
    pub fn submit(&mut self, buffers: &[Buffer], table: Table) -> u16 {
        let since = self.mark();
        let head = self.offer(buffers, table);
        self.notify(since);
        head
    }

    /// Takes a completion if there is one.
    pub fn try_take(&mut self) -> Option<Used> {
        if let Some(packed) = &mut self.packed {
            return packed.try_take(&self.memory, &self.ring);
        }
        if self.used_idx() == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.ring.size);
        let element = self.memory.read(self.ring.used + 4 + 8 * slot, 8);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().expect("4 bytes"));
        let used = Used { id: word(0), len: word(4) };
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(chain) = self.chains.get_mut(used.id as usize) {
            self.free.append(chain);
        }
        Some(used)
    }

    /// Waits for a completion, woken by the device's call alone.
    #[track_caller]
    pub fn take(&mut self) -> Used {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(used) = self.try_take() {
                return used;
            }
            let left = end.saturating_duration_since(Instant::now());
            if self.polling {
                assert!(!left.is_zero(), "queue {}: no completion within {DEADLINE:?}", self.index);
                std::thread::yield_now();
                continue;
            }
            self.ask_for_call();
            if !self.has_completion() && self.call.wait(left) == 0 {
                let what = if self.has_completion() { "a completion without a call" } else { "no completion" };
                panic!("queue {}: {what} within {DEADLINE:?}", self.index);
            }
        }
    }

    /// With EVENT_IDX: asks for a call at the next completion.
    pub fn ask_for_call(&self) {
        match &self.packed {
            _ if !self.event_idx => {}
            None => self.set_used_event(self.next_used),
            Some(packed) => Packed::ask_for_call_at(&self.memory, &self.ring, packed.used),
        }
    }

    /// Waits until the device has looked at everything offered: with EVENT_IDX it says so before it sleeps.
    #[track_caller]
    pub fn wait_popped(&self) {
        assert!(self.event_idx, "only EVENT_IDX shows what a device has seen");
        wait::until("the device pops what was offered", || match &self.packed {
            None => self.avail_event() == self.next_avail,
            Some(packed) => packed.device_waits_here(&self.memory, &self.ring),
        });
    }

    /// True when the device reports the queue broken in time.
    pub fn reports_error(&self, timeout: Duration) -> bool {
        self.err.wait(timeout) > 0
    }
}

fn plain(buffer: Buffer) -> Descriptor {
    let flags = if buffer.writable { WRITE } else { 0 };
    Descriptor { addr: buffer.addr, len: buffer.len, flags, next: 0 }
}
