//! Copy: bytes from a source to an image, many requests at a time. It owns what is read, what is left out because the
//! target has it already or it is zero, and the order in which writes begin, so that a new image lies in order on its disk.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

use blockport_block::driver::{BoxFuture, WriteFlags};
use blockport_block::iovec::{self, AlignedBuffer, IoVec};
use blockport_block::{BlockError, BlockResult, ChildChannel, SECTOR};

use super::Failure;
use super::progress::Progress;
use super::task::{Image, Session, buffer};

/// How much is read at a time, a multiple of every size of clusters.
pub const CHUNK: u64 = 2 << 20;

/// What is copied.
pub trait Source {
    /// In bytes.
    fn length(&self) -> u64;

    /// What the bytes from `offset` on are: of at least 1, at most `bytes`, which is not 0 and inside the length.
    fn part(self: Rc<Self>, offset: u64, bytes: u64) -> BoxFuture<BlockResult<Part>>;

    /// Reads them.
    fn read(self: Rc<Self>, offset: u64, iov: IoVec) -> BoxFuture<BlockResult>;
}

/// What some bytes of a source are.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub bytes: u64,
    pub what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The target has them already.
    Skip,
    Zero,
    Data,
}

/// How it is copied.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Requests at a time.
    pub parallel: usize,
    /// Writes may begin in any order.
    pub any_order: bool,
    /// So many zero bytes at a time are not written as data; 0: all are.
    pub sparse: u64,
    /// The target reads as zeroes where nothing was written, from this offset on.
    pub zero_from: Option<u64>,
    /// Clusters are to be stored compressed.
    pub compressed: bool,
    /// What cannot be read is zero.
    pub salvage: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { parallel: 8, any_order: false, sparse: 4096, zero_from: None, compressed: false, salvage: false }
    }
}

/// Copies all of a source to the start of an image.
///
/// # Errors
/// Something cannot be read or written; the error says where. A part has been copied then.
pub fn copy(
    session: &Session,
    source: Rc<dyn Source>,
    target: &Image,
    settings: Settings,
    progress: Progress,
) -> Result<(), Failure> {
    let limits = target.channel.limits();
    let cluster = u64::from(limits.cluster_size);
    if settings.compressed && (!limits.can_compress || cluster == 0) {
        return Err(format!("\"{}\": clusters of this format cannot be stored compressed", target.name).into());
    }
    let copy = Rc::new(Copy {
        source,
        target: target.channel.clone(),
        flags: WriteFlags { fua: target.writes_through, compressed: settings.compressed, ..WriteFlags::default() },
        // Room is taken by the cluster: there is nothing to be gained by leaving out less.
        grain: match settings.sparse {
            0 => 0,
            sparse => sparse.max(cluster).max(limits.request_alignment.into()).next_power_of_two().min(CHUNK),
        },
        cluster,
        settings,
        progress,
        free: Cell::new(settings.parallel.max(1)),
        next_write: Cell::new(0),
        waiting: RefCell::default(),
        buffers: RefCell::default(),
        failure: RefCell::default(),
    });
    let context = session.context.clone();
    session.run(async move {
        copy.clone().schedule(&context).await;
        match copy.failure.take() {
            Some(failure) => Err(failure),
            None => {
                copy.progress.finish();
                Ok(())
            }
        }
    })
}

struct Copy {
    source: Rc<dyn Source>,
    target: Rc<ChildChannel>,
    settings: Settings,
    flags: WriteFlags,
    /// The unit in which zeroes are left out; 0: none are.
    grain: u64,
    cluster: u64,
    progress: Progress,
    /// How many more pieces may be under way.
    free: Cell<usize>,
    /// The number of the piece whose writes begin next.
    next_write: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
    /// Those that are not in use.
    buffers: RefCell<Vec<AlignedBuffer>>,
    failure: RefCell<Option<Failure>>,
}

