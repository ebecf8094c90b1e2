//! virtio-blk as a guest driver speaks it (virtio 1.3, 5.2): feature bits, config space, requests in any framing.

use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};

use super::queue::{Buffer, Queue, Table, Used};

/// Feature bits, as masks.
pub mod feature {
    use super::{virtio_blk, virtio_config, virtio_ring};

    pub const SIZE_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SIZE_MAX;
    pub const SEG_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
    pub const RO: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
    pub const BLK_SIZE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE;
    pub const FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
    pub const TOPOLOGY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_TOPOLOGY;
    pub const CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
    pub const MQ: u64 = 1 << virtio_blk::VIRTIO_BLK_F_MQ;
    pub const DISCARD: u64 = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
    pub const WRITE_ZEROES: u64 = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;
    pub const NOTIFY_ON_EMPTY: u64 = 1 << virtio_config::VIRTIO_F_NOTIFY_ON_EMPTY;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
    pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
    pub const ACCESS_PLATFORM: u64 = 1 << virtio_config::VIRTIO_F_ACCESS_PLATFORM;
    pub const RING_PACKED: u64 = 1 << virtio_config::VIRTIO_F_RING_PACKED;
    pub const IN_ORDER: u64 = 1 << virtio_config::VIRTIO_F_IN_ORDER;
    pub const RING_RESET: u64 = 1 << virtio_config::VIRTIO_F_RING_RESET;
}

/// Request types.
pub mod kind {
    use super::virtio_blk;

    pub const IN: u32 = virtio_blk::VIRTIO_BLK_T_IN;
    pub const OUT: u32 = virtio_blk::VIRTIO_BLK_T_OUT;
    pub const SCSI_CMD: u32 = virtio_blk::VIRTIO_BLK_T_SCSI_CMD;
    pub const FLUSH: u32 = virtio_blk::VIRTIO_BLK_T_FLUSH;
    pub const GET_ID: u32 = virtio_blk::VIRTIO_BLK_T_GET_ID;
    pub const DISCARD: u32 = virtio_blk::VIRTIO_BLK_T_DISCARD;
    pub const WRITE_ZEROES: u32 = virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES;
    pub const SECURE_ERASE: u32 = 14;
}

pub const OK: u8 = virtio_blk::VIRTIO_BLK_S_OK as u8;
pub const IOERR: u8 = virtio_blk::VIRTIO_BLK_S_IOERR as u8;
pub const UNSUPP: u8 = virtio_blk::VIRTIO_BLK_S_UNSUPP as u8;
/// What stands in the status byte until the device writes it.
pub const NO_STATUS: u8 = 0xEE;
/// What stands in a read buffer until the device writes it.
pub const UNREAD: u8 = 0x5A;

pub const SECTOR: u64 = 512;
/// Bytes of a GET_ID answer.
pub const ID_BYTES: u32 = virtio_blk::VIRTIO_BLK_ID_BYTES;

const HEADER: usize = 16;

/// The current `virtio_blk_config`, with the secure-erase and zoned fields.
pub const CONFIG_SIZE: u32 = 96;
/// Offset of the writeback byte in it.
pub const WRITEBACK: u32 = 32;

/// The config space, read field by field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config(pub Vec<u8>);

impl Config {
    fn number<const N: usize>(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&self.0[offset..offset + N]);
        u64::from_le_bytes(bytes)
    }

    pub fn capacity(&self) -> u64 {
        self.number::<8>(0)
    }
    pub fn size_max(&self) -> u64 {
        self.number::<4>(8)
    }
    pub fn seg_max(&self) -> u64 {
        self.number::<4>(12)
    }
    pub fn blk_size(&self) -> u64 {
        self.number::<4>(20)
    }
    pub fn physical_block_exp(&self) -> u64 {
        self.number::<1>(24)
    }
    pub fn writeback(&self) -> u64 {
        self.number::<1>(WRITEBACK as usize)
    }
    pub fn num_queues(&self) -> u64 {
        self.number::<2>(34)
    }
    pub fn max_discard_sectors(&self) -> u64 {
        self.number::<4>(36)
    }
    pub fn max_discard_seg(&self) -> u64 {
        self.number::<4>(40)
    }
    pub fn discard_sector_alignment(&self) -> u64 {
        self.number::<4>(44)
    }
    pub fn max_write_zeroes_sectors(&self) -> u64 {
        self.number::<4>(48)
    }
    pub fn max_write_zeroes_seg(&self) -> u64 {
        self.number::<4>(52)
    }
    pub fn write_zeroes_may_unmap(&self) -> u64 {
        self.number::<1>(56)
    }
    /// The fields of features that are not offered.
    pub fn secure_erase_and_zoned(&self) -> &[u8] {
        &self.0[60..]
    }
}

