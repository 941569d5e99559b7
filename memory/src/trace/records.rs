//! One block's records, and the steps allowed on them. The relation of spec/Ownership.tla, kept
//! equal to it.
//!
//! The state is the part of the specification's that a trace shows: the records, the holder of the
//! lock, the pages that each device has counted, the owner of the frame behind each page, and the
//! progress of a split or a merge. The program counters of the specification's threads and devices'
//! ranges are unconstrained: a step is allowed if some state of the specification with the same
//! projection allows it.
//!
//! `the_relation_is_the_specifications` compares all states and steps with TLC's (spec/check
//! --graph).

use std::collections::BTreeMap;
use std::fmt;

/// A record: the bit and the count, or a reference to the other level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Record {
    /// The record is in force.
    Says {
        /// The exclusive bit.
        exclusive: bool,
        /// The pin count.
        pins: u32,
    },
    /// A block's: ask the pages. A page's: ask the block, under the lock.
    Ask,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Says { exclusive, pins } => write!(f, "{}{pins}", if *exclusive { "x" } else { "-" }),
            Self::Ask => f.write_str("?"),
        }
    }
}

/// Holder of the table's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Lock {
    /// Not held.
    Free,
    /// A pin, of this device (`Locked` to `LetGo`).
    Pin(u64),
    /// A freeze or a reset (`Begin` to `Finish`).
    Change,
    /// In a trace: the steps of either are allowed, on any part of the block.
    Either,
}

/// Progress of a split or a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Doing {
    /// Neither is in progress.
    Quiet,
    /// The block's record was `was`; pages before `next` are open.
    Opening {
        /// Next page.
        next: usize,
        /// Value of the block's record.
        was: Record,
    },
    /// Pages before `next` are closed, and were equal to `first`.
    Closing {
        /// Next page.
        next: usize,
        /// Value that all pages must have.
        first: Record,
    },
    /// A merge was given up: pages from `next` to `end` are still closed.
    Reopening {
        /// Next page.
        next: usize,
        /// End of the closed pages.
        end: usize,
        /// Value that they had.
        first: Record,
    },
}

/// A step on one block. Pages are counted from the block's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Step {
    /// `TryBlock`, `CountLocked`
    PinBlock(u64),
    /// `TryPages`, `CountPages`
    PinPage(usize, u64),
    /// `Unpin`
    UnpinBlock(u64),
    /// `UnpinPages`, `Undo`, `GiveBack`
    UnpinPage(usize, u64),
    /// `Locked`, `Begin`
    Lock(Lock),
    /// `LetGo`, `Finish`
    Unlock,
    /// `SetBlock`
    SetBlock,
    /// `SetPages`, `Restore`
    SetPage(usize),
    /// `SplitBlock`
    Split,
    /// `OpenPages`
    OpenPage(usize),
    /// `Begin`
    ShareBlock,
    /// `SharePages`
    SharePage(usize),
    /// `ClosePages`
    ClosePage(usize),
    /// `ClosePages`, the last
    Merge,
    /// `Reopen`
    ReopenPage(usize),
    /// `BreakCow`, and `Write` of the guest
    Own(usize),
    /// `Take`: the page becomes a layer's, or is dropped for a layer's
    Take(usize),
}

/// One block and its pages.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Block {
    /// The block's record.
    pub(crate) record: Record,
    /// The pages' records.
    pub(crate) pages: Vec<Record>,
    /// Whether the frame behind a page is the VM's own.
    pub(crate) own: Vec<bool>,
    /// Holder of the table's lock.
    pub(crate) lock: Lock,
    /// Progress of a split or a merge.
    pub(crate) doing: Doing,
    /// The pages each device has counted, ascending.
    pub(crate) counted: BTreeMap<u64, Vec<usize>>,
}

const CLEAR: Record = Record::Says { exclusive: false, pins: 0 };

/// The reason why the specification does not allow a step.
pub(crate) type Refusal = &'static str;

