//! Cache: pieces of L2 tables or refcount blocks in memory, by number. It owns what is cached and what of it is dirty;
//! the order in which dirty pieces reach the disk is `writeback.rs`'s, and nothing here does I/O.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::Arc;

/// Hashes one number by a multiplication: the keys are places in tables.
#[derive(Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((*byte).into()));
    }

    fn write_u64(&mut self, number: u64) {
        // 2^64 divided by the golden ratio; the high half spreads best, and the table looks at both ends.
        let product = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ product >> 32;
    }
}

/// A map and a set of numbers.
pub(super) type NumberMap<V> = HashMap<u64, V, BuildHasherDefault<NumberHasher>>;
pub(super) type NumberSet = std::collections::HashSet<u64, BuildHasherDefault<NumberHasher>>;

/// Words that are written together, as one sector of 4096 bytes at most has them.
const DIRTY_UNIT_WORDS: usize = 512;

/// How many slots are found without the map.
const RECENT: usize = 256;

struct Slot {
    key: u64,
    /// Where it lies in the file, in bytes.
    host: u64,
    /// In the machine's byte order. Shared with a write-back under way, so that a change copies it first.
    words: Arc<Vec<u64>>,
    dirty: Option<Range<usize>>,
    /// Used since the hand last passed.
    referenced: bool,
    /// Loaded for somebody who has not used it yet; it stays until then.
    fresh: bool,
    /// A write-back has taken it and has not ended: the disk may still have what it replaces.
    writing: bool,
}

/// A piece as it was when a write-back began, and what of it is to be written.
#[derive(Clone)]
pub(super) struct Dirty {
    pub key: u64,
    host: u64,
    words: Arc<Vec<u64>>,
    range: Range<usize>,
}

impl Dirty {
    /// Where in the file it goes.
    pub(super) fn offset(&self) -> u64 {
        self.host + self.range.start as u64 * 8
    }

    /// As it stands on disk.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.words[self.range.clone()].iter().flat_map(|word| word.to_be_bytes()).collect()
    }
}

/// See the file's head.
pub(super) struct Cache {
    slots: Vec<Slot>,
    by_key: NumberMap<usize>,
    /// Slots that were found last, by the keys' last bits: a guess, which the slot's key tells right or wrong.
    recent: [usize; RECENT],
    /// Where the search for a victim goes on: second chance.
    hand: usize,
    /// In pieces; more are kept only while all are dirty or fresh.
    capacity: usize,
    dirty: usize,
}

