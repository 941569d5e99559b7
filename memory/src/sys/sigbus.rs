//! SIGBUS: a page of guest memory, or of a layer that is read through a window, that the kernel cannot
//! provide.
//!
//! Memory mapped from files on a disk (snapshots, evicted pages) may turn out to be missing: the
//! file was truncated, or the disk fails to read. A guest's access is then an error of KVM_RUN and
//! a system call's is EFAULT, but an access by this process is a signal, which would end all its
//! VMs. So the page is replaced (the kernel drops the VM's own copies of a truncated file's pages
//! too) by one of zeros **whose only purpose is that the access succeeds**, and the VM is marked as
//! lost. The VM is stopped, and with it ends every use of the zeros.
//!
//! The handler may interrupt any code, so it takes no locks: it searches a table of watched ranges.
//! The write order of each entry ensures that a half-written one matches no address.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};

use crate::lost::{FillError, LostMemory};
use crate::units::PAGE_SIZE;

/// Maximum number of watched regions. For other regions the signal keeps its default effect.
const SLOTS: usize = 1 << 15;

/// A watched range. Empty if `end` is 0.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] =
    [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), lost: AtomicBool::new(false) } }; SLOTS];
/// Number of slots ever used, which bounds the handler's search.
static USED: AtomicUsize = AtomicUsize::new(0);
/// The eventfd that the handler writes to when it has found a loss; -1 until it exists.
static BELL: AtomicI32 = AtomicI32::new(-1);

/// Data that the handler does not access.
#[derive(Default)]
struct Owners {
    free: Vec<usize>,
    failures: Vec<Weak<LostMemory>>,
}

static OWNERS: Mutex<Option<Owners>> = Mutex::new(None);
/// The previous handler, for signals outside guest memory.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

