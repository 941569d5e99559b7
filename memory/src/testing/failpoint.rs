//! Failpoints: system calls that the tests of I13 can make fail, one at a time. Compiled only for
//! tests.

use std::io;

/// Kind of the next system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// mmap.
    Map,
    /// A new file: memfd_create, open.
    File,
    /// ftruncate.
    Size,
    /// madvise.
    Advise,
    /// PAGEMAP_SCAN.
    Scan,
    /// Reading and writing files: pread, pwritev, dup.
    Copy,
    /// fdatasync.
    Sync,
    /// UFFDIO_REGISTER.
    Watch,
    /// UFFDIO_WRITEPROTECT that protects.
    Protect,
    /// UFFDIO_WRITEPROTECT that lifts a protection. The fallback, forgetting the region, never
    /// fails here.
    Release,
    /// UFFDIO_COPY.
    Fill,
}

/// Called before each system call; an error counts as the call's own.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn failpoint(_call: Call) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use armed::{failpoint, inherit, plan};

#[cfg(test)]
mod armed {
    use super::{Call, io};
    use std::cell::RefCell;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

    const OFF: u64 = u64::MAX;

    /// A kind of call and the number of calls until one fails.
    type Only = Option<(Call, u64)>;
    /// The same, and what is done before that call.
    type Before = Option<(Call, u64, Box<dyn FnOnce() + Send>)>;

    /// Selects the failing call. One plan for a test's thread and the threads that its stores
    /// start.
    pub(crate) struct FailurePlan {
        /// Calls until the one that fails.
        left: AtomicU64,
        /// 0 not yet, 1 once, 2 all from there on.
        fired: AtomicU8,
        for_ever: AtomicU8,
        last: std::sync::Mutex<Option<Call>>,
        only: std::sync::Mutex<Only>,
        before: std::sync::Mutex<Before>,
    }

    impl Default for FailurePlan {
        fn default() -> Self {
            let left = AtomicU64::new(OFF);
            let (last, only) = (std::sync::Mutex::default(), std::sync::Mutex::default());
            Self { left, fired: AtomicU8::new(0), for_ever: AtomicU8::new(0), last, only, before: Default::default() }
        }
    }

    impl FailurePlan {
        /// Makes the call after `nth` others fail, or all from it on.
        pub(crate) fn arm(&self, nth: u64, for_ever: bool) {
            self.fired.store(0, Ordering::SeqCst);
            self.for_ever.store(u8::from(for_ever), Ordering::SeqCst);
            self.left.store(nth, Ordering::SeqCst);
        }

        /// Makes only the call of that kind after `nth` others of it fail.
        pub(crate) fn fail_call(&self, call: Call, nth: u64) {
            self.fired.store(0, Ordering::SeqCst);
            *self.only.lock().unwrap() = Some((call, nth));
        }

        /// Does something once, before the call of that kind after `nth` others of it. What it does may
        /// panic, and may make such calls itself.
        pub(crate) fn before(&self, call: Call, nth: u64, action: impl FnOnce() + Send + 'static) {
            *self.before.lock().unwrap() = Some((call, nth, Box::new(action)));
        }

        /// Whether what was to be done before a call has been done.
        pub(crate) fn has_acted(&self) -> bool {
            self.before.lock().unwrap().is_none()
        }

        /// Does nothing before a call.
        pub(crate) fn forget_action(&self) {
            *self.before.lock().unwrap() = None;
        }

        fn act(&self, call: Call) {
            let mut before = self.before.lock().unwrap();
            match &mut *before {
                Some((kind, 0, _)) if *kind == call => {
                    let action = before.take();
                    drop(before);
                    if let Some((.., action)) = action {
                        action();
                    }
                }
                Some((kind, left, _)) if *kind == call => *left -= 1,
                _ => {}
            }
        }

        fn fails_only(&self, call: Call) -> bool {
            let mut only = self.only.lock().unwrap();
            match &mut *only {
                Some((kind, 0)) if *kind == call => {
                    *only = None;
                    self.fired.store(1, Ordering::SeqCst);
                    *self.last.lock().unwrap() = Some(call);
                    true
                }
                Some((kind, left)) if *kind == call => {
                    *left -= 1;
                    false
                }
                _ => false,
            }
        }

        /// Stops failures.
        pub(crate) fn heal(&self) {
            self.left.store(OFF, Ordering::SeqCst);
            self.for_ever.store(0, Ordering::SeqCst);
            *self.only.lock().unwrap() = None;
        }

        /// Stops failures. Returns the call that failed, if any.
        pub(crate) fn disarm(&self) -> Option<Call> {
            self.heal();
            let fired = self.fired.swap(0, Ordering::SeqCst) > 0;
            self.last.lock().unwrap().take().filter(|_| fired)
        }

        fn fails(&self, call: Call) -> bool {
            if self.fails_only(call) {
                return true;
            }
            let left = self.left.load(Ordering::SeqCst);
            if left == OFF {
                // Allocating calls keep failing; calls that only query or clean up do not.
                let again = self.fired.load(Ordering::SeqCst) > 0 && self.for_ever.load(Ordering::SeqCst) > 0;
                let allocates =
                    matches!(call, Call::Map | Call::File | Call::Size | Call::Advise | Call::Copy | Call::Sync);
                return again && allocates;
            }
            if left > 0 {
                self.left.store(left - 1, Ordering::SeqCst);
                return false;
            }
            self.left.store(OFF, Ordering::SeqCst);
            self.fired.store(1, Ordering::SeqCst);
            *self.last.lock().unwrap() = Some(call);
            true
        }
    }

    thread_local! {
        static PLAN: RefCell<Arc<FailurePlan>> = RefCell::default();
    }

    /// This thread's plan.
    pub(crate) fn plan() -> Arc<FailurePlan> {
        PLAN.with(|plan| Arc::clone(&plan.borrow()))
    }

    /// Called on a thread that works for the owner of `plan`.
    pub(crate) fn inherit(plan: Arc<FailurePlan>) {
        PLAN.with(|mine| *mine.borrow_mut() = plan);
    }

    pub(crate) fn failpoint(call: Call) -> io::Result<()> {
        crate::sync::step();
        let plan = plan();
        plan.act(call);
        let fails = plan.fails(call);
        let errno = match call {
            Call::File => libc::EMFILE,
            Call::Copy | Call::Size | Call::Sync => libc::ENOSPC,
            _ => libc::ENOMEM,
        };
        if fails { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
    }
}
