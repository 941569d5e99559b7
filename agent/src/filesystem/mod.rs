//! The file system as clients see it: entries, their metadata, and events in directories.

pub(crate) mod entry;
pub(crate) mod inotify;
pub(crate) mod metadata;
pub(crate) mod watchers;

pub(crate) use watchers::Watchers;
