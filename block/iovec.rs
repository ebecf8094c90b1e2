//! IoVec: a piece of memory that a request reads into or writes from, and AlignedBuffer, memory of our own.
//! It owns the promise behind both; it never touches a descriptor or a file.
#![allow(unsafe_code)] // Raw memory is what this file is for; each block gives its reason.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// A piece of memory, layout-compatible with the kernel's `struct iovec`.
///
/// Who makes one promises (see [`IoVec::new`]) that the memory stays valid until every request given it has completed.
/// A guest may write it at any moment: nothing here makes a Rust reference to it.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct IoVec(libc::iovec);

// SAFETY: an IoVec is an address and a length; the promise made to `IoVec::new` does not depend on the thread.
unsafe impl Send for IoVec {}
// SAFETY: as above; sharing it shares only the two numbers.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// # Safety
    /// `base..base+len` is valid for reads and writes until every request that was given this IoVec (or a part of it)
    /// has completed, and no Rust reference to that memory is used meanwhile.
    pub unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// The first byte.
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes; may be 0.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether address and length are multiples of `align`, a power of two.
    pub fn is_aligned(&self, align: usize) -> bool {
        (self.base() as usize | self.len()) & (align - 1) == 0
    }

    /// The first 16 bytes as two little-endian numbers, each read once; `None` if there are fewer.
    #[inline]
    pub fn read_two_le64(&self) -> Option<[u64; 2]> {
        /// Two numbers at any address.
        #[derive(Clone, Copy)]
        #[repr(C, packed)]
        struct Two(u64, u64);
        if self.len() < size_of::<Two>() {
            return None;
        }
        // SAFETY: valid for reads of at least 16 bytes by the promise of `IoVec::new`; a packed struct has no alignment,
        // and any bytes are numbers.
        let two = unsafe { self.base().cast::<Two>().read_volatile() };
        Some([u64::from_le(two.0), u64::from_le(two.1)])
    }

    /// Writes the first byte; nothing if there is none.
    #[inline]
    pub fn write_byte(&self, byte: u8) {
        if !self.is_empty() {
            // SAFETY: valid for writes of at least one byte by the promise of `IoVec::new`.
            unsafe { self.base().write_volatile(byte) };
        }
    }

    /// Cuts the last byte off and returns it; `None` if there is none.
    #[inline]
    pub fn split_last_byte(&mut self) -> Option<Self> {
        let rest = self.len().checked_sub(1)?;
        self.0.iov_len = rest;
        Some(Self(libc::iovec { iov_base: self.base().wrapping_add(rest).cast(), iov_len: 1 }))
    }

    /// `len` bytes from `start`, both cut to what there is.
    pub fn part(&self, start: usize, len: usize) -> Self {
        let start = start.min(self.len());
        Self(libc::iovec {
            // In bounds, or one past the end, as `start` was cut.
            iov_base: self.base().wrapping_add(start).cast(),
            iov_len: len.min(self.len() - start),
        })
    }
}

/// The sum of the lengths, in bytes; saturates.
#[inline]
pub fn total_len(iov: &[IoVec]) -> u64 {
    // Most requests have one buffer.
    match iov {
        [one] => one.len() as u64,
        _ => iov.iter().fold(0u64, |sum, v| sum.saturating_add(v.len() as u64)),
    }
}

/// The pieces that hold the `len` bytes from `skip` on; fewer bytes when there are not as many.
pub fn slice(iov: &[IoVec], skip: u64, len: u64) -> Vec<IoVec> {
    let mut out = Vec::new();
    let (mut skip, mut left) = (skip, len);
    for v in iov {
        if left == 0 {
            break;
        }
        let here = v.len() as u64;
        if skip >= here {
            skip -= here;
            continue;
        }
        let take = (here - skip).min(left);
        // Both fit: they are at most `here`, which came from a usize.
        out.push(v.part(skip as usize, take as usize));
        left -= take;
        skip = 0;
    }
    out
}

/// Copies `from` into the pieces, in order; stops at whichever ends first. Returns the bytes copied.
pub fn fill_from(iov: &[IoVec], from: &[u8]) -> usize {
    let mut done = 0;
    for v in iov {
        let n = v.len().min(from.len() - done);
        // SAFETY: `v` is valid for writes of its length by the promise of `IoVec::new`; `from` holds n more bytes.
        unsafe { std::ptr::copy(from.as_ptr().add(done), v.base(), n) };
        done += n;
    }
    done
}

