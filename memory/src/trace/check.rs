//! The validator: replays a trace, and refuses the first step that the specification does not
//! allow.
//!
//! Records take the steps of spec/Ownership.tla ([`super::records`]). Mappings, views, protection
//! and punched pages take those of Cow.tla and Background.tla, as far as a trace shows them
//! ([`super::frames`]).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;

use super::event::Event;
use super::frames::{Files, Under};
use super::records::{Block, Step};
use super::region::{Region, Why, why};
use super::step::WordStep;
use crate::units::{BLOCK_PAGES, PageRange};

/// Maximum number of events kept, to be printed with a refused one.
const KEPT: usize = 1 << 14;
/// Maximum number of these that are printed: the last ones of the page.
const SHOWN: usize = 12;

/// A pin.
#[derive(Debug)]
struct Device {
    table: u64,
    range: PageRange,
    in_place: bool,
    /// Whether a section is open.
    section: bool,
}

/// A step that the specification does not allow.
#[derive(Debug)]
pub(crate) struct Refused {
    index: u64,
    event: String,
    page: Option<u64>,
    why: String,
    state: String,
    before: Vec<String>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "trace: step {} is none of the specification's: {}", self.index, self.why)?;
        writeln!(f, "  step:  {}", self.event)?;
        if let Some(page) = self.page {
            writeln!(f, "  page:  {page:#x}: {}", self.state)?;
        }
        self.before.iter().try_for_each(|line| writeln!(f, "  before: {line}"))
    }
}

/// Replays a trace.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    regions: HashMap<u64, Region>,
    /// Tables by their regions' reservations.
    spaces: HashMap<u64, u64>,
    devices: BTreeMap<u64, Device>,
    files: Files,
    kept: VecDeque<(u64, u64, Event)>,
    steps: u64,
    schedules: u64,
    kinds: BTreeMap<&'static str, u64>,
}

impl Checker {
    /// Summary of the replay.
    pub(crate) fn summary(&self) -> String {
        let kinds: Vec<String> = self.kinds.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let (steps, schedules) = (self.steps, self.schedules);
        format!("trace: {steps} steps, {schedules} schedules, 0 refused ({})", kinds.join(", "))
    }

    /// Takes the next step.
    pub(crate) fn step(&mut self, thread: u64, event: Event) -> Result<(), Box<Refused>> {
        self.steps += 1;
        let done = self.take(thread, &event);
        let refused = done.err().map(|(page, why)| self.refused(&event, page, why));
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((self.steps, thread, event));
        refused.map_or(Ok(()), Err)
    }

    fn refused(&self, event: &Event, page: Option<u64>, why: String) -> Box<Refused> {
        let table = match event {
            Event::Held { device, .. } | Event::Closing { device } | Event::Done { device } => {
                self.devices.get(device).map(|device| device.table)
            }
            _ => event.about().map(|(id, _)| self.spaces.get(&id).copied().unwrap_or(id)),
        };
        let touches = |event: &Event| {
            event.about().is_some_and(|(id, range)| {
                Some(self.spaces.get(&id).copied().unwrap_or(id)) == table
                    && page.is_none_or(|page| range.is_none_or(|range| range.contains(page)))
            })
        };
        let short = |event: &Event| {
            let text = format!("{event:?}");
            if text.chars().count() > 300 { text.chars().take(300).chain("...".chars()).collect() } else { text }
        };
        let about = self.kept.iter().rev().filter(|(_, _, event)| touches(event)).take(SHOWN);
        let mut before: Vec<String> =
            about.map(|(index, thread, event)| format!("{index}, thread {thread}: {}", short(event))).collect();
        before.reverse();
        let state = page.and_then(|page| Some(self.regions.get(&table?)?.describe(page))).unwrap_or_default();
        Box::new(Refused { index: self.steps, event: short(event), page, why, state, before })
    }

    fn count(&mut self, kind: &'static str) {
        *self.kinds.entry(kind).or_default() += 1;
    }

