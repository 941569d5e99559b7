//! The CPUID of a vCPU: KVM's supported CPUID without the hidden features, with the vCPU's APIC id
//! and topology.
//!
//! The guest sees one package with one core per vCPU and no hyperthreads, independent of the host.
//! APIC ids are vCPU indices.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::features::{CpuHide, Reg, features};
use super::template::CpuTemplate;

/// Leaf 1 ECX: TSC deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: OSXSAVE. KVM updates it from CR4; it starts clear.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 1 ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the package has more than one logical CPU.
const HTT: u32 = 1 << 28;
/// Leaf 7 ECX: OSPKE. KVM updates it from CR4.
const OSPKE: u32 = 1 << 4;
/// Leaf 0x8000_0001 ECX: the logical CPUs of a package are cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001 ECX: leaves 0x8000_001D and 0x8000_001E are valid.
const TOPOEXT: u32 = 1 << 22;
/// Leaf 0x8000_0008 EBX: FXSAVE and FXRSTOR always handle the x87 error pointers.
const XSAVEERPTR: u32 = 1 << 2;

/// The first leaf that is not basic: the hypervisor range, then the extended range.
const FIRST_OTHER_LEAF: u32 = 0x4000_0000;

const SMT_LEVEL: u32 = 1 << 8;
const CORE_LEVEL: u32 = 2 << 8;

/// Why a CPUID could not be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuidError {
    /// KVM does not report a leaf that every guest needs.
    #[error("KVM reports no CPUID leaf {leaf:#x}")]
    MissingLeaf {
        /// The leaf's number.
        leaf: u32,
    },
    /// The vCPU's index is not below the number of vCPUs.
    #[error("vCPU {vcpu} is not one of {vcpus}")]
    NoSuchVcpu {
        /// The vCPU's index.
        vcpu: u8,
        /// The number of vCPUs of the VM.
        vcpus: u8,
    },
    /// The host lacks features of a template.
    #[error("the CPU template {template} needs {}, which guests cannot have on this host", missing.join(", "))]
    Template {
        /// The template.
        template: CpuTemplate,
        /// The missing features, by their Linux names.
        missing: Vec<&'static str>,
    },
    /// More entries than KVM takes.
    #[error("{entries} CPUID entries are more than KVM takes")]
    TooManyEntries {
        /// The number of entries.
        entries: usize,
    },
}

/// Parameters of a vCPU's CPUID besides the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuidSpec<'a> {
    /// Index of this vCPU, also its APIC id.
    pub vcpu: u8,
    /// The number of vCPUs of the VM.
    pub vcpus: u8,
    /// Features to hide.
    pub hide: &'a CpuHide,
    /// The CPU model that the guest sees.
    pub template: CpuTemplate,
    /// Whether the guest has performance counters.
    pub pmu: bool,
    /// The highest basic leaf that the guest sees.
    pub max_leaf: Option<u32>,
    /// Whether KVM emulates the TSC deadline timer, absent from `KVM_GET_SUPPORTED_CPUID`.
    pub tsc_deadline: bool,
    /// Whether an AMD guest sees XSAVEERPTR even if KVM does not report it.
    pub force_xsaveerptr: bool,
}

impl CpuidSpec<'_> {
    /// The number of APIC id bits that number the cores of the package.
    fn core_bits(&self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    fn get_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.0.iter_mut().find(|e| e.function == leaf && e.index == subleaf)
    }

    fn all_mut(&mut self, leaf: u32) -> impl Iterator<Item = &mut kvm_cpuid_entry2> {
        self.0.iter_mut().filter(move |e| e.function == leaf)
    }

    fn required(&mut self, leaf: u32) -> Result<&mut kvm_cpuid_entry2, CpuidError> {
        self.get_mut(leaf, 0).ok_or(CpuidError::MissingLeaf { leaf })
    }

    /// Whether the extended leaves are AMD's: vendor AMD or Hygon.
    fn is_amd(&self) -> bool {
        let vendor = self.0.iter().find(|e| e.function == 0).map(|e| [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes));
        vendor.is_some_and(|v| matches!(v.as_flattened(), b"AuthenticAMD" | b"HygonGenuine"))
    }
}

