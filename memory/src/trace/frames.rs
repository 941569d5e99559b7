//! Files, layers and views: which pages are shown to which VM, and which may be punched. The rules
//! of Cow.tla that a trace shows, by the names of its actions.

use std::collections::{HashMap, HashSet};

use super::event::FileId;
use super::region::{Region, Why};
use crate::layer::LayerId;
use crate::units::PageRange;

type Map = Vec<(PageRange, u64, u64)>;

/// Mapping behind a page, whether or not the VM has its own copy on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Under {
    /// No memory.
    Nothing,
    Zero,
    /// Mapped shared: a page of the VM's birth file.
    Born(FileId, u64),
    Private(FileId, u64),
}

/// Source of a copied page of a file: the table, its freeze, the page.
type Origin = (u64, u64, u64);

#[derive(Debug, Default)]
struct File {
    /// Layers over it.
    layers: HashSet<u64>,
    /// Punched pages.
    given: HashSet<u64>,
    origins: HashMap<u64, Origin>,
    /// The table of a VM that maps the file shared.
    is_birth: bool,
}

/// All files.
#[derive(Debug, Default)]
pub(super) struct Files {
    files: HashMap<FileId, File>,
    layers: HashMap<u64, FileId>,
    /// How many layers have an identity: more than one of a file that was published again.
    instances: HashMap<u64, u64>,
    hollow: HashSet<u64>,
    handles: HashMap<u64, i64>,
    views: HashMap<u64, Map>,
    /// Views of a VM's own pages, which it may write and punch.
    born: HashSet<u64>,
    named: HashMap<u64, HashSet<u64>>,
}

fn no_page(text: impl Into<String>) -> Why {
    (None, text.into())
}

impl Files {
    pub(super) fn layer(&mut self, layer: u64, file: FileId) {
        *self.instances.entry(layer).or_default() += 1;
        self.layers.insert(layer, file);
        self.files.entry(file).or_default().layers.insert(layer);
    }

    pub(super) fn layer_gone(&mut self, layer: u64) -> Result<(), Why> {
        let others = self.instances.get(&layer).map_or(0, |count| count.saturating_sub(1));
        if others > 0 {
            self.instances.insert(layer, others);
            return Ok(());
        }
        self.instances.remove(&layer);
        if self.named.get(&layer).is_some_and(|views| !views.is_empty()) {
            return Err(no_page("a layer goes that a view names"));
        }
        self.hollow.remove(&layer);
        self.handles.remove(&layer);
        if let Some(id) = self.layers.remove(&layer)
            && let Some(file) = self.files.get_mut(&id)
        {
            file.layers.remove(&layer);
            if file.layers.is_empty() {
                self.files.remove(&id);
            }
        }
        Ok(())
    }

    pub(super) fn hollow(&mut self, layer: u64) {
        self.hollow.insert(layer);
    }

    pub(super) fn handle(&mut self, layer: u64, count: i64) {
        *self.handles.entry(layer).or_default() += count;
    }

    /// A VM is born in a file.
    pub(super) fn born(&mut self, file: FileId, range: PageRange, page: u64) -> Result<(), Why> {
        let named = self.naming(file, PageRange::with_len(page, range.len()), true);
        if let Some(view) = named {
            return Err(no_page(format!("Birth: FreshFiles: the file of a birth is named by view {view}")));
        }
        self.files.entry(file).or_default().is_birth = true;
        Ok(())
    }

    /// A view that refers to a page of `range` of the file, if any. `all`: including views of a
    /// VM's own pages.
    fn naming(&self, file: FileId, range: PageRange, all: bool) -> Option<u64> {
        let layers = &self.files.get(&file)?.layers;
        layers.iter().find_map(|layer| {
            let views = self.named.get(layer)?;
            views.iter().copied().filter(|view| all || !self.born.contains(view)).find(|view| {
                let names = |(pages, of, at): &(PageRange, u64, u64)| {
                    of == layer && !PageRange::with_len(*at, pages.len()).intersect(range).is_empty()
                };
                self.views.get(view).is_some_and(|map| map.iter().any(names))
            })
        })
    }

    /// I1, I4: shown pages are never written in place.
    pub(super) fn nobody_writes(
        &self,
        file: FileId,
        range: PageRange,
        regions: &HashMap<u64, Region>,
    ) -> Result<(), Why> {
        if !self.files.get(&file).is_some_and(|file| file.is_birth) {
            return Ok(());
        }
        for region in regions.values() {
            // A birth file is mapped at its own offsets.
            let within = range.intersect(PageRange::new(0, region.under.len() as u64));
            if let Some(page) = (within.start..within.end).find(|p| region.under[*p as usize] == Under::Born(file, *p))
            {
                return Err((Some(page), "FreezeCommit: I1, I4: a page is shown that a VM writes in place".into()));
            }
        }
        Ok(())
    }

    /// I4: mapped pages exist.
    pub(super) fn shown(&self, file: FileId, page: u64) -> Result<(), String> {
        match self.files.get(&file) {
            Some(of) if of.given.contains(&page) => Err("I4: a page is mapped that was given back".into()),
            _ => Ok(()),
        }
    }

    pub(super) fn view(&mut self, view: u64, born: bool, map: &Map, regions: &HashMap<u64, Region>) -> Result<(), Why> {
        self.view_gone(view);
        for (pages, layer, at) in map {
            let Some(file) = self.layers.get(layer).copied() else { continue };
            let range = PageRange::with_len(*at, pages.len());
            let given = self.files.get(&file).map(|file| &file.given).filter(|given| !given.is_empty());
            if let Some(page) = given.and_then(|given| (range.start..range.end).find(|page| given.contains(page))) {
                return Err(no_page(format!(
                    "SweepPunch: I4: a view names page {page:#x} of layer {layer}, given back"
                )));
            }
            if !born {
                self.nobody_writes(file, range, regions)?;
            }
            self.named.entry(*layer).or_default().insert(view);
        }
        if born {
            self.born.insert(view);
        }
        self.views.insert(view, map.clone());
        Ok(())
    }