fn need(holds: bool, refusal: Refusal) -> Result<(), Refusal> {
    if holds { Ok(()) } else { Err(refusal) }
}

impl Block {
    /// A block of `pages` pages with one record.
    pub(crate) fn new(pages: usize, exclusive: bool, own: bool) -> Self {
        Self {
            record: Record::Says { exclusive, pins: 0 },
            pages: vec![Record::Ask; pages],
            own: vec![own; pages],
            lock: Lock::Free,
            doing: Doing::Quiet,
            counted: BTreeMap::new(),
        }
    }

    /// The record of a page, if no split or merge has it closed.
    pub(crate) fn says(&self, page: usize) -> Record {
        if self.record == Record::Ask { self.pages[page] } else { self.record }
    }

    fn counted(&self, device: u64) -> &[usize] {
        self.counted.get(&device).map_or(&[], Vec::as_slice)
    }

    fn is_quiet(&self) -> bool {
        self.doing == Doing::Quiet
    }

    /// A pin unshares, sets and splits before it counts.
    fn may_set(&self) -> bool {
        match self.lock {
            Lock::Pin(device) => self.counted(device).is_empty(),
            Lock::Either => true,
            Lock::Free | Lock::Change => false,
        }
    }

    fn may_change(&self) -> bool {
        matches!(self.lock, Lock::Change | Lock::Either)
    }

    fn count(record: Record, device_counts: bool, most: u32) -> Result<Record, Refusal> {
        match record {
            Record::Ask => Err("a record that speaks for nothing is counted"),
            Record::Says { exclusive: false, .. } => Err("I3: a page that is not exclusive is pinned"),
            Record::Says { pins, .. } if pins >= most => Err("I6: a count wraps"),
            Record::Says { .. } if device_counts => Err("I6: a device counts a page twice"),
            Record::Says { pins, .. } => Ok(Record::Says { exclusive: true, pins: pins + 1 }),
        }
    }

    fn uncount(record: Record) -> Result<Record, Refusal> {
        match record {
            Record::Ask => Err("a record that speaks for nothing is counted down"),
            Record::Says { exclusive: true, pins } if pins > 0 => Ok(Record::Says { exclusive: true, pins: pins - 1 }),
            Record::Says { .. } => Err("I6: what is unpinned was not pinned, or is not exclusive any more"),
        }
    }

    fn share(record: Record) -> Result<Record, Refusal> {
        match record {
            Record::Says { exclusive: true, pins: 0 } => Ok(CLEAR),
            Record::Says { exclusive: true, .. } => Err("I3: a pinned page loses its bit"),
            _ => Err("a bit is given up that is not there"),
        }
    }

