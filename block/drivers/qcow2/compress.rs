//! Compress: writes of whole clusters that are stored compressed. It owns the packing: clusters lie one after another,
//! byte by byte, share the host's clusters and even sectors, and are written together as far as they come together.

use std::rc::Rc;

use super::channel::{CORRUPT, Channel, Started};
use super::decompress::{deflate, on_thread};
use super::geometry::Cluster;
use super::refcounts::OVERFLOW;
use super::state::{Attempt, Span, State, Stop, Task};
use crate::error::{BlockError, BlockResult};
use crate::iovec::{self, IoVec};

/// How many bytes of the disk are compressed and packed at a time, but for one cluster.
const BATCH_BYTES: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// Where the next compressed cluster goes: into what the last one left of a cluster of the host.
#[derive(Default)]
pub(super) struct Tail {
    /// In the file, in bytes; within a cluster, or at its end. `None`: into a new cluster.
    next: Option<u64>,
    /// What the sector of `next` holds before it. It is written again with what follows.
    before: Vec<u8>,
}

impl Tail {
    /// Nothing more is put into that cluster.
    pub(super) fn leave(&mut self, cluster: u64, cluster_bits: u32) {
        if self.next.is_some_and(|next| next >> cluster_bits == cluster) {
            *self = Self::default();
        }
    }
}

/// A compressed cluster with its place.
struct Piece {
    /// The allocation in flight.
    id: u64,
    /// On the disk.
    guest: u64,
    /// In the file.
    host: u64,
    bytes: Vec<u8>,
}

impl Piece {
    fn end(&self) -> u64 {
        self.host + self.bytes.len() as u64
    }
}

impl State {
    /// A place for `bytes` bytes, less than a cluster, whose clusters have one use more then.
    fn allocate_bytes(&mut self, bytes: u64) -> Attempt<u64> {
        let bits = self.geometry.cluster_bits;
        let size = self.geometry.cluster_size();
        if let Some(next) = self.tail.next.filter(|next| !next.is_multiple_of(size)) {
            let cluster = next >> bits;
            let fits = next % size + bytes <= size;
            // In memory now, so that nothing is needed once a change has begun.
            let count = self.refcount(cluster)?;
            let shared = count > 0 && count < self.geometry.refcount_max();
            if shared && fits {
                self.increase(cluster)?;
                self.tail.next = Some(next + bytes);
                return Ok(next);
            }
            let taken = self.allocate(1)?.span.first;
            let host = match shared && taken == cluster + 1 {
                true => {
                    self.increase(cluster)?;
                    next
                }
                false => taken << bits,
            };
            self.tail.next = Some(host + bytes);
            return self.checked_place(host);
        }
        let host = self.allocate(1)?.span.first << bits;
        self.tail.next = Some(host + bytes);
        self.checked_place(host)
    }

    fn checked_place(&self, host: u64) -> Attempt<u64> {
        match host < self.geometry.compressed_end() {
            true => Ok(host),
            // Entries have fewer bits for the place of a compressed cluster.
            false => Err(Stop::Fail(BlockError::NoSpace)),
        }
    }

    /// Begins the allocation of a compressed cluster.
    fn plan_compressed(&mut self, guest: u64, bytes: u64) -> Attempt<(u64, u64)> {
        let end = self.geometry.cluster_end(guest);
        self.allocations.room(guest, end)?;
        self.own_slice(guest)?;
        let host = self.allocate_bytes(bytes)?;
        Ok((self.allocations.add(guest, end), host))
    }

    /// Makes a compressed cluster visible, once it is written.
    fn link_compressed(&mut self, guest: u64, host: u64, bytes: u64) -> Attempt<()> {
        let slot = self.own_slice(guest)?;
        match self.geometry.decode(self.entry(slot, guest), guest)? {
            Cluster::Standard { host: Some(host), .. } => self.unlink(host),
            Cluster::Standard { host: None, .. } => {}
            Cluster::Compressed { offset, bytes } => self.unlink_compressed(offset, bytes),
        }
        let entry = self.geometry.encode_compressed(host, bytes);
        self.set_entry(slot, guest, entry);
        Ok(())
    }
}

