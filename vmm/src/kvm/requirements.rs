//! Requirements of a VM's state on its host. Saved with the state, so that a host can name the
//! missing features.

use std::fmt;
use std::fs;
use std::sync::LazyLock;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::features::{Reg, features};
use super::host::{Host, HostError};

/// Tolerance within which two TSC frequencies count as equal, in parts per million: the precision
/// of calibration.
pub(super) const TSC_TOLERANCE_PPM: u64 = 250;

/// Bits of `IA32_ARCH_CAPABILITIES` that report a vulnerability, not an immunity: RSBA and RRSBA.
const WORSE: u64 = 1 << 2 | 1 << 19;

/// Bits that depend on the number of vCPUs, not on the host: HTT and CMP_LEGACY.
const TOPOLOGY: [(u32, Reg, u32); 2] = [(1, Reg::Edx, 1 << 28), (0x8000_0001, Reg::Ecx, 1 << 1)];

/// Registers of feature bits that are compared although no feature of theirs has a name here, each with those of its
/// bits which mean more when set: sub-features of leaf 7, lengths of AVX10's vectors, and AMD's immunities.
const NAMELESS: [(u32, u32, Reg, u32); 5] = [
    (7, 1, Reg::Ebx, u32::MAX),
    (7, 1, Reg::Ecx, u32::MAX),
    (7, 2, Reg::Edx, u32::MAX),
    (0x24, 0, Reg::Ebx, 0x0007_0000),
    (0x8000_0021, 0, Reg::Ecx, u32::MAX),
];

/// A CPUID register of feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureWord {
    leaf: u32,
    subleaf: u32,
    register: Reg,
    bits: u32,
}

/// A state component of the XSAVE area, from CPUID leaf 0xD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct XsaveComponent {
    /// Its bit in XCR0 or `IA32_XSS`.
    pub bit: u32,
    /// Its size in bytes.
    pub size: u32,
    /// Its offset in bytes in the standard format; 0 for those of `IA32_XSS`.
    pub offset: u32,
    /// ECX of the subleaf: supervisor component, alignment, XFD.
    pub flags: u32,
}

/// A guest's requirements on a host: features, TSC, XSAVE layout, immunities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRequirements {
    /// The version of Clade that saved the state. For messages only.
    pub clade: String,
    /// The CPU's vendor string from CPUID.
    pub vendor: String,
    /// The features that the guest was given.
    pub features: Vec<FeatureWord>,
    /// The frequency of the guest's TSC in kHz, if KVM reports it.
    pub tsc_khz: Option<u32>,
    /// The release of the host's kernel. For messages only.
    pub kernel: String,
    /// The XSAVE components that the guest was given.
    #[serde(default)]
    pub xsave: Vec<XsaveComponent>,
    /// The guest's value of `IA32_ARCH_CAPABILITIES`, if it has that MSR.
    #[serde(default)]
    pub arch_capabilities: Option<u64>,
    /// The number of bits of a physical address, if CPUID reports it.
    #[serde(default)]
    pub physical_bits: Option<u8>,
}

/// Why a saved state cannot be restored on this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostMismatch {
    /// The CPU is of another vendor.
    #[error("the guest ran on a CPU of {saved:?}, this one is of {here:?}")]
    Vendor {
        /// The vendor in the state.
        saved: String,
        /// This host's vendor.
        here: String,
    },
    /// The host lacks CPU features.
    #[error("this host lacks CPU features that the guest was given: {}", missing.join(", "))]
    Features {
        /// The features by name; unnamed ones by their bit in CPUID.
        missing: Vec<String>,
    },
    /// This host cannot give the guest its TSC frequency.
    #[error("the guest was given a TSC of {saved} kHz, this host has {here} kHz and cannot scale it")]
    Tsc {
        /// The frequency in the state, in kHz.
        saved: u32,
        /// This host's frequency, in kHz.
        here: u32,
    },
    /// This host's XSAVE area lacks a component, or has it in another layout.
    #[error("the guest's XSAVE area has component {} as {} bytes at {}, this host's has {}", saved.bit, saved.size, saved.offset, found(here.as_ref()))]
    Xsave {
        /// The component in the state.
        saved: XsaveComponent,
        /// This host's component, if it has it.
        here: Option<XsaveComponent>,
    },
    /// The guest relies on an immunity that this host lacks.
    #[error(
        "IA32_ARCH_CAPABILITIES is {here:#x} here, and {saved:#x} where the guest ran: bits {differing:#x} would deceive it"
    )]
    ArchCapabilities {
        /// The MSR's value in the state.
        saved: u64,
        /// The MSR's value on this host.
        here: u64,
        /// The bits of missing immunities and of new vulnerabilities.
        differing: u64,
    },
    /// This host's physical addresses have fewer bits.
    #[error("the guest was given physical addresses of {saved} bits, this host has {here}")]
    PhysicalBits {
        /// Physical-address bits in the state.
        saved: u8,
        /// Physical-address bits of this host.
        here: u8,
    },
    /// This host's properties could not be determined.
    #[error("this host cannot be compared with the one the guest ran on")]
    Host(#[from] HostError),
}

