//! The virtio-blk device model (virtio 1.3 §5.2.6): a descriptor chain's header, one match on the request type, the
//! BlockBackend, one status byte. It knows no ring and no socket.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use blockport_block::driver::BoxFuture;
use blockport_block::iovec::{self, IoVec};
use blockport_block::{BackendChannel, BlockError, BlockResult, Request, RequestKind, Submitted};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::config_space::{RANGE_SEGMENTS_MAX, RangeLimits, SECTOR_SIZE};
use crate::guest_memory::GuestMemory;
use crate::virtqueue::Chain;

const HEADER_BYTES: usize = 16;
/// Of a discard's or write-zeroes' segment: sector u64, sectors u32, flags u32.
const SEGMENT_BYTES: usize = 16;

/// What a request needs to know of its device.
#[derive(Debug, Clone)]
pub(crate) struct DeviceModel {
    pub(crate) serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    pub(crate) writable: bool,
    /// Whether a discard is a request that the device knows; one on a read-only disk is known and refused.
    pub(crate) can_discard: bool,
    /// In bytes, a power of two, at least 512.
    pub(crate) block_size: u32,
    pub(crate) ranges: RangeLimits,
}

/// The outcome of starting a request.
pub(crate) enum Started {
    /// It is complete. The chain is the caller's again.
    Done {
        /// How many bytes of the chain were written.
        written: u32,
    },
    /// It goes on, and has taken the chain.
    Pending(Pending),
    /// The block layer has failed it; it has taken the chain.
    Failed(Failed),
}

/// What runs in the block layer.
enum Work {
    One(Request),
    Several(BoxFuture<BlockResult>),
}

/// The writable bytes in front of the status byte.
#[derive(Clone, Copy)]
struct Room {
    bytes: u32,
    /// Whether the request writes all of them if it succeeds. Only a read does.
    is_filled: bool,
}

/// What the header of a chain says, and where its parts are.
#[derive(Clone, Copy)]
struct Parsed {
    kind: u32,
    sector: u64,
    /// The first of the readable buffers that holds data.
    from: usize,
    /// Where the status byte goes.
    status: IoVec,
    room: Room,
}

/// A request under way. It must be polled to its end.
pub(crate) struct Pending {
    /// `None` once it has ended.
    chain: Option<Chain>,
    parsed: Parsed,
    work: Work,
}

/// A request that the block layer has failed. What becomes of it is decided by the error policy; nothing is written yet.
pub(crate) struct Failed {
    chain: Chain,
    parsed: Parsed,
    error: BlockError,
}

impl Failed {
    pub(crate) fn error(&self) -> BlockError {
        self.error
    }

    /// What it is to the block layer.
    pub(crate) fn kind(&self) -> RequestKind {
        match self.parsed.kind {
            VIRTIO_BLK_T_IN => RequestKind::Read,
            VIRTIO_BLK_T_FLUSH => RequestKind::Flush,
            VIRTIO_BLK_T_DISCARD => RequestKind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => RequestKind::WriteZeroes,
            _ => RequestKind::Write,
        }
    }

    /// Keeps the memory that its buffers are in, for as long as the request lives.
    pub(crate) fn hold(&mut self, memory: &Arc<GuestMemory>) {
        self.chain.memory.get_or_insert_with(|| memory.clone());
    }

    /// Answers with the error. Returns the chain, and how many of its bytes were written.
    pub(crate) fn report(self) -> (Chain, u32) {
        let written = finish(self.parsed.status, self.parsed.room, status_of(self.error));
        (self.chain, written)
    }

    /// Answers as if all were well. A read has filled its buffers with nothing for sure, and claims none of it.
    pub(crate) fn ignore(self) -> (Chain, u32) {
        let room = Room { is_filled: false, ..self.parsed.room };
        (self.chain, finish(self.parsed.status, room, VIRTIO_BLK_S_OK))
    }

    /// Does it once more. The chain comes back in `chain`, unless the request has taken it again.
    pub(crate) fn retry(self, chain: &mut Chain, device: &DeviceModel, channel: &Rc<BackendChannel>) -> Started {
        *chain = self.chain;
        dispatch(chain, self.parsed, device, channel)
    }
}

impl Pending {
    /// How many buffers its chain has.
    pub(crate) fn buffers(&self) -> usize {
        self.chain.as_ref().map_or(0, |chain| chain.iov.len())
    }
}

impl Future for Pending {
    /// The chain, and how many of its bytes were written.
    type Output = Result<(Chain, u32), Failed>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let result = match &mut this.work {
            Work::One(request) => std::task::ready!(Pin::new(request).poll(cx)),
            Work::Several(future) => std::task::ready!(future.as_mut().poll(cx)),
        };
        let (chain, parsed) = (this.chain.take().unwrap_or_default(), this.parsed);
        Poll::Ready(match result {
            Ok(()) => Ok((chain, finish(parsed.status, parsed.room, VIRTIO_BLK_S_OK))),
            Err(error) => Err(Failed { chain, parsed, error }),
        })
    }
}

