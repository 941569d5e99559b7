//! A vCPU's state: saving it, and restoring it on another vCPU.
//!
//! Both are on the path of every fork. Buffers are therefore allocated once, CPUID is not read back
//! from KVM, and one `KVM_GET_MSRS` reads all MSRs.
//!
//! Both need the vCPU out of `KVM_RUN`, **with its last I/O completed**. KVM finishes the
//! instruction of an I/O or MMIO exit only on the next `KVM_RUN`: run the vCPU once more with
//! `immediate_exit` set. All vCPUs of the VM must be out of `KVM_RUN`. Otherwise an interrupt
//! between two of them would be in neither state.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    CpuId, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::host::{Host, HostError};
use super::host_time::{BootTime, WallClock, elapsed};
use super::msrs::{ARCH_CAPABILITIES, KVM_SYSTEM_TIME, MSR_TSC, MsrError, read_all, write_all};
use super::requirements::same_tsc;
use super::template::CpuTemplate;
use super::vm_state::Clock;

/// The bit of CR3 that has accesses to the top page table written through.
const CR3_PWT: u64 = 1 << 3;

/// Why a vCPU's state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuStateError {
    /// A KVM ioctl failed.
    #[error("{call} failed")]
    Ioctl {
        /// The ioctl.
        call: &'static str,
        /// The ioctl's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused to set MSRs.
    #[error("KVM refuses {}", refused_text(refused))]
    MsrWrite {
        /// Index and value of each refused MSR.
        refused: Vec<(u32, u64)>,
    },
    /// The saved XSAVE area has state past the end of this host's.
    #[error("the saved XSAVE area is {found} bytes, this host's KVM takes {expected}")]
    XsaveSize {
        /// Size of the saved area in bytes.
        found: usize,
        /// Size of this host's area in bytes.
        expected: usize,
    },
    /// This host cannot give the guest its TSC frequency.
    #[error("the state is from a host with a TSC of {saved} kHz, this one has {here} kHz and cannot scale it")]
    TscFrequency {
        /// The frequency in the state, in kHz.
        saved: u32,
        /// This host's frequency, in kHz.
        here: u32,
    },
    /// The MSRs of this host could not be determined.
    #[error("cannot determine the MSRs of this host")]
    Msrs {
        /// The error of the probe.
        #[source]
        source: Box<HostError>,
    },
    /// A buffer could not be allocated.
    #[error("no buffer for {what} of {bytes} bytes")]
    Buffer {
        /// The structure that it holds.
        what: &'static str,
        /// Its size in bytes.
        bytes: usize,
    },
}

impl From<HostError> for VcpuStateError {
    fn from(source: HostError) -> Self {
        Self::Msrs { source: Box::new(source) }
    }
}

impl From<MsrError> for VcpuStateError {
    fn from(source: MsrError) -> Self {
        HostError::from(source).into()
    }
}

fn refused_text(refused: &[(u32, u64)]) -> String {
    let each = refused.iter().map(|(index, value)| format!("MSR {index:#x} the value {value:#x}"));
    each.collect::<Vec<_>>().join(", ")
}

/// Logs, once per MSR and process, that saved states lack the MSR.
fn report_unreadable(refused: &[u32]) {
    static TOLD: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    for index in refused.iter().filter(|index| told.insert(**index)) {
        tracing::warn!("KVM does not read MSR {index:#x} of a vCPU: its value is not saved");
    }
}

/// Converts the error of the ioctl `call`, for `map_err`.
fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Ioctl { call, source }
}

/// The layout of a vCPU's state on this host: built once, shared by all vCPUs.
#[derive(Clone, Debug)]
pub struct StateLayout {
    msrs: Msrs,
    /// 32-bit words of the XSAVE area past the 4096 bytes of `kvm_xsave`.
    xsave_extra: usize,
    xsave2: bool,
    /// TSC frequency of a new vCPU in kHz, if KVM reports it.
    tsc_khz: Option<u32>,
    tsc_control: bool,
    /// Whether a vCPU's events show pending triple faults.
    pub(super) triple_faults: bool,
}

