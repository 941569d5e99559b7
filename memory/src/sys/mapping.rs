//! A reservation of host address space that never moves, and the mappings in it.

mod contents;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mremap_fixed, munmap};

use crate::testing::failpoint::{Call, failpoint};
use crate::units::{BLOCK_SIZE, PAGE_SHIFT, PageRange, subtract_runs};

/// Address space for a region: inaccessible until it is mapped, aligned to 2 MiB so that huge pages
/// fit.
///
/// The address is fixed for the reservation's life, so a KVM memslot over it is set once.
///
/// **Vacant.** Mapping over an existing mapping makes the kernel notify KVM, which walks the
/// memslot's reverse map of all its pages: 0.1 ms for 512 MiB, 0.7 ms for 4 GiB, even if no page
/// was ever mapped. So a VM's addresses stay unmapped until it gets its memory ([`Self::vacate`]).
/// These addresses are apart from the kernel's own choices; a foreign mapping there is an error
/// and is not replaced. No vCPU runs before.
#[derive(Debug)]
pub(crate) struct Reservation {
    base: NonNull<u8>,
    pages: u64,
    /// Whether the addresses are apart from the kernel's choices.
    is_apart: bool,
    /// While the reservation is vacant: the mapped ranges, ascending. `None` if all of it is
    /// mapped.
    mapped: Mutex<Option<Vec<PageRange>>>,
    /// Whether memory is lost: a mapping failed half-way.
    is_torn: AtomicBool,
}

/// Addresses that the kernel does not choose by itself: it allocates downward from the stack.
const APART: Range<usize> = 0x1000_0000_0000..0x5000_0000_0000;
/// Number of places tried.
const TRIES: usize = 8;

/// The reservations of this process at apart addresses, with their ends: the kernel does not know
/// the vacant ones.
static TAKEN: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

fn taken() -> MutexGuard<'static, BTreeMap<usize, usize>> {
    // A panic in between leaves the map consistent.
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records `len` bytes from `start` as a reservation, unless they overlap another one.
fn take(start: usize, len: usize) -> bool {
    let mut taken = taken();
    let is_free = taken.range(..start + len).next_back().is_none_or(|(_, end)| *end <= start);
    if is_free {
        taken.insert(start, start + len);
    }
    is_free
}

// SAFETY: the reservation is an address and a length; every access through it is volatile or by the
// kernel.
unsafe impl Send for Reservation {}
// SAFETY: as above; remapping is serialized by the region's lock, or by its background copy's for
// pages that are protected.
unsafe impl Sync for Reservation {}

const RAM_PROT: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

