//! Pages whose bytes a reset restores, instead of dropping the VM's own copies.
//!
//! A drop costs a system call for each run (4 us, with KVM's part in it), and a fault and the kernel's copy
//! when the guest writes the page again. Where a run has few pages of the VM's own, their bytes are
//! read from the layer and written over the copies (half a microsecond a page), which stay the VM's own and mapped.
//!
//! Such a page costs memory, so only pages in use stay: a page that the VM has not written
//! since the last reset has the layer's bytes already, and is dropped.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use crate::layer::{Layer, LayerMap};
use crate::lost::FillError;
use crate::region::{GuestRegion, State};
use crate::sys::FileWindow;
use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange, pages_in, push_run, subtract_runs};

/// Shared pages between two of the VM's own are dropped along, up to this number of pages. Showing them again
/// costs the guest at most one fault, since fault-around maps a page's neighbours with it. That is
/// no more than the saved system call (4 us with KVM's part in it).
const MAX_GAP: u64 = 16;
/// Runs of one block that are handled one by one. With more, all of them and the gaps between them are dropped.
const MAX_RUNS: usize = 8;
/// Pages of a run, without its gaps, that are restored one by one: these cost less than a drop. With
/// [`MAX_RUNS`], at most 32 pages of a block's 512 stay the VM's own.
const MAX_RESTORED: u64 = 4;

/// The bytes of a page, which can be read in words.
#[repr(align(8))]
struct AlignedPage([u8; PAGE_SIZE as usize]);

/// Splits `own`, ascending, into the runs to restore and those to drop. The latter are joined over gaps where that
/// costs less than it saves. Only shared pages are added, whose loss is a fault.
fn split(own: &[PageRange]) -> (Vec<PageRange>, Vec<PageRange>) {
    let near = own.chunk_by(|run, next| next.start - run.end <= MAX_GAP);
    let hull = |runs: &[PageRange]| Some(PageRange::new(runs.first()?.start, runs.last()?.end));
    let near: Vec<(PageRange, &[PageRange])> = near.filter_map(|runs| Some((hull(runs)?, runs))).collect();
    let (mut few, mut many) = (Vec::new(), Vec::new());
    for crowd in near.chunk_by(|(a, _), (b, _)| a.start / BLOCK_PAGES == b.start / BLOCK_PAGES) {
        match crowd {
            [(first, _), .., (last, _)] if crowd.len() > MAX_RUNS => many.push(PageRange::new(first.start, last.end)),
            crowd => {
                for (hull, runs) in crowd {
                    if pages_in(runs) > MAX_RESTORED { many.push(*hull) } else { few.extend_from_slice(runs) }
                }
            }
        }
    }
    (few, many)
}

impl GuestRegion {
    /// Restores pages of `own`, ascending runs that show `map`. Returns them, ascending, and the
    /// runs to drop, which have all other pages of `own`. There are no writers.
    pub(super) fn restore(
        &self,
        state: &mut State,
        map: &LayerMap,
        own: &[PageRange],
    ) -> (Vec<PageRange>, Vec<PageRange>) {
        let (few, mut dropped) = split(own);
        let pieces = state.provided_of(map, &few);
        let mut noted = HashSet::new();
        for (_, source) in &pieces {
            if noted.insert(source.layer.id()) {
                state.windows.note(&source.layer, self.store.budget(), &self.failure);
            }
        }
        let mut restored = Vec::new();
        'pieces: for (piece, source) in &pieces {
            let window = state.windows.get(source.layer.id());
            for page in piece.start..piece.end {
                let done = self.restore_page(page, &source.layer, source.at + (page - piece.start), window);
                // The thread that notifies the VM comes later.
                if window.is_some_and(FileWindow::is_lost) {
                    self.failure.set(&Arc::new(FillError::Gone));
                }
                match done {
                    // The caller reports it. Each further page could be a signal, and a mapping to mend it.
                    Ok(_) if self.lost().is_some() => break 'pieces,
                    Ok(true) => push_run(&mut restored, PageRange::with_len(page, 1)),
                    Ok(false) => {}
                    // On a disk. Or it cannot be read: the guest's next access reports that, if there is one.
                    Err(error) => tracing::debug!(%error, page, "a page is dropped"),
                }
            }
        }
        dropped.extend(subtract_runs(&few, &restored));
        (restored, dropped)
    }

    /// Gives `page` the bytes of page `at` of `layer`. Returns whether it had others.
    fn restore_page(&self, page: u64, layer: &Layer, at: u64, window: Option<&FileWindow>) -> io::Result<bool> {
        if let Some(window) = window {
            // SAFETY: `page` is a private copy of this VM's, whose writers are stopped. The window's page is mapped for
            // reading for as long as the window lives, elsewhere.
            return Ok(unsafe { self.at.put_page(page, window.addr(at).cast()) });
        }
        let mut bytes = AlignedPage([0; PAGE_SIZE as usize]);
        layer.read_cached(at, &mut bytes.0)?;
        // SAFETY: as above; `bytes` are a page of this function's own.
        Ok(unsafe { self.at.put_page(page, (&raw const bytes).cast()) })
    }
}

#[cfg(test)]
mod tests;
