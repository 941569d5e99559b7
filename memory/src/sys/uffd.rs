//! userfaultfd: write-protecting pages, filling holes, and reading the faults that wait for these.
//!
//! Faults in kernel mode are needed too (KVM's own accesses, system calls), so UFFD_USER_MODE_ONLY
//! is never set; that needs `/dev/userfaultfd`, CAP_SYS_PTRACE or `vm.unprivileged_userfaultfd`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::sys::Reservation;
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{PAGE_SIZE, PageRange};

const API: u64 = 0xaa;

/// `_IO(0xaa, 0x00)`, on `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// `_IOR(0xaa, 0x01, struct uffdio_range)`
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
/// `_IOR(0xaa, 0x02, struct uffdio_range)`
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
/// `_IOWR(0xaa, 0x03, struct uffdio_copy)`
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
/// `_IOWR(0xaa, 0x06, struct uffdio_writeprotect)`
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;

const REGISTER_MISSING: u64 = 1 << 0;
const REGISTER_WP: u64 = 1 << 1;
const WRITEPROTECT_WP: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;

/// Needed features and their names.
const FEATURES: [(u64, &str); 4] = [
    (1 << 0, "UFFD_FEATURE_PAGEFAULT_FLAG_WP"),
    (1 << 5, "UFFD_FEATURE_MISSING_SHMEM"),
    (1 << 12, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"),
    // Pages that are not mapped yet are protected too, for zeros and for files.
    (1 << 13, "UFFD_FEATURE_WP_UNPOPULATED"),
];

#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdioRange {
    start: u64,
    len: u64,
}

impl UffdioRange {
    fn of(at: &Reservation, range: PageRange) -> Self {
        // `addr` asserts that the range lies within the reservation.
        let (start, end) = (at.addr(range.start) as u64, at.addr(range.end) as u64);
        Self { start, len: end - start }
    }
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioWriteProtect {
    range: UffdioRange,
    mode: u64,
}

/// [`UFFDIO_UNREGISTER`]'s argument.
#[repr(transparent)]
struct Unregister(UffdioRange);

/// [`UFFDIO_WAKE`]'s argument.
#[repr(transparent)]
struct Wake(UffdioRange);

/// The argument of an ioctl.
///
/// # Safety
/// The ioctl `NUMBER` reads and writes a `Self`, and nothing beyond it but memory that the argument describes. Such
/// memory is within a [`Reservation`], into which there are no Rust references, or is only read by the kernel.
unsafe trait UffdRequest {
    const NUMBER: libc::c_ulong;
}

// SAFETY: `struct uffdio_api`, and no memory beyond it.
unsafe impl UffdRequest for UffdioApi {
    const NUMBER: libc::c_ulong = UFFDIO_API;
}

// SAFETY: `struct uffdio_register`. Registering changes no contents.
unsafe impl UffdRequest for UffdioRegister {
    const NUMBER: libc::c_ulong = UFFDIO_REGISTER;
}

// SAFETY: `struct uffdio_range`. Unregistering changes no contents.
unsafe impl UffdRequest for Unregister {
    const NUMBER: libc::c_ulong = UFFDIO_UNREGISTER;
}

// SAFETY: `struct uffdio_range`. A wake changes no contents.
unsafe impl UffdRequest for Wake {
    const NUMBER: libc::c_ulong = UFFDIO_WAKE;
}

// SAFETY: `struct uffdio_writeprotect`. Its range is within a reservation (`UffdioRange::of`).
unsafe impl UffdRequest for UffdioWriteProtect {
    const NUMBER: libc::c_ulong = UFFDIO_WRITEPROTECT;
}

// SAFETY: `struct uffdio_copy`. The kernel writes `dst`, which `fill` takes from a range within a reservation, and only
// reads `src`.
unsafe impl UffdRequest for UffdioCopy {
    const NUMBER: libc::c_ulong = UFFDIO_COPY;
}

/// Size of `struct uffd_msg`.
const MESSAGE: usize = 32;
/// Messages taken at a time.
const BATCH: usize = 16;

/// A waiting access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The host address, rounded down to its page.
    pub(crate) address: u64,
}

