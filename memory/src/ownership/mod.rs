//! The ownership table: which pages a VM owns outright, and how often each is pinned.
//!
//! The only module that changes the bit or a count. One record describes a 2 MiB block while it has
//! one owner. The first operation on a part of a block splits it into one record per page, each
//! with the block's bit and count (I12, R13).
//!
//! | who | needs the lock | may |
//! |---|---|---|
//! | [`OwnershipTable::try_pin`], [`OwnershipTable::unpin`] | no | count pins on exclusive pages |
//! | [`TableGuard`] | yes | set and clear the bit, split |
//!
//! Lock order: a region's state lock, then the table's.

pub(crate) mod word;

use crate::ownership::word::{Ownership, PinMiss, ShareMiss, Word};
use crate::sync::{Mutex, MutexGuard, OnceLock, lock};
use crate::testing::sabotage::{Break, broken};
use crate::trace::{self, WordStep};
use crate::units::{BLOCK_PAGES, PageRange, push_run};

type PageWords = Box<[Word]>;

#[derive(Debug)]
struct PageBlock {
    word: Word,
    /// Filled by the first split and kept, because lock-free readers may be using it.
    pages: OnceLock<PageWords>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct OwnershipTable {
    blocks: Box<[PageBlock]>,
    pages: u64,
    lock: Mutex<()>,
    pub(crate) trace: trace::Table,
}

/// Page counts of a table by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableCounts {
    /// Pages with the bit set.
    pub exclusive: u64,
    /// Pages with at least one pin.
    pub pinned: u64,
    /// Pins over all pages.
    pub pins: u64,
}