impl fmt::Display for FeatureWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPUID {:#x}.{} {:?}", self.leaf, self.subleaf, self.register)
    }
}

/// The registers of `cpuid` that have features.
fn words(cpuid: &[kvm_cpuid_entry2]) -> Vec<FeatureWord> {
    let mut all: Vec<FeatureWord> = Vec::new();
    let named = features().map(|feature| (feature.leaf, feature.subleaf, feature.reg, u32::MAX));
    for (leaf, subleaf, register, compared) in named.chain(NAMELESS) {
        let known = |word: &FeatureWord| (word.leaf, word.subleaf, word.register) == (leaf, subleaf, register);
        if all.iter().any(known) {
            continue;
        }
        let Some(entry) = cpuid.iter().find(|e| (e.function, e.index) == (leaf, subleaf)) else { continue };
        let bits = match register {
            Reg::Eax => entry.eax,
            Reg::Ebx => entry.ebx,
            Reg::Ecx => entry.ecx,
            Reg::Edx => entry.edx,
        };
        let topology = TOPOLOGY.iter().find(|(l, r, _)| (*l, *r) == (leaf, register)).map_or(0, |(.., bits)| *bits);
        all.push(FeatureWord { leaf, subleaf, register, bits: bits & compared & !topology });
    }
    all
}

fn found(here: Option<&XsaveComponent>) -> String {
    here.map_or_else(|| "none".to_owned(), |here| format!("{} bytes at {}", here.size, here.offset))
}

/// The components of leaf 0xD after x87 and SSE, whose place is the same on every host.
fn components(cpuid: &[kvm_cpuid_entry2]) -> Vec<XsaveComponent> {
    let all = cpuid.iter().filter(|e| e.function == 0xd && e.index >= 2 && e.eax != 0);
    all.map(|e| XsaveComponent { bit: e.index, size: e.eax, offset: e.ebx, flags: e.ecx }).collect()
}

fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    let leaf = cpuid.iter().find(|e| e.function == 0);
    let bytes = leaf.map(|e| [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes)).unwrap_or_default();
    String::from_utf8_lossy(bytes.as_flattened()).into_owned()
}

impl HostRequirements {
    /// The requirements of a guest on this host whose vCPUs have `cpuid`.
    #[must_use]
    pub fn of(cpuid: &[kvm_cpuid_entry2], tsc_khz: Option<u32>, arch_capabilities: Option<u64>) -> Self {
        let addresses = cpuid.iter().find(|e| e.function == 0x8000_0008);
        // Read once: by `Context::warm_up` in a zygote, for its workers, which may not read the file.
        static KERNEL: LazyLock<String> =
            LazyLock::new(|| fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned());
        Self {
            clade: env!("CARGO_PKG_VERSION").to_owned(),
            vendor: vendor(cpuid),
            features: words(cpuid),
            tsc_khz,
            kernel: KERNEL.clone(),
            xsave: components(cpuid),
            arch_capabilities,
            physical_bits: addresses.map(|e| e.eax as u8).filter(|bits| *bits > 0),
        }
    }

    /// The requirements of a guest with all features of `host`.
    ///
    /// # Errors
    /// When the host's properties cannot be determined.
    pub fn here(host: &Host) -> Result<Self, HostError> {
        Ok(Self::of(host.cpuid_at_most()?.as_slice(), host.tsc_khz()?, host.arch_capabilities()?))
    }

    /// Checks whether a guest with these requirements can be restored on `host`. The versions of
    /// Clade and of the kernel do not matter.
    ///
    /// # Errors
    /// The first mismatch. For CPU features, it names all that are missing.
    pub fn check(&self, host: &Host) -> Result<(), HostMismatch> {
        let here = host.requirements()?;
        // The common case: the guest was booted on this host, or on an equal one.
        if self == here { Ok(()) } else { self.check_against(here, host.has_tsc_control()) }
    }