fn owners<T>(with: impl FnOnce(&mut Owners) -> T) -> T {
    with(OWNERS.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

/// A range that is watched for as long as this lives.
#[derive(Debug)]
pub(crate) struct SigbusWatch(usize);

impl SigbusWatch {
    /// Watches the addresses from `start` to `end`, which are and stay guest memory, or a window of a
    /// layer. Reports the loss of a page to `failure`. `None` when the table is full.
    pub(crate) fn new(start: usize, end: usize, failure: &Arc<LostMemory>) -> Option<Self> {
        install().inspect_err(|error| tracing::warn!(%error, "a file that is cut short will end the process")).ok()?;
        let slot = owners(|owners| {
            let slot = owners.free.pop().or_else(|| {
                let next = owners.failures.len();
                (next < SLOTS).then(|| owners.failures.push(Weak::new()))?;
                Some(next)
            })?;
            owners.failures[slot] = Arc::downgrade(failure);
            Some(slot)
        })?;
        // SeqCst: in this order, after the 0 stored by the slot's previous user. The handler loads
        // the end, the start and the end.
        TABLE[slot].start.store(start, Ordering::SeqCst);
        TABLE[slot].end.store(end, Ordering::SeqCst);
        USED.fetch_max(slot + 1, Ordering::Release);
        Some(Self(slot))
    }
}

impl SigbusWatch {
    /// Whether a page of the range is lost and its owner has not been notified yet.
    pub(crate) fn is_lost(&self) -> bool {
        TABLE[self.0].lost.load(Ordering::Acquire)
    }
}

impl Drop for SigbusWatch {
    fn drop(&mut self) {
        // Before the addresses are reused: the region drops this before its reservation.
        TABLE[self.0].end.store(0, Ordering::SeqCst);
        owners(|owners| {
            // The owner is gone. The flag cannot be set again, because every accessor of the region
            // keeps the region alive.
            TABLE[self.0].lost.store(false, Ordering::Relaxed);
            owners.failures[self.0] = Weak::new();
            owners.free.push(self.0);
        });
    }
}

/// Installs the handler, once, with a thread that notifies owners.
fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let done = INSTALLED.get_or_init(|| take_over().map_err(|error| error.raw_os_error().unwrap_or(libc::EIO)));
    (*done).map_err(io::Error::from_raw_os_error)
}

fn take_over() -> io::Result<()> {
    let bell = eventfd(0, EventfdFlags::CLOEXEC)?;
    // For the life of the process, like the handler.
    let raw = bell.as_fd().as_raw_fd();
    thread::Builder::new().name("clade-sigbus".to_owned()).spawn(move || tell_all(&bell))?;
    BELL.store(raw, Ordering::Release);
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: zeros are a value of the structure: no flags, no signals, the default action.
    let new = unsafe { action.assume_init_mut() };
    new.sa_sigaction = handler as *const () as usize;
    // Uses the thread's signal stack if there is one, and restarts interrupted system calls.
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: both point at structures of that type; the handler has the signature that SA_SIGINFO
    // requires.
    if unsafe { libc::sigaction(libc::SIGBUS, new, before.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded, so it is filled in.
    let before = unsafe { before.assume_init() };
    let _ = BEFORE.set(before);
    Ok(())
}

/// The thread that notifies owners, whose callbacks may lock and allocate.
fn tell_all(bell: &OwnedFd) {
    loop {
        let mut count = [0; 8];
        match rustix::io::read(bell, &mut count) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        for (slot, entry) in TABLE.iter().enumerate().take(USED.load(Ordering::Acquire)) {
            // In one step with the lookup of the owner: otherwise, if another VM took the slot in
            // between, its owner would be notified.
            let failure = owners(|owners| {
                let lost = entry.lost.load(Ordering::Acquire);
                let failure = owners.failures.get(slot).filter(|_| lost).and_then(Weak::upgrade)?;
                // Recorded before the mark is cleared, so that a concurrent query finds one of the
                // two.
                failure.set(&Arc::new(FillError::Gone));
                entry.lost.store(false, Ordering::Release);
                Some(failure)
            });
            if let Some(failure) = failure {
                failure.tell();
            }
        }
    }
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler of this kind a structure that lives as long as the call.
    let told = unsafe { &*info };
    // SAFETY: it is filled in for a SIGBUS, which has an address.
    let address = unsafe { told.si_addr() } as usize;
    // SAFETY: errno is the interrupted code's, and is put back.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: it points at this thread's errno.
    let before = unsafe { *errno };
    let mended = mend(address);
    // SAFETY: as above.
    unsafe { *errno = before };
    if !mended {
        not_ours(signal, info, context);
    }
}

fn mend(address: usize) -> bool {
    for slot in TABLE.iter().take(USED.load(Ordering::Acquire)) {
        let end = slot.end.load(Ordering::SeqCst);
        let start = slot.start.load(Ordering::SeqCst);
        // The end once more: it is 0 while the slot changes hands, so that the start of one region
        // and the end of another never form a range.
        if address < start || address >= end || slot.end.load(Ordering::SeqCst) != end {
            continue;
        }
        let page = address & !(PAGE_SIZE as usize - 1);
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
        // SAFETY: the page is guest memory or a window's, which its watcher keeps mapped; replacing a page
        // of it leaves it mapped, and no Rust reference into it exists. mmap is a bare system call,
        // and safe in a handler.
        let mapped = unsafe { libc::mmap(page as *mut libc::c_void, PAGE_SIZE as usize, prot, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        slot.lost.store(true, Ordering::Release);
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes of this stack; write is safe in a handler. It fails if the eventfd is
        // full, which wakes the watcher as well.
        let _ = unsafe { libc::write(BELL.load(Ordering::Acquire), one.as_ptr().cast(), one.len()) };
        return true;
    }
    false
}

/// Passes a signal outside guest memory to the previous handler, or to the default action, which
/// ends the process.
fn not_ours(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(before) = BEFORE.get() else { return };
    if before.sa_sigaction == libc::SIG_DFL || before.sa_sigaction == libc::SIG_IGN {
        // SAFETY: restores the previous action, which applies when the faulting code resumes.
        unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
        return;
    }
    if before.sa_flags & libc::SA_SIGINFO != 0 {
        type WithInfo = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: the handler was set with SA_SIGINFO, so it is of this type.
        let call = unsafe { std::mem::transmute::<usize, WithInfo>(before.sa_sigaction) };
        call(signal, info, context);
    } else {
        type Plain = extern "C" fn(libc::c_int);
        // SAFETY: the handler was set without SA_SIGINFO, so it is of this type.
        let call = unsafe { std::mem::transmute::<usize, Plain>(before.sa_sigaction) };
        call(signal);
    }
}