/// Builds the CPUID of one vCPU from KVM's supported CPUID.
pub(crate) fn build_cpuid(supported: &CpuId, spec: &CpuidSpec<'_>) -> Result<CpuId, CpuidError> {
    if spec.vcpu >= spec.vcpus {
        return Err(CpuidError::NoSuchVcpu { vcpu: spec.vcpu, vcpus: spec.vcpus });
    }
    let mut leaves = Leaves(supported.as_slice().to_vec());
    let amd = leaves.is_amd();
    // Checked before `hide` applies: a feature hidden by the user is not missing on the host.
    let missing = spec.template.missing(&leaves.0);
    if !missing.is_empty() {
        return Err(CpuidError::Template { template: spec.template, missing });
    }
    spec.template.apply(&mut leaves.0);
    if let Some(max) = spec.max_leaf {
        let highest = leaves.required(0)?;
        highest.eax = highest.eax.min(max);
        leaves.0.retain(|e| e.function <= max || e.function >= FIRST_OTHER_LEAF);
    }
    set_basic(&mut leaves, spec)?;
    set_topology_leaves(&mut leaves, spec)?;
    set_cache_sharing(&mut leaves, spec);
    if amd {
        set_amd_topology(&mut leaves, spec);
    }
    hide(&mut leaves, spec.hide);
    if !spec.pmu {
        hide(&mut leaves, &CpuHide::counters());
        clear(&mut leaves, &PMU_LEAVES);
    }
    if spec.hide.hides("svm") {
        clear(&mut leaves, &[SVM_LEAF]);
    }
    let entries = leaves.0.len();
    CpuId::from_entries(&leaves.0).map_err(|_| CpuidError::TooManyEntries { entries })
}

fn set_basic(leaves: &mut Leaves, spec: &CpuidSpec<'_>) -> Result<(), CpuidError> {
    let leaf = leaves.required(1)?;
    let cores = 1 << spec.core_bits();
    leaf.ebx = leaf.ebx & 0x0000_ffff | u32::from(spec.vcpu) << 24 | cores << 16;
    leaf.ecx = leaf.ecx & !OSXSAVE | HYPERVISOR;
    if spec.tsc_deadline {
        leaf.ecx |= TSC_DEADLINE;
    }
    leaf.edx = if spec.vcpus > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
    if let Some(leaf) = leaves.get_mut(7, 0) {
        leaf.ecx &= !OSPKE;
    }
    Ok(())
}

/// Replaces leaves 0xB and 0x1F, if the highest basic leaf includes them. KVM fills them with the
/// host's topology or with zeros.
fn set_topology_leaves(leaves: &mut Leaves, spec: &CpuidSpec<'_>) -> Result<(), CpuidError> {
    let highest = leaves.required(0)?.eax;
    for function in [0xb, 0x1f] {
        leaves.0.retain(|e| e.function != function);
        if highest < function {
            continue;
        }
        let level = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: ecx | index,
            edx: spec.vcpu.into(),
            ..Default::default()
        };
        leaves.0.extend([
            level(0, 0, 1, SMT_LEVEL),
            level(1, spec.core_bits(), spec.vcpus.into(), CORE_LEVEL),
            level(2, 0, 0, 0),
        ]);
    }
    Ok(())
}

/// Cache leaves 4 (Intel) and 0x8000_001D (AMD): levels 1 and 2 per core, level 3 shared by all.
fn set_cache_sharing(leaves: &mut Leaves, spec: &CpuidSpec<'_>) {
    let cores = (1 << spec.core_bits()) - 1;
    for leaf in [4, 0x8000_001d] {
        for cache in leaves.all_mut(leaf).filter(|e| e.eax & 0x1f != 0) {
            let level = cache.eax >> 5 & 7;
            let sharing = if level >= 3 { cores } else { 0 };
            cache.eax = cache.eax & !(0xfff << 14) | sharing << 14;
            if leaf == 4 {
                cache.eax = cache.eax & !(0x3f << 26) | cores << 26;
            }
        }
    }
}

fn set_amd_topology(leaves: &mut Leaves, spec: &CpuidSpec<'_>) {
    let mut topoext = false;
    if let Some(leaf) = leaves.get_mut(0x8000_0001, 0) {
        topoext = leaf.ecx & TOPOEXT != 0;
        leaf.ecx = if spec.vcpus > 1 { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY };
    }
    if let Some(leaf) = leaves.get_mut(0x8000_0008, 0) {
        leaf.ecx = leaf.ecx & !0xf0ff | spec.core_bits() << 12 | u32::from(spec.vcpus - 1);
        if spec.force_xsaveerptr {
            leaf.ebx |= XSAVEERPTR;
        }
    }
    if topoext && let Some(leaf) = leaves.get_mut(0x8000_001e, 0) {
        // One thread per core, one node per package.
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (spec.vcpu.into(), spec.vcpu.into(), 0, 0);
    }
}

