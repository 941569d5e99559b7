//! Reading and writing guest memory from outside the guest, for a debugger or an API.
//!
//! A write goes through the VM's own mapping, like a guest's: it breaks COW. A read does too,
//! except for unallocated memory: the hole of a file is read as zeros and stays a hole.
//!
//! These are not device accesses: there is no pin, so the caller excludes forks and resets. Each
//! aligned word of 8 bytes is read or written atomically with respect to vCPUs. Words are
//! unordered.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryRegion, VolatileMemoryError, VolatileSlice};

use crate::error::RamError;
use crate::layer::LayerStorage;
use crate::lost::FillError;
use crate::ram::GuestRam;
use crate::region::GuestRegion;
use crate::region::mappings::Mapping;
use crate::sys::allocated;
use crate::units::{PAGE_SHIFT, PAGE_SIZE, PageRange, subtract_runs};

const WORD: usize = size_of::<u64>();

/// The reason why guest memory is not read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AccessError {
    /// There are no bytes in the range.
    #[error("0 bytes at {address:#x}")]
    Nothing {
        /// Guest-physical address of the range.
        address: u64,
    },
    /// The range is not all RAM.
    #[error("{length:#x} bytes at {address:#x}: there is no RAM at {first:#x}")]
    NotRam {
        /// Guest-physical address of the range.
        address: u64,
        /// Its length in bytes.
        length: u64,
        /// The first address that is not RAM's.
        first: u64,
    },
    /// A page has no memory, because it was not inherited (R19).
    #[error("{length:#x} bytes at {address:#x}: the VM did not inherit the page at {page:#x}")]
    Absent {
        /// Guest-physical address of the range.
        address: u64,
        /// Its length in bytes.
        length: u64,
        /// Guest-physical address of the page.
        page: u64,
    },
    /// Part of the VM's memory is lost: the bytes read may be zeros in its place.
    #[error("the VM's memory is lost")]
    Lost(#[source] Arc<FillError>),
    /// The allocated pages could not be determined.
    #[error("the VM's memory cannot be looked at")]
    Look(#[source] Box<RamError>),
    /// The processor's access has failed.
    #[error("guest memory at {address:#x}")]
    Access {
        /// Guest-physical address of the access.
        address: u64,
        /// Why the access has failed.
        #[source]
        source: VolatileMemoryError,
    },
}

/// A part of a range: in one region, with memory.
struct RegionSlice<'a> {
    region: &'a GuestRegion,
    /// Byte of the region.
    offset: u64,
    length: usize,
}

impl RegionSlice<'_> {
    fn address(&self) -> u64 {
        self.region.base.0 + self.offset
    }

    fn pages(&self) -> PageRange {
        // The part lies within its region.
        PageRange::new(self.offset >> PAGE_SHIFT, (self.offset + self.length as u64).div_ceil(PAGE_SIZE))
    }

    fn slice(&self, from: u64, length: usize) -> Result<VolatileSlice<'_>, AccessError> {
        let absent = |_| AccessError::Absent { address: self.address(), length: length as u64, page: self.address() };
        self.region.get_slice(vm_memory::MemoryRegionAddress(from), length).map_err(absent)
    }
}

impl GuestRam {
    /// Reads guest-physical memory from `address` on. Unallocated memory stays unallocated.
    ///
    /// The caller excludes forks and resets meanwhile.
    ///
    /// # Errors
    /// When the range is not all RAM, or memory is lost. `bytes` is undefined then.
    pub fn read_bytes(&self, address: u64, bytes: &mut [u8]) -> Result<(), AccessError> {
        let mut done = 0;
        for part in self.parts(address, bytes.len())? {
            part.region.read_part(&part, &mut bytes[done..done + part.length])?;
            done += part.length;
        }
        self.expect_not_lost()
    }