impl Copy {
    /// Hands out pieces, and waits for all of them.
    async fn schedule(self: Rc<Self>, context: &blockport_block::aio::AioContext) {
        let end = self.source.length();
        let (mut at, mut number) = (0, 0);
        while at < end && !self.has_failed() {
            let part = match self.source.clone().part(at, end - at).await {
                Ok(part) => part,
                Err(error) => {
                    self.fail("the status of the source", at, error);
                    break;
                }
            };
            let mut stop = at + part.bytes;
            if self.settings.compressed && part.what != What::Skip {
                // Clusters are written whole.
                stop = match part.what {
                    What::Zero if stop < end => stop - stop % self.cluster,
                    _ => stop,
                };
            }
            match part.what {
                What::Skip | What::Zero
                    if self.settings.compressed && (stop <= at || !at.is_multiple_of(self.cluster)) =>
                {
                    stop = (at + 1).next_multiple_of(self.cluster).min(end);
                    self.clone().start(context, at..stop, What::Data, &mut number).await;
                }
                What::Skip => self.progress.add(stop - at),
                What::Zero if self.is_left_out(at) => self.progress.add(stop - at),
                What::Zero => {
                    stop = self.boundary(at, stop);
                    self.clone().start(context, at..stop, What::Zero, &mut number).await;
                }
                What::Data => {
                    let next = (at + 1).next_multiple_of(CHUNK);
                    stop = if self.settings.compressed { next.min(end) } else { stop.min(next) };
                    self.clone().start(context, at..stop, What::Data, &mut number).await;
                }
            }
            at = stop;
        }
        self.wait(|this| this.free.get() == this.settings.parallel.max(1)).await;
    }

    /// Whether zeroes at that offset are there without being written.
    fn is_left_out(&self, at: u64) -> bool {
        self.settings.sparse > 0 && self.settings.zero_from.is_some_and(|from| at >= from)
    }

    /// Where a range of zeroes has to be cut, as the target knows what follows to be zero.
    fn boundary(&self, at: u64, stop: u64) -> u64 {
        self.settings.zero_from.filter(|from| (at + 1..stop).contains(from)).unwrap_or(stop)
    }

    /// Starts a piece as soon as there is room for it.
    async fn start(
        self: Rc<Self>,
        context: &blockport_block::aio::AioContext,
        range: Range<u64>,
        what: What,
        number: &mut u64,
    ) {
        self.wait(|this| this.free.get() > 0 || this.has_failed()).await;
        if self.has_failed() {
            return;
        }
        self.free.set(self.free.get() - 1);
        let ticket = *number;
        *number += 1;
        context.spawn(async move {
            self.piece(range.clone(), what, ticket).await;
            self.progress.add(range.end - range.start);
            self.free.set(self.free.get() + 1);
            self.wake();
        });
    }

    /// Carries a piece out.
    async fn piece(&self, range: Range<u64>, what: What, ticket: u64) {
        let buffer = (what == What::Data).then(|| {
            let taken = self.buffers.borrow_mut().pop();
            taken.unwrap_or_else(|| buffer(CHUNK as usize))
        });
        let mut read = Ok(());
        if let Some(buffer) = &buffer {
            // At most CHUNK.
            let iov = buffer.iov().part(0, (range.end - range.start) as usize);
            read = self.source.clone().read(range.start, iov).await;
            if read.is_err() && self.settings.salvage {
                self.salvage(range.start, iov).await;
                read = Ok(());
            }
        }
        if !self.settings.any_order {
            self.wait(|this| this.next_write.get() == ticket).await;
        }
        match read {
            Ok(()) if !self.has_failed() => self.write(range, buffer.as_ref()).await,
            Ok(()) => self.pass_on(),
            Err(error) => {
                self.fail("the source", range.start, error);
                self.pass_on();
            }
        }
        self.buffers.borrow_mut().extend(buffer);
    }

    /// Reads a sector at a time what can be read.
    async fn salvage(&self, offset: u64, iov: IoVec) {
        for at in (0..iov.len()).step_by(SECTOR as usize) {
            let sector = iov.part(at, SECTOR as usize);
            if self.source.clone().read(offset + at as u64, sector).await.is_err() {
                iovec::fill(&[sector], 0);
            }
        }
    }