impl StateLayout {
    /// The layout on `host`, without performance counters. The first call on a host probes its
    /// MSRs, see [`Host::msrs`].
    pub fn new(host: &Host) -> Result<Self, VcpuStateError> {
        Self::with_pmu(host, false)
    }

    /// The layout on `host` for vCPUs with (`pmu`) or without performance counters.
    pub(crate) fn with_pmu(host: &Host, pmu: bool) -> Result<Self, VcpuStateError> {
        let size = host.xsave_size();
        Ok(Self {
            msrs: host.msrs_of(pmu)?.buffer()?,
            tsc_khz: host.tsc_khz()?,
            xsave_extra: (size - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>()),
            xsave2: host.has_xsave2(),
            tsc_control: host.has_tsc_control(),
            triple_faults: host.shows_triple_faults,
        })
    }

    /// The layout for vCPUs of `template`, with the MSRs of that template only.
    pub fn of(&self, template: CpuTemplate) -> Result<Self, VcpuStateError> {
        let mine: Vec<_> = self.msrs.as_slice().iter().filter(|entry| template.has_msr(entry.index)).copied().collect();
        let bytes = size_of_val(mine.as_slice());
        let msrs = Msrs::from_entries(&mine).map_err(|_| VcpuStateError::Buffer { what: "MSRs", bytes })?;
        Ok(Self { msrs, ..self.clone() })
    }

    fn xsave_bytes(&self) -> usize {
        size_of::<kvm_xsave>() + self.xsave_extra * size_of::<u32>()
    }

    /// A zeroed buffer for an XSAVE area of this host's size.
    fn xsave(&self) -> Result<Xsave, VcpuStateError> {
        Xsave::new(self.xsave_extra)
            .map_err(|_| VcpuStateError::Buffer { what: "an XSAVE area", bytes: self.xsave_bytes() })
    }
}

/// Whether the vCPU to restore already has its CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidState {
    /// CPUID is set: a VM prepared for this guest, or a reset in place.
    Set,
    /// CPUID is not set: `KVM_SET_CPUID2` comes first. KVM refuses it once the vCPU has run.
    Unset,
}

/// Parts of the state of a new vCPU, which has not run and has not been restored. Equal parts of an
/// image are not set again: each call costs a microsecond with hardware virtualization, and ten
/// under kvm-pvm.
#[derive(Clone, Debug)]
pub struct NewVcpu {
    mp_state: kvm_mp_state,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
}

impl NewVcpu {
    /// Reads the parts from `vcpu`, which must be new.
    pub fn read(vcpu: &VcpuFd) -> Result<Self, VcpuStateError> {
        Ok(Self {
            mp_state: vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?,
            xcrs: vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
            debug_regs: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
        })
    }
}

/// The complete state of a vCPU, without guest memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// The CPUID that the vCPU was created with. In KVM's copy, bits such as OSXSAVE follow CR4.
    pub cpuid: CpuId,
    /// TSC frequency in kHz, if KVM reports it.
    pub tsc_khz: Option<u32>,
    /// Runnable, halted, or waiting for INIT or SIPI.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, APIC base.
    pub sregs: kvm_sregs,
    /// x87, SSE, AVX and the rest of the XSAVE state.
    pub xsave: Xsave,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// MSRs in restore order. The TSC is saved as a value, not as an offset, and continues from
    /// that value.
    pub msrs: Msrs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Pending and injected exceptions, interrupts, NMIs and SMIs.
    pub events: kvm_vcpu_events,
    /// The host's wall clock when the TSC was read.
    #[serde(default)]
    pub taken: WallClock,
    /// The same instant by `CLOCK_BOOTTIME`, if known.
    #[serde(default)]
    pub taken_in_boot: Option<BootTime>,
    /// Linear address of the guest's page-fault handler, if a breakpoint is set there (kvm-pvm).
    /// The vCPU thread saves and restores it, not this module.
    #[serde(default)]
    pub page_fault_entry: Option<u64>,
}