    fn check_against(&self, here: &Self, scales_tsc: bool) -> Result<(), HostMismatch> {
        if self.vendor != here.vendor {
            return Err(HostMismatch::Vendor { saved: self.vendor.clone(), here: here.vendor.clone() });
        }
        let missing = self.missing(here);
        if !missing.is_empty() {
            return Err(HostMismatch::Features { missing });
        }
        for saved in &self.xsave {
            let here = here.xsave.iter().find(|component| component.bit == saved.bit).copied();
            if here != Some(*saved) {
                return Err(HostMismatch::Xsave { saved: *saved, here });
            }
        }
        if let (Some(saved), Some(here)) = (self.physical_bits, here.physical_bits)
            && here < saved
        {
            return Err(HostMismatch::PhysicalBits { saved, here });
        }
        // A guest without the MSR does not rely on any immunity.
        if let Some(saved) = self.arch_capabilities {
            let here = here.arch_capabilities.unwrap_or(0);
            let differing = saved & !here & !WORSE | here & !saved & WORSE;
            if differing != 0 {
                return Err(HostMismatch::ArchCapabilities { saved, here, differing });
            }
        }
        match (self.tsc_khz, here.tsc_khz) {
            (Some(saved), Some(here)) if !scales_tsc && !same_tsc(saved, here) => {
                Err(HostMismatch::Tsc { saved, here })
            }
            _ => Ok(()),
        }
    }

    /// The features that `here` lacks, by name.
    #[must_use]
    pub fn missing(&self, here: &Self) -> Vec<String> {
        let mut missing = Vec::new();
        for word in &self.features {
            let same = |w: &&FeatureWord| (w.leaf, w.subleaf, w.register) == (word.leaf, word.subleaf, word.register);
            let lacking = word.bits & !here.features.iter().find(same).map_or(0, |w| w.bits);
            for bit in (0..u32::BITS).filter(|bit| lacking & 1 << bit != 0) {
                let named = features()
                    .find(|f| (f.leaf, f.subleaf, f.reg, f.bit) == (word.leaf, word.subleaf, word.register, bit));
                missing.push(named.map_or_else(|| format!("{word} bit {bit}"), |f| f.name.to_owned()));
            }
        }
        missing
    }
}

/// Whether two frequencies in kHz are equal within [`TSC_TOLERANCE_PPM`].
pub(super) fn same_tsc(saved: u32, here: u32) -> bool {
    u64::from(saved.abs_diff(here)) * 1_000_000 <= u64::from(saved) * TSC_TOLERANCE_PPM
}

#[cfg(test)]
mod tests {
    use super::super::features::CpuHide;
    use super::super::testutil::host;
    use super::*;

    fn facts(ecx1: u32, ebx7: u32) -> HostRequirements {
        let entry = |function, ebx, ecx, edx| kvm_cpuid_entry2 { function, ebx, ecx, edx, ..Default::default() };
        let leaves =
            [entry(0, 0x756e_6547, 0x6c65_746e, 0x4965_6e69), entry(1, 0, ecx1, 1 << 28), entry(7, ebx7, 0, 0)];
        HostRequirements::of(&leaves, Some(2_000_000), None)
    }

    #[test]
    fn what_is_missing_is_named() {
        // pclmulqdq and sse4_2; avx2 and a bit without a name.
        let saved = facts(1 << 1 | 1 << 20, 1 << 5 | 1 << 13);
        assert_eq!(saved.vendor, "GenuineIntel");
        assert!(saved.check_against(&facts(!0, !0), false).is_ok(), "more is no hindrance");
        let error = saved.check_against(&facts(1 << 1, 0), false).unwrap_err().to_string();
        let wanted = "this host lacks CPU features that the guest was given: sse4_2, avx2, CPUID 0x7.0 Ebx bit 13";
        assert_eq!(error, wanted);
        let none = HostRequirements { features: Vec::new(), ..saved.clone() };
        assert_eq!(saved.missing(&none).len(), 4, "and not that there are several vCPUs");
    }

    /// No feature of these registers needs a name, and leaf 0x24 has a version beside the lengths.
    #[test]
    fn features_without_names_are_compared_as_well() {
        let with = |function, index, [ebx, ecx, edx]: [u32; 3]| {
            let vendor = kvm_cpuid_entry2 { ebx: 1, ..Default::default() };
            let entry = kvm_cpuid_entry2 { function, index, ebx, ecx, edx, ..Default::default() };
            HostRequirements::of(&[vendor, entry], None, None)
        };
        for (function, index, bits) in [
            (7, 1, [1 << 4, 0, 0]),
            (7, 1, [0, 1 << 5, 0]),
            (7, 1, [0, 0, 1 << 4]),
            (7, 2, [0, 0, 1 << 4]),
            (0x24, 0, [1 << 18, 0, 0]),
            (0x8000_0021, 0, [0, 1 << 1, 0]),
        ] {
            let (saved, here) = (with(function, index, bits), with(function, index, [0; 3]));
            assert!(here.check_against(&saved, false).is_ok(), "{function:#x}");
            let refused = saved.check_against(&here, false);
            assert!(matches!(refused, Err(HostMismatch::Features { .. })), "{function:#x}.{index}: {refused:?}");
        }
        let version = |version: u32| with(0x24, 0, [version | 1 << 18, 0, 0]);
        assert!(version(1).check_against(&version(2), false).is_ok());
    }

