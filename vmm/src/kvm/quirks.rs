//! Workarounds for kvm-pvm, all in one place.
//!
//! kvm-pvm is a KVM vendor module for hosts without hardware virtualization, such as most rented
//! VMs. Guest ring 3 runs natively; KVM's instruction emulator interprets guest ring 0. An
//! instruction unknown to the emulator ends `KVM_RUN` with `KVM_EXIT_INTERNAL_ERROR`. A guest
//! kernel must therefore not see features that make it use such instructions.
//!
//! Ring 3 executes CPUID natively and sees the host's CPU. To show the guest kernel the same, this
//! KVM restores the host's bits in leaves 1, 7 and 0xD of every `KVM_SET_CPUID2`, as
//! `KVM_GET_CPUID2` shows. CX16 and PCID, leaf 0 and the leaves from 0x4000_0000 on stay as set.
//! Hence three layers:
//!
//! 1. [`Quirks::hide`], for the leaves that this KVM does not change;
//! 2. [`Quirks::max_leaf`], because a kernel that sees six leaves reads neither 7 nor 0xD;
//! 3. [`Quirks::emulate_insn`] for the few instructions that leaf 1 still announces, and
//!    [`Quirks::kernel_args`], which spares Linux these exits.
//!
//! The TSC is the host's at every ring. Writes to it succeed and change nothing, so a child's TSC
//! is its parent's.
//!
//! A system call to a stock kernel arrives as a page fault. `syscall.rs` turns it back into a
//! system call.
//!
//! Only this file and its submodules depend on which KVM is in use.

mod emulate;
mod syscall;

use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use kvm_ioctls::VmFd;

use super::features::CpuHide;
use crate::platform::PAGE_SIZE;

pub(crate) use emulate::Emulated;
pub use emulate::{EmulateError, EmulationFailure};

/// Environment variable that overrides detection: `pvm` or `none`.
pub(crate) const QUIRKS_ENV: &str = "CLADE_QUIRKS";
/// The directory of the kernel's modules.
const MODULES: &str = "/sys/module";

/// Why the quirks could not be detected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum QuirkError {
    /// The override has an unknown value.
    #[error("{QUIRKS_ENV} is {value:?}, it can be \"pvm\" or \"none\"")]
    Override {
        /// The variable's value.
        value: String,
    },
}

/// The quirks of this host's KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirks {
    /// Hardware virtualization: no quirks.
    None,
    /// kvm-pvm.
    Pvm,
}

/// Features that a guest kernel must not see on kvm-pvm, each with the observed failure. Most are
/// in leaves that KVM overrides (see above), and are listed so that the result does not depend on
/// the set of overridden leaves.
const PVM_HIDE: &[&str] = &[
    // XSAVE and XRSTOR at ring 0 are unknown to the emulator: FPU initialisation ends in an
    // emulation failure. Hiding XSAVE also hides AVX and its dependents. The guest then uses
    // FXSAVE, which is emulated.
    "xsave",
    // POPCNT at ring 0, in hweight: emulation failure.
    "popcnt",
    // CMPXCHG16B at ring 0, in the slab allocator: emulation failure.
    "cx16",
    // STAC and CLAC around every user access: emulation failure. SMEP goes with SMAP.
    "smap",
    "smep",
    // RDFSBASE and WRFSBASE at ring 0: the context switch loses the FS base, and the first pipeline
    // segfaults.
    "fsgsbase",
    // Each of these selects an instruction or a code path in the kernel that the emulator does not
    // support.
    "bmi1",
    "bmi2",
    "movbe",
    "rdpid",
    "rdseed",
    "rdrand",
    "invpcid",
    "pcid",
    "erms",
    "fsrm",
    "sse4_2",
    "pclmulqdq",
    "aes",
    // kvm-pvm reports the feature but refuses MSR 0x10a, which the guest then reads.
    "arch_capabilities",
    // KVM_HC_SEND_IPI and related features: SMP bring-up hangs at "Booting SMP configuration".
    "kvm_pv_ipi",
    "kvm_pv_sched_yield",
    "kvm_pv_unhalt",
    "kvm_pv_tlb_flush",
];

/// The highest basic leaf that a guest sees on kvm-pvm. Linux then logs "CPU feature xsave
/// disabled, no CPUID level 0xd", uses FXSAVE, and does not read leaf 7 (SMAP, FSGSBASE, ERMS,
/// INVPCID, ...).
const PVM_MAX_LEAF: u32 = 6;