    fn take(&mut self, thread: u64, event: &Event) -> Result<(), Why> {
        match event {
            Event::Schedule => self.schedules += 1,
            Event::Table { table, pages } => _ = self.regions.insert(*table, Region::new(*pages)),
            Event::TableGone { table } => {
                if let Some(device) = self.devices.values().find(|device| device.table == *table) {
                    return Err(why(device.range.start, "I3: a region goes under a pin"));
                }
                // The addresses were released before, and may be reused by now.
                if let Some(region) = self.regions.remove(table)
                    && self.spaces.get(&region.at) == Some(table)
                {
                    self.spaces.remove(&region.at);
                }
            }
            Event::Space { at, table } => {
                if let Some(region) = self.regions.get_mut(table) {
                    region.at = *at;
                    self.spaces.insert(*at, *table);
                }
            }
            Event::SpaceGone { at } => _ = self.spaces.remove(at),
            Event::Word { .. } => self.word(thread, event)?,
            Event::Lock { table } => {
                let before = self.regions.get_mut(table).and_then(|region| region.lock.replace(thread));
                if before.is_some() {
                    return Err((None, "a table is locked twice".into()));
                }
            }
            Event::Unlock { table } => {
                if let Some(region) = self.regions.get_mut(table) {
                    if let Some(block) = region.busy {
                        region.step(thread, block, Step::Unlock)?;
                    }
                    if region.lock.take() != Some(thread) {
                        return Err((None, "a table is let go that another has locked".into()));
                    }
                }
            }
            Event::Pin { device, table, range, write, long } => {
                let (table, range, in_place) = (*table, *range, *write || *long);
                self.devices.insert(*device, Device { table, range, in_place, section: false });
            }
            Event::Held { device, counted, section } => self.held(*device, counted.as_deref(), *section)?,
            Event::Closing { device } => {
                if let Some(device) = self.devices.get_mut(device) {
                    device.section = false;
                }
            }
            Event::Done { device } => self.done(*device)?,
            Event::FreezeBegun { table } => {
                if let Some(region) = self.regions.get_mut(table) {
                    region.freezes += 1;
                    region.had = (0..region.pages).map(|page| region.is_exclusive(page)).collect();
                }
            }
            Event::Left { table } => {
                // `Death`. No device is left, because a pin keeps the region.
                if let Some(device) = self.devices.values().find(|device| device.table == *table) {
                    return Err(why(device.range.start, "Death: I3: a region goes under a pin"));
                }
                if let Some(region) = self.regions.get_mut(table) {
                    region.under.fill(Under::Nothing);
                }
            }
            Event::ResetBegun { table } => {
                if let Some(device) = self.devices.values().find(|device| device.section && device.table == *table) {
                    return Err(why(device.range.start, "ResetTake: I7: a reset goes on while a device reads"));
                }
            }
            Event::FreezeFailed { table } => self.freeze_failed(*table)?,
            Event::Settled { table, map } => {
                self.count("settled");
                if let Some(region) = self.regions.get(table) {
                    self.files.settled(region, map)?;
                }
            }
            Event::Image { table, map, declared } => {
                self.count("images");
                if let Some(region) = self.regions.get(table) {
                    self.files.image(*table, region, map, declared)?;
                }
            }
            Event::Layer { layer, file } => self.files.layer(*layer, *file),
            Event::LayerGone { layer } => self.files.layer_gone(*layer)?,
            Event::Hollow { layer } => self.files.hollow(*layer),
            Event::Handle { layer } => self.files.handle(*layer, 1),
            Event::HandleGone { layer } => self.files.handle(*layer, -1),
            Event::View { view, born, map } => {
                self.count("views");
                self.files.view(*view, *born, map, &self.regions)?;
            }
            Event::ViewGone { view } => self.files.view_gone(*view),
            Event::Written { at, runs, file, page } => {
                let table = self.spaces.get(at).copied();
                let freezes = table.and_then(|table| self.regions.get(&table)).map_or(0, |region| region.freezes);
                self.files.written(table.unwrap_or(0), freezes, runs, *file, *page)?;
            }
            Event::Swept { layers } => self.files.swept(layers)?,
            Event::Punch { file, range, swept } => {
                self.count("punches");
                self.files.punch(*file, *range, *swept, &self.regions)?;
            }
            _ => self.mapping(thread, event)?,
        }
        Ok(())
    }

