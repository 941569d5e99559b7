//! Replaces traces in a build without them: zero-sized types and empty functions.

mod step;

use std::collections::HashMap;

use crate::layer::{LayerId, LayerMap};
use crate::ownership::word::Word;
use crate::region::dont_fork::DontForkMap;
use crate::units::PageRange;
use crate::{Access, PinLifetime};

pub(crate) use step::WordStep;

#[derive(Debug)]
pub(crate) struct Table;

impl Table {
    #[inline(always)]
    pub(crate) fn new(_pages: u64) -> Self {
        Self
    }
    #[inline(always)]
    pub(crate) fn on<T>(
        &self,
        _block: usize,
        _page: Option<u64>,
        _step: WordStep,
        word: &Word,
        work: impl FnOnce(&Word) -> T,
    ) -> T {
        work(word)
    }
    #[inline(always)]
    pub(crate) fn freeze_begun(&self) {}
    #[inline(always)]
    pub(crate) fn freeze_failed(&self) {}
    #[inline(always)]
    pub(crate) fn left(&self) {}
    #[inline(always)]
    pub(crate) fn reset_begun(&self) {}
    #[inline(always)]
    pub(crate) fn image(&self, _map: &LayerMap, _declared: &DontForkMap) {}
}

#[derive(Debug)]
pub(crate) struct TraceLocked;

impl TraceLocked {
    #[inline(always)]
    pub(crate) fn new(_table: &Table) -> Self {
        Self
    }
}

#[derive(Debug)]
pub(crate) struct Device;

impl Device {
    #[inline(always)]
    pub(crate) fn pin(_table: &Table, _range: PageRange, _access: Access, _term: PinLifetime) -> Self {
        Self
    }
    #[inline(always)]
    pub(crate) fn held(&self, _counted: Option<&[PageRange]>, _section: bool) {}
    #[inline(always)]
    pub(crate) fn close(&self) {}
}

#[inline(always)]
pub(crate) fn view(_view: u64, _map: &LayerMap, _born: bool) {}

#[inline(always)]
pub(crate) fn swept<V>(seen: &mut HashMap<LayerId, V>, ask: impl FnOnce(&mut HashMap<LayerId, V>)) {
    ask(seen);
}

#[inline(always)]
pub(crate) fn handle(_layer: LayerId, count: impl FnOnce() -> u64) {
    count();
}
