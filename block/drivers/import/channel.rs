//! Channel: an image's half on one AioContext. It owns how the parts of tables that a request needs are read, how a
//! request becomes reads of the children, and compressed units; an image that is cut short is an error, never zeroes.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use super::tables::{PAGE_BYTES, Page, Stop, Tables};
use super::{Image, Packed, Place, Run};
use crate::aio::AioContext;
use crate::child::ChildChannel;
use crate::driver::{BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::iovec::{self, AlignedBuffer, IoVec};
use crate::node::SECTOR;
use crate::offload;
use crate::shaping::BounceBudget;

/// What is read into memory of our own is aligned to, for direct I/O.
const BUFFER_ALIGNMENT: usize = 4096;
/// The most pieces that are joined to one.
const JOINS_MAX: usize = 1024;
/// The header of a compressed unit: its sector on the disk, then how many bytes follow.
const MARKER_BYTES: u64 = 12;

/// A child and how long it is.
struct File {
    channel: Rc<ChildChannel>,
    /// In bytes, not rounded.
    bytes: u64,
}

impl File {
    fn new(channel: Rc<ChildChannel>) -> Self {
        Self { bytes: channel.node().driver().length(), channel }
    }

    fn has(&self, offset: u64, bytes: u64) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.bytes)
    }

    /// The whole sectors that the bytes from `offset` on lie in, and how many bytes stand before them there.
    async fn sectors(&self, offset: u64, bytes: u64, buffer: &AlignedBuffer) -> BlockResult<IoVec> {
        let start = offset / SECTOR * SECTOR;
        let end = (offset + bytes).next_multiple_of(SECTOR);
        let whole = buffer.iov().part(0, (end - start) as usize);
        self.channel.preadv(start, &[whole]).await?;
        Ok(whole.part((offset - start) as usize, bytes as usize))
    }

    /// Bytes that must be there.
    async fn bytes(&self, offset: u64, bytes: u64) -> BlockResult<Vec<u8>> {
        let buffer = AlignedBuffer::new(bytes as usize + 2 * SECTOR as usize, BUFFER_ALIGNMENT);
        let found = self.sectors(offset, bytes, &buffer).await?;
        let mut content = vec![0; bytes as usize];
        iovec::copy_to(&[found], &mut content);
        Ok(content)
    }
}

/// Reads pieces of a file while it is opened.
pub(crate) struct Reader(File);

impl Reader {
    pub(super) fn new(channel: Rc<ChildChannel>) -> Self {
        Self(File::new(channel))
    }

    /// How long the file is, in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.0.bytes
    }

    /// The `bytes` bytes from `offset` on, which are called `what`. A few MiB at most.
    ///
    /// # Errors
    /// The file ends before, or cannot be read.
    pub(crate) async fn read(&self, offset: u64, bytes: u64, what: &str) -> OpenResult<Vec<u8>> {
        if !self.0.has(offset, bytes) {
            return Err(OpenError(format!("{what} lies behind the end of the file ({} bytes)", self.0.bytes)));
        }
        self.0.bytes(offset, bytes).await.map_err(|e| OpenError(format!("{what} cannot be read: {e}")))
    }
}

/// An image's half on one AioContext.
pub(super) struct Channel {
    image: Arc<Image>,
    files: Vec<File>,
    tables: RefCell<Tables>,
    /// Bounds the memory for decompression.
    inflation: BounceBudget,
}

impl Channel {
    pub(super) fn new(image: &Arc<Image>, files: Vec<Rc<ChildChannel>>) -> Rc<Self> {
        Rc::new(Self {
            image: image.clone(),
            files: files.into_iter().map(File::new).collect(),
            tables: RefCell::default(),
            inflation: BounceBudget::default(),
        })
    }

    /// Where the bytes from `offset` on are, as far as they are at one place.
    fn run(&self, offset: u64, bytes: u64) -> Result<Run, Stop> {
        let tables = self.tables.borrow();
        let mut found = self.image.layout.locate(offset, &tables)?;
        for _ in 0..JOINS_MAX {
            if found.bytes >= bytes {
                break;
            }
            // What is not known yet is left for later.
            let next = self.image.layout.locate(offset + found.bytes, &tables);
            match next.ok().and_then(|next| found.joined(next)) {
                Some(joined) => found = joined,
                None => break,
            }
        }
        Ok(Run { bytes: found.bytes.min(bytes), ..found })
    }

    fn file(&self, child: usize) -> BlockResult<&File> {
        self.files.get(child).ok_or(BlockError::Host(libc::EIO))
    }

    async fn find(&self, offset: u64, bytes: u64) -> BlockResult<Run> {
        loop {
            match self.run(offset, bytes) {
                Ok(run) => return Ok(run),
                Err(Stop::Need(page)) => self.load(page).await?,
                Err(Stop::Corrupt(why)) => return Err(self.image.damaged(why)),
            }
        }
    }

    async fn load(&self, page: Page) -> BlockResult {
        let file = self.file(page.child)?;
        let start = page.index.saturating_mul(PAGE_BYTES);
        let there = file.bytes.saturating_sub(start).min(PAGE_BYTES);
        if there == 0 {
            return Err(self.image.damaged("a table lies behind the end of the file"));
        }
        let content = file.bytes(start, there).await?;
        self.tables.borrow_mut().insert(page, content);
        Ok(())
    }

    /// Starts a read of a child, which must be that long.
    fn read_child(&self, child: usize, offset: u64, iov: &[IoVec]) -> BlockFuture {
        match self.file(child) {
            Ok(file) if file.has(offset, iovec::total_len(iov)) => file.channel.preadv(offset, iov),
            Ok(_) => BlockFuture::ready(Err(self.image.damaged("a file is shorter than what it is to hold"))),
            Err(error) => BlockFuture::ready(Err(error)),
        }
    }