    #[test]
    fn another_vendor_and_another_tsc_are_refused_by_name() {
        let saved = facts(1, 1);
        let amd = HostRequirements { vendor: "AuthenticAMD".into(), ..saved.clone() };
        let error = amd.check_against(&saved, true).unwrap_err().to_string();
        assert_eq!(error, "the guest ran on a CPU of \"AuthenticAMD\", this one is of \"GenuineIntel\"");
        let fast =
            HostRequirements { tsc_khz: Some(3_000_000), kernel: "9.9".into(), clade: "9.9".into(), ..saved.clone() };
        assert!(fast.check_against(&saved, true).is_ok());
        let error = fast.check_against(&saved, false).unwrap_err().to_string();
        assert!(error.contains("3000000 kHz") && error.contains("2000000 kHz"), "{error}");
        let near = HostRequirements { tsc_khz: Some(2_000_400), ..saved.clone() };
        assert!(near.check_against(&saved, false).is_ok());
    }

    #[test]
    fn an_area_of_another_layout_is_refused_by_component() {
        let avx = XsaveComponent { bit: 2, size: 256, offset: 576, flags: 0 };
        let pku = XsaveComponent { bit: 9, size: 8, offset: 2688, flags: 0 };
        let saved = HostRequirements { xsave: vec![avx, pku], ..facts(1, 1) };
        let more = XsaveComponent { bit: 5, size: 64, offset: 1088, flags: 0 };
        let here = HostRequirements { xsave: vec![avx, more, pku], ..saved.clone() };
        assert!(saved.check_against(&here, false).is_ok(), "more is no hindrance");
        let moved = HostRequirements { xsave: vec![avx, XsaveComponent { offset: 832, ..pku }], ..saved.clone() };
        let error = saved.check_against(&moved, false).unwrap_err().to_string();
        let wanted = "the guest's XSAVE area has component 9 as 8 bytes at 2688, this host's has 8 bytes at 832";
        assert_eq!(error, wanted);
        let without = HostRequirements { xsave: vec![avx], ..saved.clone() };
        assert!(saved.check_against(&without, false).unwrap_err().to_string().ends_with("this host's has none"));
    }

    #[test]
    fn a_host_that_is_less_immune_or_smaller_is_refused() {
        // RDCL_NO and MDS_NO; IBRS_ALL.
        let saved = HostRequirements { arch_capabilities: Some(0x21), physical_bits: Some(46), ..facts(1, 1) };
        let with = |caps| HostRequirements { arch_capabilities: caps, ..saved.clone() };
        assert!(saved.check_against(&with(Some(0x23)), false).is_ok(), "more immune is no hindrance");
        for (here, differing) in [(Some(0x01), 0x20), (None, 0x21), (Some(0x25), 0x4)] {
            let error = saved.check_against(&with(here), false).unwrap_err();
            assert!(matches!(error, HostMismatch::ArchCapabilities { differing: d, .. } if d == differing), "{error}");
        }
        assert!(with(None).check_against(&saved, false).is_ok(), "a guest that was told nothing");
        let small = HostRequirements { physical_bits: Some(39), ..saved.clone() };
        let error = saved.check_against(&small, false).unwrap_err().to_string();
        assert_eq!(error, "the guest was given physical addresses of 46 bits, this host has 39");
        assert!(small.check_against(&saved, false).is_ok());
    }

    #[test]
    fn a_host_fits_itself() {
        let Some(host) = host() else { return };
        let facts = HostRequirements::of(
            host.cpuid(1, 2, &CpuHide::none()).unwrap().as_slice(),
            host.tsc_khz().unwrap(),
            host.arch_capabilities().unwrap(),
        );
        facts.check(&host).unwrap();
        assert!(!facts.features.is_empty() && !facts.kernel.is_empty());
        let mut hidden = HostRequirements::here(&host).unwrap();
        hidden.features.iter_mut().for_each(|word| word.bits = 0);
        assert!(!facts.missing(&hidden).is_empty());
        assert!(hidden.missing(&facts).is_empty());
    }
}