    /// Takes a step, or returns the rule that forbids it.
    pub(crate) fn step(&mut self, step: Step, most: u32) -> Result<(), Refusal> {
        match step {
            Step::PinBlock(device) => {
                let counts = !self.counted(device).is_empty();
                need(self.lock != Lock::Pin(device) || self.is_quiet(), "a device counts within its own split")?;
                self.record = Self::count(self.record, counts, most)?;
                self.counted.insert(device, (0..self.pages.len()).collect());
            }
            Step::PinPage(page, device) => {
                need(self.record == Record::Ask, "I6: a page is counted while its block's record stands")?;
                need(self.lock != Lock::Pin(device) || self.is_quiet(), "a device counts within its own split")?;
                let counted = self.counted(device);
                // Ascending, without a gap: a device's range is one run.
                need(counted.last().is_none_or(|last| last + 1 == page), "pages are counted out of order")?;
                self.pages[page] = Self::count(self.pages[page], false, most)?;
                self.counted.entry(device).or_default().push(page);
            }
            Step::UnpinBlock(device) => {
                need(self.lock != Lock::Pin(device), "a device unpins what it is pinning")?;
                need(self.counted(device).len() == self.pages.len(), "I6: a device unpins what it has not counted")?;
                self.record = Self::uncount(self.record)?;
                self.counted.remove(&device);
            }
            Step::UnpinPage(page, device) => {
                need(self.lock != Lock::Pin(device), "a device unpins what it is pinning")?;
                need(self.record == Record::Ask, "I6: a page is counted down while its block's record stands")?;
                let first = self.counted(device).first().copied();
                need(first == Some(page), "I6: a device unpins what it has not counted")?;
                self.pages[page] = Self::uncount(self.pages[page])?;
                let counted = self.counted.entry(device).or_default();
                counted.remove(0);
                if counted.is_empty() {
                    self.counted.remove(&device);
                }
            }
            Step::Lock(lock) => {
                need(self.lock == Lock::Free, "the lock is another's")?;
                if let Lock::Pin(device) = lock {
                    need(self.counted(device).is_empty(), "a device pins twice")?;
                }
                self.lock = lock;
            }
            Step::Unlock => {
                need(self.lock != Lock::Free, "a lock is let go that nobody has")?;
                need(self.is_quiet(), "I12: the lock is let go within a split or a merge")?;
                match self.lock {
                    Lock::Pin(device) => need(!self.counted(device).is_empty(), "a pin is given without a count")?,
                    Lock::Change => need(self.is_settled(), "what a change took is neither gone nor given back")?,
                    Lock::Either | Lock::Free => {}
                }
                self.lock = Lock::Free;
            }
            Step::SetBlock => {
                need(self.may_set(), "R25: a bit is set without the lock")?;
                need(self.record == CLEAR, "a bit is set that is there, or by a record that speaks for nothing")?;
                need(self.own.iter().all(|own| *own), "I2: a page is called exclusive and is not the VM's own")?;
                self.record = Record::Says { exclusive: true, pins: 0 };
            }
            Step::SetPage(page) => {
                need(self.may_set() || self.may_change(), "R25: a bit is set without the lock")?;
                need(
                    self.record == Record::Ask && self.is_quiet(),
                    "a bit is set in a record that speaks for nothing",
                )?;
                need(self.pages[page] == CLEAR, "a bit is set that is there, or by a record that speaks for nothing")?;
                need(self.own[page], "I2: a page is called exclusive and is not the VM's own")?;
                need(self.may_set() || self.some_exclusive(), "a change gives back what it did not have to take")?;
                self.pages[page] = Record::Says { exclusive: true, pins: 0 };
            }
            Step::Split => {
                need(self.may_set(), "I12: a block is split without the lock")?;
                need(self.record != Record::Ask && self.is_quiet(), "I12: what is split is split again")?;
                let one_owned = self.lock == Lock::Either || self.own.iter().any(|own| *own);
                need(one_owned, "a block is split before a page of it is unshared")?;
                self.doing = Doing::Opening { next: 0, was: self.record };
                self.record = Record::Ask;
            }
            Step::OpenPage(page) => {
                let Doing::Opening { next, was } = self.doing else { return Err("a record is opened out of turn") };
                need(next == page, "a record is opened out of turn")?;
                self.pages[page] = was;
                let next = next + 1;
                self.doing = if next == self.pages.len() { Doing::Quiet } else { Doing::Opening { next, was } };
            }
            Step::ShareBlock => {
                need(self.may_change(), "R25: a bit is given up without the lock")?;
                self.record = Self::share(self.record)?;
            }
            Step::SharePage(page) => {
                need(self.may_change(), "R25: a bit is given up without the lock")?;
                need(
                    self.record == Record::Ask && self.is_quiet(),
                    "a bit is given up by a record that speaks for nothing",
                )?;
                self.pages[page] = Self::share(self.pages[page])?;
            }
            Step::ClosePage(page) => {
                need(self.may_change(), "I12: a merge without the lock")?;
                let (next, first) = match self.doing {
                    Doing::Quiet => (0, self.pages[0]),
                    Doing::Closing { next, first } => (next, first),
                    _ => return Err("I12: a merge within a split"),
                };
                need(self.record == Record::Ask && next == page, "a record is closed out of turn")?;
                let unpinned = matches!(first, Record::Says { pins: 0, .. });
                need(unpinned && self.pages[page] == first, "I12: pages are merged that are pinned or unlike")?;
                self.pages[page] = Record::Ask;
                self.doing = Doing::Closing { next: next + 1, first };
            }
            Step::Merge => {
                let Doing::Closing { next, first } = self.doing else { return Err("I12: a merge that was not begun") };
                need(next == self.pages.len(), "I12: a merge before all records are closed")?;
                self.record = first;
                self.doing = Doing::Quiet;
            }
            Step::ReopenPage(page) => {
                let (next, end, first) = match self.doing {
                    // Given up because one page differed. That page may have been pinned then, and
                    // no longer be.
                    Doing::Closing { next, first } if next < self.pages.len() => {
                        let unlike = self.pages[next] != first
                            || matches!(self.pages[next], Record::Says { exclusive: true, .. });
                        need(unlike, "a merge is given up without a reason")?;
                        (0, next, first)
                    }
                    Doing::Reopening { next, end, first } => (next, end, first),
                    _ => return Err("a record is opened out of turn"),
                };
                need(next == page, "a record is opened out of turn")?;
                self.pages[page] = first;
                let next = next + 1;
                self.doing = if next == end { Doing::Quiet } else { Doing::Reopening { next, end, first } };
            }
            Step::Own(page) => {
                need(self.lock != Lock::Change, "a guest writes that is stopped")?;
                need(!self.own[page], "a page becomes the VM's own that is")?;
                self.own[page] = true;
            }
            Step::Take(page) => {
                need(self.may_change(), "a page is taken away without the lock")?;
                need(self.is_quiet() || self.lock == Lock::Either, "a page is taken away within a merge")?;
                match self.says(page) {
                    Record::Says { exclusive: true, pins } if pins > 0 => {
                        return Err("I3: a pinned page is taken away");
                    }
                    Record::Says { exclusive: true, .. } => return Err("I8: a page is taken away before its bit is"),
                    Record::Ask => return Err("a page is taken away whose record speaks for nothing"),
                    Record::Says { .. } => {}
                }
                // Equal and unpinned records are merged first.
                let merged = self.lock == Lock::Either || self.record != Record::Ask || self.some_exclusive();
                need(merged, "pages are taken away that should have been merged")?;
                need(self.own[page], "a page is taken away that is not the VM's own")?;
                self.own[page] = false;
            }
        }
        Ok(())
    }