/// A segment of DISCARD and WRITE_ZEROES.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    pub sector: u64,
    pub sectors: u32,
    pub flags: u32,
}

impl Segment {
    pub const UNMAP: u32 = 1;

    pub fn new(sector: u64, sectors: u32) -> Self {
        Self { sector, sectors, flags: 0 }
    }

    fn to_bytes(self) -> Vec<u8> {
        [&self.sector.to_le_bytes()[..], &self.sectors.to_le_bytes(), &self.flags.to_le_bytes()].concat()
    }
}

/// A request: the header's fields, what follows it, and how much room there is for data.
#[derive(Debug, Clone)]
pub struct Request {
    pub kind: u32,
    pub sector: u64,
    pub payload: Vec<u8>,
    pub room: u32,
}

impl Request {
    pub fn new(kind: u32, sector: u64) -> Self {
        Self { kind, sector, payload: Vec::new(), room: 0 }
    }

    pub fn read(sector: u64, bytes: u32) -> Self {
        Self { room: bytes, ..Self::new(kind::IN, sector) }
    }

    pub fn write(sector: u64, data: &[u8]) -> Self {
        Self { payload: data.to_vec(), ..Self::new(kind::OUT, sector) }
    }

    pub fn flush() -> Self {
        Self::new(kind::FLUSH, 0)
    }

    pub fn get_id() -> Self {
        Self { room: ID_BYTES, ..Self::new(kind::GET_ID, 0) }
    }

    pub fn discard(segments: &[Segment]) -> Self {
        Self {
            payload: segments.iter().flat_map(|segment| segment.to_bytes()).collect(),
            ..Self::new(kind::DISCARD, 0)
        }
    }

    pub fn write_zeroes(segments: &[Segment]) -> Self {
        Self { kind: kind::WRITE_ZEROES, ..Self::discard(segments) }
    }
}

/// How a request's bytes are cut into descriptors. Each list gives the lengths from the front; what is left over makes
/// one more descriptor. Where there is no list, it is as Linux does it: header, data, status.
#[derive(Debug, Clone, Default)]
pub struct Framing {
    pub readable: Option<Vec<u32>>,
    pub writable: Option<Vec<u32>>,
    pub table: Table,
    /// How far each buffer is from a 512-byte boundary.
    pub skew: u64,
}

impl Framing {
    pub fn readable(cuts: &[u32]) -> Self {
        Self { readable: Some(cuts.to_vec()), ..Self::default() }
    }

    pub fn writable(cuts: &[u32]) -> Self {
        Self { writable: Some(cuts.to_vec()), ..Self::default() }
    }

    pub fn table(table: Table) -> Self {
        Self { table, ..Self::default() }
    }
}

/// A request on its way.
#[must_use]
#[derive(Debug)]
pub struct Ticket {
    pub head: u16,
    pub buffers: Vec<Buffer>,
    room: u32,
}

/// What the device made of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u8,
    pub used_len: u32,
    pub data: Vec<u8>,
}

impl Queue {
    /// Puts a request into guest memory and makes it available, without telling the device.
    #[track_caller]
    pub fn prepare(&mut self, request: &Request, framing: &Framing) -> Ticket {
        let mut readable = Vec::with_capacity(HEADER + request.payload.len());
        readable.extend(request.kind.to_le_bytes());
        readable.extend([0; 4]);
        readable.extend(request.sector.to_le_bytes());
        readable.extend(&request.payload);
        let mut writable = vec![UNREAD; request.room as usize];
        writable.push(NO_STATUS);

        let usual_readable = vec![HEADER as u32];
        let usual_writable = if request.room > 0 { vec![request.room] } else { Vec::new() };
        let readable_cuts = framing.readable.as_ref().unwrap_or(&usual_readable);
        let writable_cuts = framing.writable.as_ref().unwrap_or(&usual_writable);
        let mut buffers = self.place(&readable, readable_cuts, framing.skew, false);
        buffers.extend(self.place(&writable, writable_cuts, framing.skew, true));
        let head = self.offer(&buffers, framing.table);
        Ticket { head, buffers, room: request.room }
    }

