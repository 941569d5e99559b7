//! A vCPU's state: saving it, and restoring it on another vCPU.
//!
//! Both are on the path of every fork, so the buffers are made once, CPUID is not read back from
//! KVM, and one call reads all MSRs. Both need the vCPU to be out of `KVM_RUN`, **with its last I/O
//! completed** (run it once more with `immediate_exit` set after an I/O or MMIO exit: KVM finishes
//! the instruction only then), and all its siblings too, because an interrupt between two vCPUs
//! would otherwise be in neither state.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::host::{Host, HostError};
use super::host_time::{BootTime, WallClock, elapsed};
use super::msrs::{ARCH_CAPABILITIES, MSR_TSC, MsrError, read_all, write_all};
use super::requirements::same_tsc;
use super::template::CpuTemplate;
use super::vm_state::Clock;

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
    /// KVM refuses to set MSRs.
    #[error("KVM refuses {}", refused_text(refused))]
    MsrWrite {
        /// Index and value of each.
        refused: Vec<(u32, u64)>,
    },
    /// The XSAVE area has another size than this host's.
    #[error("the saved XSAVE area is {found} bytes, this host's KVM takes {expected}")]
    XsaveSize {
        /// Its size in bytes in the state.
        found: usize,
        /// Its size in bytes on this host.
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
    /// The MSRs of this host are not known.
    #[error("the MSRs of this host could not be told")]
    Msrs {
        /// The error of probing them.
        #[source]
        source: Box<HostError>,
    },
    /// A buffer could not be made.
    #[error("no buffer for {what} of {bytes} bytes")]
    Buffer {
        /// The structure it is for.
        what: &'static str,
        /// Its size.
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

/// Says once for each MSR that it is in no state of this process.
fn report_unreadable(refused: &[u32]) {
    static TOLD: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    for index in refused.iter().filter(|index| told.insert(**index)) {
        tracing::warn!("KVM does not read MSR {index:#x} of a vCPU: what it holds is not saved");
    }
}

/// `.map_err` for a named call.
fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Ioctl { call, source }
}

/// The shape of a vCPU's state on this host: made once, shared by all vCPUs.
#[derive(Clone, Debug)]
pub struct StateLayout {
    msrs: Msrs,
    /// 32-bit words of the XSAVE area past the 4096 bytes of `kvm_xsave`.
    xsave_extra: usize,
    xsave2: bool,
    /// Frequency of the TSC that vCPUs are born with.
    tsc_khz: Option<u32>,
    tsc_control: bool,
}

impl StateLayout {
    /// Finds out. The first call on a host probes its MSRs, see [`Host::msrs`].
    pub fn new(host: &Host) -> Result<Self, VcpuStateError> {
        Self::with_pmu(host, false)
    }

    /// The same, of vCPUs with performance counters or without.
    pub(crate) fn with_pmu(host: &Host, pmu: bool) -> Result<Self, VcpuStateError> {
        let size = host.xsave_size();
        Ok(Self {
            msrs: host.msrs_of(pmu)?.buffer()?,
            tsc_khz: host.tsc_khz()?,
            xsave_extra: (size - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>()),
            xsave2: host.has_xsave2(),
            tsc_control: host.has_tsc_control(),
        })
    }

    /// The same for vCPUs that look like `template`, whose state has that template's MSRs and no
    /// others.
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

/// Whether the vCPU that a state is given to already has its CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidState {
    /// It has: a VM prepared for this guest, or a reset in place.
    Set,
    /// It has not: `KVM_SET_CPUID2` comes first. KVM refuses that once the vCPU has run.
    Unset,
}

/// Everything that is a vCPU, except memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the vCPU was made with. KVM's own copy differs in the bits that follow CR4.
    pub cpuid: CpuId,
    /// Frequency of its TSC, when KVM says.
    pub tsc_khz: Option<u32>,
    /// Running, halted, waiting for INIT or SIPI.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, APIC base.
    pub sregs: kvm_sregs,
    /// x87, SSE, AVX and the rest of what XSAVE covers.
    pub xsave: Xsave,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// MSRs in the order in which they are restored. The TSC's offset is not kept: the TSC's value
    /// is, and counts on from there.
    pub msrs: Msrs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Exceptions, interrupts, NMIs and SMIs on their way.
    pub events: kvm_vcpu_events,
    /// The host's wall clock when the TSC was read.
    #[serde(default)]
    pub taken: WallClock,
    /// The same by the clock of the host's boot.
    #[serde(default)]
    pub taken_in_boot: Option<BootTime>,
    /// Where its page faults are watched, if they are: not KVM's, but the vCPU thread's, which does
    /// it.
    #[serde(default)]
    pub page_fault_entry: Option<u64>,
}

