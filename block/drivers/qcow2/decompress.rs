//! Decompress: reads of compressed clusters. It owns the two algorithms, both ways, which run on threads of their own
//! (`offload.rs`); whatever the image holds, memory and time are bounded by the size of a cluster.

use std::collections::VecDeque;
use std::sync::Arc;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, Operation};

use super::channel::Channel;
use super::header::Compression;
use super::state::Task;
use crate::error::{BlockError, BlockResult};
use crate::iovec::{self, IoVec};
use crate::offload;

/// No frame may ask for a larger window than 2^this bytes: clusters have 2^21 at most.
const ZSTD_WINDOW_LOG_MAX: u32 = 24;

/// What a channel decompresses with.
pub(super) struct Decompressor(Compression);

impl Decompressor {
    pub(super) fn new(compression: Compression) -> Self {
        Self(compression)
    }

    pub(super) fn compression(&self) -> Compression {
        self.0
    }

    /// `bytes` bytes from `input`, which may have more behind them. `None`: that is not what the input holds.
    async fn run(&self, input: Vec<u8>, bytes: usize) -> Option<Vec<u8>> {
        let compression = self.0;
        on_thread(move || inflate(compression, &input, bytes)).await
    }
}

/// Has one of the threads do work. `None`, too, where that was not brought to its end.
pub(super) async fn on_thread(work: impl FnOnce() -> Option<Vec<u8>> + Send + 'static) -> Option<Vec<u8>> {
    offload::run(work).await.flatten()
}

fn inflate(compression: Compression, input: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let mut output = vec![0; bytes];
    let whole = match compression {
        Compression::Zlib => inflate_zlib(input, &mut output),
        Compression::Zstd => inflate_zstd(input, &mut output),
    };
    whole.then_some(output)
}

/// Whether `input` filled all of `output`.
fn inflate_zlib(input: &[u8], output: &mut [u8]) -> bool {
    // Raw deflate. Written with a window of 2^12 bytes, which a larger one reads as well.
    let mut state = Decompress::new(false);
    loop {
        let (read, written) = (state.total_in() as usize, state.total_out() as usize);
        let (Some(from), Some(to)) = (input.get(read..), output.get_mut(written..)) else { return false };
        let status = state.decompress(from, to, FlushDecompress::Finish);
        let moved = state.total_in() as usize > read || state.total_out() as usize > written;
        match status {
            _ if state.total_out() as usize == output.len() => return true,
            Ok(Status::Ok | Status::BufError) if moved => {}
            _ => return false,
        }
    }
}

/// The same for zstd.
fn inflate_zstd(input: &[u8], output: &mut [u8]) -> bool {
    let Ok(mut state) = Decoder::new() else { return false };
    if state.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX)).is_err() {
        return false;
    }
    let (mut read, mut written) = (0, 0);
    while written < output.len() {
        let (Some(from), Some(to)) = (input.get(read..), output.get_mut(written..)) else { return false };
        match state.run_on_buffers(from, to) {
            Ok(status) if status.bytes_read > 0 || status.bytes_written > 0 => {
                read += status.bytes_read;
                written += status.bytes_written;
            }
            _ => return false,
        }
    }
    true
}

/// `input`, compressed. `None`: it does not get smaller.
pub(super) fn deflate(compression: Compression, input: &[u8]) -> Option<Vec<u8>> {
    let mut output = vec![0; input.len().saturating_sub(1)];
    let bytes = match compression {
        Compression::Zlib => deflate_zlib(input, &mut output)?,
        Compression::Zstd => {
            zstd::bulk::compress_to_buffer(input, &mut output, zstd::DEFAULT_COMPRESSION_LEVEL).ok()?
        }
    };
    output.truncate(bytes);
    Some(output)
}

fn deflate_zlib(input: &[u8], output: &mut [u8]) -> Option<usize> {
    // Raw deflate. Readers have a window of 2^12 bytes and no more.
    let mut state = Compress::new_with_window_bits(flate2::Compression::default(), false, 12);
    let status = state.compress(input, output, FlushCompress::Finish);
    let whole = matches!(status, Ok(Status::StreamEnd));
    whole.then_some(state.total_out() as usize)
}

/// What was decompressed last, as guests read a cluster piece by piece.
#[derive(Default)]
pub(super) struct Inflated {
    /// The oldest first.
    list: VecDeque<Decompressed>,
    bytes: usize,
    /// How often something was forgotten because it is no longer what the image holds.
    pub changes: u64,
}

struct Decompressed {
    /// Where in the file it is compressed, and in how many bytes.
    place: (u64, u64),
    content: Arc<Vec<u8>>,
}