impl Cache {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            slots: Vec::new(),
            by_key: NumberMap::default(),
            recent: [0; RECENT],
            hand: 0,
            capacity: capacity.max(2),
            dirty: 0,
        }
    }

    /// The slot of a piece, for the calls below until the lock is given up.
    #[inline]
    pub(super) fn find(&mut self, key: u64) -> Option<usize> {
        let place = (key % RECENT as u64) as usize;
        let recent = self.recent[place];
        let at = match self.slots.get(recent) {
            Some(slot) if slot.key == key => recent,
            _ => {
                let at = *self.by_key.get(&key)?;
                self.recent[place] = at;
                at
            }
        };
        let slot = self.slots.get_mut(at)?;
        slot.referenced = true;
        slot.fresh = false;
        Some(at)
    }

    pub(super) fn words(&self, slot: usize) -> &[u64] {
        self.slots.get(slot).map_or(&[], |slot| &slot.words)
    }

    pub(super) fn is_dirty(&self, slot: usize) -> bool {
        self.slots.get(slot).is_some_and(|slot| slot.dirty.is_some())
    }

    pub(super) fn any_dirty(&self) -> bool {
        self.dirty > 0
    }

    /// Whether so much is dirty that it should be written back before more is loaded.
    pub(super) fn is_clogged(&self) -> bool {
        self.dirty * 4 >= self.capacity * 3
    }

    /// Changes one word.
    pub(super) fn set(&mut self, slot: usize, at: usize, word: u64) {
        let Some(slot) = self.slots.get_mut(slot) else { return };
        let words = Arc::make_mut(&mut slot.words);
        let len = words.len();
        let Some(place) = words.get_mut(at) else { return };
        if *place == word {
            return;
        }
        *place = word;
        let start = at / DIRTY_UNIT_WORDS * DIRTY_UNIT_WORDS;
        let unit = start..(start + DIRTY_UNIT_WORDS).min(len);
        slot.dirty = Some(match slot.dirty.take() {
            None => {
                self.dirty += 1;
                unit
            }
            Some(old) => old.start.min(unit.start)..old.end.max(unit.end),
        });
    }

    /// Puts a piece in that was read from the disk. One that is there already stays as it is.
    pub(super) fn insert(&mut self, key: u64, host: u64, words: Vec<u64>) {
        if self.by_key.contains_key(&key) {
            return;
        }
        if self.slots.len() >= self.capacity {
            self.evict();
        }
        self.by_key.insert(key, self.slots.len());
        self.slots.push(Slot {
            key,
            host,
            words: Arc::new(words),
            dirty: None,
            referenced: true,
            fresh: true,
            writing: false,
        });
    }

    /// Makes room by one clean piece, if there is one that nobody waits for.
    fn evict(&mut self) {
        for _ in 0..self.slots.len() * 2 {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[self.hand];
            if slot.dirty.is_none() && !slot.fresh && !slot.writing && !std::mem::take(&mut slot.referenced) {
                let key = slot.key;
                self.remove(key);
                return;
            }
        }
    }

    /// Forgets a piece, whether it is dirty or not.
    pub(super) fn remove(&mut self, key: u64) {
        let Some(at) = self.by_key.remove(&key) else { return };
        let slot = self.slots.swap_remove(at);
        self.dirty -= usize::from(slot.dirty.is_some());
        if let Some(moved) = self.slots.get(at) {
            self.by_key.insert(moved.key, at);
        }
    }

    /// Forgets all pieces; none is dirty.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.capacity);
    }

    /// Everything that is dirty, which counts as clean from now on. It stays in memory until [`Cache::end_write_back`].
    pub(super) fn take_dirty(&mut self) -> Vec<Dirty> {
        self.dirty = 0;
        let taken = self.slots.iter_mut().filter_map(|slot| {
            let range = slot.dirty.take()?;
            slot.writing = true;
            Some(Dirty { key: slot.key, host: slot.host, words: slot.words.clone(), range })
        });
        let mut taken: Vec<Dirty> = taken.collect();
        taken.sort_unstable_by_key(Dirty::offset);
        taken
    }

    /// What was taken is on the disk, or was put back.
    pub(super) fn end_write_back(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.writing = false);
    }

    /// Makes a piece dirty again that could not be written, or puts it back if it is gone.
    pub(super) fn put_back(&mut self, piece: Dirty) {
        let Dirty { key, host, words, range } = piece;
        let at = match self.by_key.get(&key) {
            Some(at) => *at,
            None => {
                self.by_key.insert(key, self.slots.len());
                self.slots.push(Slot { key, host, words, dirty: None, referenced: true, fresh: false, writing: false });
                self.slots.len() - 1
            }
        };
        let slot = &mut self.slots[at];
        slot.dirty = Some(match slot.dirty.take() {
            None => {
                self.dirty += 1;
                range
            }
            Some(old) => old.start.min(range.start)..old.end.max(range.end),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clean_and_unused_go_first_and_the_dirty_stay() {
        let mut cache = Cache::new(4);
        for key in 0..4 {
            cache.insert(key, key * 4096, vec![0; 512]);
            assert!(cache.find(key).is_some());
        }
        let slot = cache.find(2).expect("it is there");
        cache.set(slot, 3, 7);
        assert!(cache.any_dirty() && !cache.is_clogged());
        for key in 4..12 {
            cache.insert(key, key * 4096, vec![0; 512]);
            let slot = cache.find(key).expect("just loaded");
            assert_eq!(cache.words(slot)[0], 0);
        }
        assert_eq!(cache.slots.len(), 4);
        let slot = cache.find(2).expect("dirty pieces stay");
        assert_eq!(cache.words(slot)[3], 7);
        for (key, at) in &cache.by_key {
            assert_eq!(cache.slots[*at].key, *key);
        }
    }

    #[test]
    fn a_write_back_holds_what_was_dirty_when_it_began() {
        let mut cache = Cache::new(4);
        cache.insert(9, 1 << 20, vec![1; 1024]);
        let slot = cache.find(9).expect("it is there");
        cache.set(slot, 600, 2);
        cache.set(slot, 601, 1);
        let taken = cache.take_dirty();
        assert!(!cache.any_dirty() && !cache.is_dirty(slot));
        cache.set(slot, 600, 3);
        let [piece] = taken.as_slice() else { panic!("one piece") };
        assert_eq!((piece.offset(), piece.bytes().len()), ((1 << 20) + 4096, 4096));
        assert_eq!(piece.bytes()[88 * 8..89 * 8], 2u64.to_be_bytes());
        for key in 20..30 {
            cache.insert(key, key << 20, vec![0; 8]);
        }
        assert!(cache.find(9).is_some(), "it is not loaded again from a disk that has the old content");
        cache.put_back(piece.clone());
        cache.end_write_back();
        assert_eq!(cache.take_dirty()[0].bytes()[88 * 8..89 * 8], 3u64.to_be_bytes(), "the newer content wins");
        cache.remove(9);
        cache.put_back(taken[0].clone());
        assert!(cache.any_dirty());
    }
}