    /// Writes a piece; without a buffer, zeroes.
    async fn write(&self, range: Range<u64>, buffer: Option<&AlignedBuffer>) {
        let mut writes: Vec<(u64, BoxFuture<BlockResult>)> = Vec::new();
        for (part, is_zero) in self.parts(&range, buffer) {
            let bytes = part.end - part.start;
            match (is_zero, buffer) {
                (true, _) | (_, None) if self.is_left_out(part.start) => {}
                (true, _) | (_, None) => {
                    let flags = WriteFlags { may_unmap: self.grain > 0, compressed: false, ..self.flags };
                    writes.push((part.start, Box::pin(self.target.pwrite_zeroes(part.start, bytes, flags))));
                }
                (false, Some(buffer)) => {
                    let iov = buffer.iov().part((part.start - range.start) as usize, bytes as usize);
                    writes.push((part.start, Box::pin(self.target.pwritev(part.start, &[iov], self.flags))));
                }
            }
        }
        let mut begun = false;
        let mut results: Vec<Option<BlockResult>> = vec![None; writes.len()];
        poll_fn(|cx| {
            for ((_, write), result) in writes.iter_mut().zip(&mut results) {
                if result.is_none()
                    && let Poll::Ready(done) = write.as_mut().poll(cx)
                {
                    *result = Some(done);
                }
            }
            if !std::mem::replace(&mut begun, true) {
                self.pass_on();
            }
            if results.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        for ((offset, _), result) in writes.iter().zip(results) {
            if let Some(Err(error)) = result {
                self.fail("the target", *offset, error);
            }
        }
    }

    /// A piece in parts that are zero, or not.
    fn parts(&self, range: &Range<u64>, buffer: Option<&AlignedBuffer>) -> Vec<(Range<u64>, bool)> {
        let Some(buffer) = buffer else { return vec![(range.clone(), true)] };
        let grain = if self.settings.compressed { self.cluster } else { self.grain };
        if grain == 0 {
            return vec![(range.clone(), false)];
        }
        let mut parts: Vec<(Range<u64>, bool)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let stop = (at + 1).next_multiple_of(grain).min(range.end);
            let iov = buffer.iov().part((at - range.start) as usize, (stop - at) as usize);
            let is_zero = self.grain > 0 && iovec::is_zero(&[iov]);
            match parts.last_mut() {
                // Compressed clusters are written one by one, so that they are compressed at the same time.
                Some((last, same)) if *same == is_zero && (is_zero || !self.settings.compressed) => last.end = stop,
                _ => parts.push((at..stop, is_zero)),
            }
            at = stop;
        }
        parts
    }

    /// The next piece may begin to write.
    fn pass_on(&self) {
        self.next_write.set(self.next_write.get() + 1);
        self.wake();
    }

    fn has_failed(&self) -> bool {
        self.failure.borrow().is_some()
    }

    fn fail(&self, what: &str, offset: u64, error: BlockError) {
        self.failure.borrow_mut().get_or_insert_with(|| format!("{what}, at offset {offset}: {error}").into());
        self.wake();
    }

    fn wake(&self) {
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    /// Waits until it is so.
    async fn wait(&self, is_so: impl Fn(&Self) -> bool) {
        poll_fn(|cx| {
            if is_so(self) {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Waits for two futures at once.
pub async fn both<A, B>(first: impl Future<Output = A>, second: impl Future<Output = B>) -> (A, B) {
    let (mut first, mut second) = (pin!(first), pin!(second));
    let (mut a, mut b) = (None, None);
    poll_fn(move |cx| {
        if a.is_none()
            && let Poll::Ready(value) = first.as_mut().poll(cx)
        {
            a = Some(value);
        }
        if b.is_none()
            && let Poll::Ready(value) = second.as_mut().poll(cx)
        {
            b = Some(value);
        }
        match (a.take(), b.take()) {
            (Some(a), Some(b)) => Poll::Ready((a, b)),
            others => {
                (a, b) = others;
                Poll::Pending
            }
        }
    })
    .await
}
