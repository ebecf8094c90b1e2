//! What every block must contain: the ledger of what was written, the pattern derived from it, and the comparison.
//! It does no I/O.
//!
//! Each 512-byte sector carries its offset, the generation of its block and the run's seed in its first three
//! words, and words derived from these in the rest; so a lost, misplaced, torn or foreign write each shows, and
//! the report can say which it was.

use std::fmt;

use super::workload::mix;

/// Bytes that carry a header of their own, so that a torn block shows.
const SECTOR: usize = 512;
/// Bytes in a word of the pattern.
const WORD: usize = 8;
/// The bit of a ledger entry that says a request is in flight.
const BUSY: u32 = 1 << 31;
/// Details of at most so many mismatches are kept per queue; all are counted.
const DETAILS_MAX: usize = 10;

/// What was written to a queue's share of the disk, one entry a block: its generation, or 0 where the content is
/// not known (never written, or a write failed).
pub struct Ledger {
    first_block: u64,
    entries: Vec<u32>,
    generation: u32,
    seed: u64,
    block_size: usize,
    /// Blocks compared so far.
    pub checked: u64,
    /// Mismatches so far.
    pub mismatches: u64,
    /// The first few of them.
    pub details: Vec<Mismatch>,
}

impl Ledger {
    /// For `blocks` of `block_size` bytes from `first_block` on; four bytes of memory a block.
    pub fn new(first_block: u64, blocks: usize, block_size: usize, seed: u64) -> Self {
        Self {
            first_block,
            entries: vec![0; blocks],
            generation: 0,
            seed,
            block_size,
            checked: 0,
            mismatches: 0,
            details: Vec::new(),
        }
    }

    /// Where this share begins.
    pub fn first_block(&self) -> u64 {
        self.first_block
    }

    /// Whether a request on this block is in flight.
    pub fn busy(&self, block: u64) -> bool {
        self.entries[self.index(block)] & BUSY != 0
    }

    /// The first block from `block` on whose content is known.
    pub fn next_known(&self, block: u64) -> Option<u64> {
        let from = self.index(block);
        let rest = self.entries.get(from..)?;
        let ahead = rest.iter().position(|&entry| entry & !BUSY != 0)?;
        Some(block + ahead as u64)
    }

    /// Blocks whose content is known.
    pub fn known(&self) -> u64 {
        self.entries.iter().filter(|&&entry| entry & !BUSY != 0).count() as u64
    }

    /// A read of `block` starts.
    pub fn begin_read(&mut self, block: u64) {
        let index = self.index(block);
        self.entries[index] |= BUSY;
    }

    /// A write of `block` starts: `buffer` becomes what it is to write.
    pub fn begin_write(&mut self, block: u64, buffer: &mut [u8]) {
        // 2^31 writes later a block may carry a number twice; never the 0 of "not known".
        self.generation = ((self.generation + 1) & !BUSY).max(1);
        let pattern = self.pattern(block, self.generation);
        for (i, word) in buffer.chunks_exact_mut(WORD).enumerate() {
            word.copy_from_slice(&pattern.word(i).to_le_bytes());
        }
        let index = self.index(block);
        self.entries[index] = self.generation | BUSY;
    }

    /// A write ended. One that failed may have written anything.
    pub fn end_write(&mut self, block: u64, succeeded: bool) {
        let index = self.index(block);
        self.entries[index] = if succeeded { self.entries[index] & !BUSY } else { 0 };
    }

    /// A read ended; `buffer` is what it read, or `None` if it failed.
    pub fn end_read(&mut self, block: u64, buffer: Option<&[u8]>) {
        let index = self.index(block);
        self.entries[index] &= !BUSY;
        let generation = self.entries[index];
        let Some(buffer) = buffer else { return };
        if generation == 0 {
            return;
        }
        self.checked += 1;
        if let Some(mismatch) = self.compare(block, generation, buffer) {
            self.mismatches += 1;
            if self.details.len() < DETAILS_MAX {
                self.details.push(mismatch);
            }
        }
    }

    fn compare(&self, block: u64, generation: u32, buffer: &[u8]) -> Option<Mismatch> {
        let pattern = self.pattern(block, generation);
        let words = || buffer.chunks_exact(WORD).map(word);
        let first = words().enumerate().position(|(i, w)| w != pattern.word(i))?;
        let sector = first * WORD / SECTOR * SECTOR;
        let found = buffer.get(sector..sector + SECTOR).unwrap_or(buffer);
        Some(Mismatch {
            offset: pattern.offset + (first * WORD) as u64,
            expected_offset: pattern.offset + sector as u64,
            expected_generation: generation,
            found: Found::recognise(found, self.seed),
        })
    }

    fn pattern(&self, block: u64, generation: u32) -> Pattern {
        Pattern { offset: block * self.block_size as u64, generation, seed: self.seed }
    }

    fn index(&self, block: u64) -> usize {
        // Blocks come from this queue's share, which fits memory since the table does.
        (block - self.first_block) as usize
    }
}

/// The content of one block.
struct Pattern {
    /// Of the block, in bytes.
    offset: u64,
    generation: u32,
    seed: u64,
}

