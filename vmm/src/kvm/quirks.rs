//! Everything that adapts to kvm-pvm, in one place.
//!
//! kvm-pvm is a KVM vendor module for hosts without hardware virtualization, such as most rented
//! VMs: guest ring 3 runs natively, guest ring 0 is interpreted by KVM's instruction emulator. What
//! the emulator does not know ends `KVM_RUN` with `KVM_EXIT_INTERNAL_ERROR`, so a guest kernel must
//! not see features that make it use such instructions.
//!
//! Ring 3 executes CPUID natively and sees the host's CPU. For the guest kernel to see the same,
//! this KVM puts the host's bits back into leaves 1, 7 and 0xD of whatever `KVM_SET_CPUID2` is
//! given (seen with `KVM_GET_CPUID2`; CX16 and PCID are left alone, so are leaf 0 and the leaves
//! from 0x4000_0000 on). Hence three layers:
//!
//! 1. [`Quirks::hide`], for the leaves it leaves alone;
//! 2. [`Quirks::max_leaf`], because a kernel that sees six leaves reads neither 7 nor 0xD;
//! 3. [`Quirks::emulate_insn`] for the few instructions that leaf 1 still announces, and
//!    [`Quirks::kernel_args`], which spare Linux the detour.
//!
//! The TSC is the host's at every ring: writes to it succeed and change nothing, so a child's TSC
//! is its parent's.
//!
//! A system call of a stock kernel arrives as a page fault, and is made one again (`syscall.rs`).
//!
//! Nothing outside this file and its children asks which KVM it runs on.

mod emulate;
mod syscall;

use std::path::Path;

use super::features::CpuHide;

pub(crate) use emulate::Emulated;
pub use emulate::{EmulateError, EmulationFailure};

/// Overrides detection: `pvm` or `none`.
pub(crate) const QUIRKS_ENV: &str = "CLADE_QUIRKS";

/// Why the quirks could not be detected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum QuirkError {
    /// The override has an unknown value.
    #[error("{QUIRKS_ENV} is {value:?}, it can be \"pvm\" or \"none\"")]
    Override {
        /// Its value.
        value: String,
    },
}

/// The kind of this host's KVM, by its peculiarities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirks {
    /// Hardware virtualization, which has none.
    None,
    /// kvm-pvm.
    Pvm,
}

/// Features that a guest kernel must not see on kvm-pvm, each with what was observed. Most of it is
/// in leaves that KVM overrides (see above); it is listed all the same, so that nothing depends on
/// which those are.
const PVM_HIDE: &[&str] = &[
    // XSAVE and XRSTOR at ring 0 are unknown to the emulator: FPU initialisation ends in an
    // emulation failure. Takes AVX and its kin along. The guest then uses FXSAVE, which is
    // emulated.
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
    // Each selects an instruction or a code path in the kernel that the emulator does not do.
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
    // This KVM claims it and refuses MSR 0x10a, which the guest then reads.
    "arch_capabilities",
    // KVM_HC_SEND_IPI and its kin: SMP bring-up hangs at "Booting SMP configuration".
    "kvm_pv_ipi",
    "kvm_pv_sched_yield",
    "kvm_pv_unhalt",
    "kvm_pv_tlb_flush",
];

/// The last basic leaf that a guest sees on kvm-pvm. Linux reports "CPU feature xsave disabled, no
/// CPUID level 0xd" and uses FXSAVE; leaf 7 (SMAP, FSGSBASE, ERMS, INVPCID, ...) is not read.
const PVM_MAX_LEAF: u32 = 6;

/// Arguments for Linux on kvm-pvm: not to use the features that leaf 1 still announces.
///
/// SSSE3 is what Debian's kernels mix random numbers with, after LDMXCSR in `kernel_fpu_begin`: an
/// emulation failure.
const PVM_KERNEL_ARGS: &str = "clearcpuid=popcnt,movbe,rdrand,ssse3,sse4_2,pclmulqdq,aes";

/// MSRs that are not part of a vCPU's state on kvm-pvm although `KVM_GET_MSR_INDEX_LIST` names
/// them: `IA32_XSS` (0xda0) can be read and not written, `IA32_SMBASE` (0x9e) and AMD's `DE_CFG`
/// (0xc0011029) are absent, `IA32_ARCH_CAPABILITIES` (0x10a) is refused.
const PVM_SKIP_MSRS: &[u32] = &[0xda0, 0x9e, 0xc001_1029, 0x10a];

impl Quirks {
    /// Finds out, unless [`QUIRKS_ENV`] says.
    pub(crate) fn detect() -> Result<Self, QuirkError> {
        Self::detect_in(std::env::var(QUIRKS_ENV).ok().as_deref(), Path::new("/sys/module"))
    }

    fn detect_in(override_: Option<&str>, modules: &Path) -> Result<Self, QuirkError> {
        match override_ {
            Some("pvm") => return Ok(Self::Pvm),
            Some("none") => return Ok(Self::None),
            Some(value) => return Err(QuirkError::Override { value: value.to_owned() }),
            None => {}
        }
        // With a hardware vendor module beside it, /dev/kvm is that one's.
        let loaded = |name: &str| modules.join(name).exists();
        Ok(if loaded("kvm_pvm") && !loaded("kvm_intel") && !loaded("kvm_amd") { Self::Pvm } else { Self::None })
    }

    /// Features to hide from every guest.
    #[must_use]
    pub fn hide(self) -> CpuHide {
        match self {
            Self::None => CpuHide::none(),
            // The list is constant, and a test parses it.
            Self::Pvm => PVM_HIDE.join(",").parse().unwrap_or_default(),
        }
    }

    /// The highest basic CPUID leaf that a guest sees; `None` for as many as KVM supports.
    #[must_use]
    pub(crate) fn max_leaf(self) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Pvm => Some(PVM_MAX_LEAF),
        }
    }

    /// What to append to a Linux guest's command line. Not needed to boot, since
    /// [`Self::emulate_insn`] covers the same, but each healed instruction costs an exit and three
    /// calls.
    #[must_use]
    pub(crate) fn kernel_args(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Pvm => PVM_KERNEL_ARGS,
        }
    }

    /// `cmdline` for a Linux guest with what helps it here.
    pub(crate) fn extend_cmdline(self, cmdline: &str) -> String {
        match self.kernel_args() {
            "" => cmdline.to_owned(),
            args => format!("{cmdline} {args}"),
        }
    }

    /// MSRs to leave alone.
    #[must_use]
    pub(crate) fn skip_msrs(self) -> &'static [u32] {
        match self {
            Self::None => &[],
            Self::Pvm => PVM_SKIP_MSRS,
        }
    }

    /// Whether AMD guests must see that FXSAVE handles error pointers: without it Linux works
    /// around an FXSAVE leak with FNCLEX at every context switch, which the emulator does not know.
    #[must_use]
    pub(crate) fn forces_xsaveerptr(self) -> bool {
        self == Self::Pvm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let args = Quirks::Pvm.kernel_args().strip_prefix("clearcpuid=").unwrap();
        assert!(args.parse::<CpuHide>().is_ok());
    }
}