    /// Copies bytes into buffers of the given lengths, each somewhere else.
    fn place(&mut self, bytes: &[u8], cuts: &[u32], skew: u64, writable: bool) -> Vec<Buffer> {
        let mut rest = bytes;
        let mut parts = Vec::new();
        for &cut in cuts {
            let (part, after) = rest.split_at(cut as usize);
            parts.push(part);
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(rest);
        }
        let mut buffers = Vec::with_capacity(parts.len());
        for part in parts {
            let len = part.len() as u32;
            let addr = self.arena.cut(u64::from(len).max(1), SECTOR, skew);
            self.memory.write(addr, part);
            buffers.push(Buffer { addr, len, writable });
        }
        buffers
    }

    /// Starts a request: prepares it and tells the device.
    #[track_caller]
    pub fn start(&mut self, request: &Request, framing: &Framing) -> Ticket {
        let since = self.mark();
        let ticket = self.prepare(request, framing);
        self.notify(since);
        ticket
    }

    /// What the device wrote for a request that is used.
    pub fn answer(&self, ticket: &Ticket, used: Used) -> Answer {
        assert_eq!(used.id, u32::from(ticket.head), "the completion of another chain");
        let writable = ticket.buffers.iter().filter(|buffer| buffer.writable);
        let mut data: Vec<u8> =
            writable.flat_map(|buffer| self.memory.read(buffer.addr, buffer.len as usize)).collect();
        let status = data.pop().expect("room for a status");
        assert_eq!(data.len(), ticket.room as usize);
        Answer { status, used_len: used.len, data }
    }

    /// Performs one request from start to end.
    #[track_caller]
    pub fn perform(&mut self, request: &Request, framing: &Framing) -> Answer {
        let mark = self.arena.mark();
        let ticket = self.start(request, framing);
        let used = self.take();
        let answer = self.answer(&ticket, used);
        self.arena.release(&mark);
        answer
    }

    /// Performs a request in the usual framing.
    #[track_caller]
    pub fn request(&mut self, request: &Request) -> Answer {
        self.perform(request, &Framing::default())
    }

    /// Waits for all of some requests, in whatever order they complete.
    #[track_caller]
    pub fn finish(&mut self, tickets: &[Ticket]) -> Vec<Answer> {
        self.finish_by(tickets, Self::take)
    }

    /// The answers of requests all of which must be complete.
    #[track_caller]
    pub fn finish_at_once(&mut self, tickets: &[Ticket]) -> Vec<Answer> {
        self.finish_by(tickets, |queue| queue.try_take().expect("completed already"))
    }

    #[track_caller]
    fn finish_by(&mut self, tickets: &[Ticket], mut take: impl FnMut(&mut Self) -> Used) -> Vec<Answer> {
        let mut answers: Vec<Option<Answer>> = vec![None; tickets.len()];
        for _ in tickets {
            let used = take(self);
            let at = tickets.iter().position(|ticket| u32::from(ticket.head) == used.id);
            let at = at.unwrap_or_else(|| panic!("{used:?} is of no request"));
            assert!(answers[at].is_none(), "{used:?} came twice");
            answers[at] = Some(self.answer(&tickets[at], used));
        }
        answers.into_iter().map(|answer| answer.expect("each completed once")).collect()
    }

    /// Reads what must be readable.
    #[track_caller]
    pub fn read(&mut self, sector: u64, bytes: u32) -> Vec<u8> {
        let answer = self.request(&Request::read(sector, bytes));
        assert_eq!((answer.status, answer.used_len), (OK, bytes + 1), "read of {bytes} bytes at sector {sector}");
        answer.data
    }

    /// Writes what must be writable.
    #[track_caller]
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        let answer = self.request(&Request::write(sector, data));
        assert_eq!(answer.status, OK, "write of {} bytes at sector {sector}", data.len());
    }

    /// Shows that the queue serves requests.
    #[track_caller]
    pub fn works(&mut self) {
        self.read(0, 512);
    }
}
