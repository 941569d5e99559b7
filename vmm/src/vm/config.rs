//! The shape of a VM: what must be equal for a shell to fit, and for a child to continue its parent.

use clade_memory::{RamError, RamLayout};
use thiserror::Error;

use crate::boot::MAX_CPUS;
use crate::kvm::CpuHide;

/// Which interrupt controllers KVM emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Irqchip {
    /// Local APICs, IOAPIC and PICs: what a kernel with a serial console needs.
    Full,
    /// Local APICs only. Made and destroyed in a fraction of the time; for guests that take no device interrupts.
    Split,
}

/// What a VM is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct VmConfig {
    layout: RamLayout,
    cpus: u8,
    /// Interrupt controllers.
    pub irqchip: Irqchip,
    /// Whether there is a PIT. A kernel that calibrates by the TSC or kvm-clock needs none.
    pub pit: bool,
    /// CPU features to hide from the guest.
    pub hide: CpuHide,
    /// Whether the bare guest's report port exists.
    pub report_port: bool,
}

/// A VM nobody can make.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// See [`RamError`].
    #[error(transparent)]
    Memory(#[from] RamError),
    /// No such number of vCPUs.
    #[error("{cpus} vCPUs: a VM has 1 to {MAX_CPUS}")]
    Cpus {
        /// The number.
        cpus: u64,
    },
    /// More memory than the host has.
    #[error("{asked} MiB of guest memory are more than the host's {host} MiB (--overcommit allows it)")]
    Overcommit {
        /// MiB asked for.
        asked: u64,
        /// MiB in the host.
        host: u64,
    },
}

impl VmConfig {
    /// `memory` bytes and `cpus` vCPUs, everything else as a Linux guest needs it.
    ///
    /// # Errors
    /// When no VM can have that much memory or that many vCPUs.
    pub fn new(memory: u64, cpus: u64) -> Result<Self, ConfigError> {
        let layout = RamLayout::new(memory)?;
        let cpus = u8::try_from(cpus).ok().filter(|n| (1..=MAX_CPUS).contains(n)).ok_or(ConfigError::Cpus { cpus })?;
        Ok(Self { layout, cpus, irqchip: Irqchip::Full, pit: false, hide: CpuHide::default(), report_port: false })
    }

    /// The same for the bare guest: a report port, and no interrupt controllers beyond the local APICs.
    ///
    /// # Errors
    /// As [`VmConfig::new`].
    pub fn bare(memory: u64, cpus: u64) -> Result<Self, ConfigError> {
        Ok(Self { irqchip: Irqchip::Split, report_port: true, ..Self::new(memory, cpus)? })
    }

    /// Where RAM is.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// Refuses more memory than the host has.
    ///
    /// # Errors
    /// [`ConfigError::Overcommit`].
    pub fn check_host_memory(&self) -> Result<(), ConfigError> {
        let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib =
            info.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok());
        let host: u64 = kib.unwrap_or(u64::MAX) / 1024;
        let asked = self.layout.bytes() >> 20;
        if asked > host { Err(ConfigError::Overcommit { asked, host }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_no_vm_can_have() {
        for cpus in [0, 33, 256, 1000] {
            let error = VmConfig::new(1 << 20, cpus).unwrap_err().to_string();
            assert!(error.contains(&cpus.to_string()), "{error}");
        }
        assert!(VmConfig::new(4097, 1).unwrap_err().to_string().contains("4097"));
        assert!(VmConfig::new(0, 1).is_err());
        let big = VmConfig::new(1 << 44, 1).unwrap();
        assert!(big.check_host_memory().unwrap_err().to_string().contains("16777216 MiB"));
    }
}