    /// Writes guest-physical memory from `address` on, like a guest: pages become the VM's own.
    ///
    /// The caller excludes forks and resets meanwhile.
    ///
    /// # Errors
    /// When the range is not all RAM: then no byte is written. When memory is lost.
    pub fn write_bytes(&self, address: u64, bytes: &[u8]) -> Result<(), AccessError> {
        let mut done = 0;
        for part in self.parts(address, bytes.len())? {
            let slice = part.slice(part.offset, part.length)?;
            let failed = |source| AccessError::Access { address: part.address(), source };
            copy_in(&slice, part.address(), &bytes[done..done + part.length]).map_err(failed)?;
            done += part.length;
        }
        self.expect_not_lost()
    }

    /// The parts of a range by region, all of which have memory.
    fn parts(&self, address: u64, length: usize) -> Result<Vec<RegionSlice<'_>>, AccessError> {
        let all = length as u64;
        if length == 0 {
            return Err(AccessError::Nothing { address });
        }
        let (mut parts, mut at, mut left) = (Vec::new(), address, length);
        while left > 0 {
            let not_ram = AccessError::NotRam { address, length: all, first: at };
            let Some((region, _)) = self.locate(GuestAddress(at)) else { return Err(not_ram) };
            let offset = at - region.base.0;
            let within = usize::try_from(region.len() - offset).map_or(left, |rest| rest.min(left));
            let part = RegionSlice { region, offset, length: within };
            if let Some(page) = region.first_absent(part.pages()) {
                let page = region.base.0 + (page << PAGE_SHIFT);
                return Err(AccessError::Absent { address, length: all, page });
            }
            parts.push(part);
            (at, left) = (at + within as u64, left - within);
        }
        Ok(parts)
    }

    fn expect_not_lost(&self) -> Result<(), AccessError> {
        self.regions().iter().find_map(|region| region.lost()).map_or(Ok(()), |error| Err(AccessError::Lost(error)))
    }
}

impl GuestRegion {
    fn read_part(&self, part: &RegionSlice<'_>, bytes: &mut [u8]) -> Result<(), AccessError> {
        let pages = part.pages();
        let holes = self.unpopulated(pages).map_err(|error| AccessError::Look(Box::new(error)))?;
        let end = part.offset + part.length as u64;
        // The bytes of a run of pages that are in the part, and their place in `bytes`.
        let clipped = |run: &PageRange| {
            let (from, to) = ((run.start << PAGE_SHIFT).max(part.offset), (run.end << PAGE_SHIFT).min(end));
            (from, (from - part.offset) as usize..(to - part.offset) as usize)
        };
        for run in &holes {
            bytes[clipped(run).1].fill(0);
        }
        for run in subtract_runs(&[pages], &holes) {
            let (from, place) = clipped(&run);
            let slice = part.slice(from, place.len())?;
            let address = self.base.0 + from;
            copy_out(&slice, address, &mut bytes[place]).map_err(|source| AccessError::Access { address, source })?;
        }
        Ok(())
    }

    /// The pages of `range` that are known to be zeros because they are unallocated. Empty while a
    /// background copy may fill them.
    fn unpopulated(&self, range: PageRange) -> Result<Vec<PageRange>, RamError> {
        let state = self.live_state()?;
        let mut holes = Vec::new();
        if state.freezing.is_some() || !state.waits.is_empty() {
            return Ok(holes);
        }
        for (piece, mapping) in state.space.mappings().within(range) {
            let (source, is_private) = match mapping {
                Mapping::SharedBase(source) => (source, false),
                Mapping::Private(source) => (source, true),
                // Reading zeros is free. Absent ranges are not read.
                Mapping::Zero | Mapping::Absent => continue,
            };
            // Pages on a disk are in no memory file that could grow.
            if !matches!(source.layer.storage(), LayerStorage::Memory(_) | LayerStorage::Foreign)
                || source.layer.bg_copy().is_some()
            {
                continue;
            }
            let file = PageRange::with_len(source.at, piece.len());
            let data = allocated(source.layer.as_fd(), file).map_err(RamError::Harvest)?;
            let of_guest = |run: &PageRange| PageRange::with_len(piece.start + (run.start - source.at), run.len());
            let empty: Vec<PageRange> = subtract_runs(&[file], &data).iter().map(of_guest).collect();
            if is_private && !empty.is_empty() {
                // After the file's holes: a page that the guest writes now is in neither list.
                holes.extend(subtract_runs(&empty, &self.owned_private(piece, &[])?));
            } else {
                holes.extend(empty);
            }
        }
        Ok(holes)
    }
}

