//! Snapshots of microVMs on disk.
//!
//! A snapshot is a directory with a VM at one instant: its memory, its disks, and named sections of
//! bytes for the rest. A snapshot is full, or has the changes since its parent.
//! `docs/snapshot-format.md` describes the format and its guarantees.
//!
//! | operation | item |
//! |---|---|
//! | write a snapshot | [`Save`] |
//! | read a snapshot | [`Snapshot`] |
//! | check or show a snapshot, merge a chain | [`verify`], [`show`], [`compact`] |
//! | read ahead the last run's first pages | [`record_working_set`], [`Load::WorkingSet`] |
//!
//! Limits: the crate does not stop the VM (it takes an immutable image), does not interpret
//! sections, and does not encrypt. Checksums detect accidents, not forgeries.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod chain;
mod compact;
mod content;
mod dependents;
mod dir;
mod disk;
mod error;
mod files;
pub mod format;
mod layer;
mod lock;
mod parents;
mod progress;
mod ram;
mod restore;
mod save;
mod show;
mod space;
mod staging;
mod verify;
mod working_set;
mod write;

#[cfg(test)]
mod tests;

pub use chain::{Description, Snapshot};
pub use compact::compact;
pub use content::PageContent;
pub use disk::{DiskLayerFile, DiskReader};
pub use error::Error;
pub use format::{Compression, Damage, SnapshotId};
pub use parents::{KnownDir, ParentDirs};
pub use progress::SaveProgress;
pub use restore::Load;
pub use save::{Base, DiskToSave, Save, Saved};
pub use show::{ChainLink, LayerSummary, Summary, show};
pub use space::{Space, linear};
pub use verify::{Verified, verify};
pub use working_set::record_working_set;