/// Copies the pieces, in order, into `to`; stops at whichever ends first. Returns the bytes copied.
pub fn copy_to(iov: &[IoVec], to: &mut [u8]) -> usize {
    let mut done = 0;
    for v in iov {
        let n = v.len().min(to.len() - done);
        // SAFETY: `v` is valid for reads of its length by the promise of `IoVec::new`; `to` has room for n more bytes.
        unsafe { std::ptr::copy(v.base(), to.as_mut_ptr().add(done), n) };
        done += n;
    }
    done
}

/// Copies up to `bytes` from `from`, `from_skip` bytes in, to `to`, `to_skip` bytes in. Returns the bytes copied: fewer
/// where either ends.
pub fn copy(from: &[IoVec], from_skip: u64, to: &[IoVec], to_skip: u64, bytes: u64) -> u64 {
    let (mut from, mut to) = (Cursor::new(from, from_skip), Cursor::new(to, to_skip));
    let mut done = 0;
    while done < bytes {
        let most = usize::try_from(bytes - done).unwrap_or(usize::MAX);
        let (Some(source), Some(target)) = (from.rest(), to.rest()) else { break };
        let n = source.len().min(target.len()).min(most);
        // SAFETY: both are valid for their lengths by the promise of `IoVec::new`; they may overlap.
        unsafe { std::ptr::copy(source.base(), target.base(), n) };
        from.inside += n;
        to.inside += n;
        done += n as u64;
    }
    done
}

/// Copies `from` to `to` through `chunk`, where `work` changes it on the way: it is given where in `from` that is, in
/// bytes, and at most a chunk. Stops at whichever ends first.
pub fn transform(from: &[IoVec], to: &[IoVec], chunk: &mut [u8], mut work: impl FnMut(u64, &mut [u8])) {
    let (mut from, mut to) = (Cursor::new(from, 0), Cursor::new(to, 0));
    let mut at = 0;
    loop {
        let mut filled = 0;
        while let Some(source) = from.rest()
            && filled < chunk.len()
        {
            let n = copy_to(&[source], &mut chunk[filled..]);
            from.inside += n;
            filled += n;
        }
        if filled == 0 {
            return;
        }
        work(at, &mut chunk[..filled]);
        let mut done = 0;
        while done < filled {
            let Some(target) = to.rest() else { return };
            let n = fill_from(&[target], &chunk[done..filled]);
            to.inside += n;
            done += n;
        }
        at += filled as u64;
    }
}

/// A place in a list of pieces.
struct Cursor<'a> {
    pieces: &'a [IoVec],
    /// Bytes into the first of them.
    inside: usize,
}

impl<'a> Cursor<'a> {
    fn new(mut pieces: &'a [IoVec], mut skip: u64) -> Self {
        while let [first, rest @ ..] = pieces
            && skip >= first.len() as u64
        {
            skip -= first.len() as u64;
            pieces = rest;
        }
        // Less than the first piece's length, or there is no piece.
        Self { pieces, inside: skip as usize }
    }

    /// What is left of the present piece; never empty. `None` at the end.
    fn rest(&mut self) -> Option<IoVec> {
        while let [first, rest @ ..] = self.pieces {
            if self.inside < first.len() {
                return Some(first.part(self.inside, first.len() - self.inside));
            }
            self.pieces = rest;
            self.inside = 0;
        }
        None
    }
}

/// Sets every byte of the pieces to `byte`.
pub fn fill(iov: &[IoVec], byte: u8) {
    for v in iov {
        // SAFETY: `v` is valid for writes of its length by the promise of `IoVec::new`.
        unsafe { std::ptr::write_bytes(v.base(), byte, v.len()) };
    }
}

/// Whether every byte of the pieces is zero.
pub fn is_zero(iov: &[IoVec]) -> bool {
    let mut chunk = [0u8; 4096];
    iov.iter().all(|v| {
        (0..v.len()).step_by(chunk.len()).all(|at| {
            let part = v.part(at, chunk.len());
            let n = copy_to(&[part], &mut chunk);
            chunk[..n].chunks(64).all(|part| part.iter().fold(0, |all, b| all | b) == 0)
        })
    })
}