    fn word(&mut self, thread: u64, event: &Event) -> Result<(), Why> {
        let Event::Word { table, block, page, step, before, after, device } = event else { return Ok(()) };
        let Some(region) = self.regions.get_mut(table) else { return Ok(()) };
        let (of, device) = (&region.blocks[*block], *device);
        let at = *block as u64 * BLOCK_PAGES + page.unwrap_or(0) as u64;
        if at >= region.pages {
            // The last block has as many records as any other.
            return Ok(());
        }
        let says = |of: &Block| page.map_or(of.record, |page| of.pages[page]);
        if says(of) != *before {
            return Err(why(at, format!("the record is {before}, and the steps so far leave {}", says(of))));
        }
        if device != 0 && self.devices.get(&device).is_none_or(|device| device.table != *table) {
            return Err(why(at, "a device counts in a table that it has not asked"));
        }
        if let Some(asked) = self.devices.get(&device).filter(|_| *step == WordStep::Pin) {
            let counts =
                page.map_or_else(|| PageRange::with_len(at, of.pages.len() as u64), |_| PageRange::with_len(at, 1));
            if !asked.range.covers(counts) {
                return Err(why(
                    at,
                    format!("PinBlock: I6: a device counts {counts}, and has asked for {}", asked.range),
                ));
            }
        }
        let device = Self::run_of(of, device, *step, *page, at);
        let steps = match (step, *page) {
            (WordStep::Pin, None) => Step::PinBlock(device),
            (WordStep::Pin, Some(page)) => Step::PinPage(page, device),
            (WordStep::Unpin, None) => Step::UnpinBlock(device),
            (WordStep::Unpin, Some(page)) => Step::UnpinPage(page, device),
            (WordStep::Set, None) => Step::SetBlock,
            (WordStep::Set, Some(page)) => Step::SetPage(page),
            (WordStep::Split, _) => Step::Split,
            (WordStep::Open, page) => Step::OpenPage(page.unwrap_or(0)),
            (WordStep::Share, None) => Step::ShareBlock,
            (WordStep::Share, Some(page)) => Step::SharePage(page),
            (WordStep::Close, page) => Step::ClosePage(page.unwrap_or(0)),
            (WordStep::Merge, _) => Step::Merge,
            (WordStep::Reopen, page) => Step::ReopenPage(page.unwrap_or(0)),
        };
        region.step(thread, *block, steps)?;
        let of = &region.blocks[*block];
        if says(of) != *after {
            return Err(why(at, format!("{steps:?}: I6, I12: the record becomes {after}, and should {}", says(of))));
        }
        self.count("words");
        Ok(())
    }

    /// A device of the specification pins one run. A short read whose pages the VM owns only in
    /// part counts as several: each run is a device there, numbered by its pin and its first page.
    fn run_of(of: &Block, device: u64, step: WordStep, page: Option<usize>, at: u64) -> u64 {
        let fresh = (device << 32) | at;
        let Some(page) = page else { return fresh };
        let mut runs = of.counted.range(device << 32..=(device << 32) | u64::from(u32::MAX));
        let run = match step {
            WordStep::Pin => runs.find(|(_, counted)| counted.last().is_some_and(|last| last + 1 == page)),
            _ => runs.find(|(_, counted)| counted.first() == Some(&page)),
        };
        run.map_or(fresh, |(run, _)| *run)
    }

    /// The pages of a block that a device has counted.
    fn counted(of: &Block, device: u64) -> impl Iterator<Item = usize> {
        of.counted
            .range(device << 32..=(device << 32) | u64::from(u32::MAX))
            .flat_map(|(_, pages)| pages.iter().copied())
    }

    /// `Hold`: the pages that a device gets.
    fn held(&mut self, device: u64, counted: Option<&[PageRange]>, section: bool) -> Result<(), Why> {
        self.count("pins");
        let Some(of) = self.devices.get_mut(&device) else { return Ok(()) };
        of.section = section;
        let Some(region) = self.regions.get(&of.table) else { return Ok(()) };
        let all = [of.range];
        let runs = counted.unwrap_or(&all);
        if of.in_place && runs.iter().map(|run| run.len()).sum::<u64>() < of.range.len() {
            return Err(why(of.range.start, "PinSection: I9: a page is written or kept that was not unshared"));
        }
        if !section && counted.is_some() {
            return Err(why(of.range.start, "DeviceSees: nothing keeps what is read without a count"));
        }
        let wanted: BTreeSet<u64> = runs.iter().flat_map(|run| run.start..run.end).collect();
        for (block, piece) in of.range.blocks() {
            let first = block as u64 * BLOCK_PAGES;
            let has: BTreeSet<u64> =
                Self::counted(&region.blocks[block], device).map(|page| first + page as u64).collect();
            let wants: BTreeSet<u64> = wanted.range(piece.start..piece.end).copied().collect();
            if let Some(page) = has.symmetric_difference(&wants).next() {
                return Err(why(
                    *page,
                    "Hold: I6: a device has what it has not counted, or has counted what it has not",
                ));
            }
            if let Some(page) = wants.iter().find(|page| region.protected[**page as usize]) {
                return Err(why(*page, "PinSettle: I3: a device is given a page that is write-protected"));
            }
        }
        Ok(())
    }

    fn done(&mut self, device: u64) -> Result<(), Why> {
        let Some(of) = self.devices.get(&device) else { return Ok(()) };
        if let Some(region) = self.regions.get(&of.table) {
            for (block, piece) in of.range.blocks() {
                if Self::counted(&region.blocks[block], device).next().is_some() {
                    return Err(why(piece.start, "Unpin: I6: a pin is gone, and its count is not"));
                }
            }
        }
        self.devices.remove(&device);
        Ok(())
    }

    /// I13: after a refused freeze the VM owns the same pages as before.
    fn freeze_failed(&mut self, table: u64) -> Result<(), Why> {
        let Some(region) = self.regions.get(&table) else { return Ok(()) };
        let lost = (0..region.had.len() as u64)
            .find(|page| region.had[*page as usize] && region.is_own(*page) && !region.is_exclusive(*page));
        lost.map_or(Ok(()), |page| Err(why(page, "FreezeFails: I13: a refused freeze does not give back a bit")))
    }

