//! `/dev/kvm`: opening it, and checking its API version and capabilities.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE, KVMIO, kvm_enable_cap, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::cpuid::{CpuidError, CpuidSpec, build_cpuid};
use super::features::CpuHide;
use super::msrs::{ARCH_CAPABILITIES, MsrError, MsrSet, read_one};
use super::quirks::{QuirkError, Quirks};
use super::requirements::HostRequirements;
use super::template::CpuTemplate;
use crate::platform::MAX_CPUS;

/// The path of the device.
pub(crate) const KVM_PATH: &str = "/dev/kvm";

/// Why this host cannot run VMs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The device does not exist.
    #[error("{} is missing: is the kvm module loaded, and virtualization enabled?", path.display())]
    Missing {
        /// The device's path.
        path: PathBuf,
    },
    /// The user has no permission to open the device.
    #[error("no permission to open {}: is this user in its group?", path.display())]
    Permission {
        /// The device's path.
        path: PathBuf,
    },
    /// The device could not be opened for another reason.
    #[error("cannot open {}", path.display())]
    Open {
        /// The device's path.
        path: PathBuf,
        /// The error of opening it.
        #[source]
        source: io::Error,
    },
    /// The device is not KVM, or has an unknown version of its API.
    #[error("{} speaks KVM API version {found}, {KVM_API_VERSION} is needed", path.display())]
    ApiVersion {
        /// The device's path.
        path: PathBuf,
        /// The version; -1 when the device is not KVM at all.
        found: i32,
    },
    /// KVM lacks a capability.
    #[error("this host's KVM lacks {name}")]
    MissingCapability {
        /// The kernel's name of the capability.
        name: &'static str,
    },
    /// More vCPUs than KVM supports.
    #[error("{asked} vCPUs, but this host does at most {max}")]
    TooManyVcpus {
        /// The number of vCPUs requested.
        asked: u8,
        /// The most vCPUs that KVM supports.
        max: u8,
    },
    /// A KVM ioctl failed.
    #[error("{what} failed")]
    Ioctl {
        /// The ioctl.
        what: &'static str,
        /// The ioctl's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The quirks could not be detected.
    #[error(transparent)]
    Quirks(#[from] QuirkError),
    /// A vCPU's CPUID could not be built.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// The MSRs of a vCPU's state could not be listed.
    #[error(transparent)]
    Msrs(#[from] MsrError),
}

/// The capabilities that a VM needs, with their names.
const REQUIRED: [(Cap, &str); 14] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// Attempts at `KVM_CREATE_VM` that may fail with EINTR. The second has always succeeded.
const CREATE_TRIES: usize = 100;

/// The choices that a vCPU's CPUID depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuConfig<'a> {
    /// Features to hide, in addition to those hidden from every guest.
    pub hide: &'a CpuHide,
    /// The CPU model that the guest sees.
    pub template: CpuTemplate,
    /// Whether the vCPU has performance counters.
    pub pmu: bool,
}

/// Host properties that only a vCPU shows.
#[derive(Debug)]
struct Probed {
    msrs: MsrSet,
    tsc_khz: Option<u32>,
    arch_capabilities: Option<u64>,
}

/// An opened and checked `/dev/kvm`.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    quirks: Quirks,
    /// Features that the quirks hide from every guest.
    hidden: CpuHide,
    supported: CpuId,
    max_vcpus: u8,
    /// Whether the events of its VMs show pending triple faults: not on kernels before 6.0.
    pub(super) shows_triple_faults: bool,
    /// Properties of a vCPU without (index 0) and with (1) performance counters.
    probed: [OnceLock<Probed>; 2],
    /// Requirements of a guest with all features of this host.
    requirements: OnceLock<HostRequirements>,
}

impl Host {
    /// The requirements of a guest with all features of this host. Determined once.
    ///
    /// # Errors
    /// When the host's properties cannot be determined.
    pub fn requirements(&self) -> Result<&HostRequirements, HostError> {
        if let Some(known) = self.requirements.get() {
            return Ok(known);
        }
        let here = HostRequirements::here(self)?;
        Ok(self.requirements.get_or_init(|| here))
    }

    /// Opens `/dev/kvm`, checks it and detects its quirks.
    ///
    /// # Errors
    /// When the device is missing, or lacks a feature that a VM needs.
    pub fn open() -> Result<Self, HostError> {
        Self::open_at(Path::new(KVM_PATH))
    }

