//! The operations on a record of the ownership table, with traces and without.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WordStep {
    Pin,
    Unpin,
    Set,
    Split,
    Open,
    Share,
    Close,
    Merge,
    Reopen,
}
