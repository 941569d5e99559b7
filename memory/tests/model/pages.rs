//! The expected contents of a VM's memory, byte by byte: pages are shared until they change, so
//! that copies are cheap.

use std::ops::Range;
use std::sync::Arc;

use clade_memory::{PAGE_SIZE, PageRange};

const PAGE: usize = PAGE_SIZE as usize;

/// Contents of a page in children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inherits {
    Absent,
    Zeroed,
    Fresh(u8),
}

#[derive(Clone, Debug)]
struct Page {
    /// The page's bytes; for an absent page, those of the layer below.
    bytes: Arc<[u8; PAGE]>,
    /// No memory: not inherited.
    absent: bool,
    dont_fork: Option<Inherits>,
}

/// The model of one VM, or of one image.
#[derive(Clone, Debug)]
pub(crate) struct Pages(Vec<Page>);

impl Pages {
    /// All pages are zeros.
    pub(crate) fn new(pages: u64) -> Self {
        let zero = Page { bytes: Arc::new([0; PAGE]), absent: false, dont_fork: None };
        Self(vec![zero; pages as usize])
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len() as u64
    }

    pub(crate) fn all(&self) -> PageRange {
        PageRange::new(0, self.len())
    }

    /// The page's bytes.
    pub(crate) fn bytes(&self, page: u64) -> &Arc<[u8; PAGE]> {
        &self.0[page as usize].bytes
    }

    fn of(&self, range: PageRange) -> &[Page] {
        &self.0[range.start() as usize..range.end() as usize]
    }

    /// Whether the whole range has memory.
    pub(crate) fn is_there(&self, range: PageRange) -> bool {
        self.of(range).iter().all(|page| !page.absent)
    }

    /// The runs of `range` that have memory.
    pub(crate) fn there(&self, range: PageRange) -> Vec<PageRange> {
        let mut runs: Vec<PageRange> = Vec::new();
        for page in (range.start()..range.end()).filter(|page| !self.0[*page as usize].absent) {
            match runs.last_mut() {
                Some(last) if last.end() == page => *last = PageRange::new(last.start(), page + 1),
                _ => runs.push(PageRange::with_len(page, 1)),
            }
        }
        runs
    }

    /// Writes `byte` over a range of bytes.
    pub(crate) fn fill(&mut self, bytes: Range<u64>, byte: u8) {
        let mut at = bytes.start;
        while at < bytes.end {
            let page = &mut self.0[(at / PAGE_SIZE) as usize];
            let end = (at / PAGE_SIZE * PAGE_SIZE + PAGE_SIZE).min(bytes.end);
            let within = (at % PAGE_SIZE) as usize..(at % PAGE_SIZE + (end - at)) as usize;
            Arc::make_mut(&mut page.bytes)[within].fill(byte);
            at = end;
        }
    }

    /// Fills `pages` with one byte; absent pages stay absent.
    pub(crate) fn show(&mut self, pages: impl IntoIterator<Item = u64>, byte: u8) {
        let shown = Arc::new([byte; PAGE]);
        for page in pages {
            let page = &mut self.0[page as usize];
            if !page.absent {
                page.bytes = Arc::clone(&shown);
            }
        }
    }

    pub(crate) fn declare(&mut self, range: PageRange, what: Option<Inherits>) {
        self.0[range.start() as usize..range.end() as usize].iter_mut().for_each(|page| page.dont_fork = what);
    }

    /// The image for a child. Pages that the child does not inherit are not inherited by its
    /// children either.
    pub(crate) fn image(&self) -> Self {
        let inherited = |page: &Page| match page.dont_fork {
            // A page that is absent here, and no longer declared, is inherited with the bytes
            // below: zeros, or those of the last reset.
            None => Page { absent: false, ..page.clone() },
            Some(Inherits::Absent) => Page { bytes: Arc::new([0; PAGE]), absent: true, ..page.clone() },
            Some(Inherits::Zeroed) => Page { bytes: Arc::new([0; PAGE]), absent: false, ..page.clone() },
            Some(Inherits::Fresh(byte)) => Page { bytes: Arc::new([byte; PAGE]), absent: false, ..page.clone() },
        };
        Self(self.0.iter().map(inherited).collect())
    }

    /// A reset to `image`: replaces contents, where there is memory. Declarations and absent pages
    /// are unchanged.
    pub(crate) fn reset(&mut self, image: &Self) {
        for (page, image) in self.0.iter_mut().zip(&image.0) {
            page.bytes = Arc::clone(&image.bytes);
        }
    }

    /// The first wrong byte of `got`, which was read from `range` on: its address, value and
    /// expected value.
    pub(crate) fn first_wrong(&self, range: PageRange, got: &[u8]) -> Option<(u64, u8, u8)> {
        assert_eq!(got.len(), range.bytes());
        let pages = (range.start()..).zip(got.as_chunks::<PAGE>().0).zip(self.of(range));
        let ((page, got), want) = pages.into_iter().find(|((_, got), want)| **got != *want.bytes)?;
        let at = got.iter().zip(want.bytes.iter()).position(|(a, b)| a != b)?;
        Some((page * PAGE_SIZE + at as u64, got[at], want.bytes[at]))
    }
}
