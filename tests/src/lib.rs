//! What the end-to-end tests share: a host or a reason to skip, bare and Linux guests, and counters of what a process holds.

mod bare;
mod counters;
mod disk;
mod ext4;
mod linux;
mod oracle;
mod process;
mod saved;
mod tap;

pub use bare::{Guest, Writer};
pub use clade_harness::{required, skip};
pub use counters::{Holdings, expect_nothing_held};
pub use disk::{DiskFile, DiskGuest, words};
pub use ext4::{checked, ext4};
pub use linux::{Linux, PROMPT};
pub use oracle::{owned_pages, smaps_anonymous_kib};
pub use process::{Deadline, in_a_process_of_its_own, open_files_limit};
pub use saved::{saved_vcpus, with_vcpus};
pub use tap::{Subnet, can_have_taps};

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clade_memory::{Backing, Store};
use clade_vmm::kvm::Host;
use clade_vmm::vm::Context;

/// The right to run VMs. The test is ended if it takes too long.
#[derive(Debug)]
pub struct Turn {
    host: Arc<Host>,
    _deadline: Deadline,
    _alone: Option<MutexGuard<'static, ()>>,
}

impl Turn {
    /// Waits until no other test of the binary runs VMs. Bare guests spin while they wait, and the resources of a
    /// process can only be counted while no other test changes them.
    ///
    /// `None`, with the reason printed, on a host that cannot run VMs.
    #[must_use]
    pub fn take(patience: Duration) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        Self::with(Some(ALONE.lock().unwrap_or_else(PoisonError::into_inner)), patience)
    }

    /// Waits for nobody: for guests that sleep while they wait, in tests that count nothing of the
    /// process.
    ///
    /// `None`, with the reason printed, on a host that cannot run VMs.
    #[must_use]
    pub fn beside_others(patience: Duration) -> Option<Self> {
        Self::with(None, patience)
    }

    fn with(alone: Option<MutexGuard<'static, ()>>, patience: Duration) -> Option<Self> {
        let userfaultfd = Path::new("/dev/userfaultfd");
        if required("uffd") && !userfaultfd.exists() {
            skip("uffd", "/dev/userfaultfd is missing");
        }
        match Host::open() {
            Ok(host) => Some(Self { host: Arc::new(host), _deadline: Deadline::new(patience), _alone: alone }),
            Err(error) => {
                skip("kvm", &clade_vmm::error_chain(&error));
                None
            }
        }
    }

    /// A context of its own over a fresh store.
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