/// Which faults of a range are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegisterMode {
    /// Accesses to pages that have no memory behind them.
    Missing,
    /// Writes to pages that were protected.
    Protected,
}

/// A userfaultfd. Closing it with faults in flight lets them read zeros, so the registrar of a
/// range keeps it open.
#[derive(Debug)]
pub(crate) struct Uffd(OwnedFd);

/// The reason why userfaultfd is unavailable.
#[derive(Debug)]
pub(crate) enum UffdOpenError {
    /// The kernel or its configuration refuses.
    Refused(io::Error),
    /// The kernel is too old.
    Lacks(&'static str),
}

impl Uffd {
    pub(crate) fn open() -> Result<Self, UffdOpenError> {
        let uffd = Self::raw().map_err(UffdOpenError::Refused)?;
        let wanted = FEATURES.iter().fold(0, |all, (bit, _)| all | bit);
        let mut api = UffdioApi { api: API, features: wanted, ioctls: 0 };
        let Err(refused) = uffd.ioctl(&mut api) else { return Ok(uffd) };
        // The handshake works once per descriptor: queries the features on another one, to name the
        // missing one.
        let probe = Self::raw().map_err(UffdOpenError::Refused)?;
        let mut api = UffdioApi { api: API, ..UffdioApi::default() };
        probe.ioctl(&mut api).map_err(UffdOpenError::Refused)?;
        let lacking = FEATURES.iter().find(|(bit, _)| api.features & bit == 0);
        Err(lacking.map_or(UffdOpenError::Refused(refused), |(_, name)| UffdOpenError::Lacks(name)))
    }