impl Channel {
    /// Writes whole clusters compressed, or those that do not get smaller as they are.
    pub(super) async fn write_compressed(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> BlockResult {
        let size = self.image.geometry.cluster_size();
        let (end, disk_end) =
            (offset + iovec::total_len(iov), self.image.size.load(std::sync::atomic::Ordering::Relaxed));
        if self.image.geometry.data_file || self.image.cipher.is_some() {
            return Err(BlockError::NotSupported);
        }
        if !offset.is_multiple_of(size) || (!end.is_multiple_of(size) && end < disk_end) {
            return Err(BlockError::NotSupported);
        }
        let batch = BATCH_BYTES.max(size);
        let mut at = offset;
        while at < end {
            let stop = end.min(at + batch);
            self.write_compressed_batch(at, &iovec::slice(iov, at - offset, stop - at)).await?;
            at = stop;
        }
        Ok(())
    }

    async fn write_compressed_batch(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> BlockResult {
        let (size, bytes) = (self.image.geometry.cluster_size(), iovec::total_len(iov));
        let compression = self.decompressor.compression();
        // What is compressed and what comes out, of all who do this at once.
        let room = self.inflation.buffer(bytes * 2, 4096).await;
        let mut jobs = Vec::new();
        for at in (0..bytes).step_by(size as usize) {
            let part = iovec::slice(iov, at, size.min(bytes - at));
            let mut input = vec![0; iovec::total_len(&part) as usize];
            iovec::copy_to(&part, &mut input);
            // Behind the end of the disk.
            input.resize(size as usize, 0);
            jobs.push((at, Box::pin(on_thread(move || deflate(compression, &input)))));
        }
        let (mut packed, mut plain) = (Vec::new(), Vec::new());
        for (at, job) in start_all(jobs).await {
            match job {
                Some(output) => packed.push((offset + at, output)),
                None => plain.push(at),
            }
        }
        drop(room);
        for at in plain {
            self.write(offset + at, &iovec::slice(iov, at, size.min(bytes - at))).await?;
        }
        if !packed.is_empty() {
            self.store(packed).await?;
        }
        self.free_early().await
    }

    /// Packs compressed clusters, writes and links them.
    async fn store(self: &Rc<Self>, packed: Vec<(u64, Vec<u8>)>) -> BlockResult {
        let _claim = loop {
            if let Some(claim) = self.claim(Task::Pack).await {
                break claim;
            }
            if self.image.is_broken() {
                return Err(CORRUPT);
            }
        };
        let mut pieces: Vec<Piece> = Vec::new();
        let mut result = Ok(());
        for (guest, bytes) in packed {
            let length = bytes.len() as u64;
            match self.attempt(|state| state.plan_compressed(guest, length)).await {
                Ok((id, host)) => pieces.push(Piece { id, guest, host, bytes }),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if result.is_ok() {
            result = self.write_packed(&pieces).await;
        }
        for piece in &pieces {
            if result.is_ok() {
                let length = piece.bytes.len() as u64;
                result = self.attempt(|state| state.link_compressed(piece.guest, piece.host, length)).await;
            }
            if result.is_err() {
                self.image.lock().tail = Tail::default();
                let bits = self.image.geometry.cluster_bits;
                let (first, last) = (piece.host >> bits, (piece.end() - 1) >> bits);
                self.give_back(Span { first, count: last - first + 1 }).await;
            }
            self.end_allocation(piece.id);
        }
        match result {
            Err(OVERFLOW) => Err(BlockError::NoSpace),
            result => result,
        }
    }

    /// Writes pieces, in whole sectors, those that follow each other at once.
    async fn write_packed(&self, pieces: &[Piece]) -> BlockResult {
        let mut before = std::mem::take(&mut self.image.lock().tail.before);
        let mut started = Started::default();
        let mut buffers = Vec::new();
        let mut result = Ok(());
        let mut at = 0;
        while let Some(first) = pieces.get(at) {
            let start = first.host / SECTOR * SECTOR;
            let inside = (first.host - start) as usize;
            // The tail goes on, or a new cluster begins, which has nothing in its first sector.
            let mut run = std::mem::take(&mut before);
            run.resize(inside, 0);
            let mut end = first.host;
            while let Some(piece) = pieces.get(at).filter(|piece| piece.host == end) {
                run.extend(&piece.bytes);
                end = piece.end();
                at += 1;
            }
            before = run.get(run.len() / SECTOR as usize * SECTOR as usize..).unwrap_or(&[]).to_vec();
            run.resize(run.len().next_multiple_of(SECTOR as usize), 0);
            self.extend_file(start + run.len() as u64).await;
            let mut buffer = iovec::AlignedBuffer::new(run.len(), 4096);
            buffer.fill_from(&run);
            result = result.and(started.push(self.file.pwritev(start, &[buffer.iov()], Default::default())));
            buffers.push(buffer);
        }
        let result = started.finish().await.and(result);
        let mut state = self.image.lock();
        state.tail.before = before;
        result
    }
}

/// Runs all at once, to their ends; the results in the same order.
async fn start_all<F: Future + Unpin>(jobs: Vec<(u64, F)>) -> Vec<(u64, F::Output)> {
    let mut jobs: Vec<(u64, Option<F>, Option<F::Output>)> =
        jobs.into_iter().map(|(at, job)| (at, Some(job), None)).collect();
    std::future::poll_fn(|cx| {
        for (_, job, output) in &mut jobs {
            if let Some(running) = job
                && let std::task::Poll::Ready(value) = std::pin::Pin::new(running).poll(cx)
            {
                (*job, *output) = (None, Some(value));
            }
        }
        match jobs.iter().any(|(_, job, _)| job.is_some()) {
            true => std::task::Poll::Pending,
            false => std::task::Poll::Ready(()),
        }
    })
    .await;
    jobs.into_iter().filter_map(|(at, _, output)| output.map(|output| (at, output))).collect()
}