/// The one place where an error becomes a status.
fn status_of(error: BlockError) -> u32 {
    match error {
        BlockError::NotSupported => VIRTIO_BLK_S_UNSUPP,
        _ => VIRTIO_BLK_S_IOERR,
    }
}

/// Writes the status and returns the used length: the bytes written from the first writable one on (§2.7.8.2). The
/// status counts only where it follows them without a gap; a failed read may have written some, but none for sure.
#[inline]
fn finish(status: IoVec, room: Room, code: u32) -> u32 {
    status.write_byte(code as u8);
    let is_filled = room.bytes == 0 || (room.is_filled && code == VIRTIO_BLK_S_OK);
    if is_filled { room.bytes.saturating_add(1) } else { 0 }
}

/// Starts the request that `chain` holds.
#[inline]
pub(crate) fn start(chain: &mut Chain, device: &DeviceModel, channel: &Rc<BackendChannel>) -> Started {
    // No room for a status: nothing can be answered, and nothing is done.
    let Some(status) = take_status(chain) else {
        chain.status = 0;
        return answered(0);
    };
    let (readable, data_in) = chain.iov.split_at_mut(chain.readable);
    let in_bytes = u32::try_from(iovec::total_len(data_in)).unwrap_or(u32::MAX);
    let Some((header, from)) = take_header(readable) else {
        return answered(finish(status, Room { bytes: in_bytes, is_filled: false }, VIRTIO_BLK_S_IOERR));
    };
    // §5.2.6: le32 type, le32 reserved, le64 sector.
    let (kind, sector) = (header[0] as u32, header[1]);
    let room = Room { bytes: in_bytes, is_filled: kind == VIRTIO_BLK_T_IN };
    dispatch(chain, Parsed { kind, sector, from, status, room }, device, channel)
}

/// The one match on the request type.
#[inline(always)]
fn dispatch(chain: &mut Chain, parsed: Parsed, device: &DeviceModel, channel: &Rc<BackendChannel>) -> Started {
    let Parsed { kind, sector, from, status, room } = parsed;
    let (readable, data_in) = chain.iov.split_at(chain.readable);
    let data_out = &readable[from..];
    // What the block layer is asked once; all else is answered in its arm.
    let submitted = match kind {
        VIRTIO_BLK_T_IN => match device.range(sector, iovec::total_len(data_in)) {
            Some(offset) => channel.preadv(offset, data_in),
            None => return refuse(RequestKind::Read, channel, status, room),
        },
        VIRTIO_BLK_T_OUT => match device.range(sector, iovec::total_len(data_out)) {
            Some(offset) if device.writable => channel.pwritev(offset, data_out),
            _ => return refuse(RequestKind::Write, channel, status, room),
        },
        VIRTIO_BLK_T_FLUSH => channel.flush(),
        VIRTIO_BLK_T_GET_ID => {
            // §5.2.6: no terminator when the serial is as long as the field. A shorter buffer gets what fits.
            let copied = iovec::fill_from(data_in, &device.serial) as u32;
            status.write_byte(VIRTIO_BLK_S_OK as u8);
            return answered(copied + u32::from(copied == room.bytes));
        }
        VIRTIO_BLK_T_DISCARD if device.can_discard => {
            let several = device.discard(data_out, channel);
            return start_several(several, RequestKind::Discard, chain, channel, parsed);
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            let several = device.write_zeroes(data_out, channel);
            return start_several(several, RequestKind::WriteZeroes, chain, channel, parsed);
        }
        _ => return answered(finish(status, room, VIRTIO_BLK_S_UNSUPP)),
    };
    match submitted {
        Submitted::Done(Ok(())) => Started::Done { written: finish(status, room, VIRTIO_BLK_S_OK) },
        Submitted::Done(Err(error)) => failed(chain, parsed, error),
        Submitted::Pending(request) => {
            let (chain, work) = (Some(std::mem::take(chain)), Work::One(request));
            Started::Pending(Pending { chain, parsed, work })
        }
    }
}

#[cold]
fn failed(chain: &mut Chain, parsed: Parsed, error: BlockError) -> Started {
    Started::Failed(Failed { chain: std::mem::take(chain), parsed, error })
}

/// A request of several segments, or why it is none.
fn start_several(
    several: Result<BoxFuture<BlockResult>, Refusal>,
    kind: RequestKind,
    chain: &mut Chain,
    channel: &BackendChannel,
    parsed: Parsed,
) -> Started {
    match several {
        Ok(future) => {
            let chain = Some(std::mem::take(chain));
            Started::Pending(Pending { chain, parsed, work: Work::Several(future) })
        }
        Err(Refusal::IoError) => refuse(kind, channel, parsed.status, parsed.room),
        Err(Refusal::Unsupported) => answered(finish(parsed.status, parsed.room, VIRTIO_BLK_S_UNSUPP)),
    }
}

/// What is answered without asking the block layer.
#[inline]
fn answered(written: u32) -> Started {
    Started::Done { written }
}

/// A request that is refused before it reaches the block layer.
#[cold]
fn refuse(kind: RequestKind, channel: &BackendChannel, status: IoVec, room: Room) -> Started {
    channel.account_invalid(kind);
    answered(finish(status, room, VIRTIO_BLK_S_IOERR))
}

