//! A VM's state outside its vCPUs: interrupt controllers, timer, clock.

use std::fmt;
use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::host_time::{BootTime, WallClock, elapsed};

/// Why a VM's state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmStateError {
    /// A KVM ioctl failed.
    #[error("{call} failed for {what}")]
    Ioctl {
        /// The ioctl.
        call: &'static str,
        /// The chip or clock.
        what: &'static str,
        /// The ioctl's error.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// The PC chips that KVM emulates for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chips {
    /// None, or the local APICs alone (split irqchip).
    None,
    /// PICs and IOAPIC.
    Irqchip,
    /// PICs, IOAPIC and PIT.
    IrqchipAndPit,
}

/// How the clock of a restored VM continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// From its saved value: no time has passed.
    Resume,
    /// From its saved value plus the time elapsed since (`host_time.rs`), so that the guest's time
    /// of day is right. A fork and a reset use this.
    CatchUp,
}

/// The three interrupt controllers, in KVM's form.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Irqchips {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
}

impl fmt::Debug for Irqchips {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The chips are C unions, which have no Debug.
        f.write_str("Irqchips { .. }")
    }
}

/// A VM's state outside its vCPUs and its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PlatformState {
    irqchips: Option<Irqchips>,
    pit: Option<kvm_pit_state2>,
    clock: kvm_clock_data,
    /// The host's wall clock when the guest's clock was read.
    #[serde(default)]
    taken: WallClock,
    /// The same instant by `CLOCK_BOOTTIME`, if known.
    #[serde(default)]
    taken_in_boot: Option<BootTime>,
}

fn failed(call: &'static str, what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmStateError {
    move |source| VmStateError::Ioctl { call, what, source }
}

const PARTS: [(u32, &str); 3] = [
    (KVM_IRQCHIP_PIC_MASTER, "the first PIC"),
    (KVM_IRQCHIP_PIC_SLAVE, "the second PIC"),
    (KVM_IRQCHIP_IOAPIC, "the IOAPIC"),
];

impl PlatformState {
    /// Saves the state of `vm`, all of whose vCPUs are paused and **saved**. An interrupt that the
    /// IOAPIC still holds is delivered again by [`Self::restore_chips`]. One that it has delivered
    /// is in a vCPU's local APIC.
    pub(crate) fn save(vm: &VmFd, chips: Chips) -> Result<Self, VmStateError> {
        // First, so that the guest's clock loses as little as possible to the pause.
        let clock = vm.get_clock().map_err(failed("KVM_GET_CLOCK", "the clock"))?;
        let (taken, taken_in_boot) = (WallClock::now(), BootTime::now());
        let get = |(chip_id, what): (u32, &'static str)| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP", what))?;
            Ok(chip)
        };
        // The timer before the controllers: a tick between the two reads is then in the
        // controllers' state, not lost.
        let pit = match chips {
            Chips::IrqchipAndPit => Some(vm.get_pit2().map_err(failed("KVM_GET_PIT2", "the PIT"))?),
            Chips::None | Chips::Irqchip => None,
        };
        let irqchips = match chips {
            Chips::None => None,
            Chips::Irqchip | Chips::IrqchipAndPit => {
                let [pic_master, pic_slave, ioapic] = PARTS;
                Some(Irqchips { pic_master: get(pic_master)?, pic_slave: get(pic_slave)?, ioapic: get(ioapic)? })
            }
        };
        Ok(Self { irqchips, pit, clock, taken, taken_in_boot })
    }

    /// The chips of this state. `None` for a combination that KVM does not have.
    #[must_use]
    pub(crate) fn chips(&self) -> Option<Chips> {
        match (&self.irqchips, &self.pit) {
            (None, None) => Some(Chips::None),
            (Some(_), None) => Some(Chips::Irqchip),
            (Some(_), Some(_)) => Some(Chips::IrqchipAndPit),
            // KVM has no PIT without the controllers it interrupts.
            (None, Some(_)) => None,
        }
    }

