//! The virtio-blk device model (virtio 1.3 §5.2.6): a descriptor chain's header, one match on the request type, the
//! BlockBackend, one status byte. It knows no ring and no socket.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use blockport_block::driver::BoxFuture;
use blockport_block::iovec::{self, IoVec};
use blockport_block::{BackendChannel, BlockError, BlockResult, Request, RequestKind};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::config_space::{RANGE_SEGMENTS_MAX, RangeLimits, SECTOR_SIZE};
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
    /// It is complete; `written` bytes of the chain were.
    Done { chain: Chain, written: u32 },
    /// It goes on.
    Pending(Pending),
}

/// Why a request never reached the block layer, as the guest is told.
enum Refusal {
    IoError(RequestKind),
    Unsupported,
}

/// What runs in the block layer.
enum Work {
    One(Request),
    Several(BoxFuture<BlockResult>),
}

/// A request under way. It must be polled to its end.
pub(crate) struct Pending {
    /// `None` once it has ended.
    chain: Option<Chain>,
    /// Where the status byte goes; `None` where the guest left no room for one.
    status: Option<IoVec>,
    /// What `written` counts besides the status byte if the request succeeds.
    data_in: u32,
    work: Work,
}

impl Future for Pending {
    /// The chain, how many of its bytes were written, and the error, if it failed.
    type Output = (Chain, u32, BlockResult);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let result = match &mut this.work {
            Work::One(request) => std::task::ready!(Pin::new(request).poll(cx)),
            Work::Several(future) => std::task::ready!(future.as_mut().poll(cx)),
        };
        let chain = this.chain.take().unwrap_or_default();
        let written = finish(this.status, this.data_in, status_of(result));
        Poll::Ready((chain, written, result))
    }
}

/// The one place where an error becomes a status.
fn status_of(result: BlockResult) -> u32 {
    match result {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(BlockError::NotSupported) => VIRTIO_BLK_S_UNSUPP,
        Err(_) => VIRTIO_BLK_S_IOERR,
    }
}

/// Writes the status and returns the used length: the bytes written from the first writable one on (§2.7.8.2). A failed
/// read may have written some, but none for sure; then the status does not follow them without a gap.
fn finish(status: Option<IoVec>, data_in: u32, code: u32) -> u32 {
    let Some(status) = status else { return 0 };
    iovec::fill_from(&[status], &[code as u8]);
    if code == VIRTIO_BLK_S_OK || data_in == 0 { data_in.saturating_add(1) } else { 0 }
}

/// Starts the request that `chain` holds. The chain comes back in either outcome and is returned to the guest once.
pub(crate) fn start(mut chain: Chain, device: &DeviceModel, channel: &Rc<BackendChannel>) -> Started {
    let status = take_status(&mut chain);
    let Some((header, from)) = take_header(&mut chain) else {
        // No header: there is a request to answer, but nothing is known of it.
        let written = if chain.iov.len() > chain.readable {
            finish(status, 1, VIRTIO_BLK_S_IOERR)
        } else {
            finish(status, 0, VIRTIO_BLK_S_IOERR)
        };
        return Started::Done { chain, written };
    };
    let Some(status) = status else { return Started::Done { chain, written: 0 } };
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes(std::array::from_fn(|i| header[8 + i]));
    let (data_out, data_in) = (&chain.iov[from..chain.readable], &chain.iov[chain.readable..]);
    let in_bytes = u32::try_from(iovec::total_len(data_in)).unwrap_or(u32::MAX);

    let outcome = match kind {
        VIRTIO_BLK_T_IN => device
            .range(sector, iovec::total_len(data_in))
            .map(|offset| Work::One(channel.preadv(offset, data_in)))
            .ok_or(Refusal::IoError(RequestKind::Read)),
        VIRTIO_BLK_T_OUT => device
            .range(sector, iovec::total_len(data_out))
            .filter(|_| device.writable)
            .map(|offset| Work::One(channel.pwritev(offset, data_out)))
            .ok_or(Refusal::IoError(RequestKind::Write)),
        VIRTIO_BLK_T_FLUSH => Ok(Work::One(channel.flush())),
        VIRTIO_BLK_T_GET_ID => {
            // §5.2.6: no terminator when the serial is as long as the field. A shorter buffer gets what fits.
            let copied = iovec::fill_from(data_in, &device.serial);
            let whole = copied as u64 == iovec::total_len(data_in);
            finish(Some(status), 0, VIRTIO_BLK_S_OK);
            // At most 20.
            return Started::Done { chain, written: copied as u32 + u32::from(whole) };
        }
        VIRTIO_BLK_T_DISCARD if device.can_discard => device.discard(data_out, channel),
        VIRTIO_BLK_T_WRITE_ZEROES => device.write_zeroes(data_out, channel),
        _ => Err(Refusal::Unsupported),
    };
    match outcome {
        Ok(Work::One(request)) => match request.try_ready() {
            Ok(result) => {
                let written = finish(Some(status), in_bytes, status_of(result));
                Started::Done { chain, written }
            }
            Err(request) => Started::Pending(Pending {
                chain: Some(chain),
                status: Some(status),
                data_in: in_bytes,
                work: Work::One(request),
            }),
        },
        Ok(work) => Started::Pending(Pending { chain: Some(chain), status: Some(status), data_in: in_bytes, work }),
        Err(Refusal::IoError(kind)) => {
            channel.account_invalid(kind);
            let written = finish(Some(status), in_bytes, VIRTIO_BLK_S_IOERR);
            Started::Done { chain, written }
        }
        Err(Refusal::Unsupported) => {
            let written = finish(Some(status), in_bytes, VIRTIO_BLK_S_UNSUPP);
            Started::Done { chain, written }
        }
    }
}

