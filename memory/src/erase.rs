//! Erasing bytes wherever they are in a VM's memory: what a child must not have of its parent.
//!
//! All of memory is read, through the layers, and only pages with a match are written. So a child
//! that is erased in stays as shared as it was, but for these pages.
//!
//! A program's buffer is contiguous in its own addresses, not in the guest's memory. It may begin at
//! the end of one page and go on in a page elsewhere. So a beginning of the bytes at the end of a
//! page is erased as well, and an end of them at the start of a page, from [`MIN_EDGE`] bytes on.
//! A secret is no longer than a page, so no page lies within it.
//!
//! ```text
//!  page 7             page 8              page 3             page 90
//!  ├───── secret ─────┼──┤                ├──────── sec┤     ├ret ───────────────┤
//!   whole, across an edge                  a beginning, and an end elsewhere
//! ```

use std::ops::Range;

use memchr::memmem::Finder;
use thiserror::Error;

use crate::access::AccessError;
use crate::error::RamError;
use crate::ram::{GuestRam, Quiesced};
use crate::region::pages::PageKind;
use crate::units::PAGE_SIZE;

/// The least bytes that are searched for as a whole: fewer are in memory by chance.
pub const MIN_SECRET: usize = 16;
/// The most.
pub const MAX_SECRET: usize = PAGE_SIZE as usize;
/// The least bytes of a beginning or an end at a page's edge.
pub const MIN_EDGE: usize = 8;
/// Bytes that are read at a time, in whole pages. Each read asks the kernel which pages are there.
const CHUNK: usize = 8 << 20;
const PAGE: usize = PAGE_SIZE as usize;

/// Bytes that were erased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erased {
    /// How often a secret was there as a whole.
    pub whole: u64,
    /// Beginnings at the end of a page and ends at the start of one.
    pub parts: u64,
}

/// Why nothing is searched for, or not all was erased.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EraseError {
    /// It has too few bytes, or too many.
    #[error("a secret of {length} bytes: {MIN_SECRET} to {MAX_SECRET} can be found in memory")]
    Length {
        /// Its bytes.
        length: usize,
    },
    /// Its beginning or its end is in memory everywhere.
    #[error("a secret whose first or last {MIN_EDGE} bytes are all the same matches other memory")]
    Plain,
    /// The pages cannot be found out.
    #[error("the VM's memory cannot be looked at")]
    Look(#[source] RamError),
    /// Memory cannot be read or written. Some may be erased.
    #[error("the VM's memory cannot be searched")]
    Access(#[from] AccessError),
}

/// Whether `secret` can be searched for.
///
/// # Errors
/// When it is too short, too long or too plain.
pub fn check_secret(secret: &[u8]) -> Result<(), EraseError> {
    let length = secret.len();
    if !(MIN_SECRET..=MAX_SECRET).contains(&length) {
        return Err(EraseError::Length { length });
    }
    let is_plain = |edge: &[u8]| edge.iter().all(|byte| *byte == edge[0]);
    if is_plain(&secret[..MIN_EDGE]) || is_plain(&secret[length - MIN_EDGE..]) {
        return Err(EraseError::Plain);
    }
    Ok(())
}

/// One secret, and what finds its first and its last bytes.
struct Needle<'a> {
    secret: &'a [u8],
    first: Finder<'a>,
    last: Finder<'a>,
    /// Where those end that go across the end of the last bytes, in the next ones.
    across: Vec<usize>,
}

/// All places where `finder` matches, also those that overlap.
fn places<'a>(finder: &'a Finder<'_>, bytes: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    let mut from = 0;
    std::iter::from_fn(move || {
        let place = from + finder.find(bytes.get(from..)?)?;
        from = place + 1;
        Some(place)
    })
}

impl<'a> Needle<'a> {
    fn new(secret: &'a [u8]) -> Result<Self, EraseError> {
        check_secret(secret)?;
        let last = &secret[secret.len() - MIN_EDGE..];
        Ok(Self { secret, first: Finder::new(&secret[..MIN_EDGE]), last: Finder::new(last), across: Vec::new() })
    }

