//! A region as a trace shows it: its records, its mappings, and the owners of its pages.

use super::frames::Under;
use super::records::{Block, Doing, Lock, Record, Step};
use crate::ownership::word::MAX_PINS;
use crate::units::{BLOCK_PAGES, PageRange};

/// A region, with its table and its mappings.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) at: u64,
    pub(super) pages: u64,
    pub(super) blocks: Vec<Block>,
    /// The mappings.
    pub(super) under: Vec<Under>,
    pub(super) protected: Vec<bool>,
    /// The thread that holds the table's lock.
    pub(super) lock: Option<u64>,
    /// The block that is being split or merged.
    pub(super) busy: Option<usize>,
    /// The bits at the start of a freeze, and the number of freezes begun.
    pub(super) had: Vec<bool>,
    pub(super) freezes: u64,
}

/// The reason, and the page of the region.
pub(super) type Why = (Option<u64>, String);

pub(super) fn why(page: u64, text: impl Into<String>) -> Why {
    (Some(page), text.into())
}

impl Region {
    pub(super) fn new(pages: u64) -> Self {
        let blocks = PageRange::new(0, pages).blocks().map(|(_, whole)| Block::new(whole.len() as usize, false, false));
        Self {
            at: 0,
            pages,
            blocks: blocks.collect(),
            under: vec![Under::Nothing; pages as usize],
            protected: vec![false; pages as usize],
            lock: None,
            busy: None,
            had: Vec::new(),
            freezes: 0,
        }
    }

    pub(super) fn place(page: u64) -> (usize, usize) {
        ((page / BLOCK_PAGES) as usize, (page % BLOCK_PAGES) as usize)
    }

    pub(super) fn record(&self, page: u64) -> Record {
        let (block, page) = Self::place(page);
        self.blocks[block].says(page)
    }

    pub(super) fn is_exclusive(&self, page: u64) -> bool {
        matches!(self.record(page), Record::Says { exclusive: true, .. })
    }

    pub(super) fn pins(&self, page: u64) -> u32 {
        if let Record::Says { pins, .. } = self.record(page) { pins } else { 0 }
    }

    pub(super) fn is_own(&self, page: u64) -> bool {
        let (block, page) = Self::place(page);
        self.blocks[block].own[page]
    }

    pub(super) fn set_own(&mut self, page: u64, own: bool) {
        let (block, page) = Self::place(page);
        self.blocks[block].own[page] = own;
    }

    /// A step on a block, by `thread`.
    pub(super) fn step(&mut self, thread: u64, block: usize, step: Step) -> Result<(), Why> {
        let held = self.lock == Some(thread);
        let of = &mut self.blocks[block];
        of.lock = Lock::Free;
        let locked = if held { of.step(Step::Lock(Lock::Either), MAX_PINS) } else { Ok(()) };
        let done = locked.and_then(|()| of.step(step, MAX_PINS));
        self.busy = (of.doing != Doing::Quiet).then_some(block);
        done.map_err(|rule| {
            let page = match step {
                Step::PinPage(page, _) | Step::UnpinPage(page, _) | Step::SetPage(page) | Step::OpenPage(page) => page,
                Step::SharePage(page) | Step::ClosePage(page) | Step::ReopenPage(page) => page,
                Step::Own(page) | Step::Take(page) => page,
                _ => 0,
            };
            why(block as u64 * BLOCK_PAGES + page as u64, format!("{step:?}: {rule}"))
        })
    }

    /// The visible state of a page.
    pub(super) fn describe(&self, page: u64) -> String {
        if page >= self.pages {
            return "beyond the region".into();
        }
        let (block, _) = Self::place(page);
        let of = &self.blocks[block];
        let own = if self.is_own(page) { "the VM's own" } else { "not known to be its own" };
        let protected = if self.protected[page as usize] { ", protected" } else { "" };
        let (record, block) = (self.record(page), of.record);
        format!(
            "record {record} (block {block}, {:?}), {own}, over {:?}{protected}",
            of.doing, self.under[page as usize]
        )
    }
}