impl VcpuState {
    /// Saves the state of `vcpu`, which was created with `cpuid`.
    pub fn save(vcpu: &VcpuFd, layout: &StateLayout, cpuid: &CpuId) -> Result<Self, VcpuStateError> {
        Self::save_with(vcpu, layout, cpuid, tsc_khz(vcpu))
    }

    /// As [`Self::save`], of a vCPU whose TSC frequency is known.
    pub(crate) fn save_with(
        vcpu: &VcpuFd,
        layout: &StateLayout,
        cpuid: &CpuId,
        tsc_khz: Option<u32>,
    ) -> Result<Self, VcpuStateError> {
        let mut state = Self {
            cpuid: cpuid.clone(),
            tsc_khz,
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: layout.xsave()?,
            xcrs: kvm_xcrs::default(),
            debug_regs: kvm_debugregs::default(),
            msrs: layout.msrs.clone(),
            lapic: kvm_lapic_state::default(),
            events: kvm_vcpu_events::default(),
            taken: WallClock::default(),
            taken_in_boot: None,
            page_fault_entry: None,
        };
        state.save_into(vcpu, layout)?;
        Ok(state)
    }

    /// The guest's value of `IA32_ARCH_CAPABILITIES`, if it has that MSR.
    #[must_use]
    pub(crate) fn arch_capabilities(&self) -> Option<u64> {
        self.msrs.as_slice().iter().find(|entry| entry.index == ARCH_CAPABILITIES).map(|entry| entry.data)
    }

    /// Whether the guest has a kvmclock page, without which it cannot be notified of a pause.
    #[must_use]
    pub(crate) fn has_kvmclock(&self) -> bool {
        self.msrs.as_slice().iter().any(|entry| entry.index == KVM_SYSTEM_TIME && entry.data & 1 != 0)
    }