    /// Where it is in `bytes`, which begin at a page. `end` of them are searched; those behind are
    /// there for what goes across.
    fn find(&mut self, bytes: &[u8], end: usize, found: &mut Vec<Range<usize>>, erased: &mut Erased) {
        let (secret, length) = (self.secret, self.secret.len());
        let across = std::mem::take(&mut self.across);
        let mut whole: Vec<Range<usize>> = Vec::new();
        for at in places(&self.first, bytes).take_while(|at| *at < end) {
            let in_page = PAGE - at % PAGE;
            if bytes[at..].starts_with(secret) {
                erased.whole += 1;
                whole.push(at..at + length);
            } else if (MIN_EDGE..length).contains(&in_page) && bytes[at..].starts_with(&secret[..in_page]) {
                erased.parts += 1;
                found.push(at..at + in_page);
            }
        }
        for at in places(&self.last, &bytes[..end]) {
            let page = at - at % PAGE;
            let tail = at + MIN_EDGE - page;
            let is_end = tail <= PAGE && tail < length && bytes[page..page + tail] == secret[length - tail..];
            // The end of one that goes across the edge between two pages is no other.
            let is_known = || {
                let is_it = |whole: &Range<usize>| whole.start < page && whole.end == page + tail;
                whole.iter().any(is_it) || page == 0 && across.contains(&tail)
            };
            if is_end && !is_known() {
                erased.parts += 1;
                found.push(page..page + tail);
            }
        }
        self.across = whole.iter().filter(|whole| whole.end > end).map(|whole| whole.end - end).collect();
        found.append(&mut whole);
    }
}

impl GuestRam {
    /// Writes zeros over every occurrence of each of `secrets`: of all its bytes, and of a part of
    /// them at a page's edge. Pages without one are read only, and stay as shared as they are.
    ///
    /// # Errors
    /// When one of the secrets cannot be searched for: then nothing is written. When memory cannot
    /// be read or written: then the VM must not run.
    pub fn erase(&self, secrets: &[&[u8]], quiesced: &Quiesced<'_>) -> Result<Erased, EraseError> {
        self.erase_by(CHUNK, secrets, quiesced)
    }

    /// The same, `chunk` bytes at a time.
    fn erase_by(&self, chunk: usize, secrets: &[&[u8]], _quiesced: &Quiesced<'_>) -> Result<Erased, EraseError> {
        let mut needles = secrets.iter().map(|secret| Needle::new(secret)).collect::<Result<Vec<_>, _>>()?;
        let mut erased = Erased::default();
        if needles.is_empty() {
            return Ok(erased);
        }
        let mut bytes = vec![0; chunk + PAGE];
        for Range { mut start, end } in self.with_bytes()? {
            // Bytes that were read with those before, and were not searched.
            let mut kept = 0;
            needles.iter_mut().for_each(|needle| needle.across.clear());
            while start < end {
                let there = usize::try_from(end - start).unwrap_or(usize::MAX);
                let (searched, read) = (there.min(chunk), there.min(chunk + PAGE));
                let bytes = &mut bytes[..read];
                if read > kept {
                    self.read_bytes(start + kept as u64, &mut bytes[kept..])?;
                }
                let mut found = Vec::new();
                needles.iter_mut().for_each(|needle| needle.find(bytes, searched, &mut found, &mut erased));
                for place in found {
                    self.write_bytes(start + place.start as u64, &vec![0; place.len()])?;
                }
                // As they were: another secret may begin where one was erased.
                bytes.copy_within(searched.., 0);
                (kept, start) = (read - searched, start + searched as u64);
            }
        }
        // They are no other's to read either.
        bytes.fill(0);
        std::hint::black_box(&bytes);
        Ok(erased)
    }

    /// The addresses that have other bytes than zeros or a pattern, in runs, each of one region.
    fn with_bytes(&self) -> Result<Vec<Range<u64>>, EraseError> {
        let map = self.page_map(None).map_err(EraseError::Look)?;
        let mut runs: Vec<Range<u64>> = Vec::new();
        for run in map.runs.iter().filter(|run| run.kind != PageKind::Absent && run.kind != PageKind::Reference) {
            let run = run.first * PAGE_SIZE..(run.first + run.count) * PAGE_SIZE;
            let region = |at: u64| self.regions().iter().rposition(|region| region.base.0 <= at);
            match runs.last_mut() {
                Some(last) if last.end == run.start && region(last.start) == region(run.start) => last.end = run.end,
                _ => runs.push(run),
            }
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests;