impl OwnershipTable {
    /// A table of `pages` pages, all without an owner.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let block = || PageBlock { word: Word::new(Ownership::new(false, 0)), pages: OnceLock::new() };
        let blocks = (0..pages.div_ceil(BLOCK_PAGES)).map(|_| block()).collect();
        Self { blocks, pages, lock: Mutex::new(()), trace: trace::Table::new(pages) }
    }

    /// Number of pages described.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Size of the table in bytes.
    #[must_use]
    pub fn footprint(&self) -> u64 {
        let split = self.blocks.iter().filter(|b| b.pages.get().is_some()).count();
        (self.blocks.len() * size_of::<PageBlock>() + split * BLOCK_PAGES as usize * size_of::<Word>()) as u64
    }

    /// Takes the right to change bits. Held by freeze, unshare, adopt and reset; never while
    /// waiting.
    pub fn lock(&self) -> TableGuard<'_> {
        let held = lock(&self.lock);
        TableGuard { table: self, _trace: trace::TraceLocked::new(&self.trace), _held: held }
    }

    fn whole(&self, block: usize) -> PageRange {
        PageRange::with_len(block as u64 * BLOCK_PAGES, BLOCK_PAGES).intersect(PageRange::new(0, self.pages))
    }

    fn page_words(&self, block: usize, piece: PageRange) -> &[Word] {
        let first = (piece.start % BLOCK_PAGES) as usize;
        match self.blocks[block].pages.get() {
            Some(words) => &words[first..first + piece.len() as usize],
            None => &[],
        }
    }

    /// State of `page` in the table: the exclusive bit and the pin count.
    #[must_use]
    pub fn get(&self, page: u64) -> (bool, u32) {
        let block = (page / BLOCK_PAGES) as usize;
        let word = self.blocks[block].word.load();
        let word = match self.page_words(block, PageRange::with_len(page, 1)) {
            [one] if word.is_split() => one.load(),
            _ => word,
        };
        (word.is_exclusive(), word.pins())
    }

    /// Pins every page of `range`, all or none, without a lock: one atomic step per page, or one
    /// for a whole block. On a miss no pin stays counted, and the caller takes the locked path.
    pub(crate) fn try_pin(&self, range: PageRange) -> Result<(), PinMiss> {
        for (block, piece) in range.blocks() {
            if let Err((miss, done)) = self.try_pin_piece(block, piece) {
                self.unpin(PageRange::new(range.start, done));
                return Err(miss);
            }
        }
        Ok(())
    }

    /// On a miss, returns the page (from the piece's start) up to which pins were counted.
    fn try_pin_piece(&self, block: usize, piece: PageRange) -> Result<(), (PinMiss, u64)> {
        let record = &self.blocks[block];
        if piece == self.whole(block) || broken(Break::CountBlock) {
            match self.trace.on(block, None, WordStep::Pin, &record.word, Word::try_pin) {
                Ok(()) => return Ok(()),
                Err(PinMiss::Split) => {}
                Err(miss) => return Err((miss, piece.start)),
            }
        } else {
            let word = record.word.load();
            if !word.is_split() {
                // A part of a block is pinned page by page, so that counts stay exact (I6): the
                // locked path splits the block.
                let miss = if word.is_exclusive() { PinMiss::Split } else { PinMiss::NotExclusive };
                return Err((miss, piece.start));
            }
        }
        for (page, word) in (piece.start..).zip(self.page_words(block, piece)) {
            let done = self.trace.on(block, Some(page), WordStep::Pin, word, Word::try_pin);
            done.map_err(|miss| (miss, page))?;
        }
        Ok(())
    }

    /// Whether no page of `range` is exclusive, as far as a lookup without the lock shows. Loads
    /// are Acquire: later loads of the caller come after them.
    pub(crate) fn none_exclusive(&self, range: PageRange) -> bool {
        let mut none = true;
        for (block, piece) in range.blocks() {
            let word = self.blocks[block].word.load();
            let pages = if word.is_split() { self.page_words(block, piece) } else { &[] };
            // A page's closed record belongs to a block that is being split or merged.
            none &= (word.is_split() || !word.is_exclusive())
                && pages.iter().map(Word::load).all(|word| !word.is_exclusive() && !word.is_split());
        }
        none
    }

    /// Drops one pin of every page of `range`. Takes no lock.
    ///
    /// # Panics
    /// When a page was not pinned or is no longer exclusive (R27): memory would already be corrupt.
    pub(crate) fn unpin(&self, range: PageRange) {
        for (block, piece) in range.blocks() {
            let unpin = |page, word: &Word| self.trace.on(block, page, WordStep::Unpin, word, Word::unpin);
            if piece == self.whole(block) && unpin(None, &self.blocks[block].word).is_ok() {
                continue;
            }
            // Acquire of the split bit, so that the page records are visible.
            assert!(self.blocks[block].word.load().is_split(), "I6: part of an unsplit block unpinned: {piece}");
            for (page, word) in (piece.start..).zip(self.page_words(block, piece)) {
                // Refused while the block is being split and this page's record is not open yet:
                // waits for the split.
                while unpin(Some(page), word).is_err() {
                    drop(self.lock());
                }
            }
        }
    }

    fn for_each_run(&self, range: PageRange, mut seen: impl FnMut(PageRange, Ownership)) {
        for (block, piece) in range.blocks() {
            let word = self.blocks[block].word.load();
            if word.is_split() {
                for (page, word) in (piece.start..).zip(self.page_words(block, piece)) {
                    seen(PageRange::with_len(page, 1), word.load());
                }
            } else {
                seen(piece, word);
            }
        }
    }

    /// Counts within `range`.
    #[must_use]
    pub fn counts(&self, range: PageRange) -> TableCounts {
        let mut counts = TableCounts::default();
        self.for_each_run(range, |run, word| {
            counts.exclusive += if word.is_exclusive() { run.len() } else { 0 };
            counts.pinned += if word.pins() > 0 { run.len() } else { 0 };
            counts.pins += u64::from(word.pins()) * run.len();
        });
        counts
    }

    /// The pinned pages within `range`, as ascending runs. Only a [`TableGuard`] holder that has
    /// shared the rest may act on the result.
    #[must_use]
    pub fn pinned_runs(&self, range: PageRange) -> Vec<PageRange> {
        let mut runs = Vec::new();
        self.for_each_run(range, |run, word| {
            if word.pins() > 0 {
                push_run(&mut runs, run);
            }
        });
        runs
    }
}

/// The right to set and clear exclusive bits.
#[derive(Debug)]
pub struct TableGuard<'a> {
    table: &'a OwnershipTable,
    /// Dropped before the lock is released.
    _trace: trace::TraceLocked,
    _held: MutexGuard<'a, ()>,
}

