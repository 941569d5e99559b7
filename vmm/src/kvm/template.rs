//! CPU templates: named baselines of CPUID and MSRs, so that a snapshot can move between hosts of
//! one vendor.
//!
//! The templates are the levels of the x86-64 psABI. A host that lacks features of the level is
//! refused, with their names. In addition to the level, guests have:
//!
//! - features of virtualization itself: x2APIC, the TSC deadline timer, the hypervisor's leaves;
//! - the host's mitigations of speculative execution, which a guest must not lose for the sake of
//!   mobility. A snapshot records that it needs them.
//!
//! Everything else is hidden, including model-specific leaves and MSRs. The processor's signature,
//! caches and name stay the host's: a guest reads them at boot, and a restored guest keeps those
//! values.

use std::fmt;
use std::str::FromStr;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::features::{Feature, Reg, features};

/// The CPU model that a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub enum CpuTemplate {
    /// The host's model, as far as KVM supports it for guests. A snapshot needs a host with all of
    /// its features.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// x86-64-v1: any x86-64 processor.
    #[serde(rename = "x86-64-v1")]
    V1,
    /// x86-64-v2: v1 with SSE4.2, POPCNT and CMPXCHG16B.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// x86-64-v3: v2 with AVX2, BMI2 and FMA.
    #[serde(rename = "x86-64-v3")]
    V3,
}

/// Every template, by name.
const NAMES: [(CpuTemplate, &str); 4] = [
    (CpuTemplate::Host, "host"),
    (CpuTemplate::V1, "x86-64-v1"),
    (CpuTemplate::V2, "x86-64-v2"),
    (CpuTemplate::V3, "x86-64-v3"),
];

/// The name of an unknown CPU template.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unknown CPU template {name:?}: there are host, x86-64-v1, x86-64-v2 and x86-64-v3")]
pub struct UnknownTemplate {
    /// The name as given.
    pub name: String,
}