    /// Steps on mappings.
    fn mapping(&mut self, thread: u64, event: &Event) -> Result<(), Why> {
        let Some((at, Some(range))) = event.about() else { return Ok(()) };
        let Some(table) = self.spaces.get(&at).copied() else { return Ok(()) };
        self.count("mappings");
        let Some(region) = self.regions.get_mut(&table) else { return Ok(()) };
        let locked = region.lock == Some(thread);
        match event {
            Event::Owned { .. } => {
                for page in range.start..range.end {
                    Self::becomes_own(region, thread, page)?;
                }
            }
            Event::Kernel { runs, .. } => {
                // Only under the lock, which keeps pages from being removed between the answer and
                // the log.
                if !locked {
                    return Ok(());
                }
                let mut runs = runs.iter().peekable();
                for page in range.start..range.end {
                    while runs.next_if(|run| run.end <= page).is_some() {}
                    if runs.peek().is_some_and(|run| run.contains(page)) {
                        Self::becomes_own(region, thread, page)?;
                    } else if region.is_exclusive(page) {
                        return Err(why(page, "I2: a page has the bit, and the kernel does not call it the VM's own"));
                    } else {
                        region.set_own(page, false);
                    }
                }
            }
            Event::Protected { .. } => {
                for page in range.start..range.end {
                    if region.is_exclusive(page) {
                        return Err(why(page, "Protect: I3: a page is protected whose bit is not given up"));
                    }
                    region.protected[page as usize] = true;
                }
            }
            Event::Released { .. } => region.protected[range.start as usize..range.end as usize].fill(false),
            Event::Shared { file, page, .. } => {
                self.files.born(*file, range, *page)?;
                for offset in 0..range.len() {
                    let at = range.start + offset;
                    region.under[at as usize] = Under::Born(*file, page + offset);
                    region.set_own(at, true);
                }
            }
            _ => {
                let read = matches!(event, Event::Zero { .. } | Event::Dropped { .. });
                let reads = |device: &&Device| {
                    device.section && device.table == table && !device.range.intersect(range).is_empty()
                };
                if let Some(device) = self.devices.values().find(reads).filter(|_| read) {
                    let page = device.range.intersect(range).start;
                    return Err(why(page, "DiscardTake, ResetTake: I7: a page is taken away that a device reads"));
                }
                for offset in 0..range.len() {
                    let page = range.start + offset;
                    Self::taken(region, thread, page, locked, matches!(event, Event::Nothing { .. }))?;
                    let place = &mut region.under[page as usize];
                    match event {
                        Event::Private { file, page: first, .. } => {
                            *place = Under::Private(*file, first + offset);
                            self.files.shown(*file, first + offset).map_err(|rule| why(page, rule))?;
                        }
                        Event::Zero { .. } => *place = Under::Zero,
                        Event::Nothing { .. } => *place = Under::Nothing,
                        Event::Replaced { .. } => {
                            *place = Under::Zero;
                            region.set_own(page, true);
                        }
                        _ => {
                            // Dropped in place, over its birth file: the page is still the VM's
                            // own.
                        }
                    }
                }
                if let Event::Private { file, page, .. } = event {
                    let to = PageRange::with_len(*page, range.len());
                    self.files.nobody_writes(*file, to, &self.regions).map_err(|(_, rule)| why(range.start, rule))?;
                }
            }
        }
        Ok(())
    }

    /// `BreakCow`, `Write`.
    fn becomes_own(region: &mut Region, thread: u64, page: u64) -> Result<(), Why> {
        let (block, place) = Region::place(page);
        if region.is_own(page) { Ok(()) } else { region.step(thread, block, Step::Own(place)) }
    }

    /// `Take`, `StepRemap`: another mapping replaces a page's.
    fn taken(region: &mut Region, thread: u64, page: u64, locked: bool, emptied: bool) -> Result<(), Why> {
        if region.pins(page) > 0 {
            return Err(why(page, "Take: I3, I7: a pinned page is taken away"));
        }
        if region.is_exclusive(page) {
            return Err(why(page, "Take: I8: a page is taken away before its bit is"));
        }
        let was_protected = std::mem::take(&mut region.protected[page as usize]);
        if !region.is_own(page) {
            return Ok(());
        }
        if locked {
            let (block, place) = Region::place(page);
            return region.step(thread, block, Step::Take(place));
        }
        // Without the lock: the background thread, which holds its background copy's lock, or a
        // region that is being emptied and has no other users.
        if !was_protected && !emptied {
            return Err(why(page, "StepRemap: a page is mapped over a delta that was not protected"));
        }
        region.set_own(page, false);
        Ok(())
    }
}