    /// Restores the controllers and the timer.
    ///
    /// After every vCPU: setting the IOAPIC delivers its pending interrupts to the local APICs. A
    /// local APIC that is restored later would lose them.
    pub(crate) fn restore_chips(&self, vm: &VmFd) -> Result<(), VmStateError> {
        if let Some(irqchips) = &self.irqchips {
            // The PICs before the IOAPIC, whose pin 0 may carry their pending interrupts.
            let chips = [&irqchips.pic_master, &irqchips.pic_slave, &irqchips.ioapic];
            for (chip, (_, what)) in chips.into_iter().zip(PARTS) {
                vm.set_irqchip(chip).map_err(failed("KVM_SET_IRQCHIP", what))?;
            }
        }
        // After the controllers: the PIT starts to tick at once.
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).map_err(failed("KVM_SET_PIT2", "the PIT"))?;
        }
        Ok(())
    }

    /// Sets the guest's clock (`KVM_SET_CLOCK`), which runs from then on.
    ///
    /// The last step before the vCPUs run, because the clock runs from this call. After their MSRs,
    /// because the clock is computed from their TSCs.
    pub(crate) fn restore_clock(&self, vm: &VmFd, clock: Clock) -> Result<(), VmStateError> {
        // Not by KVM_CLOCK_REALTIME: it is more exact, but missing on some hosts, and it advances
        // this clock without the TSCs.
        let ahead = match clock {
            Clock::Resume => Duration::ZERO,
            Clock::CatchUp => elapsed(self.taken, self.taken_in_boot),
        };
        let clock = self.clock.clock.saturating_add(u64::try_from(ahead.as_nanos()).unwrap_or(u64::MAX));
        // KVM_SET_CLOCK refuses the flags that KVM_GET_CLOCK returned.
        let data = kvm_clock_data { clock, ..Default::default() };
        vm.set_clock(&data).map_err(failed("KVM_SET_CLOCK", "the clock"))
    }

    /// The guest's clock when it was saved, in nanoseconds.
    #[cfg(test)]
    pub(crate) fn clock_ns(&self) -> u64 {
        self.clock.clock
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};

    use super::super::testutil::host;
    use super::*;

    /// The chips as bytes, for comparison.
    fn chips(state: &PlatformState) -> Vec<u8> {
        serde_json::to_vec(&(state.irqchips, state.pit)).unwrap()
    }

    #[test]
    fn a_full_irqchip_goes_to_another_vm() {
        let Some(host) = host() else { return };
        let make = || {
            let vm = host.create_vm().unwrap();
            vm.create_irq_chip().unwrap();
            vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() }).unwrap();
            vm
        };
        let (a, b) = (make(), make());
        let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        a.get_irqchip(&mut ioapic).unwrap();
        // SAFETY: KVM has filled the union's IOAPIC member, as `chip_id` requests. Its fields are
        // plain integers.
        let mut registers = unsafe { ioapic.chip.ioapic };
        registers.redirtbl[5].bits = 0x1_0000 | 0x35;
        ioapic.chip.ioapic = registers;
        a.set_irqchip(&ioapic).unwrap();

        let saved = PlatformState::save(&a, Chips::IrqchipAndPit).unwrap();
        let fresh = PlatformState::save(&b, Chips::IrqchipAndPit).unwrap();
        assert_ne!(serde_json::to_vec(&saved.irqchips).unwrap(), serde_json::to_vec(&fresh.irqchips).unwrap());
        let json = serde_json::to_string(&saved).unwrap();
        let sent: PlatformState = serde_json::from_str(&json).unwrap();
        sent.restore_chips(&b).unwrap();
        sent.restore_clock(&b, Clock::Resume).unwrap();
        let again = PlatformState::save(&b, Chips::IrqchipAndPit).unwrap();
        // The PIT's count load time is the host's time of the load, and changes.
        let without_time = |mut state: PlatformState| {
            if let Some(pit) = &mut state.pit {
                pit.channels.iter_mut().for_each(|c| c.count_load_time = 0);
            }
            chips(&state)
        };
        assert_eq!(without_time(again), without_time(saved));
    }

    #[test]
    fn the_clock_resumes_where_it_stood() {
        let Some(host) = host() else { return };
        let a = host.scratch_vm().unwrap();
        let mut saved = PlatformState::save(&a, Chips::None).unwrap();
        saved.clock.clock = 3_600_000_000_000;
        let b = host.scratch_vm().unwrap();
        // The wall clock was stepped meanwhile. Within one boot of the host, the guest must not see
        // that.
        saved.taken = saved.taken.earlier(Duration::from_secs(100_000));
        saved.taken_in_boot = saved.taken_in_boot.map(|taken| taken.earlier(Duration::from_secs(1800)));
        for (clock, ahead) in [(Clock::Resume, 0), (Clock::CatchUp, 1_800_000_000_000)] {
            saved.restore_clock(&b, clock).unwrap();
            let now = PlatformState::save(&b, Chips::None).unwrap().clock_ns();
            let least = saved.clock_ns() + ahead;
            assert!((least..least + 10_000_000_000).contains(&now), "{clock:?}: {now}");
        }
    }
}