impl fmt::Display for CpuTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.iter().find(|(template, _)| template == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for CpuTemplate {
    type Err = UnknownTemplate;

    fn from_str(name: &str) -> Result<Self, UnknownTemplate> {
        let found = NAMES.iter().find(|(_, known)| *known == name);
        found.map(|(template, _)| *template).ok_or_else(|| UnknownTemplate { name: name.to_owned() })
    }
}

/// Bits of a CPUID register that the kernel's list does not name, because every x86-64 processor
/// has them.
struct Always {
    leaf: u32,
    reg: Reg,
    bits: u32,
}

const ALWAYS: [Always; 2] = [
    // FPU, MSR, PAE, CX8, PGE, CMOV, FXSR, SSE, SSE2, HTT.
    Always { leaf: 1, reg: Reg::Edx, bits: 1 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 13 | 1 << 15 | 7 << 24 | 1 << 28 },
    // AMD's copy of the above, and SYSCALL, NX, LM.
    Always { leaf: 0x8000_0001, reg: Reg::Edx, bits: 0x0183_f3ff | 1 << 11 | 1 << 20 | 1 << 29 },
];

const V1: &[&str] =
    &["vme", "de", "pse", "tsc", "apic", "sep", "mtrr", "pat", "pse36", "clflush", "mmx", "mce", "mca", "fxsr_opt"];
const V2: &[&str] =
    &["pni", "ssse3", "cx16", "sse4_1", "sse4_2", "popcnt", "lahf_lm", "pclmulqdq", "aes", "rdtscp", "3dnowprefetch"];
const V3: &[&str] = &[
    "fma", "movbe", "xsave", "osxsave", "avx", "f16c", "avx2", "bmi1", "bmi2", "abm", "fsgsbase", "rdrand", "smep",
    "pdpe1gb",
];

/// Features that a guest has under every template if the host has them: those of virtualization,
/// and the controls of speculative execution. These are controls, not properties of a model.
/// `arch_capabilities`, in which a host describes itself, is hidden.
const OPTIONAL: &[&str] = &[
    "x2apic",
    "tsc_deadline_timer",
    "hypervisor",
    "arat",
    "tsc_adjust",
    "constant_tsc",
    "cmp_legacy",
    "xsaveerptr",
    "fxsr_opt",
    "md_clear",
    "spec_ctrl",
    "intel_stibp",
    "flush_l1d",
    "spec_ctrl_ssbd",
    "ibpb",
    "ibrs",
    "stibp",
    "amd_ssbd",
    "virt_ssbd",
];

/// Leaves of feature bits, masked bit by bit. A template keeps or drops most other leaves whole.
const FEATURE_LEAVES: [u32; 6] = [1, 7, 0x8000_0001, 0x8000_0007, 0x8000_0008, 0x8000_0021];
/// The highest basic and extended leaves of a template. Beyond are performance counters, enclaves,
/// tracing, tiles.
const MAX_LEAF: u32 = 0xd;
const MAX_EXTENDED_LEAF: u32 = 0x8000_0008;
/// First leaves of the hypervisor range and of the extended range.
const HYPERVISOR_LEAVES: u32 = 0x4000_0000;
const EXTENDED_LEAVES: u32 = 0x8000_0000;
/// Leaf 0xD: the components x87, SSE and AVX, and the bytes of their area: legacy region, header,
/// upper halves of the AVX registers.
const AVX_COMPONENTS: u32 = 7;
const AVX_AREA: u32 = 512 + 64 + 256;
/// Model-specific leaves, such as those of MONITOR, power and performance counters.
const MODEL_LEAVES: [u32; 5] = [2, 5, 9, 0xa, 0xc];

fn register(entry: &mut kvm_cpuid_entry2, reg: Reg) -> &mut u32 {
    match reg {
        Reg::Eax => &mut entry.eax,
        Reg::Ebx => &mut entry.ebx,
        Reg::Ecx => &mut entry.ecx,
        Reg::Edx => &mut entry.edx,
    }
}

fn value(entry: &kvm_cpuid_entry2, reg: Reg) -> u32 {
    *register(&mut entry.clone(), reg)
}

impl CpuTemplate {
    /// The features that the template requires of a host and gives to a guest.
    fn required(self) -> impl Iterator<Item = &'static str> {
        let levels: &[&[&str]] = match self {
            Self::Host => &[],
            Self::V1 => &[V1],
            Self::V2 => &[V1, V2],
            Self::V3 => &[V1, V2, V3],
        };
        levels.iter().flat_map(|level| level.iter().copied())
    }

    fn allows(self, feature: &Feature) -> bool {
        self.required().chain(OPTIONAL.iter().copied()).any(|name| name == feature.name)
    }

    /// The required features that `leaves` lack.
    pub(super) fn missing(self, leaves: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
        let has = |feature: &Feature| {
            let entry = leaves.iter().find(|entry| entry.function == feature.leaf && entry.index == feature.subleaf);
            entry.is_some_and(|entry| value(entry, feature.reg) & 1 << feature.bit != 0)
        };
        // OSXSAVE follows CR4. Some vendors lack fxsr_opt, or do not report machine checks.
        let told = |name: &&str| !["osxsave", "fxsr_opt", "mce", "mca"].contains(name);
        let lacks = |name: &&str| !features().filter(|feature| feature.name == *name).any(|feature| has(&feature));
        self.required().filter(told).filter(lacks).collect()
    }

    /// Removes features outside the template from `leaves`.
    pub(super) fn apply(self, leaves: &mut Vec<kvm_cpuid_entry2>) {
        if self == Self::Host {
            return;
        }
        leaves.retain(|entry| match entry.function {
            function if function < HYPERVISOR_LEAVES => function <= MAX_LEAF && !MODEL_LEAVES.contains(&function),
            function if function < EXTENDED_LEAVES => true,
            function => function <= MAX_EXTENDED_LEAF,
        });
        for entry in leaves.iter_mut() {
            match entry.function {
                0 => entry.eax = entry.eax.min(MAX_LEAF),
                EXTENDED_LEAVES => entry.eax = entry.eax.min(MAX_EXTENDED_LEAF),
                0xd => self.set_state_components(entry),
                leaf if FEATURE_LEAVES.contains(&leaf) => self.mask(entry),
                _ => {}
            }
        }
    }

    fn mask(self, entry: &mut kvm_cpuid_entry2) {
        // Registers of these leaves without feature bits: signature, brand and ids in leaf 1, sizes
        // in 0x8000_0008. EAX of leaf 7, the number of subleaves, becomes 0.
        let plain = match entry.function {
            1 => [Reg::Eax, Reg::Ebx].as_slice(),
            0x8000_0001 => &[Reg::Eax, Reg::Ebx],
            0x8000_0008 => &[Reg::Eax, Reg::Ecx],
            _ => &[],
        };
        for reg in [Reg::Eax, Reg::Ebx, Reg::Ecx, Reg::Edx] {
            if plain.contains(&reg) {
                continue;
            }
            let here = |leaf: u32, subleaf: u32, of: Reg| leaf == entry.function && subleaf == entry.index && of == reg;
            let named = features().filter(|f| here(f.leaf, f.subleaf, f.reg) && self.allows(f));
            let always = ALWAYS.iter().filter(|always| here(always.leaf, 0, always.reg));
            let keep =
                named.map(|f| 1 << f.bit).chain(always.map(|always| always.bits)).fold(0, |all, bits| all | bits);
            *register(entry, reg) &= keep;
        }
    }

    fn set_state_components(self, entry: &mut kvm_cpuid_entry2) {
        let [eax, ebx, ecx, edx] = match (self, entry.index) {
            (Self::V3, 0) => [AVX_COMPONENTS, AVX_AREA, AVX_AREA, 0],
            (Self::V3, 2) => [entry.eax, entry.ebx, entry.ecx, entry.edx],
            _ => [0; 4],
        };
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (eax, ebx, ecx, edx);
    }

    /// Whether a guest of this template has MSR `index`: MSRs defined by the architecture or the
    /// hypervisor, but no model-specific ones.
    pub(super) fn has_msr(self, index: u32) -> bool {
        match index {
            _ if self == Self::Host => true,
            // TSC, APIC base, speculation control, CPUID faulting, SYSENTER, machine check, MISC_ENABLE,
            // page attributes.
            0x10 | 0x1b | 0x3b | 0x48 | 0x49 | 0x10b | 0x140 | 0x174..=0x176 | 0x179..=0x17b | 0x1a0 | 0x277 => true,
            // MTRRs.
            0xfe | 0x200..=0x20f | 0x250 | 0x258 | 0x259 | 0x268..=0x26f | 0x2ff => true,
            // Machine check banks.
            0x400..=0x47f => true,
            // Deadline, x2APIC.
            0x6e0 | 0x800..=0x8ff => true,
            // The hypervisor's.
            0x11 | 0x12 | 0x4000_0000..=0x4000_0fff | 0x4b56_4d00..=0x4b56_4dff => true,
            // EFER, STAR, LSTAR, CSTAR, FMASK, FS and GS bases, TSC_AUX.
            0xc000_0080..=0xc000_0084 | 0xc000_0100..=0xc000_0103 => true,
            // AMD: SYSCFG, HWCR, and VIRT_SPEC_CTRL, which switches SSBD.
            0xc001_0010 | 0xc001_0015 | 0xc001_011f => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A host with every feature bit set, known or unknown, and a `model` of its own.
    fn rich(model: u32) -> Vec<kvm_cpuid_entry2> {
        let all = u32::MAX;
        let mut leaves = vec![
            entry(0, 0, [0x20, 1, 2, 3]),
            entry(1, 0, [model, 0, all, all]),
            entry(2, 0, [model, 0, 0, 0]),
            entry(4, 0, [model, 0, 0, 0]),
            entry(7, 0, [2, all, all, all]),
            entry(7, 1, [all, all, all, all]),
            entry(0xa, 0, [model; 4]),
            entry(0xd, 0, [0x2e7, 2696, 2696, 0]),
            entry(0xd, 1, [0x1f, 2696, 0, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(0xd, 5, [64, 1088, 0, 0]),
            entry(0x14, 0, [all; 4]),
            entry(0x4000_0001, 0, [all, 0, 0, 0]),
            entry(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]),
            entry(0x8000_0001, 0, [model, 0, all, all]),
            entry(0x8000_0008, 0, [0x3030, all, 0x7000, all]),
            entry(0x8000_0021, 0, [all; 4]),
        ];
        leaves.iter_mut().for_each(|leaf| leaf.flags = 0);
        leaves
    }

    /// A host with the features of `template`, the optional ones, and no others.
    fn poor(template: CpuTemplate, model: u32) -> Vec<kvm_cpuid_entry2> {
        let mut leaves = rich(model);
        template.apply(&mut leaves);
        leaves
    }

    #[test]
    fn names_go_both_ways() {
        for (template, name) in NAMES {
            assert_eq!(name.parse::<CpuTemplate>().unwrap(), template);
            assert_eq!(template.to_string(), name);
            assert_eq!(serde_json::to_string(&template).unwrap(), format!("{name:?}"));
        }
        let error = "haswell".parse::<CpuTemplate>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown CPU template \"haswell\": there are host, x86-64-v1, x86-64-v2 and x86-64-v3"
        );
    }

    #[test]
    fn every_name_in_the_levels_is_a_features() {
        let known: Vec<&str> = features().map(|feature| feature.name).collect();
        for name in CpuTemplate::V3.required().chain(OPTIONAL.iter().copied()) {
            assert!(known.contains(&name), "{name}");
        }
    }

    #[test]
    fn hosts_of_one_vendor_give_the_same_features() {
        for template in [CpuTemplate::V1, CpuTemplate::V2, CpuTemplate::V3] {
            let (mut new, mut old) = (rich(0xa0f10), poor(template, 0x800f12));
            assert_eq!(template.missing(&old), [""; 0], "{template}");
            template.apply(&mut new);
            template.apply(&mut old);
            let features = |leaves: &[kvm_cpuid_entry2]| -> Vec<_> {
                let of = |e: &kvm_cpuid_entry2| [value(e, Reg::Ebx), value(e, Reg::Ecx), value(e, Reg::Edx)];
                leaves.iter().filter(|e| e.function != 4).map(|e| (e.function, e.index, of(e))).collect()
            };
            assert_eq!(features(&new), features(&old), "{template}");
        }
    }

    #[test]
    fn a_level_has_what_it_names_and_no_more() {
        let has = |leaves: &[kvm_cpuid_entry2], name: &str| {
            features().filter(|f| f.name == name).any(|f| {
                let entry = leaves.iter().find(|e| e.function == f.leaf && e.index == f.subleaf);
                entry.is_some_and(|entry| value(entry, f.reg) & 1 << f.bit != 0)
            })
        };
        let v2 = poor(CpuTemplate::V2, 1);
        assert!(["sse4_2", "popcnt", "aes", "tsc_deadline_timer", "spec_ctrl"].iter().all(|name| has(&v2, name)));
        assert!(!["avx", "xsave", "avx512f", "arch_capabilities", "gfni", "svm"].iter().any(|name| has(&v2, name)));
        assert!(v2.iter().filter(|e| e.function == 0xd).all(|e| (e.eax, e.ebx, e.ecx, e.edx) == (0, 0, 0, 0)));
        let v3 = poor(CpuTemplate::V3, 1);
        assert!(["avx2", "xsave", "bmi2", "rdrand"].iter().all(|name| has(&v3, name)));
        assert!(!["avx512f", "xsaves", "sha_ni", "pku"].iter().any(|name| has(&v3, name)));
        let area = v3.iter().find(|e| (e.function, e.index) == (0xd, 0)).unwrap();
        assert_eq!((area.eax, area.ebx, area.ecx), (7, 832, 832));
        assert!(
            v3.iter().all(|e| !MODEL_LEAVES.contains(&e.function) && e.function != 0x14 && e.function != 0x8000_0021)
        );
        assert_eq!((v3[0].eax, v3.iter().find(|e| e.function == 0x8000_0000).unwrap().eax), (0xd, 0x8000_0008));
        let one = v3.iter().find(|e| e.function == 1).unwrap();
        assert_eq!(one.edx & ALWAYS[0].bits, ALWAYS[0].bits, "SSE2 is not lost for having no name here");
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let v2 = poor(CpuTemplate::V2, 1);
        assert_eq!(CpuTemplate::V2.missing(&v2), [""; 0]);
        let missing = CpuTemplate::V3.missing(&v2);
        assert!(missing.contains(&"avx2") && missing.contains(&"fma") && !missing.contains(&"sse4_2"), "{missing:?}");
        assert_eq!(CpuTemplate::Host.missing(&[]), [""; 0]);
    }

    #[test]
    fn a_models_own_msrs_are_not_a_templates() {
        // TSC, LSTAR, the KVM clock, MTRR default; platform information, ARCH_CAPABILITIES, a
        // performance counter.
        for (index, has) in [
            (0x10, true),
            (0xc000_0082, true),
            (0x4b56_4d01, true),
            (0x2ff, true),
            (0xce, false),
            (0x10a, false),
            (0xc1, false),
        ] {
            assert_eq!(CpuTemplate::V2.has_msr(index), has, "{index:#x}");
            assert!(CpuTemplate::Host.has_msr(index));
        }
    }
}