/// The words of a range of `length` bytes at `address`: bytes before the first, and words.
fn words_of(address: u64, length: usize) -> (usize, usize) {
    let head = (address.wrapping_neg() as usize % WORD).min(length);
    (head, (length - head) / WORD)
}

/// The aligned words of guest memory that are `count` from byte `from` of `slice` on.
fn atomics<'a>(slice: &'a VolatileSlice<'_>, from: usize, count: usize) -> impl Iterator<Item = &'a AtomicU64> {
    let first = slice.ptr_guard_mut().as_ptr().wrapping_add(from).cast::<u64>();
    let is_within = from + count * WORD <= slice.len() && first.is_aligned();
    assert!(count == 0 || is_within, "words of the slice");
    // SAFETY: the word is in the slice and aligned (asserted), and is mapped as long as the slice
    // lives. Concurrent accesses are by vCPUs, devices, or this process with atomics and volatile
    // accesses, which are one instruction on this architecture.
    (0..count).map(move |at| unsafe { AtomicU64::from_ptr(first.wrapping_add(at)) })
}

/// Reads aligned words atomically, and the bytes around them one by one.
fn copy_out(from: &VolatileSlice<'_>, address: u64, bytes: &mut [u8]) -> Result<(), VolatileMemoryError> {
    let (head, words) = words_of(address, bytes.len());
    let tail = head + words * WORD;
    from.subslice(0, head)?.copy_to(&mut bytes[..head]);
    for (bytes, word) in bytes[head..tail].as_chunks_mut::<WORD>().0.iter_mut().zip(atomics(from, head, words)) {
        // Relaxed: words are unordered.
        *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
    }
    from.subslice(tail, bytes.len() - tail)?.copy_to(&mut bytes[tail..]);
    Ok(())
}

