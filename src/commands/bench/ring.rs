//! The driver's side of a virtqueue, made to cost the client and the daemon as few cache lines as possible, so that a load
//! measures the daemon: descriptors are written once where the layout allows it, header and status of a request share a
//! line, and what is submitted is shown a batch at a time. It owns the requests' headers; it never waits.

mod library;
mod packed;
mod split;

use std::io;
use std::sync::atomic::Ordering;

use virtio_driver::VirtioBlkQueue;

use super::memory::Area;
use library::LibraryRing;
use packed::PackedRing;
use split::SplitRing;

/// Descriptors that a request takes: header, data, status.
pub const DESCRIPTORS_PER_REQUEST: u16 = 3;

/// Requests that are shown to the daemon in one go, at most: it begins while the client goes on.
const SHOWN_TOGETHER: u16 = 8;

/// What a request is to the device (virtio 1.3 §5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read = 0,
    Write = 1,
    Flush = 4,
}

/// Bytes of a request beside its data: its header, and where its status goes. A cache line.
pub const REQUEST_BYTES: usize = 64;
const HEADER_BYTES: u32 = 16;
const STATUS: usize = 16;
/// What no device answers.
const NOT_ANSWERED: u16 = 0xff;

/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Headers and buffers of a ring's requests, by slot.
struct Requests {
    /// [`REQUEST_BYTES`] for each slot.
    headers: Area,
    buffers: Area,
    buffer_bytes: u32,
}

impl Requests {
    /// Where a slot's data is.
    fn buffer(&self, slot: u16) -> *mut u8 {
        self.buffers.address(usize::from(slot) * self.buffer_bytes as usize) as *mut u8
    }

    /// Header, data unless there is none, and status: address, length and flags of each descriptor.
    fn parts(&self, slot: u16, kind: Kind) -> [(u64, u32, u16); 3] {
        let header = self.headers.address(usize::from(slot) * REQUEST_BYTES);
        let data = self.buffer(slot) as u64;
        let direction = if kind == Kind::Read { WRITE } else { 0 };
        [(header, HEADER_BYTES, NEXT), (data, self.buffer_bytes, NEXT | direction), (header + STATUS as u64, 1, WRITE)]
    }

    #[inline]
    fn write_header(&self, slot: u16, kind: Kind, sector: u64) {
        let at = usize::from(slot) * REQUEST_BYTES;
        self.headers.u64(at).store(kind as u64, Ordering::Relaxed);
        self.headers.u64(at + 8).store(sector, Ordering::Relaxed);
        self.headers.u16(at + STATUS).store(NOT_ANSWERED, Ordering::Relaxed);
    }

    /// The status byte that the device has written.
    #[inline]
    fn status(&self, slot: u16) -> u8 {
        self.headers.u16(usize::from(slot) * REQUEST_BYTES + STATUS).load(Ordering::Relaxed) as u8
    }
}

/// A request that came back.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub slot: u16,
    pub status: u8,
}

enum Layout {
    Split(SplitRing),
    Packed(PackedRing),
    Library(LibraryRing),
}

/// A ring and its requests. `slot` numbers a request and its buffer, below a third of the ring's size.
pub struct Ring {
    layout: Layout,
    requests: Requests,
    /// Submitted and not shown yet.
    hidden: u16,
    calls: bool,
}

impl Ring {
    /// A ring of `size` entries at the start of `ring`, which is laid out as virtio-driver does it, with so many slots.
    pub fn new(
        ring: Area,
        size: u16,
        (packed, event_idx): (bool, bool),
        (headers, buffers): (Area, Area),
        (slots, buffer_bytes): (u16, u32),
    ) -> Self {
        let requests = Requests { headers, buffers, buffer_bytes };
        let layout = match packed {
            false => Layout::Split(SplitRing::new(ring, size, event_idx, slots)),
            true => Layout::Packed(PackedRing::new(ring, size, event_idx, slots)),
        };
        Self { layout, requests, hidden: 0, calls: false }
    }

    /// A ring of virtio-driver.
    pub fn of_library(ring: VirtioBlkQueue<'static, u16>, event_idx: bool, requests: (Area, Area), bytes: u32) -> Self {
        let (headers, buffers) = requests;
        let requests = Requests { headers, buffers, buffer_bytes: bytes };
        Self { layout: Layout::Library(LibraryRing { ring, event_idx }), requests, hidden: 0, calls: false }
    }

    /// Puts a request on the ring. The device sees it at the latest at the next [`Ring::show`].
    ///
    /// # Errors
    /// virtio-driver's ring has no room.
    #[inline]
    pub fn submit(&mut self, slot: u16, kind: Kind, sector: u64) -> io::Result<()> {
        match &mut self.layout {
            Layout::Split(ring) => {
                self.requests.write_header(slot, kind, sector);
                ring.submit(&self.requests, slot, kind);
            }
            Layout::Packed(ring) => {
                self.requests.write_header(slot, kind, sector);
                ring.submit(&self.requests, slot, kind);
            }
            Layout::Library(ring) => return ring.submit(&self.requests, slot, kind, sector),
        }
        self.hidden += 1;
        if self.hidden == SHOWN_TOGETHER {
            self.show();
        }
        Ok(())
    }

    #[inline]
    fn show(&mut self) {
        self.hidden = 0;
        match &mut self.layout {
            Layout::Split(ring) => ring.show(),
            Layout::Packed(ring) => ring.show(),
            Layout::Library(_) => {}
        }
    }

    /// Shows the device everything submitted; whether it asked to be kicked for some of it.
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        self.show();
        match &mut self.layout {
            Layout::Split(ring) => ring.needs_kick(),
            Layout::Packed(ring) => ring.needs_kick(),
            Layout::Library(ring) => ring.needs_kick(),
        }
    }

    /// Whether an answer waits.
    #[inline]
    pub fn has_answer(&mut self) -> bool {
        match &mut self.layout {
            Layout::Split(ring) => ring.has_answer(),
            Layout::Packed(ring) => ring.has_answer(),
            Layout::Library(ring) => ring.has_answer(),
        }
    }

    /// The next answer, if one waits.
    ///
    /// # Errors
    /// What the device names was not in flight.
    #[inline]
    pub fn next_answer(&mut self) -> Result<Option<Answer>, &'static str> {
        let slot = match &mut self.layout {
            Layout::Split(ring) => ring.next_answer(),
            Layout::Packed(ring) => ring.next_answer(),
            Layout::Library(ring) => return ring.next_answer(),
        };
        let Some(slot) = slot? else { return Ok(None) };
        Ok(Some(Answer { slot, status: self.requests.status(slot) }))
    }

    /// After a batch of answers: asks to be called for the next one, if calls are on.
    #[inline]
    pub fn took_answers(&mut self) {
        // virtio-driver does it by itself.
        if self.calls && !matches!(self.layout, Layout::Library(_)) {
            self.ask_for_calls(true);
        }
    }

    /// Asks to be called for the next answer, or for none.
    pub fn set_calls(&mut self, enabled: bool) {
        self.calls = enabled;
        self.ask_for_calls(enabled);
    }

    fn ask_for_calls(&mut self, enabled: bool) {
        match &mut self.layout {
            Layout::Split(ring) => ring.ask_for_calls(enabled),
            Layout::Packed(ring) => ring.ask_for_calls(enabled),
            Layout::Library(ring) => ring.ring.set_used_notif_enabled(enabled),
        }
    }
}

const NOT_IN_FLIGHT: &str = "the daemon completed a request that was not in flight";
