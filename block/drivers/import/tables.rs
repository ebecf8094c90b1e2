//! Tables: the pieces of an image's own tables that one channel has read. It owns how much of them is kept, whatever an
//! image says of their size; what stands in them it does not know.

use std::collections::{HashMap, VecDeque};

/// How much is read at once; an entry never lies in two of them.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// The most pages that are kept: 1 MiB in each channel.
const PAGES_MAX: usize = 256;

/// A piece of a child, by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Page {
    /// The number of the child.
    pub(crate) child: usize,
    /// In pages.
    pub(crate) index: u64,
}

/// Why a place could not be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// This is to be read first.
    Need(Page),
    /// The image contradicts itself, or ends too early.
    Corrupt(&'static str),
}

/// What a lookup gives.
pub(crate) type Attempt<T> = Result<T, Stop>;

/// The pages that have been read, the oldest first to go.
#[derive(Default)]
pub(crate) struct Tables {
    pages: HashMap<Page, Vec<u8>>,
    order: VecDeque<Page>,
}

impl Tables {
    /// `N` bytes at `offset` of a child, which must be a multiple of N.
    pub(crate) fn bytes<const N: usize>(&self, child: usize, offset: u64) -> Attempt<[u8; N]> {
        let page = Page { child, index: offset / PAGE_BYTES };
        let content = self.pages.get(&page).ok_or(Stop::Need(page))?;
        let start = (offset % PAGE_BYTES) as usize;
        let found = content.get(start..).and_then(<[u8]>::first_chunk);
        found.copied().ok_or(Stop::Corrupt("a table lies behind the end of the file"))
    }

    /// Keeps what was read. A page may be short: the file ends there.
    pub(super) fn insert(&mut self, page: Page, content: Vec<u8>) {
        if self.pages.insert(page, content).is_none() {
            self.order.push_back(page);
        }
        while self.order.len() > PAGES_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.pages.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_entries_are_whole() {
        let mut tables = Tables::default();
        assert_eq!(tables.bytes::<4>(1, 8192), Err(Stop::Need(Page { child: 1, index: 2 })));
        for index in 0..2000 {
            tables.insert(Page { child: 0, index }, vec![index as u8; 6]);
        }
        assert_eq!((tables.pages.len(), tables.order.len()), (PAGES_MAX, PAGES_MAX));
        assert_eq!(tables.bytes::<4>(0, 1999 * PAGE_BYTES), Ok([1999u64 as u8; 4]));
        assert!(matches!(tables.bytes::<4>(0, 1999 * PAGE_BYTES + 4), Err(Stop::Corrupt(_))));
        assert!(matches!(tables.bytes::<4>(0, 0), Err(Stop::Need(_))));
    }
}
