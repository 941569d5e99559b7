//! Proof that nothing writes to a VM's memory but devices through pins.

/// A guard: while it lives, the only writers to a VM's memory are devices through pins. vCPUs are
/// out of KVM_RUN, and devices are paused.
///
/// Implemented for the value that resumes them when dropped.
pub trait StopsWriters {}

/// There are no writers to stop: only the caller has the memory, as in tests and benchmarks.
#[derive(Clone, Copy, Debug)]
pub struct NoWriters;

impl StopsWriters for NoWriters {}

/// Proof that a guard stops all writers. A write in spite of it is not undefined behaviour, but may
/// or may not be in the image.
#[derive(Debug)]
pub struct Quiesced<'a>(std::marker::PhantomData<&'a ()>);

impl<'a> Quiesced<'a> {
    /// Writers are stopped as long as `guard` is held, which this value borrows.
    #[must_use]
    pub fn by(_guard: &'a impl StopsWriters) -> Self {
        Self(std::marker::PhantomData)
    }
}