/// How many bytes are kept, but for the last cluster, and how many clusters.
const KEPT_BYTES: usize = 4 << 20;
const KEPT_CLUSTERS: usize = 64;

impl Inflated {
    pub(super) fn find(&self, offset: u64, bytes: u64) -> Option<Arc<Vec<u8>>> {
        let found = self.list.iter().rev().find(|one| one.place == (offset, bytes))?;
        Some(found.content.clone())
    }

    /// Keeps what a reader decompressed who found its place when there had been `changes`.
    fn keep(&mut self, place: (u64, u64), content: Arc<Vec<u8>>, changes: u64) {
        if changes != self.changes || self.list.iter().any(|one| one.place == place) {
            return;
        }
        self.bytes += content.len();
        self.list.push_back(Decompressed { place, content });
        while self.list.len() > 1 && (self.bytes > KEPT_BYTES || self.list.len() > KEPT_CLUSTERS) {
            self.bytes -= self.list.pop_front().map_or(0, |oldest| oldest.content.len());
        }
    }

    /// That place may hold something else soon.
    pub(super) fn forget(&mut self, offset: u64) {
        self.changes += 1;
        self.list.retain(|one| one.place.0 != offset);
        self.bytes = self.list.iter().map(|one| one.content.len()).sum();
    }
}

impl Channel {
    /// Reads `iov`'s length in bytes from `skip` on of the cluster that is compressed in `bytes` from `offset` on. That
    /// was found when there had been `changes` to what is compressed.
    pub(super) async fn read_compressed(
        &self,
        (offset, bytes): (u64, u64),
        skip: u64,
        iov: &[IoVec],
        changes: u64,
    ) -> BlockResult {
        loop {
            let kept = self.image.lock().inflated.find(offset, bytes);
            if let Some(content) = kept {
                copy_out(&content, skip, iov);
                return Ok(());
            }
            // One decompresses, whoever wants the same waits for it.
            let Some(_claim) = self.claim(Task::Inflate(offset)).await else { continue };
            let content = Arc::new(self.inflate_at(offset, bytes).await?);
            self.image.lock().inflated.keep((offset, bytes), content.clone(), changes);
            copy_out(&content, skip, iov);
            return Ok(());
        }
    }

    async fn inflate_at(&self, offset: u64, bytes: u64) -> BlockResult<Vec<u8>> {
        let size = self.image.geometry.cluster_size();
        // Room for what comes out, too, so that the memory of all who do this is bounded.
        let room = self.inflation.buffer(bytes + size, 4096).await;
        let packed = room.part(0, bytes as usize);
        self.file.preadv(offset, &[packed]).await?;
        let mut input = vec![0; packed.len()];
        iovec::copy_to(&[packed], &mut input);
        let output = self.decompressor.run(input, size as usize).await;
        output.ok_or_else(|| {
            tracing::error!("node \"{}\": the compressed cluster at {offset:#x} is damaged", self.image.name);
            BlockError::Host(libc::EIO)
        })
    }
}

pub(super) fn copy_out(content: &[u8], skip: u64, iov: &[IoVec]) {
    let start = (skip as usize).min(content.len());
    iovec::fill_from(iov, &content[start..]);
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_compressed_comes_out_and_nothing_else_does() {
        let content: Vec<u8> = (0..65536u32).map(|n| (n % 251 * (n / 4096)) as u8).collect();
        let mut zlib = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        zlib.write_all(&content).expect("to memory");
        let zlib = zlib.finish().expect("to memory");
        let zstd = zstd::encode_all(content.as_slice(), 0).expect("to memory");
        for compression in [Compression::Zlib, Compression::Zstd] {
            let packed = deflate(compression, &content).expect("it gets smaller");
            assert!(inflate(compression, &packed, content.len()).as_ref() == Some(&content));
            assert_eq!(deflate(compression, &[7]), None);
        }
        for (compression, packed) in [(Compression::Zlib, zlib), (Compression::Zstd, zstd)] {
            let padded = [packed.as_slice(), &[0xaa; 700]].concat();
            assert!(inflate(compression, &padded, content.len()).as_ref() == Some(&content));
            assert_eq!(inflate(compression, &padded[..packed.len() / 2], content.len()), None, "cut off");
            assert_eq!(inflate(compression, &packed, content.len() + 1), None, "less than a cluster");
            assert_eq!(inflate(compression, &[], content.len()), None);
            assert_eq!(inflate(compression, &[0xff; 4096], content.len()), None);
            assert_eq!(inflate(compression, &[0; 4096], content.len()), None);
        }
    }
}