    fn some_exclusive(&self) -> bool {
        self.pages.iter().any(|page| matches!(page, Record::Says { exclusive: true, .. }))
    }

    /// Whether a change is complete.
    fn is_settled(&self) -> bool {
        if self.record != Record::Ask {
            return true;
        }
        let left = |(page, own): (&Record, &bool)| *page == CLEAR && *own;
        !self.pages.iter().zip(&self.own).any(left) && self.some_exclusive()
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages: Vec<String> = self.pages.iter().map(ToString::to_string).collect();
        let own: String = self.own.iter().map(|own| if *own { 'v' } else { 'l' }).collect();
        write!(f, "{} {} {own} ", self.record, pages.join(","))?;
        match self.lock {
            Lock::Free => write!(f, "free ")?,
            Lock::Pin(device) => write!(f, "pin-d{device} ")?,
            Lock::Change => write!(f, "change ")?,
            Lock::Either => write!(f, "locked ")?,
        }
        match self.doing {
            Doing::Quiet => write!(f, "quiet"),
            Doing::Opening { next, was } => write!(f, "open{}:{was}", next + 1),
            Doing::Closing { next, first } => write!(f, "close{next}:{first}"),
            Doing::Reopening { next, end, first } => write!(f, "back{}-{end}:{first}", next + 1),
        }
    }
}

#[cfg(test)]
mod tests;