impl Reservation {
    /// Reserves `pages` pages.
    pub(crate) fn new(pages: u64) -> io::Result<Self> {
        failpoint(Call::Map)?;
        let len = PageRange::new(0, pages).bytes();
        if let Some(base) = Self::apart(len) {
            return Ok(Self { base, pages, is_apart: true, mapped: Mutex::default(), is_torn: AtomicBool::new(false) });
        }
        let slack = BLOCK_SIZE as usize;
        let padded = len.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing
        // that exists.
        let raw = unsafe {
            mmap_anonymous(std::ptr::null_mut(), padded, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        }?;
        let start = raw as usize;
        let aligned = start.next_multiple_of(slack);
        Self::trim(start, aligned - start)?;
        Self::trim(aligned + len, start + padded - (aligned + len))?;
        let base = NonNull::new(aligned as *mut u8).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, pages, is_apart: false, mapped: Mutex::default(), is_torn: AtomicBool::new(false) })
    }

    /// Reserves `len` bytes at a random apart address. `None` if every place tried is taken.
    fn apart(len: usize) -> Option<NonNull<u8>> {
        let places = APART.len().checked_sub(len)? / BLOCK_SIZE as usize;
        (0..TRIES).find_map(|_| {
            let mut random = [0; size_of::<usize>()];
            let random = match rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()) {
                Ok(all) if all == random.len() => usize::from_ne_bytes(random),
                _ => return None,
            };
            Self::apart_at(APART.start + random % places.max(1) * BLOCK_SIZE as usize, len)
        })
    }

    fn apart_at(place: usize, len: usize) -> Option<NonNull<u8>> {
        if !take(place, len) {
            return None;
        }
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the address is a hint: existing mappings are not touched.
        let raw = unsafe { mmap_anonymous(place as *mut _, len, ProtFlags::empty(), flags) };
        if let Ok(raw) = raw
            && raw as usize == place
        {
            return NonNull::new(raw.cast());
        }
        taken().remove(&place);
        if let Ok(raw) = raw {
            // SAFETY: the mapping was just made, and has no other users.
            if let Err(error) = unsafe { munmap(raw, len) } {
                tracing::error!(%error, "addresses stay reserved");
            }
        }
        None
    }

    /// Releases the addresses for other reservations, once they are unmapped.
    fn release(&self) {
        if self.is_apart {
            taken().remove(&(self.base.as_ptr() as usize));
        }
    }

    fn mapped(&self) -> MutexGuard<'_, Option<Vec<PageRange>>> {
        // A panic in between leaves a mapping unrecorded, which is then not unmapped.
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unmaps the addresses until memory is mapped there. Only before anything is mapped. A
    /// reservation whose addresses are not apart is left as it is.
    pub(crate) fn vacate(&self) {
        let mut mapped = self.mapped();
        if !self.is_apart || mapped.is_some() {
            return;
        }
        // SAFETY: the mapping is this type's own, inaccessible, and no vCPU runs on it. From here
        // on the addresses are only mapped by `place`, which replaces no foreign mapping.
        match unsafe { munmap(self.base.as_ptr().cast(), PageRange::new(0, self.pages).bytes()) } {
            Ok(()) => *mapped = Some(Vec::new()),
            Err(error) => tracing::debug!(%error, "a reservation stays mapped"),
        }
    }

    /// Calls `map` for `range` with the flags to use: over mappings of this type, or over unmapped
    /// addresses.
    fn place(&self, range: PageRange, map: impl Fn(MapFlags) -> io::Result<*mut c_void>) -> io::Result<()> {
        let map = |how| failpoint(Call::Map).and_then(|()| map(how));
        let replace = || map(MapFlags::FIXED).map(drop).inspect_err(|_| self.fill_gap(range));
        let mut vacant = self.mapped();
        let Some(mapped) = &mut *vacant else {
            drop(vacant);
            return replace();
        };
        let free = subtract_runs(&[range], mapped);
        match free.as_slice() {
            [] => return replace(),
            [all] if *all == range => self.expect_free(range, map(MapFlags::FIXED_NOREPLACE)?)?,
            parts => {
                for part in parts {
                    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
                    let at = self.addr(part.start).cast();
                    // SAFETY: with this flag existing mappings are not replaced.
                    let raw = unsafe { mmap_anonymous(at, part.bytes(), ProtFlags::empty(), flags) }?;
                    self.expect_free(*part, raw)?;
                    mapped.push(*part);
                    mapped.sort_unstable();
                }
                replace()?;
            }
        }
        if free.as_slice() == [range] {
            mapped.push(range);
            mapped.sort_unstable();
        }
        if subtract_runs(&[PageRange::new(0, self.pages)], mapped).is_empty() {
            *vacant = None;
        }
        Ok(())
    }

    /// Called when `range` could not be mapped anew. The kernel removes what is there first, and may fail after that,
    /// for want of memory of its own: then the pages are lost. Addresses without a mapping would be given to another
    /// user of this process, in reach of the guest.
    fn fill_gap(&self, range: PageRange) {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: with this flag existing mappings are not replaced.
        let filled = unsafe { mmap_anonymous(self.addr(range.start).cast(), range.bytes(), ProtFlags::empty(), flags) };
        if filled.is_ok_and(|raw| self.expect_free(range, raw).is_ok()) {
            tracing::error!(%range, "a mapping of guest memory has failed half-way: the memory is lost");
            // Relaxed: it publishes no other data.
            self.is_torn.store(true, Ordering::Relaxed);
        }
    }

    /// Whether memory is lost: a mapping failed half-way.
    pub(crate) fn is_torn(&self) -> bool {
        self.is_torn.load(Ordering::Relaxed)
    }

    /// Checks that `raw` is the place of `range`: before Linux 4.17 the flag is unknown, and the
    /// address is a hint.
    fn expect_free(&self, range: PageRange, raw: *mut c_void) -> io::Result<()> {
        if raw == self.addr(range.start).cast() {
            return Ok(());
        }
        // SAFETY: the mapping was just made, and has no other users.
        unsafe { munmap(raw, range.bytes()) }?;
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn trim(at: usize, len: usize) -> io::Result<()> {
        if len > 0 {
            // SAFETY: only called on the slack at either end of the mapping just made, which has no
            // other users.
            unsafe { munmap(at as *mut _, len) }?;
        }
        Ok(())
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// The host address of `page`.
    ///
    /// # Panics
    /// When `page` is beyond the end: callers check ranges against the region.
    pub(crate) fn addr(&self, page: u64) -> *mut u8 {
        assert!(page <= self.pages, "page {page:#x} beyond a region of {:#x} pages", self.pages);
        // SAFETY: page <= pages, so the result is within, or one past, the mapping this type owns.
        unsafe { self.base.as_ptr().add((page << PAGE_SHIFT) as usize) }
    }

    fn check(&self, range: PageRange) -> io::Result<()> {
        if range.end <= self.pages { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Maps `range` shared and writable over `file` from `file_page` on.
    pub(crate) fn map_shared(&self, range: PageRange, file: BorrowedFd<'_>, file_page: u64) -> io::Result<()> {
        self.map(range, MapFlags::SHARED, file, file_page)?;
        trace!(Shared { at: self.at(), range, file: crate::trace::file(file), page: file_page });
        Ok(())
    }

    /// Maps `range` private (the kernel copies on write) over `file` from `file_page` on.
    pub(crate) fn map_private(&self, range: PageRange, file: BorrowedFd<'_>, file_page: u64) -> io::Result<()> {
        self.map(range, MapFlags::PRIVATE | MapFlags::NORESERVE, file, file_page)?;
        trace!(Private { at: self.at(), range, file: crate::trace::file(file), page: file_page });
        Ok(())
    }

    fn map(&self, range: PageRange, kind: MapFlags, file: BorrowedFd<'_>, file_page: u64) -> io::Result<()> {
        self.check(range)?;
        let at = self.addr(range.start).cast();
        self.place(range, |how| {
            // SAFETY: range lies within this reservation (checked), which this type owns; replacing
            // its mapping leaves it mapped, so volatile accesses through it stay valid. No Rust
            // reference into it exists.
            Ok(unsafe { mmap(at, range.bytes(), RAM_PROT, kind | how, file, file_page << PAGE_SHIFT) }?)
        })?;
        self.do_not_fork(range);
        Ok(())
    }

    /// Maps `range` to fresh zeros of this VM's own.
    pub(crate) fn map_zero(&self, range: PageRange) -> io::Result<()> {
        self.check(range)?;
        let at = self.addr(range.start).cast();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: as in `map`.
        self.place(range, |how| Ok(unsafe { mmap_anonymous(at, range.bytes(), RAM_PROT, flags | how) }?))?;
        self.do_not_merge(range);
        self.do_not_fork(range);
        trace!(Zero { at: self.at(), range });
        Ok(())
    }

    /// Excludes `range` from forked processes (R19's VM_DONTCOPY): a fork would turn guest memory
    /// into the kernel's COW pages, under its devices, and give the guest's memory to a child
    /// process. Best effort: this fails only for an unmapped range. A process that another thread forks
    /// between the mapping and this call inherits the range; workers fork none.
    fn do_not_fork(&self, range: PageRange) {
        let at = self.addr(range.start).cast();
        // SAFETY: this changes the copies made by a fork, not the memory.
        if let Err(error) = unsafe { madvise(at, range.bytes(), Advice::LinuxDontFork) } {
            tracing::debug!(%error, %range, "a process that is forked inherits guest memory");
        }
    }

    /// Excludes `range`, which is anonymous, from huge pages. When Linux 6.12 or later splits one, it replaces those of
    /// its small pages that hold zeros by the zero page: the pagemap would no longer show that this mapping owns them,
    /// and older bytes would be read from the layers. Fails only on kernels without huge pages.
    fn do_not_merge(&self, range: PageRange) {
        let at = self.addr(range.start).cast();
        // SAFETY: this changes the size of the pages that hold the memory, not the memory.
        if let Err(error) = unsafe { madvise(at, range.bytes(), Advice::LinuxNoHugepage) } {
            tracing::debug!(%error, %range, "guest memory may be in huge pages");
        }
    }

    /// Removes the memory of `range`: accesses fail.
    pub(crate) fn map_none(&self, range: PageRange) -> io::Result<()> {
        self.check(range)?;
        let at = self.addr(range.start).cast();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the range stays reserved; no Rust reference into it exists, and the region
        // reports that it is absent.
        self.place(range, |how| Ok(unsafe { mmap_anonymous(at, range.bytes(), ProtFlags::empty(), flags | how) }?))?;
        trace!(Nothing { at: self.at(), range });
        Ok(())
    }

    /// Removes the memory of `range`, which others may be using: `empty` is a file without a page. An access
    /// of KVM or of a system call fails, and one of this process is a SIGBUS, for which a zero page is
    /// mapped ([`crate::sys::sigbus`]).
    pub(crate) fn map_lost(&self, range: PageRange, empty: BorrowedFd<'_>) -> io::Result<()> {
        self.map(range, MapFlags::PRIVATE | MapFlags::NORESERVE, empty, 0)?;
        trace!(Nothing { at: self.at(), range });
        Ok(())
    }

    /// Replaces the mapping of `range`, in one step, by private pages with the bytes of `file` from
    /// `file_page` on. On failure nothing has changed, unless the reservation is torn.
    pub(crate) fn replace_private(&self, range: PageRange, file: BorrowedFd<'_>, file_page: u64) -> io::Result<()> {
        let aside = Self::new(range.len())?;
        let all = PageRange::new(0, range.len());
        aside.map_zero(all)?;
        aside.read_in(all, file, file_page)?;
        self.check(range)?;
        let (from, into) = (aside.addr(0).cast(), self.addr(range.start).cast());
        let flags = MremapFlags::MAYMOVE;
        // SAFETY: `from` is a mapping of this function's own, which moves whole; `into` lies within
        // this reservation, which stays mapped. No Rust reference into either exists.
        let moved = |()| Ok(unsafe { mremap_fixed(from, range.bytes(), range.bytes(), flags, into) }?);
        failpoint(Call::Map).and_then(moved).inspect_err(|_| self.fill_gap(range))?;
        // The move gave up these addresses, which may be reused by now.
        aside.release();
        std::mem::forget(aside);
        trace!(Replaced { at: self.at(), range });
        Ok(())
    }

    /// Removes all access and all memory. A vacant reservation becomes vacant again.
    pub(crate) fn protect_none(&self) -> io::Result<()> {
        if let Some(mapped) = &mut *self.mapped() {
            self.unmap(mapped)?;
            trace!(Nothing { at: self.at(), range: PageRange::new(0, self.pages) });
            return Ok(());
        }
        let at: *mut c_void = self.base.as_ptr().cast();
        let len = PageRange::new(0, self.pages).bytes();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: replaces this reservation's own mappings; it stays reserved.
        unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) }?;
        trace!(Nothing { at: self.at(), range: PageRange::new(0, self.pages) });
        Ok(())
    }

    /// Unmaps the `mapped` ranges of a vacant reservation: its other addresses may have other
    /// users.
    fn unmap(&self, mapped: &mut Vec<PageRange>) -> io::Result<()> {
        while let Some(run) = mapped.pop() {
            // SAFETY: `place` has mapped the run, and every holder of an address holds the region.
            unsafe { munmap(self.addr(run.start).cast(), run.bytes()) }?;
        }
        Ok(())
    }

    /// Identity in a trace.
    #[cfg(feature = "trace")]
    fn at(&self) -> u64 {
        self.addr(0) as u64
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        trace!(SpaceGone { at: self.at() });
        let mut mapped = std::mem::take(&mut *self.mapped());
        let mut all = vec![PageRange::new(0, self.pages)];
        if let Err(error) = self.unmap(mapped.as_mut().unwrap_or(&mut all)) {
            tracing::error!(%error, "a region's address range could not be unmapped");
            return;
        }
        self.release();
    }
}

#[cfg(test)]
mod tests;
