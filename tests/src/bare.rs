//! Bare guests that run only while they carry out a command.

use std::sync::Arc;

use clade_guests::abi::{Command, PAGE_SIZE, PAGE_WORDS, WORK_BASE, model};
use clade_harness::{BareVcpu, boot_bare};
use clade_vmm::vm::{ChildOptions, Context, ForkImage, ForkReport, Vm, VmConfig};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::oracle;

/// The source of a write: the guest's CPU, or the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// A command to the first vCPU.
    Guest,
    /// An access through `vm-memory`, as a device's emulation does.
    Host,
}

/// A bare guest with one or more vCPUs, paused except while it works. Pages are counted from
/// [`WORK_BASE`].
#[derive(Debug)]
pub struct Guest {
    vm: Vm,
}

impl Guest {
    /// Boots a guest with `mib` of memory.
    ///
    /// # Panics
    /// When it does not boot.
    #[must_use]
    pub fn boot(context: &Context, mib: u64, cpus: u64) -> Self {
        Self::boot_as(context, VmConfig::bare(mib << 20, cpus).expect("a configuration"))
    }

    /// Boots a guest of the given shape.
    ///
    /// # Panics
    /// When it does not boot.
    #[must_use]
    pub fn boot_as(context: &Context, config: VmConfig) -> Self {
        let vm = boot_bare(context, "guest", &Arc::new(config)).expect("a bare guest boots");
        vm.pause().expect("a running VM pauses");
        Self { vm }
    }

    /// Makes a paused child of `image`.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn child(context: &Context, image: &Arc<ForkImage>) -> Self {
        let options = ChildOptions { paused: true, erase: &[], before_start: None };
        Self { vm: Vm::from_image(context, "child", image, options).expect("a child") }
    }

    /// Forks the guest while it runs.
    ///
    /// # Panics
    /// When it cannot be forked.
    #[must_use]
    pub fn fork(&self) -> (Arc<ForkImage>, ForkReport) {
        self.vm.resume().expect("a paused VM runs on");
        let forked = self.vm.fork().expect("a running VM is forked");
        self.vm.pause().expect("a running VM pauses");
        forked
    }

    /// Forks the guest, and starts one child.
    #[must_use]
    pub fn fork_child(&self) -> Self {
        Self::child(self.vm.context(), &self.fork().0)
    }

    /// Returns the VM.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Returns only the VM.
    #[must_use]
    pub fn into_vm(self) -> Vm {
        self.vm
    }

    /// Returns the number of pages from [`WORK_BASE`] to the end.
    #[must_use]
    pub fn work_pages(&self) -> u64 {
        (self.vm.config().layout().bytes() - WORK_BASE) / PAGE_SIZE
    }

    /// Runs a command on the first vCPU, and pauses again.
    ///
    /// # Panics
    /// When the guest does not answer.
    pub fn run(&self, command: Command) -> [u64; 4] {
        self.vm.resume().expect("a paused VM runs on");
        let results = BareVcpu::new(&self.vm, 0).run(command).expect("the guest answers");
        self.vm.pause().expect("a running VM pauses");
        results
    }

    /// Fills `pages` pages from `first` with words of `seed`.
    ///
    /// # Panics
    /// When the pages do not exist.
    pub fn fill(&self, writer: Writer, first: u64, pages: u64, seed: u64) {
        let start = gpa(first);
        match writer {
            Writer::Guest => {
                self.run(Command::Fill { start, pages, seed });
            }
            Writer::Host => {
                let mut words = vec![0u64; (pages * PAGE_WORDS) as usize];
                model::fill(&mut words, start, seed);
                let slice = self.vm.ram().memory().get_slice(GuestAddress(start), words.len() * 8);
                slice.expect("the pages are there").copy_from(&words);
            }
        }
    }

    /// Checks that `pages` pages from `first` hold the words of `seed` (zeros if `None`), as the
    /// host and the guest see it.
    ///
    /// # Panics
    /// When a word differs.
    pub fn expect(&self, first: u64, pages: u64, seed: Option<u64>, what: &str) {
        let start = gpa(first);
        let mut want = vec![0u64; (pages * PAGE_WORDS) as usize];
        if let Some(seed) = seed {
            model::fill(&mut want, start, seed);
        }
        self.expect_words(start, &want, what);
        match seed {
            Some(seed) => {
                let [wrong, at, is, must] = self.run(Command::Verify { start, pages, seed });
                assert_eq!(wrong, 0, "{what}: the guest sees {is:#x} at {at:#x}, must be {must:#x}");
            }
            None => {
                let [sum, ..] = self.run(Command::Read { start, pages, passes: 1, words: PAGE_WORDS });
                assert_eq!(sum, 0, "{what}: the guest sees no zeros");
            }
        }
    }

    /// Checks the words from `start` on, as the host sees them.
    ///
    /// # Panics
    /// When a word differs.
    pub fn expect_words(&self, start: u64, want: &[u64], what: &str) {
        let mut got = vec![0u64; want.len()];
        let slice = self.vm.ram().memory().get_slice(GuestAddress(start), want.len() * 8);
        slice.expect("the pages are there").copy_to(&mut got);
        if let Some(at) = got.iter().zip(want).position(|(got, want)| got != want) {
            let wrong = got.iter().zip(want).filter(|(got, want)| got != want).count();
            let gpa = start + at as u64 * 8;
            panic!("{what}: {wrong} wrong words, the first at {gpa:#x}: {:#x}, must be {:#x}", got[at], want[at]);
        }
    }

    /// Returns the number of pages that it owns, by its own counts.
    ///
    /// # Panics
    /// When the counts are unavailable.
    #[must_use]
    pub fn exclusive(&self) -> u64 {
        self.vm.memory_stats().expect("statistics").exclusive
    }

    /// Returns the work pages that it owns, by the kernel's page map, in order.
    #[must_use]
    pub fn owned_work_pages(&self) -> Vec<u64> {
        let region = &self.vm.ram().regions()[0];
        let first = WORK_BASE / PAGE_SIZE;
        oracle::owned_pages(region.host_address(), region.pages())
            .into_iter()
            .filter_map(|p| p.checked_sub(first))
            .collect()
    }
}

impl From<Vm> for Guest {
    /// A bare guest that is paused.
    fn from(vm: Vm) -> Self {
        Self { vm }
    }
}

fn gpa(page: u64) -> u64 {
    WORK_BASE + page * PAGE_SIZE
}
