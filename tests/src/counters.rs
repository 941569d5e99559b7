//! Counts of the resources that a process holds.

use std::fs;

use clade_memory::Store;
use clade_test_support::wait_eq;

/// The resources that a VM takes and must release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub fds: usize,
    /// Mappings of files and of anonymous inodes: layers, and `kvm_run` pages.
    pub file_mappings: usize,
    /// All mappings. The C library keeps some stacks of ended threads, so these come back only
    /// roughly.
    pub mappings: usize,
    /// Threads whose names begin with `clade-`: all of ours have such a name.
    pub threads: usize,
    /// Layers alive in the store.
    pub layers: usize,
    /// Mappings promised by the store's budget.
    pub promised: u64,
}

/// Checks that all layers of the store, and mappings of its budget, are released.
///
/// # Panics
/// When one is still held.
pub fn expect_nothing_held(store: &Store, what: &str) {
    // A thread of the store frees large layers.
    let what = format!("{what}: a layer or a mapping outlived its last user");
    wait_eq(&what, &(0, 0), || (store.live_layers(), store.budget().used()));
}

/// Counts the threads of VMs and of their devices. Those of tests come and go: on a busy host one has ended while the
/// next has not begun. Those that the kernel adds for transfers go 5 s after the last one.
fn threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc").flatten();
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    tasks.map(name).filter(|name| name.starts_with("clade-")).count()
}

impl Holdings {
    /// Counts the resources.
    ///
    /// # Panics
    /// When /proc cannot be read.
    #[must_use]
    pub fn count(store: &Store) -> Self {
        // Resources kept warm for later have no holder.
        store.drain();
        let maps = fs::read_to_string("/proc/self/maps").expect("maps");
        let entries = |path| fs::read_dir(path).expect("/proc").count();
        Self {
            fds: entries("/proc/self/fd"),
            file_mappings: maps.lines().filter(|l| l.contains('/') || l.contains("anon_inode")).count(),
            mappings: maps.lines().count(),
            threads: threads(),
            layers: store.live_layers(),
            promised: store.budget().used(),
        }
    }

    /// Checks that all counts are unchanged.
    ///
    /// # Panics
    /// When one has changed.
    pub fn expect_same(self, store: &Store, what: &str) {
        self.expect_layers_more(0, store, what);
    }

    /// The same, except for one more layer, and its file: of a VM that ran, and was then frozen.
    ///
    /// # Panics
    /// When another count has changed.
    pub fn expect_a_layer_more_at_most(self, store: &Store, what: &str) {
        self.expect_layers_more(1, store, what);
    }

    fn expect_layers_more(self, most: usize, store: &Store, what: &str) {
        // Far below one for each of the hundred VMs that come and go in between.
        const SLACK: usize = 24;
        let exact = |h: Self| {
            let more = h.layers.saturating_sub(self.layers).min(most);
            Self { mappings: 0, layers: h.layers - more, fds: h.fds - more, ..h }
        };
        wait_eq(&format!("{what}: something is still held"), &exact(self), || exact(Self::count(store)));
        let now = Self::count(store);
        assert!(now.mappings <= self.mappings + SLACK, "{what}: {} mappings, were {}", now.mappings, self.mappings);
    }
}