/// Leaves of performance counters: Intel's 0xA and AMD's 0x8000_0022.
const PMU_LEAVES: [u32; 2] = [0xa, 0x8000_0022];
/// Leaf of AMD's SVM features.
const SVM_LEAF: u32 = 0x8000_000a;

fn clear(leaves: &mut Leaves, functions: &[u32]) {
    for function in functions {
        leaves.all_mut(*function).for_each(|e| (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0));
    }
}

/// The XSAVE state components of a feature, as XCR0 bits of leaf 0xD.
const STATE_COMPONENTS: [(&str, u64); 5] =
    [("avx", 1 << 2), ("mpx", 0b11 << 3), ("avx512f", 0b111 << 5), ("pku", 1 << 9), ("amx_tile", 0b11 << 17)];

fn hide(leaves: &mut Leaves, hide: &CpuHide) {
    for feature in features().filter(|f| hide.hides(f.name)) {
        if let Some(leaf) = leaves.get_mut(feature.leaf, feature.subleaf) {
            let register = match feature.reg {
                Reg::Eax => &mut leaf.eax,
                Reg::Ebx => &mut leaf.ebx,
                Reg::Ecx => &mut leaf.ecx,
                Reg::Edx => &mut leaf.edx,
            };
            *register &= !(1 << feature.bit);
        }
    }
    let everything = hide.hides("xsave");
    let hidden = STATE_COMPONENTS.iter().filter(|(name, _)| hide.hides(name)).fold(0, |bits, (_, c)| bits | c);
    for leaf in leaves.all_mut(0xd) {
        let component = 1_u64.checked_shl(leaf.index).filter(|_| leaf.index >= 2).unwrap_or(0);
        if everything || component & hidden != 0 {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        } else if leaf.index == 0 {
            leaf.eax &= !(hidden as u32);
            leaf.edx &= !((hidden >> 32) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn vendor(name: &[u8; 12]) -> [u32; 4] {
        let part = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        [0x1f, part(0), part(8), part(4)]
    }

    fn supported(name: &[u8; 12]) -> CpuId {
        let l1 = 1 | 1 << 5 | 3 << 14;
        let l3 = 3 | 3 << 5 | 15 << 14;
        CpuId::from_entries(&[
            entry(0, 0, vendor(name)),
            entry(1, 0, [0xa20f10, 0x0710_0800, u32::MAX, u32::MAX]),
            entry(4, 0, [l1, 0, 0, 0]),
            entry(4, 3, [l3, 0, 0, 0]),
            entry(7, 0, [1, u32::MAX, u32::MAX, u32::MAX]),
            entry(0xa, 0, [0x0730_0402, 0, 0, 0x603]),
            entry(0xb, 0, [1, 2, 0x100, 7]),
            entry(0xd, 0, [0xe7, 1000, 1000, 0]),
            entry(0xd, 1, [0xf, 1000, 0, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(0xd, 5, [64, 832, 0, 0]),
            entry(0x4000_0001, 0, [u32::MAX, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, !2, u32::MAX]),
            entry(0x8000_0008, 0, [0x3030, 0, 0x703f, 0]),
            entry(0x8000_000a, 0, [1, 8, 0, 0xff]),
            entry(0x8000_0022, 0, [1, 6, 0, 0]),
            entry(0x8000_001d, 3, [l3, 0, 0, 0]),
            entry(0x8000_001e, 0, [7, 7, 7, 0]),
        ])
        .unwrap()
    }

    fn spec(vcpu: u8, vcpus: u8, hide: &CpuHide) -> CpuidSpec<'_> {
        CpuidSpec {
            vcpu,
            vcpus,
            hide,
            template: CpuTemplate::Host,
            pmu: false,
            max_leaf: None,
            tsc_deadline: true,
            force_xsaveerptr: false,
        }
    }

    fn find(cpuid: &CpuId, leaf: u32, subleaf: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == leaf && e.index == subleaf).unwrap()
    }

    #[test]
    fn every_leaf_agrees_on_the_apic_id_and_the_core_count() {
        for (vcpus, bits) in [(1_u8, 0_u32), (2, 1), (3, 2), (4, 2), (5, 3), (32, 5)] {
            for vcpu in 0..vcpus {
                let cpuid = build_cpuid(&supported(b"AuthenticAMD"), &spec(vcpu, vcpus, &CpuHide::none())).unwrap();
                let id = u32::from(vcpu);
                assert_eq!(find(&cpuid, 1, 0).ebx >> 24, id);
                assert_eq!(find(&cpuid, 1, 0).ebx >> 16 & 0xff, 1 << bits);
                assert_eq!(find(&cpuid, 1, 0).ebx & 0xffff, 0x0800, "the rest of EBX is KVM's");
                assert_eq!(find(&cpuid, 1, 0).edx & HTT != 0, vcpus > 1);
                for leaf in [0xb, 0x1f] {
                    assert_eq!(find(&cpuid, leaf, 0).edx, id);
                    assert_eq!(find(&cpuid, leaf, 0).ecx, 0x100);
                    let core = find(&cpuid, leaf, 1);
                    assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (bits, vcpus.into(), 0x201, id));
                }
                let amd = find(&cpuid, 0x8000_0008, 0).ecx;
                assert_eq!((amd & 0xff, amd >> 12 & 0xf), (u32::from(vcpus) - 1, bits));
                assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, id);
                assert_eq!(find(&cpuid, 0x8000_001d, 3).eax >> 14 & 0xfff, (1 << bits) - 1);
                assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx & CMP_LEGACY != 0, vcpus > 1);
            }
        }
    }

    #[test]
    fn intel_leaf_4_counts_cores_and_amd_leaves_stay() {
        let cpuid = build_cpuid(&supported(b"GenuineIntel"), &spec(1, 3, &CpuHide::none())).unwrap();
        let (l1, l3) = (find(&cpuid, 4, 0).eax, find(&cpuid, 4, 3).eax);
        assert_eq!((l1 >> 26, l1 >> 14 & 0xfff), (3, 0));
        assert_eq!((l3 >> 26, l3 >> 14 & 0xfff), (3, 3));
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 0x703f);
    }

    #[test]
    fn identity_bits() {
        let cpuid = build_cpuid(&supported(b"GenuineIntel"), &spec(0, 1, &CpuHide::none())).unwrap();
        let ecx = find(&cpuid, 1, 0).ecx;
        assert_eq!(ecx & (HYPERVISOR | TSC_DEADLINE | OSXSAVE), HYPERVISOR | TSC_DEADLINE);
        assert_eq!(find(&cpuid, 7, 0).ecx & OSPKE, 0);
    }

    #[test]
    fn hidden_features_are_gone_with_their_state() {
        let hide: CpuHide = "avx512f,kvm_pv_ipi,fsgsbase,kvm_clock".parse().unwrap();
        let cpuid = build_cpuid(&supported(b"AuthenticAMD"), &spec(0, 1, &hide)).unwrap();
        assert_eq!(find(&cpuid, 7, 0).ebx & (1 | 1 << 16 | 1 << 31), 0);
        assert_eq!(find(&cpuid, 0x4000_0001, 0).eax & (1 << 11 | 1 | 1 << 3), 0);
        assert_eq!(find(&cpuid, 0xd, 0).eax, 0x07, "x87, SSE and AVX remain");
        assert_eq!(find(&cpuid, 0xd, 5).eax, 0);
        assert_eq!(find(&cpuid, 0xd, 2).eax, 256);
        let none: CpuHide = "xsave".parse().unwrap();
        let cpuid = build_cpuid(&supported(b"AuthenticAMD"), &spec(0, 1, &none)).unwrap();
        assert!(cpuid.as_slice().iter().filter(|e| e.function == 0xd).all(|e| e.eax | e.ebx | e.ecx | e.edx == 0));
    }

    #[test]
    fn there_are_no_performance_counters_unless_asked_for() {
        let hide = CpuHide::none();
        let with = |pmu| build_cpuid(&supported(b"GenuineIntel"), &CpuidSpec { pmu, ..spec(0, 1, &hide) }).unwrap();
        let (without, with) = (with(false), with(true));
        for leaf in PMU_LEAVES {
            let of = |cpuid| find(cpuid, leaf, 0);
            assert_eq!([of(&without).eax, of(&without).ebx, of(&without).edx], [0; 3], "{leaf:#x}");
            assert_ne!(of(&with).eax, 0, "{leaf:#x}");
        }
        assert_eq!(find(&without, 1, 0).ecx & 1 << 15, 0, "PDCM");
        assert_ne!(find(&with, 1, 0).ecx & 1 << 15, 0);
        assert_eq!(find(&without, 0x8000_0001, 0).ecx & (1 << 23 | 1 << 24 | 1 << 28), 0);
    }

    #[test]
    fn nested_virtualization_hides_with_its_leaf() {
        let cpuid = build_cpuid(&supported(b"AuthenticAMD"), &spec(0, 1, &CpuHide::unsaved())).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ecx & (1 << 5 | 1 << 6), 0);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx & 1 << 2, 0);
        assert_eq!(find(&cpuid, SVM_LEAF, 0).edx, 0);
    }

    #[test]
    fn no_guest_has_shadow_stacks() {
        const SHADOW_STACKS: u32 = 1 << 7;
        let of = |hide: &CpuHide| build_cpuid(&supported(b"GenuineIntel"), &spec(0, 1, hide)).unwrap();
        let ecx = |hide: &CpuHide| find(&of(hide), 7, 0).ecx & SHADOW_STACKS;
        assert_eq!((ecx(&CpuHide::none()), ecx(&CpuHide::unsaved())), (SHADOW_STACKS, 0));
    }

    #[test]
    fn a_template_hides_what_it_does_not_name() {
        let hide = CpuHide::none();
        let with = |template| build_cpuid(&supported(b"GenuineIntel"), &CpuidSpec { template, ..spec(1, 2, &hide) });
        let cpuid = with(CpuTemplate::V2).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ecx & (1 << 28 | 1 << 26), 0, "no AVX, no XSAVE");
        assert_eq!(find(&cpuid, 1, 0).ecx & (1 << 23 | HYPERVISOR), 1 << 23 | HYPERVISOR);
        assert_eq!(find(&cpuid, 1, 0).ebx >> 24, 1, "and the vCPU's place as ever");
        assert_eq!(find(&cpuid, 0xb, 1).ebx, 2);
        let mut poor = supported(b"GenuineIntel");
        poor.as_mut_slice().iter_mut().filter(|e| e.function == 7).for_each(|e| e.ebx = 0);
        let error = build_cpuid(&poor, &CpuidSpec { template: CpuTemplate::V3, ..spec(0, 1, &hide) }).unwrap_err();
        let text =
            "the CPU template x86-64-v3 needs avx2, bmi1, bmi2, fsgsbase, smep, which guests cannot have on this host";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn leaves_past_the_highest_are_gone() {
        let hide = CpuHide::none();
        let cpuid = build_cpuid(&supported(b"AuthenticAMD"), &CpuidSpec { max_leaf: Some(6), ..spec(0, 2, &hide) });
        let cpuid = cpuid.unwrap();
        assert_eq!(find(&cpuid, 0, 0).eax, 6);
        assert!(cpuid.as_slice().iter().all(|e| e.function <= 6 || e.function >= 0x4000_0000));
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx & 0xff, 1);
    }

    #[test]
    fn xsaveerptr_is_forced_on_amd_alone() {
        let forced = |name| {
            let hide = CpuHide::none();
            let spec = CpuidSpec { force_xsaveerptr: true, ..spec(0, 1, &hide) };
            find(&build_cpuid(&supported(name), &spec).unwrap(), 0x8000_0008, 0).ebx & XSAVEERPTR != 0
        };
        assert!(forced(b"AuthenticAMD"));
        assert!(!forced(b"GenuineIntel"));
    }

    #[test]
    fn refusals() {
        let hide = CpuHide::none();
        let error = build_cpuid(&supported(b"GenuineIntel"), &spec(2, 2, &hide)).unwrap_err();
        assert_eq!(error.to_string(), "vCPU 2 is not one of 2");
        let empty = CpuId::from_entries(&[]).unwrap();
        assert_eq!(build_cpuid(&empty, &spec(0, 1, &hide)), Err(CpuidError::MissingLeaf { leaf: 1 }));
    }
}
