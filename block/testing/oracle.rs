//! Oracle: random requests to a node, several at once, and the content that must come of them. It owns the expectation;
//! which requests are tried follows from the seed alone.

use std::rc::Rc;

use blockport_block::driver::{BlockFuture, WriteFlags};
use blockport_block::iovec::{AlignedBuffer, IoVec};
use blockport_block::{BlockError, BlockResult, ChildChannel};

use super::join_all;
use super::random::Random;

/// What a node should hold.
pub struct Oracle {
    channel: Rc<ChildChannel>,
    /// Reads give what was written; else zeroes.
    keeps: bool,
    content: Vec<u8>,
    random: Random,
}

/// A request under way, with what is to be made of its answer.
struct Running {
    kind: Kind,
    offset: u64,
    bytes: u64,
    /// Alive as long as the request.
    buffer: AlignedBuffer,
    /// Where the request's own bytes begin in the buffer.
    skew: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Read,
    Write,
    Zero { no_fallback: bool },
    Discard,
    Flush,
}

impl Oracle {
    /// Reads what is there and goes on from it.
    pub async fn new(channel: Rc<ChildChannel>, keeps: bool, seed: u64) -> Self {
        let content = read(&channel, 0, channel.length()).await;
        Self { channel, keeps, content, random: Random::new(seed) }
    }

    /// What the node should hold now.
    pub fn content(&self) -> &[u8] {
        &self.content
    }

    /// Sends a batch of requests to different parts of the node at once and checks what comes back.
    pub async fn batch(&mut self) {
        let count = 1 + self.random.below(6);
        let part = self.content.len() as u64 / count;
        let (mut running, mut futures) = (Vec::new(), Vec::new());
        for i in 0..count {
            let (request, future) = self.start(i * part, part);
            running.push(request);
            futures.push(future);
        }
        let results = join_all(futures).await;
        for (request, result) in running.into_iter().zip(results) {
            self.check(request, result).await;
        }
        if self.random.one_in(4) {
            self.check_status().await;
        }
    }

    /// Reads the whole node and compares.
    pub async fn verify(&self) {
        let got = read(&self.channel, 0, self.content.len() as u64).await;
        if let Some(at) = (0..got.len()).find(|at| got[*at] != self.content[*at]) {
            panic!("byte {at} is {:#x}, not {:#x}", got[at], self.content[at]);
        }
    }

    fn start(&mut self, begin: u64, room: u64) -> (Running, BlockFuture) {
        let random = &mut self.random;
        // Of every alignment from 1 to 4096, and often of none at all.
        let unit = 1 << random.below(13);
        let longest = if random.one_in(8) { room } else { room.min(9000) };
        let bytes = (random.below(longest + 1) / unit * unit).min(room);
        let offset = (begin + random.below(room - bytes + 1)).next_multiple_of(unit).min(begin + room - bytes);
        let kind = match random.below(20) {
            0..7 => Kind::Read,
            7..14 => Kind::Write,
            14..17 => Kind::Zero { no_fallback: random.one_in(3) },
            17 | 18 => Kind::Discard,
            _ => Kind::Flush,
        };
        let skew = if random.one_in(2) { random.below(520) as usize } else { 0 };
        let mut buffer = AlignedBuffer::new(skew + bytes as usize, 4096);
        let iov = split(random, buffer.iov().part(skew, bytes as usize));
        let flags = WriteFlags { fua: random.one_in(4), ..WriteFlags::default() };
        let zero = WriteFlags { may_unmap: random.one_in(2), ..flags };
        // Under a read, so that bytes which it leaves alone show.
        buffer.fill_from(&random.bytes(skew + bytes as usize));
        let channel = &self.channel;
        let future = match kind {
            Kind::Read => channel.preadv(offset, &iov),
            Kind::Write => channel.pwritev(offset, &iov, flags),
            Kind::Zero { no_fallback } => channel.pwrite_zeroes(offset, bytes, WriteFlags { no_fallback, ..zero }),
            Kind::Discard => channel.pdiscard(offset, bytes),
            Kind::Flush => channel.flush(),
        };
        (Running { kind, offset, bytes, buffer, skew }, future)
    }

    async fn check(&mut self, request: Running, result: BlockResult) {
        let Running { kind, offset, bytes, ref buffer, skew } = request;
        let range = offset as usize..(offset + bytes) as usize;
        match (kind, result) {
            (Kind::Read, Ok(())) => {
                let got = buffer.to_vec().split_off(skew);
                assert!(got == self.content[range], "reading {bytes} bytes from {offset}");
            }
            (Kind::Write, Ok(())) if self.keeps => {
                let (data, content) = (buffer.to_vec(), &mut self.content[range]);
                content.copy_from_slice(&data[skew..]);
            }
            (Kind::Write | Kind::Flush, Ok(())) => {}
            (Kind::Zero { .. }, Ok(())) => self.content[range].fill(0),
            // Some of it may have been done.
            (Kind::Zero { no_fallback: true }, Err(BlockError::NotSupported)) => {
                let got = read(&self.channel, offset, bytes).await;
                let zero_or_old =
                    got.iter().zip(&self.content[range.clone()]).all(|(new, old)| *new == 0 || new == old);
                assert!(zero_or_old, "zeroing {bytes} bytes from {offset}");
                self.content[range].copy_from_slice(&got);
            }
            // Anything may be there now, but it has to stay.
            (Kind::Discard, Ok(())) => {
                let got = read(&self.channel, offset, bytes).await;
                self.content[range].copy_from_slice(&got);
            }
            (kind, result) => panic!("{kind:?} of {bytes} bytes from {offset}: {result:?}"),
        }
    }

    async fn check_status(&mut self) {
        let length = self.content.len() as u64;
        let offset = self.random.below(length);
        let bytes = 1 + self.random.below(2 * length);
        let status = self.channel.block_status(offset, bytes).await.expect("it is inside");
        let end = offset + status.bytes;
        assert!(status.bytes >= 1 && status.bytes <= bytes && end <= length, "{status:?} of {bytes} from {offset}");
        let zero = self.content[offset as usize..end as usize].iter().all(|byte| *byte == 0);
        assert!(zero || !status.zero, "{status:?} from {offset}");
    }
}

/// Reads through one buffer.
pub async fn read(channel: &Rc<ChildChannel>, offset: u64, bytes: u64) -> Vec<u8> {
    let mut buffer = AlignedBuffer::new(bytes as usize, 4096);
    // Bytes that the read leaves alone show.
    buffer.fill_from(&vec![0xdd; bytes as usize]);
    let read = channel.preadv(offset, &[buffer.iov()]).await;
    read.unwrap_or_else(|error| panic!("reading {bytes} bytes from {offset}: {error}"));
    buffer.to_vec()
}

/// One piece, a few, or more than one request may have; some of them empty.
fn split(random: &mut Random, whole: IoVec) -> Vec<IoVec> {
    let pieces = match random.below(8) {
        0..4 => 1,
        4..7 => 1 + random.below(8),
        _ => 1100,
    };
    let unit = 1 << random.below(10);
    let mut iov = Vec::new();
    let mut at = 0;
    for _ in 1..pieces {
        let len = random.below(2 * whole.len() as u64 / pieces + 2) / unit * unit;
        iov.push(whole.part(at, len as usize));
        at = (at + len as usize).min(whole.len());
    }
    iov.push(whole.part(at, whole.len()));
    iov
}
