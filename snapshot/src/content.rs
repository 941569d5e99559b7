//! The kind of a page of a snapshot.

/// Kind of a page, before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// The page has to be read, and may turn out to be zeros.
    Data,
    /// The page is zeros.
    Zero,
}