    /// Opens `path`, checks it and detects its quirks.
    pub(crate) fn open_at(path: &Path) -> Result<Self, HostError> {
        let kvm = open_device(path)?;
        let found = kvm.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(HostError::ApiVersion { path: path.to_owned(), found });
        }
        if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(HostError::MissingCapability { name });
        }
        let quirks = Quirks::detect()?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| HostError::Ioctl { what: "KVM_GET_SUPPORTED_CPUID", source })?;
        let max_vcpus = u8::try_from(kvm.get_max_vcpus()).unwrap_or(u8::MAX).min(MAX_CPUS);
        let shows_triple_faults = kvm.check_extension_raw(KVM_CAP_X86_TRIPLE_FAULT_EVENT.into()) > 0;
        let (hidden, probed, requirements) = (quirks.hide(), Default::default(), OnceLock::new());
        Ok(Self { kvm, quirks, hidden, supported, max_vcpus, shows_triple_faults, probed, requirements })
    }

    /// The opened device.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The quirks of this KVM.
    #[must_use]
    pub fn quirks(&self) -> Quirks {
        self.quirks
    }

    /// The most vCPUs a VM may have.
    #[must_use]
    pub fn max_vcpus(&self) -> u8 {
        self.max_vcpus
    }

    /// Whether a guest's TSC frequency can differ from the host's (`KVM_CAP_TSC_CONTROL`).
    #[must_use]
    pub fn has_tsc_control(&self) -> bool {
        self.kvm.check_extension(Cap::TscControl)
    }

    /// Whether the PICs and the IOAPIC can be in userspace while the local APICs stay in KVM.
    #[must_use]
    pub(crate) fn has_split_irqchip(&self) -> bool {
        self.kvm.check_extension(Cap::SplitIrqchip)
    }

    /// Whether the XSAVE area may be larger than 4096 bytes.
    #[must_use]
    pub fn has_xsave2(&self) -> bool {
        self.kvm.check_extension_int(Cap::Xsave2) > 0
    }

    /// Size of a vCPU's XSAVE area in bytes.
    #[must_use]
    pub fn xsave_size(&self) -> usize {
        let size = usize::try_from(self.kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        size.max(size_of::<kvm_xsave>())
    }

    /// The CPUID of vCPU `vcpu` of `vcpus`, without the features hidden by `hide` and the host's
    /// quirks.
    pub fn cpuid(&self, vcpu: u8, vcpus: u8, hide: &CpuHide) -> Result<CpuId, HostError> {
        self.cpuid_of(vcpu, vcpus, &CpuConfig { hide, template: CpuTemplate::Host, pmu: false })
    }

    /// The CPUID of vCPU `vcpu` of `vcpus` with the choices in `cpu_config`. Nested virtualization and
    /// shadow stacks are always hidden.
    pub(crate) fn cpuid_of(&self, vcpu: u8, vcpus: u8, cpu_config: &CpuConfig<'_>) -> Result<CpuId, HostError> {
        self.build(vcpu, vcpus, &CpuConfig { hide: &cpu_config.hide.union(&CpuHide::unsaved()), ..*cpu_config })
    }

    /// The CPUID with all features that a vCPU can have here. It includes those hidden by default,
    /// because an older state may have them.
    pub(super) fn cpuid_at_most(&self) -> Result<CpuId, HostError> {
        self.build(0, 1, &CpuConfig { hide: &CpuHide::none(), template: CpuTemplate::Host, pmu: true })
    }

    fn build(&self, vcpu: u8, vcpus: u8, cpu_config: &CpuConfig<'_>) -> Result<CpuId, HostError> {
        if vcpus > self.max_vcpus {
            return Err(HostError::TooManyVcpus { asked: vcpus, max: self.max_vcpus });
        }
        let spec = CpuidSpec {
            vcpu,
            vcpus,
            hide: &cpu_config.hide.union(&self.hidden),
            template: cpu_config.template,
            pmu: cpu_config.pmu,
            max_leaf: self.quirks.max_leaf(),
            tsc_deadline: self.kvm.check_extension(Cap::TscDeadlineTimer),
            force_xsaveerptr: self.quirks.forces_xsaveerptr(),
        };
        Ok(build_cpuid(&self.supported, &spec)?)
    }

    /// The MSRs of a vCPU's state without performance counters.
    ///
    /// # Errors
    /// When they cannot be probed.
    pub fn msrs(&self) -> Result<&MsrSet, HostError> {
        self.msrs_of(false)
    }

    /// The MSRs of a vCPU's state, with performance counters or without. The first call probes them
    /// on a scratch VM, which takes some milliseconds.
    ///
    /// # Errors
    /// When they cannot be probed.
    pub fn msrs_of(&self, pmu: bool) -> Result<&MsrSet, HostError> {
        Ok(&self.probed(pmu)?.msrs)
    }

    /// The TSC frequency of new vCPUs in kHz, if KVM reports it. Probed together with the MSRs.
    pub fn tsc_khz(&self) -> Result<Option<u32>, HostError> {
        Ok(self.probed(false)?.tsc_khz)
    }

    /// A vCPU's value of `IA32_ARCH_CAPABILITIES`, if it has that MSR. Probed together with the
    /// MSRs.
    pub(crate) fn arch_capabilities(&self) -> Result<Option<u64>, HostError> {
        Ok(self.probed(false)?.arch_capabilities)
    }

    fn probed(&self, pmu: bool) -> Result<&Probed, HostError> {
        let slot = &self.probed[usize::from(pmu)];
        if let Some(probed) = slot.get() {
            return Ok(probed);
        }
        let (_vm, vcpu) = self.scratch_vcpu(pmu)?;
        // KVM_GET_TSC_KHZ fails where the host's TSC is not usable.
        let tsc_khz = vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0);
        let arch_capabilities = read_one(&vcpu, ARCH_CAPABILITIES)?;
        let probed = Probed { msrs: MsrSet::probe(self, &vcpu)?, tsc_khz, arch_capabilities };
        // Two threads may probe at the same time: they find the same values, and the first stores
        // them.
        Ok(slot.get_or_init(|| probed))
    }

    /// Disables the performance counters of `vm`, which has no vCPU yet. Does nothing where KVM
    /// cannot disable them: CPUID hides them anyway.
    pub(crate) fn disable_pmu(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        let known = self.kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
        if u32::try_from(known).unwrap_or(0) & KVM_PMU_CAP_DISABLE == 0 {
            return Ok(());
        }
        let args = [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0];
        vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, args, ..Default::default() })
    }

    /// Creates a VM. Pending triple faults are a part of its vCPUs' events where KVM can show them, so that they are
    /// saved and a reset can clear them.
    pub fn create_vm(&self) -> Result<VmFd, kvm_ioctls::Error> {
        let vm = self.create_vm_patiently()?;
        if self.shows_triple_faults {
            let args = [1, 0, 0, 0];
            vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_X86_TRIPLE_FAULT_EVENT, args, ..Default::default() })?;
        }
        Ok(vm)
    }

    /// `KVM_CREATE_VM` takes all locks of this process's memory map, and fails with EINTR if the thread has other work
    /// pending in the kernel: a signal, or io_uring completions. The call is then retried.
    fn create_vm_patiently(&self) -> Result<VmFd, kvm_ioctls::Error> {
        for _ in 0..CREATE_TRIES {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => std::thread::yield_now(),
                made => return made,
            }
        }
        self.kvm.create_vm()
    }

    /// A vCPU with a guest's CPUID, in a VM of its own without memory.
    ///
    /// # Errors
    /// When KVM refuses the VM, the vCPU or its CPUID.
    pub fn lone_vcpu(&self) -> Result<(VmFd, VcpuFd), HostError> {
        self.scratch_vcpu(false)
    }

    fn scratch_vcpu(&self, pmu: bool) -> Result<(VmFd, VcpuFd), HostError> {
        let failed = |what| move |source| HostError::Ioctl { what, source };
        let vm = self.scratch_vm().map_err(failed("making a scratch VM"))?;
        if !pmu {
            self.disable_pmu(&vm).map_err(failed("KVM_CAP_PMU_CAPABILITY"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
        set_machine_check_banks(&vcpu);
        let cpu_config = CpuConfig { hide: &CpuHide::none(), template: CpuTemplate::Host, pmu };
        vcpu.set_cpuid2(&self.cpuid_of(0, 1, &cpu_config)?).map_err(failed("KVM_SET_CPUID2"))?;
        Ok((vm, vcpu))
    }

    /// A VM for probing: no memory, vCPUs with local APICs.
    pub(super) fn scratch_vm(&self) -> Result<VmFd, kvm_ioctls::Error> {
        let vm = self.create_vm()?;
        if self.has_split_irqchip() {
            // Destroying it takes a sixtieth of the time of a full irqchip.
            local_apics_alone(&vm)?;
        } else {
            vm.create_irq_chip()?;
        }
        Ok(vm)
    }
}

/// Enables the split irqchip of `vm`, which has no vCPU yet. KVM then emulates the local APICs, but
/// neither IOAPIC nor PICs.
pub(crate) fn local_apics_alone(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    /// Pins of the absent IOAPIC. KVM uses the number for its routing table.
    const PINS: u64 = 24;
    vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [PINS, 0, 0, 0], ..Default::default() })
}

