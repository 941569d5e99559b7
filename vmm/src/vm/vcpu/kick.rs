//! Getting a vCPU's thread out of KVM_RUN from another thread.
//!
//! This takes two steps, in this order:
//!
//! 1. `immediate_exit` is set in the vCPU's `kvm_run`: a thread that has not entered the guest yet
//!    will not.
//! 2. A signal is sent to the thread: one that is in the guest leaves it.

use std::os::raw::c_int;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::unblock_signal;

/// The signal: the first real-time one, unused elsewhere in the process.
fn kick_signal() -> c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: c_int) {}

/// Installs the empty handler: the signal must interrupt KVM_RUN, not end the process.
fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid value of that plain C struct.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as extern "C" fn(c_int) as usize;
        // No SA_RESTART: the ioctl must return EINTR.
        // SAFETY: `action` is initialised and on_kick is async-signal-safe: it does nothing.
        let rc = unsafe { libc::sigaction(kick_signal(), &raw const action, ptr::null_mut()) };
        assert_eq!(rc, 0, "SIGRTMIN takes a handler");
    });
}

/// Unblocks the signal in this thread: whoever has started the process may have blocked it, and exec keeps that.
fn unblock() {
    if let Err(error) = unblock_signal(kick_signal()) {
        tracing::warn!(%error, "a vCPU cannot be kicked: its signal stays blocked");
    }
}

struct KickTarget {
    thread: libc::pthread_t,
    immediate_exit: *const AtomicU8,
}

// SAFETY: `immediate_exit` points into a kvm_run page that outlives the target (see
// `Kicker::enrol`) and is only used atomically.
unsafe impl Send for KickTarget {}

/// Kicks one vCPU's thread, for as long as that thread is enrolled.
#[derive(Default)]
pub(crate) struct Kicker(Mutex<Option<KickTarget>>);

impl std::fmt::Debug for Kicker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kicker")
    }
}

/// A vCPU's thread, enrolled to be kicked. Withdrawn on drop, which must come before the vCPU's
/// drop.
pub(crate) struct Enrolled<'a>(&'a Kicker);

impl Drop for Enrolled<'_> {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Kicker {
    /// Enrols the calling thread, which runs `vcpu`. The guard lives on the thread's stack beside
    /// the vCPU that the thread owns, and must be dropped before it.
    pub(crate) fn enrol(&self, vcpu: &mut VcpuFd) -> Enrolled<'_> {
        install_handler();
        unblock();
        let immediate_exit: *const AtomicU8 = (&raw const vcpu.get_kvm_run().immediate_exit).cast();
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(KickTarget { thread, immediate_exit });
        Enrolled(self)
    }

    /// Makes the thread leave KVM_RUN, now or as soon as it would enter it.
    pub(crate) fn kick(&self) {
        // The lock is held over both steps. The thread cannot withdraw in between, so neither it
        // nor its kvm_run can go away.
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = &*target {
            // SAFETY: enrolled, so the kvm_run page is mapped; immediate_exit is a byte the kernel
            // expects to be changed under it.
            let flag = unsafe { &*target.immediate_exit };
            // SeqCst: see `clear_immediate_exit`.
            flag.store(1, Ordering::SeqCst);
            // SAFETY: enrolled, so the thread has not ended; the signal has a handler.
            unsafe { libc::pthread_kill(target.thread, kick_signal()) };
        }
    }

    /// Called by the vCPU's own thread before it reads whether it may run: from here on only a new
    /// kick stops it.
    ///
    /// SeqCst on both sides: the thread clears the flag, then reads the wish; a pauser sets the
    /// wish, then the flag. At least one of them sees the other's store.
    pub(crate) fn clear_immediate_exit(&self) {
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = &*target {
            // SAFETY: as in `kick`.
            let flag = unsafe { &*target.immediate_exit };
            flag.store(0, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::signal::{block_signal, get_blocked_signals};

    use super::*;

    #[test]
    fn the_signal_of_kicks_is_unblocked_whatever_a_process_has_inherited() {
        let Some(host) = crate::kvm::testutil::host() else { return };
        let vm = host.kvm().create_vm().unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        block_signal(kick_signal()).unwrap();
        assert!(get_blocked_signals().unwrap().contains(&kick_signal()));
        let kicker = Kicker::default();
        let enrolled = kicker.enrol(&mut vcpu);
        assert!(!get_blocked_signals().unwrap().contains(&kick_signal()));
        // Before the vCPU.
        drop(enrolled);
    }
}