/// Cuts the status byte off: the last writable byte (§5.2.6; any framing is legal, §2.7.4).
fn take_status(chain: &mut Chain) -> Option<IoVec> {
    if chain.iov.len() == chain.readable {
        return None;
    }
    let last = chain.iov.last_mut()?;
    let status = last.part(last.len() - 1, 1);
    match last.len() {
        1 => drop(chain.iov.pop()),
        len => *last = last.part(0, len - 1),
    }
    Some(status)
}

/// Cuts the header off the readable bytes. Returns it with the number of the first buffer that holds data; `None` when
/// there are fewer bytes than a header has.
fn take_header(chain: &mut Chain) -> Option<([u8; HEADER_BYTES], usize)> {
    let mut header = [0; HEADER_BYTES];
    if iovec::copy_to(&chain.iov[..chain.readable], &mut header) < HEADER_BYTES {
        return None;
    }
    let mut left = HEADER_BYTES;
    for (index, buffer) in chain.iov[..chain.readable].iter_mut().enumerate() {
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

    fn discard(&self, payload: &[IoVec], channel: &Rc<BackendChannel>) -> Result<Work, Refusal> {
        let segments = self.segments(payload, RequestKind::Discard, self.ranges.discard_sectors_max)?;
        if segments.iter().any(|segment| segment.unmap) {
            return Err(Refusal::Unsupported);
        }
        let channel = channel.clone();
        Ok(Work::Several(Box::pin(async move {
            for segment in segments {
                channel.pdiscard(segment.offset, segment.bytes).await?;
            }
            Ok(())
        })))
    }

    fn write_zeroes(&self, payload: &[IoVec], channel: &Rc<BackendChannel>) -> Result<Work, Refusal> {
        let segments = self.segments(payload, RequestKind::WriteZeroes, self.ranges.zeroes_sectors_max)?;
        let channel = channel.clone();
        Ok(Work::Several(Box::pin(async move {
            for segment in segments {
                channel.pwrite_zeroes(segment.offset, segment.bytes, segment.unmap).await?;
            }
            Ok(())
        })))
    }

    /// Reads and checks the segments of a discard or write-zeroes (§5.2.6.2), all before any takes effect.
    fn segments(&self, payload: &[IoVec], kind: RequestKind, sectors_max: u32) -> Result<Vec<Segment>, Refusal> {
        let refused = || Refusal::IoError(kind);
        let bytes = iovec::total_len(payload);
        if !self.writable || bytes == 0 || !bytes.is_multiple_of(SEGMENT_BYTES as u64) {
            return Err(refused());
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
                    return Err(refused());
                }
                let bytes = u64::from(sectors) * SECTOR_SIZE;
                let offset = self.range(sector, bytes).ok_or_else(refused)?;
                let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                Ok(Segment { offset, bytes, unmap })
            })
            .collect()
    }
}