/// Writes aligned words atomically, and the bytes around them one by one.
fn copy_in(to: &VolatileSlice<'_>, address: u64, bytes: &[u8]) -> Result<(), VolatileMemoryError> {
    let (head, words) = words_of(address, bytes.len());
    let tail = head + words * WORD;
    to.subslice(0, head)?.copy_from(&bytes[..head]);
    for (bytes, word) in bytes[head..tail].as_chunks::<WORD>().0.iter().zip(atomics(to, head, words)) {
        // Relaxed: words are unordered.
        word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
    }
    to.subslice(tail, bytes.len() - tail)?.copy_from(&bytes[tail..]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::{DontFork, FreezeMode, GAP_END, GAP_START, NoWriters, Quiesced, RamLayout, Store};

    const PAGES: u64 = 1024;

    fn ram(store: &Store) -> GuestRam {
        let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), store).unwrap();
        ram.populate().unwrap();
        ram
    }

    fn child(of: &GuestRam, store: &Store) -> GuestRam {
        let (image, _) = of.freeze_in(FreezeMode::Eager, &Quiesced::by(&NoWriters)).unwrap();
        let child = GuestRam::reserve(image.layout(), store).unwrap();
        child.adopt(&image).unwrap();
        child
    }

    /// Bytes of memory behind the layers that it is shown.
    fn resident(ram: &GuestRam) -> u64 {
        ram.page_map(None).unwrap().layers.iter().filter_map(|layer| layer.resident_bytes).sum()
    }

    fn all(ram: &GuestRam) -> Vec<u8> {
        let mut bytes = vec![0xaa; (PAGES * PAGE_SIZE) as usize];
        ram.read_bytes(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn ranges_within_a_word_and_across_its_ends_are_read_and_written() {
        let ram = ram(&Store::open_small().unwrap());
        let mut model = vec![0; 64];
        for (value, (at, length)) in (1..).zip((0..24).flat_map(|at| (1..=24).map(move |length| (at, length)))) {
            ram.write_bytes(at as u64, &vec![value as u8; length]).unwrap();
            model[at..at + length].fill(value as u8);
            let mut bytes = vec![0xaa; length];
            ram.read_bytes(at as u64, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == value as u8), "{length} bytes at {at}: {bytes:?}");
            let mut all = vec![0; model.len()];
            ram.read_bytes(0, &mut all).unwrap();
            assert_eq!(all, model, "{length} bytes at {at}");
        }
    }

    #[test]
    fn a_read_gives_memory_to_nothing_and_a_write_only_to_its_pages() {
        for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
            let parent = ram(&store);
            assert!(all(&parent).iter().all(|byte| *byte == 0));
            assert_eq!(parent.stats().unwrap().private_kib, 0, "the base file has holes still");
            parent.write_bytes(7 * PAGE_SIZE + 100, &[1; 5000]).unwrap();
            let own = parent.stats().unwrap().private_kib;
            assert_eq!(parent.stats().unwrap().shared_kib, 0);
            let child = child(&parent, &store);
            let both = [&parent, &child].map(|ram| ram.stats().unwrap());
            assert_eq!(both.map(|stats| (stats.private_kib, stats.shared_kib)), [(0, own); 2], "its holes take none");
            let layers = || resident(&child);
            let before = layers();
            let seen = all(&child);
            assert_eq!(seen, all(&parent));
            assert_eq!(seen.iter().map(|byte| u64::from(*byte)).sum::<u64>(), 5000);
            assert_eq!((layers(), child.stats().unwrap().private_kib), (before, 0), "of {own} KiB");
            child.write_bytes(500 * PAGE_SIZE - 1, &[9, 9]).unwrap();
            assert_eq!(child.stats().unwrap().exclusive, 2, "both pages are its own");
            assert_eq!((all(&child)[500 * PAGE_SIZE as usize], all(&parent)[500 * PAGE_SIZE as usize]), (9, 0));
            child.check(&Quiesced::by(&NoWriters)).unwrap();
        }
    }

    #[test]
    fn what_is_not_ram_is_named_and_nothing_is_written() {
        let store = Store::open_small().unwrap();
        let parent = ram(&store);
        let end = PAGES * PAGE_SIZE;
        let error = parent.write_bytes(end - 4, &[7; 8]).unwrap_err().to_string();
        assert_eq!(error, format!("0x8 bytes at {:#x}: there is no RAM at {end:#x}", end - 4));
        assert!(all(&parent).iter().all(|byte| *byte == 0));
        assert!(matches!(parent.read_bytes(u64::MAX, &mut [0; 2]), Err(AccessError::NotRam { first: u64::MAX, .. })));
        assert!(matches!(parent.read_bytes(0, &mut []), Err(AccessError::Nothing { address: 0 })));
        let range = PageRange::new(3, 4);
        parent.regions()[0].set_dont_fork(range, Some(DontFork::Absent)).unwrap();
        let child = child(&parent, &store);
        for refused in [child.read_bytes(0x2ff8, &mut [0; 16]), child.write_bytes(0x2ff8, &[1; 16])] {
            let error = refused.unwrap_err().to_string();
            assert_eq!(error, "0x10 bytes at 0x2ff8: the VM did not inherit the page at 0x3000");
        }
        assert!(all_but_absent(&child), "nothing is written");
    }

    fn all_but_absent(ram: &GuestRam) -> bool {
        let mut bytes = vec![1; 0x3000];
        ram.read_bytes(0, &mut bytes).unwrap();
        bytes.iter().all(|byte| *byte == 0)
    }

    #[test]
    fn a_range_goes_on_in_the_next_region_only_if_that_is_adjacent() {
        let store = Store::open_small().unwrap();
        let (low, high) = (GuestAddress(GAP_START - PAGE_SIZE), GuestAddress(GAP_END));
        let apart = GuestRam::reserve(&RamLayout::of_ranges(&[(low, 1), (high, 1)]).unwrap(), &store).unwrap();
        apart.populate().unwrap();
        let refused = apart.read_bytes(GAP_START - 8, &mut [0; 16]);
        assert!(matches!(refused, Err(AccessError::NotRam { first: GAP_START, .. })), "{refused:?}");
        let beside = [(GuestAddress(0), 2), (GuestAddress(2 * PAGE_SIZE), 2)];
        let beside = GuestRam::reserve(&RamLayout::of_ranges(&beside).unwrap(), &store).unwrap();
        beside.populate().unwrap();
        beside.write_bytes(2 * PAGE_SIZE - 3, &[1, 2, 3, 4, 5, 6]).unwrap();
        let mut seen = [0; 8];
        beside.read_bytes(2 * PAGE_SIZE - 4, &mut seen).unwrap();
        assert_eq!(seen, [0, 1, 2, 3, 4, 5, 6, 0]);
    }

    /// Pages that are still being copied are neither holes nor lost.
    #[test]
    fn what_is_copied_in_the_background_is_read_as_it_was() {
        let store = Store::open_small().unwrap();
        let parent = ram(&store);
        for page in 0..PAGES {
            parent.write_bytes(page * PAGE_SIZE, &(page + 1).to_ne_bytes()).unwrap();
        }
        // Private copies, which the next freeze leaves to the background.
        parent.freeze_in(FreezeMode::Eager, &Quiesced::by(&NoWriters)).unwrap();
        for page in 0..PAGES {
            parent.write_bytes(page * PAGE_SIZE, &(page + 2).to_ne_bytes()).unwrap();
        }
        let (image, _) = parent.freeze_in(FreezeMode::Background, &Quiesced::by(&NoWriters)).unwrap();
        let child = GuestRam::reserve(image.layout(), &store).unwrap();
        child.adopt(&image).unwrap();
        for ram in [&child, &parent] {
            let bytes = all(ram);
            let word = |page: u64| u64::from_ne_bytes(bytes[(page * PAGE_SIZE) as usize..][..8].try_into().unwrap());
            assert!((0..PAGES).all(|page| word(page) == page + 2));
        }
    }

    #[test]
    fn an_aligned_word_is_whole_beside_a_writer() {
        let store = Store::open_small().unwrap();
        let ram = ram(&store);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut word = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    word = !word;
                    ram.memory().store(word, GuestAddress(0x1008), Ordering::Relaxed).unwrap();
                }
            });
            for _ in 0..2_000 {
                let mut bytes = [0; 31];
                ram.read_bytes(0x1003, &mut bytes).unwrap();
                let word = u64::from_ne_bytes(bytes[5..13].try_into().unwrap());
                assert!(word == 0 || word == u64::MAX, "{word:#x}");
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_written_is_read(
            writes in proptest::collection::vec((0..PAGES * PAGE_SIZE, 1usize..9000, any::<u8>(), any::<bool>()), 1..12)
        ) {
            let store = Store::open_small().unwrap();
            let mut ram = ram(&store);
            let mut model = vec![0u8; (PAGES * PAGE_SIZE) as usize];
            for (address, length, byte, forks) in writes {
                let end = (address as usize + length).min(model.len());
                let bytes: Vec<u8> = (0..end - address as usize).map(|at| byte.wrapping_add(at as u8)).collect();
                ram.write_bytes(address, &bytes).unwrap();
                model[address as usize..end].copy_from_slice(&bytes);
                if forks {
                    ram = child(&ram, &store);
                }
            }
            prop_assert!(all(&ram) == model);
        }
    }
}