/// Cuts the status byte off: the last writable byte (§5.2.6; any framing is legal, §2.7.4).
#[inline]
fn take_status(chain: &mut Chain) -> Option<IoVec> {
    if chain.iov.len() == chain.readable {
        return None;
    }
    let last = chain.iov.last_mut()?;
    let status = last.split_last_byte()?;
    if last.is_empty() {
        chain.iov.pop();
    }
    chain.status = status.base() as usize;
    Some(status)
}

/// Cuts the header off the readable bytes. Returns it with the number of the first buffer that holds data; `None` when
/// there are fewer bytes than a header has.
#[inline]
fn take_header(readable: &mut [IoVec]) -> Option<([u64; 2], usize)> {
    if let [first, ..] = readable
        && first.len() == HEADER_BYTES
    {
        return first.read_two_le64().map(|header| (header, 1));
    }
    take_split_header(readable)
}

/// The same for a header that shares its buffer with data, or lies in several.
#[cold]
fn take_split_header(readable: &mut [IoVec]) -> Option<([u64; 2], usize)> {
    let mut bytes = [0; HEADER_BYTES];
    if iovec::copy_to(readable, &mut bytes) < HEADER_BYTES {
        return None;
    }
    let (numbers, _) = bytes.as_chunks::<8>();
    let header = [u64::from_le_bytes(numbers[0]), u64::from_le_bytes(numbers[1])];
    let mut left = HEADER_BYTES;
    for (index, buffer) in readable.iter_mut().enumerate() {
        if left < buffer.len() {
            *buffer = buffer.part(left, buffer.len() - left);
            return Some((header, index));
        }
        left -= buffer.len();
        if left == 0 {
            return Some((header, index + 1));
        }
    }
    None
}

/// Why a list of segments is refused.
enum Refusal {
    IoError,
    Unsupported,
}

/// A checked segment of a discard or write-zeroes.
struct Segment {
    offset: u64,
    bytes: u64,
    unmap: bool,
}

impl DeviceModel {
    /// The byte offset of `sector`, if offset and length are whole blocks and their sum is a number. Whether they lie on
    /// the disk is checked where its size is owned.
    #[inline]
    fn range(&self, sector: u64, bytes: u64) -> Option<u64> {
        let mask = u64::from(self.block_size) - 1;
        let offset = sector.checked_mul(SECTOR_SIZE)?;
        ((offset | bytes) & mask == 0 && offset.checked_add(bytes).is_some()).then_some(offset)
    }

    fn discard(&self, payload: &[IoVec], channel: &Rc<BackendChannel>) -> Result<BoxFuture<BlockResult>, Refusal> {
        let segments = self.segments(payload, self.ranges.discard_sectors_max)?;
        if segments.iter().any(|segment| segment.unmap) {
            return Err(Refusal::Unsupported);
        }
        let channel = channel.clone();
        Ok(Box::pin(async move {
            for segment in segments {
                channel.pdiscard(segment.offset, segment.bytes).await?;
            }
            Ok(())
        }))
    }

    fn write_zeroes(&self, payload: &[IoVec], channel: &Rc<BackendChannel>) -> Result<BoxFuture<BlockResult>, Refusal> {
        let segments = self.segments(payload, self.ranges.zeroes_sectors_max)?;
        let channel = channel.clone();
        Ok(Box::pin(async move {
            for segment in segments {
                channel.pwrite_zeroes(segment.offset, segment.bytes, segment.unmap).await?;
            }
            Ok(())
        }))
    }

    /// Reads and checks the segments of a discard or write-zeroes (§5.2.6.2), all before any takes effect.
    fn segments(&self, payload: &[IoVec], sectors_max: u32) -> Result<Vec<Segment>, Refusal> {
        let bytes = iovec::total_len(payload);
        if !self.writable || bytes == 0 || !bytes.is_multiple_of(SEGMENT_BYTES as u64) {
            return Err(Refusal::IoError);
        }
        if bytes > u64::from(RANGE_SEGMENTS_MAX) * SEGMENT_BYTES as u64 {
            return Err(Refusal::Unsupported);
        }
        let mut raw = [0u8; RANGE_SEGMENTS_MAX as usize * SEGMENT_BYTES];
        let copied = iovec::copy_to(payload, &mut raw);
        let segments = raw[..copied].as_chunks::<SEGMENT_BYTES>().0.iter();
        segments
            .map(|raw| {
                let sector = u64::from_le_bytes(std::array::from_fn(|i| raw[i]));
                let sectors = u32::from_le_bytes(std::array::from_fn(|i| raw[8 + i]));
                let flags = u32::from_le_bytes(std::array::from_fn(|i| raw[12 + i]));
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(Refusal::Unsupported);
                }
                if sectors > sectors_max {
                    return Err(Refusal::IoError);
                }
                let bytes = u64::from(sectors) * SECTOR_SIZE;
                let offset = self.range(sector, bytes).ok_or(Refusal::IoError)?;
                let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                Ok(Segment { offset, bytes, unmap })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
