//! One request: from a descriptor chain to a status byte and `used.len` (virtio 1.3, 5.2.6 and 2.7.8). It answers
//! as blockport's contract says, so that the two can be compared; it never keeps anything between requests.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryLoadGuard, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::config::{SECTOR, ZERO_SECTORS_MAX, ZERO_SEGMENTS_MAX};
use crate::disk::Disk;

/// Bytes of `struct virtio_blk_outhdr`: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of one discard or write-zeroes segment: sector, number of sectors, flags.
const SEGMENT: usize = 16;

/// Guest memory as seen by one batch.
type Memory = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// What a request is executed with.
pub struct Context<'a> {
    pub disk: &'a Disk,
    /// The answer to GET_ID.
    pub serial: &'a [u8; 20],
    /// Whether a write must be durable before its status.
    pub write_through: bool,
}

/// Why a request failed: the status byte to answer.
enum Failure {
    Io,
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

/// A chain taken apart, whatever its framing: header, data either way, status.
pub struct Request<'a> {
    kind: u32,
    sector: u64,
    /// What the guest wrote for us, after the header.
    output: Vec<VolatileSlice<'a>>,
    /// What the guest reads from us, before the status.
    input: Vec<VolatileSlice<'a>>,
    status: VolatileSlice<'a>,
}

impl<'a> Request<'a> {
    /// Takes a chain apart; `None` where header or status are missing or lie outside guest memory.
    pub fn parse(memory: &'a Memory, chain: DescriptorChain<Memory>) -> Option<Self> {
        let (mut output, mut input) = (Vec::new(), Vec::new());
        for descriptor in chain {
            let (side, access) = if descriptor.is_write_only() {
                (&mut input, Permissions::Write)
            } else {
                (&mut output, Permissions::Read)
            };
            let slices = memory.get_slices(descriptor.addr(), descriptor.len() as usize, access).ok()?;
            for slice in slices {
                side.push(slice.ok()?);
            }
        }
        let header: [u8; HEADER] = take_front(&mut output)?;
        let status = take_last_byte(&mut input)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        Some(Self { kind, sector: u64::from_le_bytes(sector), output, input, status })
    }

    /// Does what the request asks, writes its status, and returns `used.len`: the bytes written, counted from the
    /// first that is writable.
    pub fn execute(mut self, context: &Context) -> u32 {
        let (status, written) = match self.dispatch(context) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        // Status constants are at most 2.
        self.status.copy_from(&[status as u8]);
        let contiguous = written == length(&self.input);
        u32::try_from(written + u64::from(contiguous)).unwrap_or(u32::MAX)
    }

    /// Does what the request asks and returns the data bytes written to the guest.
    fn dispatch(&mut self, context: &Context) -> Result<u64, Failure> {
        match self.kind {
            VIRTIO_BLK_T_IN => {
                let (offset, bytes) = range(self.sector, length(&self.input), context.disk)?;
                context.disk.read(&self.input, offset)?;
                Ok(bytes)
            }
            VIRTIO_BLK_T_OUT => {
                writable(context.disk)?;
                let (offset, _) = range(self.sector, length(&self.output), context.disk)?;
                context.disk.write(&self.output, offset)?;
                durable(context)
            }
            VIRTIO_BLK_T_FLUSH => {
                context.disk.flush()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut left: &[u8] = context.serial;
                for slice in &self.input {
                    let (now, later) = left.split_at(left.len().min(slice.len()));
                    slice.copy_from(now);
                    left = later;
                }
                Ok((context.serial.len() - left.len()) as u64)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.zero(context),
            _ => Err(Failure::Unsupported),
        }
    }

    /// DISCARD and WRITE_ZEROES: all segments are judged before the first is executed.
    fn zero(&mut self, context: &Context) -> Result<u64, Failure> {
        writable(context.disk)?;
        let bytes = length(&self.output);
        if bytes == 0 || !bytes.is_multiple_of(SEGMENT as u64) {
            return Err(Failure::Io);
        }
        if bytes / SEGMENT as u64 > u64::from(ZERO_SEGMENTS_MAX) {
            return Err(Failure::Unsupported);
        }
        let discard = self.kind == VIRTIO_BLK_T_DISCARD;
        let mut segments = Vec::new();
        while let Some(segment) = take_front::<SEGMENT>(&mut self.output) {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && flags != 0) {
                return Err(Failure::Unsupported);
            }
            if sectors > ZERO_SECTORS_MAX {
                return Err(Failure::Io);
            }
            let (offset, bytes) = range(sector, u64::from(sectors) * SECTOR, context.disk)?;
            segments.push((offset, bytes, flags != 0));
        }
        for (offset, bytes, unmap) in segments {
            if discard {
                context.disk.discard(offset, bytes)?;
            } else {
                context.disk.write_zeroes(offset, bytes, unmap)?;
            }
        }
        durable(context)
    }
}

/// Refuses what a read-only disk cannot do.
fn writable(disk: &Disk) -> Result<(), Failure> {
    if disk.read_only { Err(Failure::Io) } else { Ok(()) }
}

/// Ends a request that wrote: durable now, if nothing will ask for it later.
fn durable(context: &Context) -> Result<u64, Failure> {
    if context.write_through {
        context.disk.flush()?;
    }
    Ok(0)
}

/// Offset and length in bytes of a request that lies within the disk.
fn range(sector: u64, bytes: u64, disk: &Disk) -> Result<(u64, u64), Failure> {
    let offset = sector.checked_mul(SECTOR).ok_or(Failure::Io)?;
    let end = offset.checked_add(bytes).ok_or(Failure::Io)?;
    if !bytes.is_multiple_of(SECTOR) || end > disk.size.next_multiple_of(SECTOR) {
        return Err(Failure::Io);
    }
    Ok((offset, bytes))
}

/// The sum of the slices' lengths, in bytes.
fn length(slices: &[VolatileSlice]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Takes `N` bytes from the front, or `None` if there are fewer.
fn take_front<const N: usize>(slices: &mut Vec<VolatileSlice>) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut have = 0;
    while have < N {
        let slice = slices.first()?;
        let n = slice.copy_to(&mut bytes[have..]);
        have += n;
        if n == slice.len() {
            slices.remove(0);
        } else {
            slices[0] = slice.offset(n).ok()?;
        }
    }
    Some(bytes)
}

/// Takes the last byte, which is where the status goes.
fn take_last_byte<'a>(slices: &mut Vec<VolatileSlice<'a>>) -> Option<VolatileSlice<'a>> {
    loop {
        let last = slices.pop()?;
        if let Some(before) = last.len().checked_sub(1) {
            if before > 0 {
                slices.push(last.subslice(0, before).ok()?);
            }
            return last.offset(before).ok();
        }
    }
}
