//! Common parts of the end-to-end tests: a host or a reason to skip, bare and Linux guests, and
//! counters of a process's resources.

mod bare;
mod booted;
mod counters;
mod disk;
mod ext4;
mod linux;
mod oracle;
mod process;
mod saved;
mod tap;

pub use bare::{Guest, Writer};
pub use booted::{BootedLinux, booted, formatted};
pub use clade_test_support::{required, skip};
pub use counters::{Holdings, expect_nothing_held};
pub use disk::{DiskFile, DiskGuest, until_in_flight, words};
pub use ext4::{checked, ext4};
pub use linux::{Linux, PROMPT, rerun};
pub use oracle::{owned_pages, smaps_anonymous_kib};
pub use process::{in_a_process_of_its_own, open_files_limit};
pub use saved::{saved_vcpus, with_vcpus};
pub use tap::{Subnet, can_have_taps};

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use clade_memory::{Backing, Store};
use clade_test_support::Watchdog;
use clade_vmm::kvm::Host;
use clade_vmm::vm::Context;

/// Limit of a test's running time, after which its process is aborted.
const TEST_LIMIT: Duration = Duration::from_secs(1800);

/// The right to run VMs. A watchdog aborts a test that hangs.
#[derive(Debug)]
pub struct Turn {
    host: Arc<Host>,
    _watchdog: Watchdog,
    _place: Place,
}

/// Held shared by the tests of this process that run VMs or start processes, and exclusively by one that counts the
/// process's resources.
static TURNS: RwLock<()> = RwLock::new(());

#[derive(Debug)]
enum Place {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

/// Waits until no test of the binary counts the process's resources.
fn shared() -> Place {
    Place::Shared { _guard: TURNS.read().unwrap_or_else(PoisonError::into_inner) }
}

impl Turn {
    /// Waits until no other test of the binary counts the process's resources.
    ///
    /// `None`, with the reason printed, on a host that cannot run VMs.
    #[must_use]
    pub fn take() -> Option<Self> {
        Self::with(shared())
    }

    /// Waits until no other test of the binary has a turn: for a test that counts the process's descriptors, mappings
    /// or threads.
    ///
    /// `None`, with the reason printed, on a host that cannot run VMs.
    #[must_use]
    pub fn alone() -> Option<Self> {
        Self::with(Place::Alone { _guard: TURNS.write().unwrap_or_else(PoisonError::into_inner) })
    }

    fn with(place: Place) -> Option<Self> {
        let userfaultfd = Path::new("/dev/userfaultfd");
        if required("uffd") && !userfaultfd.exists() {
            skip("uffd", "/dev/userfaultfd is missing");
        }
        match Host::open() {
            Ok(host) => Some(Self {
                host: Arc::new(host),
                _watchdog: Watchdog::new(TEST_LIMIT, || "a test with VMs".to_owned()),
                _place: place,
            }),
            Err(error) => {
                skip("kvm", &clade_vmm::error_chain(&error));
                None
            }
        }
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Makes a context of its own over a fresh store.
    ///
    /// # Panics
    /// When this host has KVM but cannot have the store.
    #[must_use]
    pub fn context(&self, backing: Backing) -> Context {
        let store = match backing {
            Backing::Huge => Store::open(),
            Backing::Small => Store::open_small(),
        };
        Context::new(Arc::clone(&self.host), store.expect("a store")).expect("a context").with_report_port()
    }
}