impl Pattern {
    /// The `i`th word of the block.
    fn word(&self, i: usize) -> u64 {
        const PER_SECTOR: usize = SECTOR / WORD;
        let sector_offset = self.offset + (i / PER_SECTOR * SECTOR) as u64;
        match i % PER_SECTOR {
            0 => sector_offset,
            1 => u64::from(self.generation),
            2 => self.seed,
            rest => {
                let key = sector_offset ^ u64::from(self.generation).rotate_left(32) ^ self.seed;
                mix(key.wrapping_add((rest as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
            }
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// What stood in a sector instead of what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing but zeroes.
    Zeroes,
    /// A whole sector that this run wrote, somewhere or at some other time.
    Written { offset: u64, generation: u64 },
    /// The header is this run's, the rest does not belong to it.
    Damaged { offset: u64, generation: u64 },
    /// Anything else, by its first two words.
    Foreign([u64; 2]),
}

impl Found {
    fn recognise(sector: &[u8], seed: u64) -> Self {
        let words: Vec<u64> = sector.chunks_exact(WORD).map(word).collect();
        let &[offset, generation, found_seed, ..] = words.as_slice() else {
            return Self::Foreign([0; 2]);
        };
        if words.iter().all(|&w| w == 0) {
            return Self::Zeroes;
        }
        let Ok(short_generation) = u32::try_from(generation) else {
            return Self::Foreign([offset, generation]);
        };
        if found_seed != seed {
            return Self::Foreign([offset, generation]);
        }
        let pattern = Pattern { offset, generation: short_generation, seed };
        if words.iter().enumerate().all(|(i, &w)| w == pattern.word(i)) {
            Self::Written { offset, generation }
        } else {
            Self::Damaged { offset, generation }
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeroes => write!(f, "zeroes"),
            Self::Written { offset, generation } => {
                write!(f, "what this run wrote at offset {offset}, generation {generation}")
            }
            Self::Damaged { offset, generation } => {
                write!(f, "a damaged sector of offset {offset}, generation {generation}")
            }
            Self::Foreign([a, b]) => write!(f, "nothing this run wrote ({a:016x} {b:016x} …)"),
        }
    }
}

/// One block that did not contain what was written to it.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// Of the first wrong word, in bytes.
    pub offset: u64,
    /// Of the sector it lies in, in bytes.
    pub expected_offset: u64,
    pub expected_generation: u32,
    pub found: Found,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "offset {}: expected offset {}, generation {}; found {}",
            self.offset, self.expected_offset, self.expected_generation, self.found
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 4096;

    fn written(ledger: &mut Ledger, block: u64) -> Vec<u8> {
        let mut buffer = vec![0; BLOCK];
        ledger.begin_write(block, &mut buffer);
        assert!(ledger.busy(block));
        ledger.end_write(block, true);
        assert!(!ledger.busy(block));
        buffer
    }

    fn found(ledger: &mut Ledger, block: u64, buffer: &[u8]) -> Option<(u64, Found)> {
        let before = ledger.details.len();
        ledger.begin_read(block);
        ledger.end_read(block, Some(buffer));
        ledger.details.get(before).map(|m| (m.offset, m.found.clone()))
    }

    #[test]
    fn what_was_written_passes_and_each_kind_of_damage_is_named() {
        let mut ledger = Ledger::new(8, 8, BLOCK, 42);
        let old = written(&mut ledger, 9);
        let other = written(&mut ledger, 10);
        let new = written(&mut ledger, 9);
        assert_eq!(found(&mut ledger, 9, &new), None);

        let at = 9 * BLOCK as u64;
        // The first word of a lost write is right: it is the offset.
        let lost = Found::Written { offset: at, generation: 1 };
        assert_eq!(found(&mut ledger, 9, &old), Some((at + 8, lost)));
        let misplaced = Found::Written { offset: at + 4096, generation: 2 };
        assert_eq!(found(&mut ledger, 9, &other), Some((at, misplaced)));
        assert_eq!(found(&mut ledger, 9, &[0; BLOCK]), Some((at, Found::Zeroes)));
        assert_eq!(found(&mut ledger, 9, &[0xff; BLOCK]), Some((at, Found::Foreign([u64::MAX; 2]))));

        let mut torn = new.clone();
        torn[512..1024].copy_from_slice(&old[512..1024]);
        let torn_sector = Found::Written { offset: at + 512, generation: 1 };
        assert_eq!(found(&mut ledger, 9, &torn), Some((at + 520, torn_sector)));

        let mut flipped = new;
        flipped[1000] ^= 1;
        let damaged = Found::Damaged { offset: at + 512, generation: 3 };
        assert_eq!(found(&mut ledger, 9, &flipped), Some((at + 1000, damaged)));
        assert_eq!((ledger.checked, ledger.mismatches), (7, 6));
    }

    #[test]
    fn only_known_blocks_are_read_back_and_checked() {
        let mut ledger = Ledger::new(0, 8, BLOCK, 1);
        written(&mut ledger, 2);
        written(&mut ledger, 5);
        let mut buffer = vec![0; BLOCK];
        ledger.begin_write(6, &mut buffer);
        ledger.end_write(6, false);
        assert_eq!(ledger.next_known(0), Some(2));
        assert_eq!(ledger.next_known(3), Some(5));
        assert_eq!(ledger.next_known(6), None);
        assert_eq!(ledger.next_known(8), None);
        assert_eq!(ledger.known(), 2);
        assert_eq!(found(&mut ledger, 6, &buffer), None);
        assert_eq!(ledger.checked, 0);
    }
}
