//! Options of a store. The defaults are measured (docs/performance.md).

use crate::backing::Backing;

/// Options for a store's memory and the time of its copies.
///
/// ```
/// use clade_memory::{Backing, Config, Store};
///
/// let mut config = Config::default();
/// config.backing = Some(Backing::Small);
/// config.background_pages = 4096;
/// let store = Store::with_config(config)?;
/// assert_eq!(store.backing(), Backing::Small);
/// # Ok::<(), clade_memory::StoreError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// The page size of layers. `None`: 2 MiB if the host allows it, else 4 KiB with a warning
    /// ([`Store::warning`](crate::Store::warning)).
    pub backing: Option<Backing>,
    /// Maximum number of memory mappings of all stores of this process, as checked by this store.
    /// At most `vm.max_map_count` less 4,096, which is also the default.
    pub max_mappings: Option<u64>,
    /// Number of private pages from which [`FreezeMode::Auto`](crate::FreezeMode::Auto) copies in
    /// the background.
    pub background_pages: u64,
    /// Maximum number of private pages that a freeze copies and leaves in place. Below it, copying
    /// them again at the next freeze is cheaper than mapping them anew and breaking COW again.
    pub keep_pages: u64,
    /// Maximum number of pages used by devices since the last freeze that a freeze copies and
    /// leaves in place. Copying 2,048 takes half a millisecond.
    pub keep_recently_pinned_pages: u64,
    /// Number of pieces of a VM's layer map from which they are merged in the background.
    pub compact_at_pieces: usize,
    /// Number of layers in a VM's layer map from which they are merged in the background.
    pub compact_at_layers: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            backing: None,
            max_mappings: None,
            background_pages: 1_024,
            // Small under shuttle, whose schedules have a few pages.
            keep_pages: if cfg!(shuttle) { 2 } else { 256 },
            keep_recently_pinned_pages: 2_048,
            // Below, a child is mapped in less than a millisecond.
            compact_at_pieces: 192,
            compact_at_layers: 24,
        }
    }
}