impl VcpuState {
    /// Takes the state of `vcpu`, which was made with `cpuid`.
    pub fn save(vcpu: &VcpuFd, layout: &StateLayout, cpuid: &CpuId) -> Result<Self, VcpuStateError> {
        let mut state = Self {
            cpuid: cpuid.clone(),
            // Fixed for the vCPU's life. Fails where the host's TSC is not usable.
            tsc_khz: vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0),
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

    /// Takes the state of the same vCPU again, without allocating. After an error the state is of
    /// no use.
    pub(crate) fn save_into(&mut self, vcpu: &VcpuFd, layout: &StateLayout) -> Result<(), VcpuStateError> {
        // Before everything else, because it makes KVM accept a pending INIT or SIPI, which changes
        // registers and the local APIC.
        self.mp_state = vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        self.regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
        self.sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        self.save_xsave(vcpu, layout)?;
        self.xcrs = vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
        self.debug_regs = vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?;
        // Before the local APIC: the timer may fire between the two, on another CPU. This way round
        // the interrupt is in the APIC's state and perhaps comes twice, which a guest takes for a
        // spurious one; the other way round the deadline would already read 0 and the APIC would
        // not have it yet, and a tickless guest would sleep forever.
        (self.taken, self.taken_in_boot) = (WallClock::now(), BootTime::now());
        self.save_msrs(vcpu, layout)?;
        // Before the events, because it moves posted interrupts into the APIC's registers.
        self.lapic = vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
        // Last, because each of the calls above may leave an event behind.
        self.events = vcpu.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
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
        // SAFETY: KVM writes as many bytes as KVM_CAP_XSAVE2 says. `layout` asked the same KVM, and
        // the area has exactly that size, checked just above. The size could only grow by this
        // process asking for dynamic XSTATE permission (arch_prctl), which nothing in this program
        // does.
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
        // This vCPU was not given all that the layout's has. The others must not be lost with what
        // is missing.
        let (found, refused) = read_all(vcpu, layout.msrs.clone())?;
        report_unreadable(&refused);
        let bytes = size_of_val(found.as_slice());
        self.msrs = Msrs::from_entries(&found).map_err(|_| VcpuStateError::Buffer { what: "MSRs", bytes })?;
        Ok(())
    }

    /// Gives the state to `vcpu`. After an error the vCPU is of no use.
    pub fn restore(
        &self,
        vcpu: &VcpuFd,
        layout: &StateLayout,
        cpuid: CpuidState,
        clock: Clock,
    ) -> Result<(), VcpuStateError> {
        // Checked before anything is changed.
        let fitted = self.fitted_xsave(layout)?;
        let xsave = fitted.as_ref().unwrap_or(&self.xsave);
        // First, because KVM checks everything that follows against what the guest's CPU has.
        if cpuid == CpuidState::Unset {
            vcpu.set_cpuid2(&self.cpuid).map_err(call("KVM_SET_CPUID2"))?;
        }
        // Before the MSRs, because KVM converts the TSC's value with the frequency in force when it
        // is written.
        self.restore_tsc_frequency(vcpu, layout)?;
        // Before the registers, because making a vCPU wait for SIPI or run again resets parts of
        // it.
        vcpu.set_mp_state(self.mp_state).map_err(call("KVM_SET_MP_STATE"))?;
        // Before the events, because it drops pending exceptions.
        vcpu.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        // Before the local APIC and the MSRs, because it carries the APIC base (without which the
        // local APIC refuses its registers) and EFER.
        vcpu.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says, or 4096 where it does not know
        // that capability. `layout` asked the same KVM, and the area has exactly that size, checked
        // at the top. The size could only grow by this process asking for dynamic XSTATE permission
        // (arch_prctl), which nothing in this program does.
        unsafe { vcpu.set_xsave2(xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(call("KVM_SET_DEBUGREGS"))?;
        // After the special registers because of the APIC base; before the MSRs, because a TSC
        // deadline is taken only while the timer is in deadline mode.
        vcpu.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        self.restore_msrs(vcpu, clock)?;
        // Last, because setting registers drops pending exceptions, and special registers queue an
        // interrupt that this replaces.
        vcpu.set_vcpu_events(&self.events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    /// The XSAVE area in this host's size, where the state's is another: a host with more state
    /// components has a larger area, of which a guest that was not given them has used nothing.
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
            // It has counted on while the VM was not there, as the guest's clock has: a guest that
            // reads the TSC finds the same time in both. It comes first among the MSRs, so a
            // deadline that has passed meanwhile fires when it is set.
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

/// Tells the guest that it was stopped, so that its watchdogs do not count the time. `false` when
/// it has no kvmclock page to be told on.
pub(crate) fn mark_paused(vcpu: &VcpuFd) -> Result<bool, VcpuStateError> {
    match vcpu.kvmclock_ctrl() {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == libc::EINVAL => Ok(false),
        Err(source) => Err(call("KVM_KVMCLOCK_CTRL")(source)),
    }
}

#[cfg(test)]
mod tests;