/// Machine-check banks of a guest. KVM's default of 32 would be half of all MSRs that a fork reads
/// and writes. No error is ever injected into a bank.
const MACHINE_CHECK_BANKS: u64 = 4;

ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);

/// Reduces the number of machine-check banks of `vcpu` (`KVM_X86_SETUP_MCE`). [`MsrSet`] counts the
/// banks, so all of them are saved.
pub(crate) fn set_machine_check_banks(vcpu: &VcpuFd) {
    /// MCG_CTL_P: `IA32_MCG_CTL` is present.
    const CTL_P: u64 = 1 << 8;
    // SAFETY: the ioctl reads the u64 passed to it, and writes no memory of this process.
    let rc = unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &(MACHINE_CHECK_BANKS | CTL_P)) };
    if rc != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "KVM_X86_SETUP_MCE: the guest has KVM's banks");
    }
}

fn open_device(path: &Path) -> Result<Kvm, HostError> {
    let owned = || path.to_owned();
    let invalid = |error| HostError::Open { path: owned(), source: io::Error::new(io::ErrorKind::InvalidInput, error) };
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(invalid)?;
    Kvm::new_with_path(c_path).map_err(|error| match error.errno() {
        libc::ENOENT => HostError::Missing { path: owned() },
        libc::EACCES | libc::EPERM => HostError::Permission { path: owned() },
        errno => HostError::Open { path: owned(), source: io::Error::from_raw_os_error(errno) },
    })
}