    /// Saves the state of the same vCPU again, without allocating. After an error the state is
    /// invalid.
    pub(crate) fn save_into(&mut self, vcpu: &VcpuFd, layout: &StateLayout) -> Result<(), VcpuStateError> {
        // First: KVM_GET_MP_STATE makes KVM accept a pending INIT or SIPI, which changes registers
        // and the local APIC.
        self.mp_state = vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        self.regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
        self.sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        self.save_xsave(vcpu, layout)?;
        self.xcrs = vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
        self.debug_regs = vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?;
        // Before the local APIC: the APIC timer may fire between the two reads, on another CPU. In
        // this order the interrupt is in the saved APIC and may come twice; the guest treats the
        // second as spurious. In the other order the deadline already reads 0 and the saved APIC
        // lacks the interrupt. A tickless guest would then sleep forever.
        (self.taken, self.taken_in_boot) = (WallClock::now(), BootTime::now());
        self.save_msrs(vcpu, layout)?;
        // Before the events: KVM_GET_LAPIC moves posted interrupts into the APIC's registers.
        self.lapic = vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
        // Last: each call above may queue an event.
        self.events = vcpu.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        if self.events.triple_fault.pending == 0 {
            // A kernel before 6.0 refuses the flag.
            self.events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        Ok(())
    }

    pub(super) fn save_xsave(&mut self, vcpu: &VcpuFd, layout: &StateLayout) -> Result<(), VcpuStateError> {
        if !layout.xsave2 {
            let xsave = vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?;
            self.xsave = Xsave::from_header(kvm_xsave2::from(xsave))
                .map_err(|_| VcpuStateError::Buffer { what: "an XSAVE area", bytes: 4096 })?;
            return Ok(());
        }
        if self.xsave.as_slice().len() != layout.xsave_extra {
            self.xsave = layout.xsave()?;
        }
        // SAFETY: KVM writes the number of bytes that KVM_CAP_XSAVE2 reports. `layout` holds the
        // report of the same KVM, and the area has exactly that size, checked just above. The size
        // grows only if this process requests dynamic XSTATE permission (arch_prctl), which nothing
        // in this program does.
        unsafe { vcpu.get_xsave2(&mut self.xsave) }.map_err(call("KVM_GET_XSAVE2"))
    }

    pub(super) fn save_msrs(&mut self, vcpu: &VcpuFd, layout: &StateLayout) -> Result<(), VcpuStateError> {
        let count = layout.msrs.as_slice().len();
        if self.msrs.as_slice().len() != count {
            self.msrs = layout.msrs.clone();
        }
        let read = vcpu.get_msrs(&mut self.msrs).map_err(call("KVM_GET_MSRS"))?;
        if read == count {
            return Ok(());
        }
        // KVM stopped at an MSR that this vCPU lacks. The MSRs after it must not be lost.
        let (found, refused) = read_all(vcpu, layout.msrs.clone())?;
        report_unreadable(&refused);
        let bytes = size_of_val(found.as_slice());
        self.msrs = Msrs::from_entries(&found).map_err(|_| VcpuStateError::Buffer { what: "MSRs", bytes })?;
        Ok(())
    }

    /// Restores the state on `vcpu`, which is `new` or may have any state. After an error the vCPU
    /// is unusable.
    pub fn restore(
        &self,
        vcpu: &VcpuFd,
        layout: &StateLayout,
        cpuid: CpuidState,
        clock: Clock,
        new: Option<&NewVcpu>,
    ) -> Result<(), VcpuStateError> {
        // Checked before any change to the vCPU.
        let fitted = self.fitted_xsave(layout)?;
        let xsave = fitted.as_ref().unwrap_or(&self.xsave);
        // First: KVM checks all later state against the guest's CPUID.
        if cpuid == CpuidState::Unset {
            vcpu.set_cpuid2(&self.cpuid).map_err(call("KVM_SET_CPUID2"))?;
        }
        // Before the MSRs: KVM converts a written TSC value with the frequency then in force.
        self.restore_tsc_frequency(vcpu, layout)?;
        // Before the registers: waiting for SIPI, or becoming runnable, resets parts of the vCPU.
        if new.is_none_or(|new| new.mp_state != self.mp_state) {
            vcpu.set_mp_state(self.mp_state).map_err(call("KVM_SET_MP_STATE"))?;
        }
        // Before the events: KVM_SET_REGS drops pending exceptions.
        vcpu.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        if new.is_none() {
            // A vCPU that has run has translations of page tables whose pages have other contents now, as after a
            // reset in place. KVM drops them where a control register changes: the next call changes it back. CR3's
            // write-through bit is valid in every mode.
            let mut other = self.sregs;
            other.cr3 ^= CR3_PWT;
            vcpu.set_sregs(&other).map_err(call("KVM_SET_SREGS"))?;
        }
        // Before the local APIC and the MSRs: this call sets EFER and the APIC base. Without the
        // APIC base the local APIC refuses its registers.
        vcpu.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads the number of bytes that KVM_CAP_XSAVE2 reports, or 4096 without that
        // capability. `layout` holds the report of the same KVM, and the area has exactly that
        // size, checked at the top. The size grows only if this process requests dynamic XSTATE
        // permission (arch_prctl), which nothing in this program does.
        unsafe { vcpu.set_xsave2(xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        if new.is_none_or(|new| new.xcrs != self.xcrs) {
            vcpu.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        }
        if new.is_none_or(|new| new.debug_regs != self.debug_regs) {
            vcpu.set_debug_regs(&self.debug_regs).map_err(call("KVM_SET_DEBUGREGS"))?;
        }
        // After the special registers: they set the APIC base. Before the MSRs: KVM accepts a TSC
        // deadline only while the timer is in deadline mode.
        vcpu.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        self.restore_msrs(vcpu, clock)?;
        // Last: KVM_SET_REGS drops pending exceptions, and KVM_SET_SREGS queues an interrupt that
        // this call replaces.
        let mut events = self.events;
        if !layout.triple_faults && events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 {
            // The guest meets the fault again at the same instruction.
            tracing::warn!("a pending triple fault cannot be restored on this kernel");
            events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        vcpu.set_vcpu_events(&events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    /// The XSAVE area resized to this host's, or `None` if the sizes are equal. The area grows with
    /// the host's state components. A guest without a component has left its part zero.
    fn fitted_xsave(&self, layout: &StateLayout) -> Result<Option<Xsave>, VcpuStateError> {
        let (mine, theirs) = (self.xsave.as_slice(), layout.xsave_extra);
        if mine.len() == theirs {
            return Ok(None);
        }
        let both = mine.len().min(theirs);
        if mine[both..].iter().any(|word| *word != 0) {
            let found = size_of::<kvm_xsave>() + size_of_val(mine);
            return Err(VcpuStateError::XsaveSize { found, expected: layout.xsave_bytes() });
        }
        let mut fitted = layout.xsave()?;
        // SAFETY: the length, which describes the allocation, is not changed.
        let area = unsafe { fitted.as_mut_fam_struct() };
        area.xsave.region = self.xsave.as_fam_struct_ref().xsave.region;
        fitted.as_mut_slice()[..both].copy_from_slice(&mine[..both]);
        Ok(Some(fitted))
    }

    fn restore_msrs(&self, vcpu: &VcpuFd, clock: Clock) -> Result<(), VcpuStateError> {
        let mut msrs = self.msrs.clone();
        if let (Clock::CatchUp, Some(khz)) = (clock, self.tsc_khz) {
            // The TSC advances by the time elapsed, as the guest's clock does: a guest finds the
            // same time in both. The TSC is the first MSR written, so a deadline that has passed
            // fires when it is set.
            let ticks = (elapsed(self.taken, self.taken_in_boot).as_nanos() * u128::from(khz) / 1_000_000) as u64;
            msrs.as_mut_slice().iter_mut().filter(|entry| entry.index == MSR_TSC).for_each(|entry| {
                entry.data = entry.data.wrapping_add(ticks);
            });
        }
        let refused: Vec<_> = write_all(vcpu, &msrs)?.iter().map(|entry| (entry.index, entry.data)).collect();
        if refused.is_empty() { Ok(()) } else { Err(VcpuStateError::MsrWrite { refused }) }
    }

    fn restore_tsc_frequency(&self, vcpu: &VcpuFd, layout: &StateLayout) -> Result<(), VcpuStateError> {
        let (Some(saved), Some(here)) = (self.tsc_khz, layout.tsc_khz) else { return Ok(()) };
        if same_tsc(saved, here) {
            return Ok(());
        }
        if !layout.tsc_control {
            return Err(VcpuStateError::TscFrequency { saved, here });
        }
        vcpu.set_tsc_khz(saved).map_err(call("KVM_SET_TSC_KHZ"))
    }
}

/// The TSC frequency of `vcpu` in kHz. It stays until a state is restored.
pub(crate) fn tsc_khz(vcpu: &VcpuFd) -> Option<u32> {
    // KVM_GET_TSC_KHZ fails where the host's TSC is not usable.
    vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0)
}

/// Marks the guest as paused (`KVM_KVMCLOCK_CTRL`), so that its watchdogs ignore the pause. `false`
/// if the guest has no kvmclock page.
pub(crate) fn mark_paused(vcpu: &VcpuFd) -> Result<bool, VcpuStateError> {
    match vcpu.kvmclock_ctrl() {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == libc::EINVAL => Ok(false),
        Err(source) => Err(call("KVM_KVMCLOCK_CTRL")(source)),
    }
}

#[cfg(test)]
mod tests;
