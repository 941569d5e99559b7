//! The size of pages in memory files.

/// The size of the pages layers live in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A tmpfs mounted `huge=always`: shared memory is read 2 MiB at a time.
    Huge,
    /// memfd in 4 KiB pages.
    Small,
}

impl Backing {
    /// `huge` or `4k`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Huge => "huge",
            Self::Small => "4k",
        }
    }
}