/// Zeroed memory of our own, aligned for direct I/O. Freed when dropped: keep it until its requests completed.
#[derive(Debug)]
pub struct AlignedBuffer {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its memory exclusively.
unsafe impl Send for AlignedBuffer {}

impl AlignedBuffer {
    /// `len` zero bytes at a multiple of `align` (a power of two; values below 1 count as 1). A `len` of 0 holds one
    /// byte that [`AlignedBuffer::iov`] does not show.
    pub fn new(len: usize, align: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), align.max(1))
            .unwrap_or_else(|_| panic!("a buffer of {len} bytes aligned to {align} cannot exist"));
        // SAFETY: the size is above 0.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout));
        Self { base, layout: Layout::from_size_align(len, align.max(1)).unwrap_or(layout) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.layout.size()
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The whole buffer as a piece for a request. The buffer must outlive that request.
    pub fn iov(&self) -> IoVec {
        // SAFETY: the memory is ours and valid until drop; requests never outlive the future that owns the buffer,
        // since dropping an unfinished request aborts (aio/uring.rs).
        unsafe { IoVec::new(self.base.as_ptr(), self.len()) }
    }

    /// Copies `from` to the start; what does not fit is left out.
    pub fn fill_from(&mut self, from: &[u8]) {
        fill_from(&[self.iov()], from);
    }

    /// A copy of the content.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len()];
        copy_to(&[self.iov()], &mut out);
        out
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        let size = self.layout.size().max(1);
        // SAFETY: same size and alignment as in `new`, and freed once.
        unsafe { dealloc(self.base.as_ptr(), Layout::from_size_align_unchecked(size, self.layout.align())) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_of_pieces_is_the_slice_of_the_bytes() {
        let mut a = AlignedBuffer::new(3, 1);
        let mut b = AlignedBuffer::new(5, 8);
        a.fill_from(&[0, 1, 2]);
        b.fill_from(&[3, 4, 5, 6, 7]);
        let iov = [a.iov(), b.iov()];
        for skip in 0..9u64 {
            for len in 0..9u64 {
                let mut got = vec![0; 8];
                let n = copy_to(&slice(&iov, skip, len), &mut got);
                let want: Vec<u8> = (skip.min(8)..(skip + len).min(8)).map(|v| v as u8).collect();
                assert_eq!(&got[..n], &want[..]);
            }
        }
        assert_eq!(total_len(&iov), 8);
        assert!(!is_zero(&iov));
        fill(&iov, 0);
        assert!(is_zero(&iov));
    }

    #[test]
    fn a_copy_between_pieces_is_the_copy_of_the_bytes() {
        let buffers = |lens: &[usize]| lens.iter().map(|len| AlignedBuffer::new(*len, 1)).collect::<Vec<_>>();
        let (from, to) = (buffers(&[3, 0, 5, 1]), buffers(&[1, 4, 0, 4]));
        let pieces = |buffers: &[AlignedBuffer]| buffers.iter().map(AlignedBuffer::iov).collect::<Vec<_>>();
        let (from, to) = (pieces(&from), pieces(&to));
        let content: Vec<u8> = (1..10).collect();
        fill_from(&from, &content);
        for from_skip in 0..11u64 {
            for to_skip in 0..11u64 {
                for bytes in 0..11u64 {
                    fill(&to, 0);
                    let n = copy(&from, from_skip, &to, to_skip, bytes);
                    assert_eq!(n, bytes.min(9u64.saturating_sub(from_skip)).min(9u64.saturating_sub(to_skip)));
                    let mut want = vec![0; 9];
                    for i in 0..n as usize {
                        want[to_skip as usize + i] = content[from_skip as usize + i];
                    }
                    let mut got = vec![0; 9];
                    copy_to(&to, &mut got);
                    assert_eq!(got, want);
                }
            }
        }
    }

    #[test]
    fn what_is_transformed_is_changed_once_wherever_pieces_end() {
        let buffers = |lens: &[usize]| lens.iter().map(|len| AlignedBuffer::new(*len, 1)).collect::<Vec<_>>();
        let pieces = |buffers: &[AlignedBuffer]| buffers.iter().map(AlignedBuffer::iov).collect::<Vec<_>>();
        for (from, to) in
            [(vec![3, 0, 9], vec![5, 7]), (vec![12], vec![1, 1, 10]), (vec![5], vec![3]), (vec![], vec![2])]
        {
            let (from, to) = (buffers(&from), buffers(&to));
            let (from, to) = (pieces(&from), pieces(&to));
            let content: Vec<u8> = (1..13).collect();
            fill_from(&from, &content);
            let mut expected_at = 0;
            transform(&from, &to, &mut [0; 4], |at, part| {
                assert_eq!(at, expected_at);
                expected_at += part.len() as u64;
                part.iter_mut().for_each(|byte| *byte ^= 0x80);
            });
            let mut got = vec![0; total_len(&from).min(total_len(&to)) as usize];
            copy_to(&to, &mut got);
            let want: Vec<u8> = (1..=got.len() as u8).map(|byte| byte ^ 0x80).collect();
            assert_eq!(got, want);
        }
    }

    #[test]
    fn buffers_are_aligned_and_zero() {
        for align in [1, 512, 4096] {
            let b = AlignedBuffer::new(8192, align);
            assert!(b.iov().is_aligned(align));
            assert!(is_zero(&[b.iov()]));
        }
        assert!(AlignedBuffer::new(0, 4096).is_empty());
    }
}