/// Linux arguments on kvm-pvm, against the use of features that leaf 1 still announces.
///
/// Debian's kernels mix random numbers with SSSE3, after LDMXCSR in `kernel_fpu_begin`: an
/// emulation failure.
///
/// Ring 3 runs natively, and so does its CPUID unless the CPU can fault it: a program sees the host's AVX, which the
/// guest's kernel does not save. Of two programs that use AVX, one finds the upper halves of its registers
/// zeroed after a switch: a `memcpy` then writes zeros. Arguments unknown to the kernel go into the
/// environment of its first program, and are inherited from there; the C library obeys them. XCR0
/// without AVX would cover all programs, but this KVM does not load the guest's
/// (docs/selfcheck.md).
///
/// `noreplace-smp` and `rodata=off` only save time, of a boot of 54 s: 4 s of page-table walks that write-protect the
/// kernel, and 4 s in which a kernel with one processor patches away its lock prefixes.
///
/// `rcu_cpu_stall_suppress`: in a child of an older image the kernel reported a stall at its first
/// tick, and spent 1.3 s on the report. The kernel forgives the pause (`KVM_KVMCLOCK_CTRL`) at its
/// first look at the clock, but a grace period that begins between that look and the tick has the
/// old tick count as its start. This KVM delivers the tick late.
const PVM_KERNEL_ARGS: &str = "clearcpuid=popcnt,movbe,rdrand,ssse3,sse4_2,pclmulqdq,aes \
     noreplace-smp rodata=off rcupdate.rcu_cpu_stall_suppress=1 \
     GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX2,-AVX,-AVX_Fast_Unaligned_Load";

/// MSRs that are not part of a vCPU's state on kvm-pvm although `KVM_GET_MSR_INDEX_LIST` lists
/// them. `IA32_XSS` (0xda0) can be read but not written. `IA32_SMBASE` (0x9e) and AMD's `DE_CFG`
/// (0xc0011029) are absent. `IA32_ARCH_CAPABILITIES` (0x10a) is refused.
const PVM_SKIP_MSRS: &[u32] = &[0xda0, 0x9e, 0xc001_1029, 0x10a];

/// The slice of a vCPU's thread on kvm-pvm, instead of the kernel's 1.4 ms (two processors): each switch to
/// another guest costs that guest about 1.7 ms. Twenty guests of Linux that each run a shell, all at once on
/// two processors: 21 to 24 s by the kernel's slices, 12 s by 5 ms, 10 to 14 s by 10 ms, 9 s by 50 ms. But of
/// guests that compute all the time, the last of a hundred children runs later: by 10 ms after 0.7 s, by the
/// kernel's slices after 0.35 s.
const PVM_VCPU_SLICE: Duration = Duration::from_millis(5);

impl Quirks {
    /// Detects the quirks, unless [`QUIRKS_ENV`] sets them.
    pub(crate) fn detect() -> Result<Self, QuirkError> {
        Self::detect_in(std::env::var(QUIRKS_ENV).ok().as_deref(), Path::new(MODULES))
    }

    fn detect_in(override_: Option<&str>, modules: &Path) -> Result<Self, QuirkError> {
        match override_ {
            Some("pvm") => return Ok(Self::Pvm),
            Some("none") => return Ok(Self::None),
            Some(value) => return Err(QuirkError::Override { value: value.to_owned() }),
            None => {}
        }
        // If a hardware vendor module is loaded too, /dev/kvm belongs to it.
        let loaded = |name: &str| modules.join(name).exists();
        Ok(if loaded("kvm_pvm") && !loaded("kvm_intel") && !loaded("kvm_amd") { Self::Pvm } else { Self::None })
    }

    /// Features to hide from every guest.
    #[must_use]
    pub fn hide(self) -> CpuHide {
        match self {
            Self::None => CpuHide::none(),
            // A test parses the list: parsing takes a quarter of a millisecond at each process's
            // start.
            Self::Pvm => CpuHide::of(PVM_HIDE),
        }
    }