    fn start_read(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> BlockFuture {
        let bytes = iovec::total_len(iov);
        match self.run(offset, bytes) {
            Ok(Run { place: Place::Data { child, offset }, bytes: run }) if run == bytes => {
                self.read_child(child, offset, iov)
            }
            Ok(Run { place: Place::Hole | Place::Zero, bytes: run }) if run == bytes => {
                iovec::fill(iov, 0);
                BlockFuture::ready(Ok(()))
            }
            _ => {
                let (this, iov) = (self.clone(), iov.to_vec());
                BlockFuture::boxed(async move { this.read(offset, &iov).await })
            }
        }
    }

    async fn read(&self, offset: u64, iov: &[IoVec]) -> BlockResult {
        let mut started = Vec::new();
        let result = self.read_runs(offset, iov, &mut started).await;
        // What was started is brought to its end, whatever happened to the rest.
        finish(started).await.and(result)
    }

    async fn read_runs(&self, offset: u64, iov: &[IoVec], started: &mut Vec<BlockFuture>) -> BlockResult {
        let end = offset + iovec::total_len(iov);
        let mut at = offset;
        while at < end {
            let run = self.find(at, end - at).await?;
            let part = iovec::slice(iov, at - offset, run.bytes);
            match run.place {
                Place::Hole | Place::Zero => iovec::fill(&part, 0),
                Place::Data { child, offset } => match self.read_child(child, offset, &part).try_ready() {
                    Ok(result) => result?,
                    Err(future) => started.push(future),
                },
                Place::Packed(unit, skip) => self.read_packed(unit, skip, &part).await?,
            }
            at += run.bytes;
            if at < end {
                AioContext::breathe().await;
            }
        }
        Ok(())
    }

    /// Reads what is compressed. How long that is, its header says; it is bounded by what deflate can make of the unit.
    async fn read_packed(&self, unit: Packed, skip: u64, iov: &[IoVec]) -> BlockResult {
        let file = self.file(unit.child)?;
        let cut = || self.image.damaged("a compressed unit lies behind the end of the file");
        if !file.has(unit.offset, MARKER_BYTES) {
            return Err(cut());
        }
        let marker = file.bytes(unit.offset, MARKER_BYTES).await?;
        let size = marker.last_chunk::<4>().map_or(0, |size| u64::from(u32::from_le_bytes(*size)));
        // Deflate never makes more of its input than this.
        if size == 0 || size > unit.bytes + unit.bytes / 1000 + 512 {
            return Err(self.image.damaged("the size of a compressed unit is impossible"));
        }
        let start = unit.offset + MARKER_BYTES;
        if !file.has(start, size) {
            return Err(cut());
        }
        // Room for what comes out, too, so that the memory of all who do this is bounded.
        let _room = self.inflation.buffer(size + unit.bytes, BUFFER_ALIGNMENT as u32).await;
        let input = file.bytes(start, size).await?;
        let wanted = unit.bytes as usize;
        let Some(Some(output)) = offload::run(move || inflate(&input, wanted)).await else {
            return Err(self.image.damaged("a compressed unit holds something else"));
        };
        let content = output.get(skip as usize..).unwrap_or_default();
        iovec::fill_from(iov, content);
        Ok(())
    }

    async fn status(&self, offset: u64, bytes: u64) -> BlockResult<BlockStatus> {
        let run = self.find(offset, bytes).await?;
        let zero = matches!(run.place, Place::Hole | Place::Zero);
        let place = match run.place {
            Place::Data { child: 0, offset } => Some(offset),
            _ => None,
        };
        let compressed = matches!(run.place, Place::Packed(..));
        Ok(BlockStatus { bytes: run.bytes, zero, allocated: run.place != Place::Hole, place, compressed })
    }
}

/// What is deflated in `input`, with the header of zlib, if it is exactly `bytes` long.
fn inflate(input: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let mut output = vec![0; bytes];
    let mut state = flate2::Decompress::new(true);
    let mut read = 0;
    loop {
        let written = state.total_out() as usize;
        if written == bytes {
            return Some(output);
        }
        let (from, to) = (input.get(read..)?, output.get_mut(written..)?);
        state.decompress(from, to, flate2::FlushDecompress::Finish).ok()?;
        let moved = state.total_in() as usize > read || state.total_out() as usize > written;
        read = state.total_in() as usize;
        if !moved {
            return None;
        }
    }
}

/// Waits for all; the first error is the answer.
async fn finish(mut futures: Vec<BlockFuture>) -> BlockResult {
    let mut result = Ok(());
    std::future::poll_fn(|cx| {
        futures.retain_mut(|future| match Pin::new(future).poll(cx) {
            Poll::Ready(answer) => {
                result = result.and(answer);
                false
            }
            Poll::Pending => true,
        });
        if futures.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}

/// The door of a channel.
pub(super) struct ImportChannel(pub(super) Rc<Channel>);

impl IoChannel for ImportChannel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        self.0.start_read(offset, iov)
    }

    fn pwritev(&self, _: u64, _: &[IoVec], _: WriteFlags) -> BlockFuture {
        BlockFuture::ready(Err(BlockError::ReadOnly))
    }

    fn flush(&self) -> BlockFuture {
        BlockFuture::ready(Ok(()))
    }

    fn pdiscard(&self, _: u64, _: u64) -> BlockFuture {
        BlockFuture::ready(Err(BlockError::ReadOnly))
    }

    fn pwrite_zeroes(&self, _: u64, _: u64, _: WriteFlags) -> BlockFuture {
        BlockFuture::ready(Err(BlockError::ReadOnly))
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        let this = self.0.clone();
        Box::pin(async move { this.status(offset, bytes).await })
    }
}
