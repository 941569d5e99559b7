//! The heap of a process that is copied many times.
//!
//! A started process has hundreds of holes in its heap, left by startup allocations. Its copies
//! allocate in them, and each page that they write becomes their own: 90 KiB of allocations took
//! 276 KiB of private memory, and each page a fault. Without holes the copies allocate behind all
//! shared pages: 212 KiB.

/// Allocates all holes of the heap, for good. Writes nothing to them but the allocator's own words.
///
/// Call it when everything that the copies share has been made. Without glibc it does nothing.
#[cfg(target_env = "gnu")]
pub(crate) fn take_holes() {
    /// Sizes that the allocator keeps lists of, for each thread and for all: multiples of 16.
    const STEP: usize = 16;
    const LISTED: usize = 1024;
    /// Chunks on a thread's list of one size, at most.
    const ON_LIST: usize = 7;
    /// Larger chunks do not come from the heap: they are mappings of their own.
    const LARGEST: usize = 64 << 10;

    // SAFETY: it reads the allocator's state, under the allocator's lock.
    let info = unsafe { libc::mallinfo2() };
    // SAFETY: it asks for the end of the heap, and does not move it.
    let end = unsafe { libc::sbrk(0) } as usize;
    // Memory behind this was never allocated.
    let top = end.saturating_sub(info.keepcost);
    let take = |size: usize| {
        // SAFETY: any size is valid for `malloc`. The result is never used, and never freed.
        unsafe { libc::malloc(size) as usize }
    };
    let mut taken = 0;
    for size in (STEP..=LISTED).step_by(STEP) {
        // The usable size of a chunk is 8 more than a multiple of 16.
        (0..ON_LIST).for_each(|_| _ = take(size - 8));
    }
    let mut size = LARGEST;
    while size >= STEP {
        // A larger hole is split, and its rest is a hole again.
        let behind = loop {
            match take(size) {
                hole if (1..top).contains(&hole) => taken += size,
                behind => break behind,
            }
        };
        if size > LISTED {
            // SAFETY: it was allocated above, and nothing refers to it.
            unsafe { libc::free(behind as *mut libc::c_void) };
        }
        size -= if size > LISTED { size / 8 } else { STEP };
    }
    tracing::debug!(taken, holes = info.fordblks - info.keepcost, "the holes of the heap are taken");
}

#[cfg(not(target_env = "gnu"))]
pub(crate) fn take_holes() {}

/// Has the kernel provide the pages of the stack and the heap that the start of a VM uses: each is a fault, which the
/// request for the VM would wait for. For a worker that waits for its VM.
#[inline(never)]
pub(crate) fn touch_ahead() {
    const PAGE: usize = 4096;
    /// Below what this function's callers use: state is decoded on the stack.
    const STACK: usize = 9 * PAGE;
    /// At the end of the heap, where nothing is free behind shared pages ([`take_holes`]). Less than the allocator
    /// gives back to the kernel.
    const HEAP: usize = 10 * PAGE;
    // Not zeros: those of the heap's end would not be written.
    std::hint::black_box([1u8; STACK].as_slice());
    std::hint::black_box(vec![1u8; HEAP]);
}