    /// The highest basic CPUID leaf that a guest sees; `None` for KVM's highest.
    #[must_use]
    pub(crate) fn max_leaf(self) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Pvm => Some(PVM_MAX_LEAF),
        }
    }

    /// The slice of a vCPU's thread; zero for the kernel's default.
    pub(crate) fn vcpu_slice(self) -> Duration {
        match self {
            Self::None => Duration::ZERO,
            Self::Pvm => PVM_VCPU_SLICE,
        }
    }

    /// Has KVM forget all that it has derived from a guest's page tables, whose pages have other contents now:
    /// those of a reset. `slot` and `address` are a memslot and a guest page that nothing uses, and `host` is
    /// an address of the guest's memory.
    ///
    /// kvm-pvm runs a guest by shadow page tables. They follow the guest's own writes, and not the host's: after a
    /// reset PID 1 of a Linux guest ran with pages of the processes since, and ended by a segmentation fault. The
    /// removal of any memslot drops them all. Other hosts shadow page tables where EPT or NPT is switched off.
    ///
    /// # Errors
    /// When KVM refuses the memslot.
    pub(crate) fn forget_page_tables(
        self,
        fd: &VmFd,
        slot: u32,
        address: u64,
        host: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        static SHADOWED: LazyLock<bool> = LazyLock::new(|| has_shadow_paging(Path::new(MODULES)));
        if self == Self::None && !*SHADOWED {
            return Ok(());
        }
        for memory_size in [PAGE_SIZE, 0] {
            let memory = kvm_bindings::kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: address,
                memory_size,
                userspace_addr: host,
            };
            // SAFETY: `host` is a page of the guest's memory already, and no vCPU runs while there are two
            // addresses for it.
            unsafe { fd.set_user_memory_region(memory) }?;
        }
        Ok(())
    }

    /// Arguments to append to a Linux guest's command line. Not needed to boot, because
    /// `emulate_insn` covers the same instructions, but each emulation costs an exit and three
    /// ioctls.
    #[must_use]
    pub fn kernel_args(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Pvm => PVM_KERNEL_ARGS,
        }
    }

    /// `cmdline` of a Linux guest with [`Self::kernel_args`] appended.
    pub(crate) fn extend_cmdline(self, cmdline: &str) -> String {
        match self.kernel_args() {
            "" => cmdline.to_owned(),
            args => format!("{cmdline} {args}"),
        }
    }

    /// MSRs to leave out of a vCPU's state.
    #[must_use]
    pub(crate) fn skip_msrs(self) -> &'static [u32] {
        match self {
            Self::None => &[],
            Self::Pvm => PVM_SKIP_MSRS,
        }
    }

    /// Whether AMD guests must see XSAVEERPTR. Without it Linux works around an FXSAVE leak with
    /// FNCLEX at every context switch, and the emulator does not support FNCLEX.
    #[must_use]
    pub(crate) fn forces_xsaveerptr(self) -> bool {
        self == Self::Pvm
    }
}

/// Whether KVM shadows guests' page tables though there is hardware virtualization: its module has no
/// EPT or NPT, or does not use it.
fn has_shadow_paging(modules: &Path) -> bool {
    [("kvm_intel", "ept"), ("kvm_amd", "npt")].iter().any(|(module, parameter)| {
        let value = fs::read_to_string(modules.join(module).join("parameters").join(parameter));
        value.is_ok_and(|value| matches!(value.trim(), "N" | "0"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shadow_paging_is_known_by_the_modules_parameter() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!has_shadow_paging(dir.path()), "neither module");
        for (module, parameter) in [("kvm_amd", "npt"), ("kvm_intel", "ept")] {
            let parameters = dir.path().join(module).join("parameters");
            fs::create_dir_all(&parameters).unwrap();
            for (value, is_shadowed) in [("Y\n", false), ("1\n", false), ("0\n", true), ("N\n", true)] {
                fs::write(parameters.join(parameter), value).unwrap();
                assert_eq!(has_shadow_paging(dir.path()), is_shadowed, "{module} {value}");
            }
            fs::remove_dir_all(dir.path().join(module)).unwrap();
        }
    }

    #[test]
    fn detection_looks_at_modules_and_obeys_the_override() {
        let dir = tempfile::tempdir().unwrap();
        let detect = |env| Quirks::detect_in(env, dir.path());
        assert_eq!(detect(None), Ok(Quirks::None));
        std::fs::create_dir(dir.path().join("kvm_pvm")).unwrap();
        assert_eq!(detect(None), Ok(Quirks::Pvm));
        assert_eq!(detect(Some("none")), Ok(Quirks::None));
        std::fs::create_dir(dir.path().join("kvm_amd")).unwrap();
        assert_eq!(detect(None), Ok(Quirks::None));
        assert_eq!(detect(Some("pvm")), Ok(Quirks::Pvm));
        assert_eq!(
            detect(Some("yes")).unwrap_err().to_string(),
            "CLADE_QUIRKS is \"yes\", it can be \"pvm\" or \"none\""
        );
    }

    #[test]
    fn the_hidden_features_all_have_names() {
        let hide: CpuHide = PVM_HIDE.join(",").parse().unwrap();
        assert_eq!(Quirks::Pvm.hide(), hide);
        assert!(PVM_HIDE.iter().all(|name| hide.hides(name)));
        assert!(hide.hides("avx2") && hide.hides("xsaves"), "with what depends on them");
        assert_eq!(Quirks::None.hide(), CpuHide::none());
        let args: Vec<&str> = Quirks::Pvm.kernel_args().split(' ').collect();
        let [features, "noreplace-smp", "rodata=off", "rcupdate.rcu_cpu_stall_suppress=1", tunables] = args[..] else {
            panic!("{args:?}")
        };
        assert!(features.strip_prefix("clearcpuid=").unwrap().parse::<CpuHide>().is_ok());
        // The kernel would attribute an argument with a point before the `=` to a module.
        assert!(tunables.starts_with("GLIBC_TUNABLES="), "{tunables}");
    }
}
