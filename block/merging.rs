//! Merging: which of the reads and writes of one batch may go to the medium as one request. It owns the rule; it starts
//! nothing.

use crate::accounting::RequestKind;

/// The most requests in one run.
pub(crate) const RUN_MAX: usize = 32;

/// What there is to know of a request. All numbers in bytes, but for the buffers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) kind: RequestKind,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) buffers: usize,
}

/// How large a run may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunLimits {
    pub(crate) bytes_max: u64,
    pub(crate) buffers_max: usize,
}

/// Requests by their places in the batch, each beginning where the one before it ends.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) members: Vec<usize>,
    /// Of all members together.
    pub(crate) whole: Piece,
}

/// Puts a batch, in the order of arrival, together to runs. A run stands where its first member stood, and no request
/// comes before one that it overlaps and came after, unless both read.
pub(crate) fn runs(batch: &[Piece], limits: RunLimits) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(batch.len());
    for (place, piece) in batch.iter().enumerate() {
        // The newest first: what belongs together mostly comes together.
        let joined = runs.iter_mut().rev().find(|run| run.takes(piece, limits));
        match joined {
            Some(run) if !run.would_overtake(piece, &batch[..place]) => run.add(place, piece),
            _ => runs.push(Run { members: vec![place], whole: *piece }),
        }
    }
    runs
}

impl Run {
    fn takes(&self, piece: &Piece, limits: RunLimits) -> bool {
        let whole = &self.whole;
        piece.kind == whole.kind
            && matches!(piece.kind, RequestKind::Read | RequestKind::Write)
            && piece.bytes > 0
            && whole.bytes > 0
            && whole.offset.checked_add(whole.bytes) == Some(piece.offset)
            && self.members.len() < RUN_MAX
            && whole.bytes.saturating_add(piece.bytes) <= limits.bytes_max
            && whole.buffers.saturating_add(piece.buffers) <= limits.buffers_max
    }

    /// Whether a request would come before one that came earlier and touches the same bytes.
    fn would_overtake(&self, piece: &Piece, earlier: &[Piece]) -> bool {
        let first = self.members.first().copied().unwrap_or(0);
        earlier[first..].iter().any(|other| {
            let both_read = piece.kind == RequestKind::Read && other.kind == RequestKind::Read;
            !both_read && overlap(piece, other)
        })
    }

    fn add(&mut self, place: usize, piece: &Piece) {
        self.members.push(place);
        self.whole.bytes += piece.bytes;
        self.whole.buffers += piece.buffers;
    }
}

fn overlap(a: &Piece, b: &Piece) -> bool {
    // A range that ends behind the last byte there can be is nobody's.
    let end = |piece: &Piece| piece.offset.saturating_add(piece.bytes);
    a.offset < end(b) && b.offset < end(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RunLimits = RunLimits { bytes_max: 1 << 20, buffers_max: 1024 };

    /// Requests of whole blocks of 4 KiB: "w0", "r3+2".
    fn batch(text: &str) -> Vec<Piece> {
        let piece = |word: &str| {
            let kind = match &word[..1] {
                "r" => RequestKind::Read,
                "w" => RequestKind::Write,
                "z" => RequestKind::WriteZeroes,
                _ => RequestKind::Flush,
            };
            let (at, blocks) = word[1..].split_once('+').unwrap_or((&word[1..], "1"));
            let number = |text: &str| text.parse::<u64>().expect("a number") * 4096;
            Piece { kind, offset: number(at), bytes: number(blocks), buffers: 1 }
        };
        text.split_whitespace().map(piece).collect()
    }

    fn members(text: &str, limits: RunLimits) -> Vec<Vec<usize>> {
        runs(&batch(text), limits).into_iter().map(|run| run.members).collect()
    }

    #[test]
    fn neighbours_of_one_kind_become_one() {
        for (text, expected) in [
            ("r0 r1 r2+4 r6", vec![vec![0, 1, 2, 3]]),
            ("r0 w5 r1 w6", vec![vec![0, 2], vec![1, 3]]),
            ("w0 w2 w3 w1", vec![vec![0, 3], vec![1, 2]]),
            ("w1 w0", vec![vec![0], vec![1]]),
            ("z0 z1", vec![vec![0], vec![1]]),
            ("w0 f0+0 w1", vec![vec![0, 2], vec![1]]),
            ("r0+0 r0 r1+0 r1", vec![vec![0], vec![1, 3], vec![2]]),
            ("", vec![]),
        ] {
            assert_eq!(members(text, LIMITS), expected, "{text}");
        }
    }

    #[test]
    fn nothing_comes_before_what_it_overlaps() {
        for (text, expected) in [
            // The last write would come before another to the same block.
            ("w0 w1+2 w5 w1", vec![vec![0, 1], vec![2], vec![3]]),
            ("w0 r1 w1", vec![vec![0], vec![1], vec![2]]),
            ("r0 w1 r1", vec![vec![0], vec![1], vec![2]]),
            ("w0 z1 w1", vec![vec![0], vec![1], vec![2]]),
            ("r0 r1 r1 r2", vec![vec![0, 1, 3], vec![2]]),
        ] {
            let got = members(text, LIMITS);
            if text.starts_with("r0 r1") {
                // Which of two equal reads goes on does not matter.
                assert_eq!(got.iter().map(Vec::len).sum::<usize>(), 4, "{text}");
                continue;
            }
            assert_eq!(got, expected, "{text}");
        }
    }

    #[test]
    fn a_run_stays_within_limits() {
        let many: String = (0..100).map(|at| format!("w{at} ")).collect();
        let lens = |limits| members(&many, limits).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(lens(LIMITS), [32, 32, 32, 4]);
        assert_eq!(lens(RunLimits { bytes_max: 40960, ..LIMITS }), [10; 10]);
        assert_eq!(lens(RunLimits { buffers_max: 25, ..LIMITS }), [25; 4]);
        let end = Piece { kind: RequestKind::Write, offset: u64::MAX - 4095, bytes: 4096, buffers: 1 };
        assert_eq!(runs(&[end, Piece { offset: 0, ..end }], LIMITS).len(), 2, "nothing lies behind the last byte");
    }
}
