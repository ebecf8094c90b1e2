//! Channel: a volume's half on one AioContext. It owns the way of data between the guest's memory, which never holds what
//! is encrypted for longer than a request, and the file: through buffers of our own, within a budget.

use std::rc::Rc;
use std::sync::Arc;

use super::cipher::{Cipher, SECTOR};
use crate::aio::AioContext;
use crate::child::ChildChannel;
use crate::driver::{BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockError, BlockResult};
use crate::iovec::{self, IoVec};
use crate::shaping::BounceBudget;

/// How much is encrypted at once: some sectors that stay in the CPU's cache.
const CHUNK_BYTES: usize = 4096;
/// How much is encrypted before others may run: a few tens of microseconds.
const TURN_BYTES: u64 = 128 << 10;
/// The longest request that the driver takes, as each is in a buffer of our own.
pub(super) const TRANSFER_MAX: u32 = 1 << 20;

/// A volume's half on one AioContext.
pub(super) struct Channel {
    cipher: Arc<Cipher>,
    file: Rc<ChildChannel>,
    /// Where the data begins in the file.
    payload: u64,
    buffers: BounceBudget,
}

impl Channel {
    pub(super) fn new(cipher: &Arc<Cipher>, file: Rc<ChildChannel>, payload: u64) -> Rc<Self> {
        Rc::new(Self { cipher: cipher.clone(), file, payload, buffers: BounceBudget::default() })
    }

    fn place(&self, offset: u64) -> BlockResult<u64> {
        self.payload.checked_add(offset).ok_or(BlockError::OutOfRange)
    }

    /// Copies `bytes` bytes, encrypting or decrypting them on the way. The first has its place at `offset`.
    async fn carry(&self, offset: u64, from: &[IoVec], to: &[IoVec], work: impl Fn(&Cipher, u64, &mut [u8])) {
        let bytes = iovec::total_len(from);
        let mut chunk = [0; CHUNK_BYTES];
        let mut done = 0;
        while done < bytes {
            let turn = (done + TURN_BYTES).min(bytes);
            let (turn_from, turn_to) = (iovec::slice(from, done, turn - done), iovec::slice(to, done, turn - done));
            iovec::transform(&turn_from, &turn_to, &mut chunk, |at, part| {
                work(&self.cipher, (offset + done + at) / SECTOR as u64, part);
            });
            done = turn;
            if done < bytes {
                AioContext::breathe().await;
            }
        }
    }

    pub(super) async fn read(&self, offset: u64, iov: &[IoVec]) -> BlockResult {
        let place = self.place(offset)?;
        let buffer = self.buffers.buffer(iovec::total_len(iov), 4096).await;
        let whole = [buffer.part(0, usize::MAX)];
        self.file.preadv(place, &whole).await?;
        self.carry(offset, &whole, iov, Cipher::decrypt).await;
        Ok(())
    }

    pub(super) async fn write(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockResult {
        let place = self.place(offset)?;
        let buffer = self.buffers.buffer(iovec::total_len(iov), 4096).await;
        let whole = [buffer.part(0, usize::MAX)];
        self.carry(offset, iov, &whole, Cipher::encrypt).await;
        self.file.pwritev(place, &whole, flags).await
    }
}

/// The door of a channel.
pub(super) struct VolumeChannel(pub(super) Rc<Channel>);

impl IoChannel for VolumeChannel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        let (this, iov) = (self.0.clone(), iov.to_vec());
        BlockFuture::boxed(async move { this.read(offset, &iov).await })
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        let (this, iov) = (self.0.clone(), iov.to_vec());
        BlockFuture::boxed(async move { this.write(offset, &iov, flags).await })
    }

    fn flush(&self) -> BlockFuture {
        self.0.file.flush()
    }

    // What is not used would show, and afterwards no zeroes could be told from data.
    fn pdiscard(&self, _: u64, _: u64) -> BlockFuture {
        BlockFuture::ready(Err(BlockError::NotSupported))
    }

    fn pwrite_zeroes(&self, _: u64, _: u64, _: WriteFlags) -> BlockFuture {
        BlockFuture::ready(Err(BlockError::NotSupported))
    }

    fn block_status(&self, _: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        let status = BlockStatus { bytes, zero: false, allocated: true, place: None, compressed: false };
        Box::pin(std::future::ready(Ok(status)))
    }
}