    fn raw() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
        let fd = match &device {
            // SAFETY: this ioctl takes flags by value and touches no memory.
            Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
            // SAFETY: the call takes flags by value and touches no memory.
            Err(_) => (unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }) as libc::c_int,
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made the descriptor, and it has no other owner.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn ioctl<R: UffdRequest>(&self, request: &mut R) -> io::Result<()> {
        // SAFETY: `request` is the argument of that number (by the trait), and outlives the call.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), R::NUMBER, std::ptr::from_mut(request)) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Watches `range`. Doing so again is harmless.
    pub(crate) fn register(&self, at: &Reservation, range: PageRange, watch: RegisterMode) -> io::Result<()> {
        let mode = match watch {
            RegisterMode::Missing => REGISTER_MISSING,
            RegisterMode::Protected => REGISTER_WP,
        };
        failpoint(Call::Watch)?;
        self.ioctl(&mut UffdioRegister { range: UffdioRange::of(at, range), mode, ioctls: 0 })
    }

    /// Stops watching `range`, lifts any protection, and wakes the accesses that wait there.
    pub(crate) fn unregister(&self, at: &Reservation, range: PageRange) -> io::Result<()> {
        self.ioctl(&mut Unregister(UffdioRange::of(at, range)))?;
        // The kernel wakes accesses that wait for a missing page, but not writes that wait.
        self.wake(at, range)
    }

    /// Wakes the accesses that wait in `range`.
    pub(crate) fn wake(&self, at: &Reservation, range: PageRange) -> io::Result<()> {
        self.ioctl(&mut Wake(UffdioRange::of(at, range)))
    }

    /// Wakes the accesses that wait for the page at `address`. Harmless for any mapping.
    pub(crate) fn wake_page(&self, address: u64) -> io::Result<()> {
        self.ioctl(&mut Wake(UffdioRange { start: address, len: PAGE_SIZE }))
    }

    /// Write-protects the pages of `range`. Only for [`crate::freeze::protect`], which ensures that
    /// they may be protected.
    pub(crate) fn protect(&self, at: &Reservation, range: PageRange) -> io::Result<()> {
        failpoint(Call::Protect)?;
        self.write_protect(at, range, WRITEPROTECT_WP)
    }

    /// Lifts the protection of `range`, and wakes the writes that wait.
    pub(crate) fn unprotect(&self, at: &Reservation, range: PageRange) -> io::Result<()> {
        self.write_protect(at, range, 0)
    }

    fn write_protect(&self, at: &Reservation, range: PageRange, mode: u64) -> io::Result<()> {
        loop {
            match self.ioctl(&mut UffdioWriteProtect { range: UffdioRange::of(at, range), mode }) {
                // The address space is being changed concurrently.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
                other => return other,
            }
        }
    }

    /// Fills the holes of `range` of a shared mapping with the pages from `from` on; present pages
    /// stay. A page appears to others in one step, complete, and alone: no neighbour is allocated
    /// with it, regardless of the file's page size.
    ///
    /// The kernel reads `from`, never Rust; an address that is not mapped is an error.
    pub(crate) fn fill(&self, into: &Reservation, range: PageRange, from: *const u8) -> io::Result<()> {
        let whole = UffdioRange::of(into, range);
        let mut done = 0;
        while done < whole.len {
            let (dst, src) = (whole.start + done, from as u64 + done);
            failpoint(Call::Fill)?;
            let mut copy = UffdioCopy { dst, src, len: whole.len - done, mode: 0, copy: 0 };
            let result = self.ioctl(&mut copy);
            done += u64::try_from(copy.copy).unwrap_or(0);
            done += skip_or(result)?;
        }
        Ok(())
    }

    /// Reads the waiting faults, possibly none.
    pub(crate) fn faults(&self) -> io::Result<Vec<Fault>> {
        let mut bytes = [0u8; MESSAGE * BATCH];
        let got = match rustix::io::read(&self.0, &mut bytes) {
            Ok(got) => got,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let word = |message: &[u8], at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&message[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        // The event is at 0, the address at 16.
        let faults = bytes[..got].chunks_exact(MESSAGE).filter(|m| m[0] == EVENT_PAGEFAULT);
        Ok(faults.map(|m| Fault { address: word(m, 16) & !(PAGE_SIZE - 1) }).collect())
    }
}

/// Number of bytes to advance after a call that stopped early: past a present page, or zero to
/// retry.
fn skip_or(result: io::Result<()>) -> io::Result<u64> {
    match result {
        Ok(()) => Ok(0),
        Err(e) => match e.raw_os_error() {
            Some(libc::EEXIST) => Ok(PAGE_SIZE),
            Some(libc::EAGAIN | libc::EINTR) => Ok(0),
            _ => Err(e),
        },
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{HugeTmpfs, small_file};
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn read(file: &File, page: u64) -> Vec<u8> {
        let mut got = vec![0; PAGE_SIZE as usize];
        file.read_exact_at(&mut got, page * PAGE_SIZE).unwrap();
        got
    }

    /// A requirement for children of a pending layer: filling a page adds no zero-filled neighbour.
    #[test]
    fn filling_a_page_of_a_huge_file_makes_no_neighbour() {
        let Ok(fs) = HugeTmpfs::mount() else {
            clade_test_support::skipped("no tmpfs in huge pages");
            return;
        };
        for file in [fs.file(1024).unwrap(), small_file(1024).unwrap()] {
            let uffd = Uffd::open().unwrap();
            let into = Reservation::new(1024).unwrap();
            let all = PageRange::new(0, 1024);
            into.map_shared(all, file.as_fd(), 0).unwrap();
            uffd.register(&into, all, RegisterMode::Missing).unwrap();
            let bytes = vec![7u8; 2 * PAGE_SIZE as usize];
            uffd.fill(&into, PageRange::with_len(5, 2), bytes.as_ptr()).unwrap();
            uffd.fill(&into, PageRange::with_len(6, 2), bytes.as_ptr()).expect("EEXIST is skipped");
            let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
            assert_eq!(blocks * 512, 3 * PAGE_SIZE, "three pages and no more");
            assert_eq!(read(&file, 7), vec![7; PAGE_SIZE as usize]);
        }
    }

    #[test]
    fn an_unmapped_source_is_an_error() {
        let uffd = Uffd::open().unwrap();
        let into = Reservation::new(4).unwrap();
        let file = small_file(4).unwrap();
        into.map_shared(PageRange::new(0, 4), file.as_fd(), 0).unwrap();
        uffd.register(&into, PageRange::new(0, 4), RegisterMode::Missing).unwrap();
        assert!(uffd.fill(&into, PageRange::new(0, 1), std::ptr::null()).is_err());
    }
}