    pub(super) fn view_gone(&mut self, view: u64) {
        self.born.remove(&view);
        for (_, layer, _) in self.views.remove(&view).unwrap_or_default() {
            if let Some(views) = self.named.get_mut(&layer) {
                views.remove(&view);
                if views.is_empty() {
                    self.named.remove(&layer);
                }
            }
        }
    }

    /// I4: a file is written before any VM is shown it.
    pub(super) fn written(
        &mut self,
        table: u64,
        freeze: u64,
        runs: &[PageRange],
        file: FileId,
        page: u64,
    ) -> Result<(), Why> {
        let mut to = page;
        for run in runs {
            if let Some(view) = self.naming(file, PageRange::with_len(to, run.len()), true) {
                return Err((Some(run.start), format!("FreezePrepare: I4: what view {view} names is written")));
            }
            let of = &mut self.files.entry(file).or_default().origins;
            of.extend((0..run.len()).map(|offset| (to + offset, (table, freeze, run.start + offset))));
            to += run.len();
        }
        Ok(())
    }

    /// A sweep acts on its last check of handles.
    pub(super) fn swept(&self, layers: &[u64]) -> Result<(), Why> {
        let handled = layers.iter().find(|layer| self.handles.get(layer).is_some_and(|count| *count > 0));
        handled.map_or(Ok(()), |layer| {
            Err(no_page(format!("SweepPunch: a_sweep_heeds_handles: layer {layer} has a handle outside")))
        })
    }

    /// `SweepPunch`; and the pages of its birth file that a VM punches.
    pub(super) fn punch(
        &mut self,
        file: FileId,
        range: PageRange,
        swept: bool,
        regions: &HashMap<u64, Region>,
    ) -> Result<(), Why> {
        if let Some(view) = self.naming(file, range, swept) {
            return Err(no_page(format!("SweepPunch: I4: view {view} names pages of {range} that are given back")));
        }
        if swept {
            self.nobody_writes(file, range, regions)?;
            if let Some(of) = self.files.get_mut(&file) {
                of.given.extend(range.start..range.end);
            }
        }
        Ok(())
    }

    /// I14: where the VM has no copy of its own, mapping and map agree.
    pub(super) fn settled(&self, region: &Region, map: &Map) -> Result<(), Why> {
        let mut pieces = map.iter().peekable();
        for page in 0..region.under.len() as u64 {
            while pieces.next_if(|(pages, ..)| pages.end <= page).is_some() {}
            let says = pieces.peek().filter(|(pages, ..)| pages.contains(page));
            let says = says.map(|(pages, layer, at)| (self.layers.get(layer).copied(), at + (page - pages.start)));
            let in_step = match region.under[page as usize] {
                Under::Nothing | Under::Born(..) => true,
                Under::Zero => says.is_none(),
                Under::Private(file, at) => says == Some((Some(file), at)),
            };
            if !in_step && !region.is_own(page) {
                return Err((Some(page), format!("I14: the map says {says:?} of a page that is mapped otherwise")));
            }
        }
        Ok(())
    }

    /// `FreezeCommit`, `ChildSees`: for every page that is still the VM's own, the image has the
    /// bytes of the freeze's instant. I11: and no bytes of no-fork pages.
    pub(super) fn image(&self, table: u64, region: &Region, map: &Map, declared: &[PageRange]) -> Result<(), Why> {
        let mut pieces = map.iter().peekable();
        let mut hidden = declared.iter().peekable();
        for page in 0..region.under.len() as u64 {
            while pieces.next_if(|(pages, ..)| pages.end <= page).is_some() {}
            while hidden.next_if(|run| run.end <= page).is_some() {}
            let shown = pieces.peek().filter(|(pages, ..)| pages.contains(page));
            let shown = shown.map(|(pages, layer, at)| (*layer, at + (page - pages.start)));
            if hidden.peek().is_some_and(|run| run.contains(page)) {
                if shown.is_some_and(|(layer, _)| !LayerId(layer).is_reference()) {
                    return Err((Some(page), "FreezeCommit: I11: an image shows a page that is not inherited".into()));
                }
                continue;
            }
            if !region.is_own(page) {
                continue;
            }
            let copied = shown.is_some_and(|(layer, at)| {
                let file = self.layers.get(&layer).and_then(|id| self.files.get(id));
                let origin = file.and_then(|file| file.origins.get(&at));
                self.hollow.contains(&layer) || origin == Some(&(table, region.freezes, page))
            });
            if !copied {
                let text = "FreezePrepare: I5, ChildSees: an image has not the bytes of a page that is its VM's own";
                return Err((Some(page), text.into()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that another process published again has two layers of one identity.
    #[test]
    fn an_identity_goes_with_the_last_of_its_layers() {
        let (mut files, regions) = (Files::default(), HashMap::new());
        let (file, map) = ((1, 2), vec![(PageRange::new(0, 4), 7, 0)]);
        files.layer(7, file);
        files.layer(7, file);
        files.view(1, false, &map, &regions).unwrap();
        files.layer_gone(7).unwrap();
        assert!(files.files.contains_key(&file), "the other layer has the file");
        assert!(files.layer_gone(7).is_err(), "a view names the last layer");
        files.view_gone(1);
        files.layer(7, file);
        files.layer_gone(7).unwrap();
        assert!(files.files.is_empty() && files.layers.is_empty() && files.instances.is_empty());
    }
}
