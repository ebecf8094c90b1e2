//! Which block is accessed next, and how. It owns the order of requests; it submits none.

use clap::ValueEnum;

use super::verify::Ledger;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
}

/// The access patterns, named as fio names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Access {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    #[value(name = "randread")]
    RandRead,
    /// Random writes.
    #[value(name = "randwrite")]
    RandWrite,
    /// Random reads and writes, mixed by --rwmixread.
    #[value(name = "randrw")]
    RandRw,
}

impl Access {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::RandRw => "randrw",
        }
    }

    /// Whether any request writes.
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }

    fn random(self) -> bool {
        !matches!(self, Self::Read | Self::Write)
    }
}

/// Where the next request of a queue comes from.
pub trait Source {
    /// The next operation and its block (in units of the block size from the start of the disk); `None` at the end.
    fn next(&mut self, ledger: Option<&Ledger>) -> Option<(Op, u64)>;
}

/// A share of the disk, accessed in a pattern.
pub struct Workload {
    rw: Access,
    /// Of 2^32, how many requests are reads.
    read_threshold: u64,
    first_block: u64,
    blocks: u64,
    /// The next block of a sequential pattern, relative to `first_block`.
    next: u64,
    /// Requests still to be issued.
    left: u64,
    random: Random,
}

impl Workload {
    /// `blocks` from `first_block` on, at most `requests` times; the same seed gives the same order.
    pub fn new(rw: Access, read_percent: u8, first_block: u64, blocks: u64, requests: u64, seed: u64) -> Self {
        let percent = match rw {
            Access::Read | Access::RandRead => 100,
            Access::Write | Access::RandWrite => 0,
            Access::RandRw => u64::from(read_percent),
        };
        Self {
            rw,
            read_threshold: (percent << 32) / 100,
            first_block,
            blocks,
            next: 0,
            left: requests,
            random: Random::new(seed),
        }
    }
}

impl Source for Workload {
    fn next(&mut self, ledger: Option<&Ledger>) -> Option<(Op, u64)> {
        self.left = self.left.checked_sub(1)?;
        let draw = self.random.next();
        let op = if draw >> 32 < self.read_threshold { Op::Read } else { Op::Write };
        let mut block = if self.rw.random() { self.random.below(self.blocks) } else { self.next };
        if let Some(ledger) = ledger {
            // Two requests on one block at once would leave its content to chance. A queue's share has more
            // blocks than requests in flight, so this ends.
            while ledger.busy(self.first_block + block) {
                block = (block + 1) % self.blocks;
            }
        }
        self.next = (block + 1) % self.blocks;
        Some((op, self.first_block + block))
    }
}

/// Reads back, in order, every block whose content the ledger knows.
pub struct ReadBack {
    next: u64,
}

impl ReadBack {
    /// From the first block of the queue's share on.
    pub fn new(first_block: u64) -> Self {
        Self { next: first_block }
    }
}

impl Source for ReadBack {
    fn next(&mut self, ledger: Option<&Ledger>) -> Option<(Op, u64)> {
        let block = ledger?.next_known(self.next)?;
        self.next = block + 1;
        Some((Op::Read, block))
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, fast, and good enough to scatter accesses.
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, by multiplication instead of division.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }
}

/// SplitMix64's finaliser: every input bit reaches every output bit.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_wraps_within_its_share() {
        let mut w = Workload::new(Access::Read, 0, 10, 3, 5, 1);
        let blocks: Vec<_> = std::iter::from_fn(|| w.next(None)).map(|(_, b)| b).collect();
        assert_eq!(blocks, [10, 11, 12, 10, 11]);
    }

    #[test]
    fn random_stays_in_its_share_and_mixes_as_asked() {
        let mut w = Workload::new(Access::RandRw, 70, 100, 50, 100_000, 7);
        let mut reads = 0;
        while let Some((op, block)) = w.next(None) {
            assert!((100..150).contains(&block));
            reads += u32::from(op == Op::Read);
        }
        assert!((69_000..71_000).contains(&reads), "{reads}");
    }

    #[test]
    fn the_seed_decides_the_order() {
        let order = |seed| {
            let mut w = Workload::new(Access::RandRead, 0, 0, 1 << 30, 100, seed);
            std::iter::from_fn(move || w.next(None)).map(|(_, b)| b).collect::<Vec<_>>()
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
    }
}