impl TableGuard<'_> {
    /// Splits the record of `block` into page records with the block's bit and count (I12).
    fn split(&self, block: usize) {
        let record = &self.table.blocks[block];
        let closed = || (0..BLOCK_PAGES).map(|_| Word::new(Ownership::closed())).collect();
        let pages: &PageWords = record.pages.get_or_init(closed);
        loop {
            let was = record.word.load();
            if was.is_split() {
                return;
            }
            // The pages' records stay closed until the block's record is split, and are then opened
            // with its value at that moment: a concurrent lookup waits for the lock. An earlier pin
            // or unpin of the whole block makes this loop retry.
            let trace = &self.table.trace;
            if trace.on(block, None, WordStep::Split, &record.word, |word| word.try_split(was)) {
                let was = if broken(Break::SplitBare) { Ownership::new(was.is_exclusive(), 0) } else { was };
                let open = |(page, word)| trace.on(block, Some(page), WordStep::Open, word, |word| word.reopen(was));
                (0..).zip(pages).for_each(open);
                return;
            }
        }
    }

    /// Merges the records of `block` into one, if its pages have one owner and no pin (I12, R13).
    /// Returns whether it has one record now.
    pub(crate) fn merge(&self, block: usize) -> bool {
        let record = &self.table.blocks[block];
        if !record.word.load().is_split() {
            return true;
        }
        let words = self.table.page_words(block, self.table.whole(block));
        let Some(first) = words.first().map(Word::load) else { return false };
        let first = first.unused();
        if first.pins() > 0 {
            return false;
        }
        // Closed one by one: a concurrent pin is either counted before its page is closed, which
        // ends the merge, or takes the locked path and waits.
        let trace = &self.table.trace;
        let like_the_first = |page: usize, word: &Word| {
            let was = word.load();
            let close = |word: &Word| was.unused() == first && word.try_close(was);
            trace.on(block, Some(page as u64), WordStep::Close, word, close)
        };
        let open = words.iter().enumerate().position(|(page, word)| !like_the_first(page, word));
        let reopen = |page, step, word| trace.on(block, page, step, word, |word: &Word| word.reopen(first));
        match open {
            None => reopen(None, WordStep::Merge, &record.word),
            Some(at) => (0..).zip(&words[..at]).for_each(|(n, word)| reopen(Some(n), WordStep::Reopen, word)),
        }
        open.is_none()
    }

    /// Sets the bit of every page of `range` (I2: populate, break-COW, copy on fork).
    pub(crate) fn set_exclusive(&self, range: PageRange) {
        for (block, piece) in range.blocks() {
            let record = &self.table.blocks[block];
            let word = record.word.load();
            if !word.is_split() {
                if word.is_exclusive() {
                    continue;
                }
                if piece == self.table.whole(block) {
                    self.table.trace.on(block, None, WordStep::Set, &record.word, Word::set_exclusive);
                    continue;
                }
                self.split(block);
            }
            for (page, word) in (piece.start..).zip(self.table.page_words(block, piece)) {
                self.table.trace.on(block, Some(page), WordStep::Set, word, Word::set_exclusive);
            }
        }
    }

    /// Clears the bit of every unpinned page of `range`, and returns the pinned pages, which keep
    /// it (I3). Pages that were not exclusive are unchanged.
    #[must_use = "the pinned pages must be copied, never shared"]
    pub(crate) fn share(&self, range: PageRange) -> Vec<PageRange> {
        if broken(Break::KeepBits) {
            return self.table.pinned_runs(range);
        }
        let mut pinned = Vec::new();
        for (block, piece) in range.blocks() {
            let record = &self.table.blocks[block];
            if piece == self.table.whole(block) {
                match self.table.trace.on(block, None, WordStep::Share, &record.word, Word::try_share) {
                    Ok(()) | Err(ShareMiss::NotExclusive) => continue,
                    Err(ShareMiss::Pinned) => {
                        push_run(&mut pinned, piece);
                        continue;
                    }
                    Err(ShareMiss::Split) => {}
                }
            } else {
                if record.word.load() == Ownership::new(false, 0) {
                    continue;
                }
                self.split(block);
            }
            for (page, word) in (piece.start..).zip(self.table.page_words(block, piece)) {
                let shared = self.table.trace.on(block, Some(page), WordStep::Share, word, Word::try_share);
                if shared == Err(ShareMiss::Pinned) {
                    push_run(&mut pinned, PageRange::with_len(page, 1));
                }
            }
            if piece == self.table.whole(block) {
                self.merge(block);
            }
        }
        pinned
    }

    /// Returns at most `most` exclusive pages of `range` that devices used since the last call, and
    /// clears their marks.
    pub(crate) fn take_recently_pinned(&self, range: PageRange, most: u64) -> Vec<PageRange> {
        let (mut runs, mut count) = (Vec::new(), 0);
        let mut take = |run: PageRange, word: &Word| {
            if word.forget_used() && count + run.len() <= most {
                count += run.len();
                push_run(&mut runs, run);
            }
        };
        for (block, piece) in range.blocks() {
            let record = &self.table.blocks[block];
            if record.word.load().is_split() {
                for (page, word) in (piece.start..).zip(self.table.page_words(block, piece)) {
                    take(PageRange::with_len(page, 1), word);
                }
            } else if piece == self.table.whole(block) {
                take(piece, &record.word);
            }
        }
        runs
    }

    /// The locked half of a pin: splits the records of `range` into one per page where the range
    /// covers only a part of a block.
    pub(crate) fn split_partial(&self, range: PageRange) {
        for (block, piece) in range.blocks() {
            if piece != self.table.whole(block) {
                self.split(block);
            }
        }
    }

    /// The runs of `range` whose bit is not set.
    pub(crate) fn not_exclusive(&self, range: PageRange) -> Vec<PageRange> {
        let mut runs = Vec::new();
        self.table.for_each_run(range, |run, word| {
            if !word.is_exclusive() {
                push_run(&mut runs, run);
            }
        });
        runs
    }
}

#[cfg(all(test, loom))]
mod loom_tests;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
