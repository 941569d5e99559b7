//! Erasing bytes in a VM's memory, for secrets of a parent that a child must not have.
//!
//! All memory is read, through the layers, and only pages with a match are written. So a child
//! stays as shared as before, except for these pages.
//!
//! A program's buffer is contiguous in its own addresses, not in the guest's memory. A secret may
//! begin at the end of one page and continue in a page elsewhere. So a prefix of the bytes at the
//! end of a page is erased as well, and a suffix of them at the start of a page, from [`MIN_EDGE`]
//! bytes on. A secret is no longer than a page, so no page lies within it.
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
use crate::quiesce::Quiesced;
use crate::ram::GuestRam;
use crate::region::pages::PageKind;
use crate::units::PAGE_SIZE;

/// Minimum length of a secret: fewer bytes occur in memory by chance.
pub const MIN_SECRET: usize = 16;
/// Maximum length of a secret.
pub const MAX_SECRET: usize = PAGE_SIZE as usize;
/// Minimum length of a prefix or suffix at a page's edge.
pub const MIN_EDGE: usize = 8;
/// Bytes read at a time, in whole pages. Each read queries the kernel for the present pages.
const CHUNK: usize = 8 << 20;
const PAGE: usize = PAGE_SIZE as usize;

/// Bytes that were erased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erased {
    /// Complete occurrences of a secret.
    pub whole: u64,
    /// Prefixes at the end of a page and suffixes at the start of one.
    pub parts: u64,
}

/// The reason why the search was refused, or the erasure is incomplete.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EraseError {
    /// The secret has too few bytes, or too many.
    #[error("a secret of {length} bytes: {MIN_SECRET} to {MAX_SECRET} can be found in memory")]
    Length {
        /// Length of the secret.
        length: usize,
    },
    /// The secret's prefix or suffix occurs everywhere in memory.
    #[error("a secret whose first or last {MIN_EDGE} bytes are all the same matches other memory")]
    Plain,
    /// The page map could not be read.
    #[error("the VM's memory cannot be looked at")]
    Look(#[source] RamError),
    /// Memory could not be read or written. Some may be erased.
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

/// One secret, and the finders of its prefix and suffix.
struct Needle<'a> {
    secret: &'a [u8],
    first: Finder<'a>,
    last: Finder<'a>,
    /// Ends of the occurrences that cross the end of the current bytes, as offsets in the next
    /// ones.
    across: Vec<usize>,
}

/// All matches of `finder`, overlapping ones included.
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

    /// Finds the secret in `bytes`, which start at a page. Searches the first `end` bytes; the
    /// others serve matches that cross `end`.
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
            // The suffix of an occurrence across the edge of two pages is not a match of its own.
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
    /// Overwrites every occurrence of each of `secrets` with zeros: complete ones, and parts at a
    /// page's edge. Pages without a match are only read, and stay as shared as before.
    ///
    /// # Errors
    /// When one of the secrets cannot be searched for: then no byte is written. When memory cannot
    /// be read or written: then the VM must not run.
    pub fn erase(&self, secrets: &[&[u8]], quiesced: &Quiesced<'_>) -> Result<Erased, EraseError> {
        self.erase_by(CHUNK, secrets, quiesced)
    }

    /// As [`Self::erase`], `chunk` bytes at a time.
    fn erase_by(&self, chunk: usize, secrets: &[&[u8]], _quiesced: &Quiesced<'_>) -> Result<Erased, EraseError> {
        let mut needles = secrets.iter().map(|secret| Needle::new(secret)).collect::<Result<Vec<_>, _>>()?;
        let mut erased = Erased::default();
        if needles.is_empty() {
            return Ok(erased);
        }
        let mut bytes = vec![0; chunk + PAGE];
        for Range { mut start, end } in self.with_bytes()? {
            // Bytes read earlier that were not searched yet.
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
                // Unmodified bytes: another secret may begin within an erased one.
                bytes.copy_within(searched.., 0);
                (kept, start) = (read - searched, start + searched as u64);
            }
        }
        // This process must not keep the secrets either.
        bytes.fill(0);
        std::hint::black_box(&bytes);
        Ok(erased)
    }

    /// The address ranges with other contents than zeros or a pattern, each within one region.
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