#[cfg(test)]
mod tests {
    use super::super::testutil::host;
    use super::*;

    #[test]
    fn a_missing_device_is_named() {
        let error = Host::open_at(Path::new("/nonexistent/kvm")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "/nonexistent/kvm is missing: is the kvm module loaded, and virtualization enabled?"
        );
    }

    #[test]
    fn another_device_is_not_kvm() {
        let error = Host::open_at(Path::new("/dev/null")).unwrap_err();
        assert_eq!(error.to_string(), "/dev/null speaks KVM API version -1, 12 is needed");
    }

    #[test]
    fn a_directory_or_an_odd_path_cannot_be_opened() {
        let error = Host::open_at(Path::new("/")).unwrap_err();
        assert_eq!(error.to_string(), "cannot open /");
        assert!(matches!(Host::open_at(Path::new("a\0b")), Err(HostError::Open { .. })));
    }

    /// Uses the only path by which vCPUs get their CPUID, on a host that offers all of it.
    #[test]
    fn guests_are_given_no_nested_virtualization_and_no_counters() {
        let Some(mut host) = host() else { return };
        let offered = [(1, 1 << 5 | 1 << 15), (0x8000_0001, 1 << 2 | 1 << 23)];
        let mut entries = host.supported.as_slice().to_vec();
        for (leaf, bits) in offered {
            entries.iter_mut().filter(|e| e.function == leaf).for_each(|e| e.ecx |= bits);
        }
        entries.retain(|e| e.function != 0xa);
        entries.push(kvm_bindings::kvm_cpuid_entry2 { function: 0xa, eax: 0x0730_0402, ..Default::default() });
        host.supported = CpuId::from_entries(&entries).unwrap();
        host.quirks = Quirks::None;
        let leaf = |cpuid: &CpuId, leaf| *cpuid.as_slice().iter().find(|e| e.function == leaf).unwrap();
        let given = host.cpuid(0, 1, &CpuHide::none()).unwrap();
        let most = host.cpuid_at_most().unwrap();
        for (function, bits) in offered {
            assert_eq!(leaf(&given, function).ecx & bits, 0, "{function:#x}");
            assert_eq!(leaf(&most, function).ecx & bits, bits, "{function:#x}");
        }
        assert_eq!((leaf(&given, 0xa).eax, leaf(&most, 0xa).eax), (0, 0x0730_0402));
    }

    #[test]
    fn a_vcpu_has_msrs_with_counters_and_without() {
        let Some(host) = host() else { return };
        let [without, with] = [false, true].map(|pmu| host.msrs_of(pmu).unwrap().indices().len());
        assert!(without > 20 && with >= without, "{without} and {with}");
        assert!(!host.msrs_of(false).unwrap().indices().contains(&super::super::msrs::WALL_CLOCK));
    }

    #[test]
    fn opens_and_builds_a_cpuid_kvm_takes() {
        let Some(host) = host() else { return };
        assert!(host.max_vcpus() >= 1);
        assert!(host.xsave_size() >= 4096);
        let vm = host.scratch_vm().unwrap();
        for vcpu in 0..2 {
            let cpuid = host.cpuid(vcpu, 2, &CpuHide::none()).unwrap();
            vm.create_vcpu(vcpu.into()).unwrap().set_cpuid2(&cpuid).unwrap();
        }
        let error = host.cpuid(0, 200, &CpuHide::none()).unwrap_err();
        assert_eq!(error.to_string(), format!("200 vCPUs, but this host does at most {}", host.max_vcpus()));
    }
}
