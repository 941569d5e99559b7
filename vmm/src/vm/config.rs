//! The configuration of a VM. Prepared VMs and images are used only for an equal configuration.

use std::fmt::Write as _;

use clade_block::DiskConfig;
use clade_devices::virtio::block::{BlockOptions, MAX_QUEUES};
use clade_devices::virtio::limiter::Limits;
#[cfg(feature = "schema")]
use clade_devices::virtio::net::EgressRule;
use clade_devices::virtio::net::{Egress, MAX_PAIRS, Mac};
use clade_devices::virtio::vsock::VsockOptions;
use clade_memory::{RamError, RamLayout};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::kvm::{Chips, CpuHide, CpuTemplate};
use crate::platform::{MAX_CPUS, VIRTIO_GSIS, virtio_slot};
use crate::vm::identity::UserNet;

/// The interrupt controllers that KVM emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Irqchip {
    /// Local APICs, IOAPIC and PICs: a kernel with a serial console needs them.
    Full,
    /// Local APICs only, for guests that take no device interrupts. Creating and destroying them
    /// takes a fraction of the time.
    Split,
}

/// A disk and its virtio block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct DiskSpec {
    /// The disk: its file and its settings.
    pub disk: DiskConfig,
    /// The block device: its queues and limits.
    pub device: BlockOptions,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct NetSpec {
    /// The name of the TAP interface to open or create; `%d` stands for a free number. Empty for
    /// `user`.
    pub tap: String,
    /// A network by passt instead of an interface.
    #[serde(default)]
    pub user: Option<UserNet>,
    /// The MAC address; a random one if not given.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>, pattern = "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$"))]
    pub mac: Option<Mac>,
    /// Pairs of queues.
    #[cfg_attr(feature = "schema", schema(minimum = 1, maximum = 8))]
    pub queues: u16,
    /// Limits on received traffic.
    pub receive: Limits,
    /// Limits on sent traffic.
    pub send: Limits,
    /// Egress rules when the guest boots: layers of rules, each of which a packet has to pass. Later the
    /// device keeps them.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Vec<Vec<EgressRule>>))]
    pub egress: Egress,
}

impl NetSpec {
    /// A device on `tap` with one pair of queues, otherwise the defaults.
    #[must_use]
    pub fn new(tap: &str) -> Self {
        let (receive, send, egress) = (Limits::default(), Limits::default(), Egress::default());
        Self { tap: tap.to_owned(), user: None, mac: None, queues: 1, receive, send, egress }
    }

    /// A device on a network by passt, otherwise the defaults.
    #[must_use]
    pub fn by_passt(user: UserNet) -> Self {
        Self { user: Some(user), ..Self::new("") }
    }
}

/// A virtio device's slot, with its part of the configuration.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DeviceSlot<'a> {
    Disk(&'a DiskSpec),
    Net(&'a NetSpec),
    Vsock,
    Rng(&'a Limits),
    Balloon,
    Console,
}

impl DeviceSlot<'_> {
    /// The kind of the device's state, see [`clade_devices::virtio::DeviceState::kind`].
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::Disk(_) => "block",
            Self::Net(_) => "network",
            Self::Vsock => "socket",
            Self::Rng(_) => "entropy",
            Self::Balloon => "balloon",
            Self::Console => "console",
        }
    }

    pub(crate) fn queues(self) -> usize {
        match self {
            Self::Disk(disk) => usize::from(disk.device.queues),
            // Two for each pair, and the control queue.
            Self::Net(net) => 2 * usize::from(net.queues) + 1,
            Self::Vsock => 3,
            Self::Rng(_) => 1,
            Self::Balloon => 4,
            Self::Console => 2,
        }
    }
}

/// The configuration of a VM. Its children have an equal one, and an identity of their own.
// Snapshots contain it: see `crate::vm::sections` for the changes that are allowed here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct VmConfig {
    /// Guest memory in bytes: whole 4 KiB pages.
    #[serde(rename = "memory", with = "saved_layout")]
    #[cfg_attr(feature = "schema", schema(value_type = u64, minimum = 4096, multiple_of = 4096))]
    layout: RamLayout,
    /// Number of vCPUs.
    #[serde(deserialize_with = "saved_cpus")]
    #[cfg_attr(feature = "schema", schema(minimum = 1, maximum = 32))]
    cpus: u8,
    /// Interrupt controllers.
    pub irqchip: Irqchip,
    /// Whether there is a PIT. Kernels that calibrate by the TSC or kvm-clock do not need one.
    pub pit: bool,
    /// The CPU model that the guest sees.
    pub cpu: CpuTemplate,
    /// CPU features to hide from the guest: Linux names, with commas between.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub hide: CpuHide,
    /// Whether the guest has performance counters. Snapshots without this field are of guests that
    /// had the host's.
    #[serde(default = "had_pmu")]
    #[cfg_attr(feature = "schema", schema(default = true))]
    pub pmu: bool,
    /// Whether the guest gets ACPI tables, with its generation id in them. Without them, or without
    /// an IOAPIC, it has the command line and the MP table.
    pub acpi: bool,
    /// A flag of snapshot format 1, for a test device. Written as false, and ignored when read.
    #[serde(rename = "report_port", default)]
    #[cfg_attr(feature = "schema", schema(value_type = bool, deprecated))]
    reserved: ReservedFlag,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskSpec>,
    /// Network devices, in the order in which the guest finds them.
    pub nets: Vec<NetSpec>,
    /// The socket device, if there is one.
    pub vsock: Option<VsockOptions>,
    /// The limits of the entropy device, if there is one.
    pub rng: Option<Limits>,
    /// Whether there is a balloon.
    pub balloon: bool,
    /// Whether there is a virtio console (`hvc0`) beside the serial one.
    pub virtio_console: bool,
}

/// A flag of snapshot format 1 without meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct ReservedFlag;

impl Serialize for ReservedFlag {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bool(false)
    }
}

impl<'de> Deserialize<'de> for ReservedFlag {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        bool::deserialize(from).map(|_| Self)
    }
}

/// Saves a layout as its number of bytes.
mod saved_layout {
    use super::{Deserialize, RamLayout};
    use serde::{Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(layout: &RamLayout, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(layout.bytes())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<RamLayout, D::Error> {
        RamLayout::new(u64::deserialize(from)?).map_err(D::Error::custom)
    }
}

fn had_pmu() -> bool {
    true
}

fn saved_cpus<'de, D: serde::Deserializer<'de>>(from: D) -> Result<u8, D::Error> {
    VmConfig::checked_cpus(u64::deserialize(from)?).map_err(serde::de::Error::custom)
}

/// Why a configuration is refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No VM can have that much memory.
    #[error(transparent)]
    Memory(#[from] RamError),
    /// No VM can have that many vCPUs.
    #[error("{cpus} vCPUs: a VM has 1 to {MAX_CPUS}")]
    Cpus {
        /// The number of vCPUs.
        cpus: u64,
    },
    /// There are more devices than slots.
    #[error("{devices} virtio devices: there are places for {}", VIRTIO_GSIS.len())]
    Devices {
        /// The number of virtio devices.
        devices: usize,
    },
    /// A device has no queues, or more than it can have.
    #[error("{queues} queues of a {device} device: it has 1 to {most}")]
    Queues {
        /// The kind of device.
        device: &'static str,
        /// The number of its queues, or of pairs.
        queues: u16,
        /// The most it can have.
        most: u16,
    },
    /// A network device has an interface and passt.
    #[error("a network device on interface {tap:?} and by passt: it has one of them")]
    Backends {
        /// The interface.
        tap: String,
    },
    /// More memory than the host has.
    #[error("{asked} MiB of guest memory are more than the host's {host} MiB (--overcommit allows it)")]
    Overcommit {
        /// The VM's memory in MiB.
        asked: u64,
        /// The host's memory in MiB.
        host: u64,
    },
}

impl VmConfig {
    /// The first field that differs from `other`'s, by its name in a snapshot and in the API.
    pub(crate) fn difference(&self, other: &Self) -> Option<&'static str> {
        // Without `..`: a new field is compared too.
        let Self {
            layout,
            cpus,
            irqchip,
            pit,
            cpu,
            hide,
            pmu,
            acpi,
            reserved: ReservedFlag,
            disks,
            nets,
            vsock,
            rng,
            balloon,
            virtio_console,
        } = self;
        let differ = [
            ("memory", *layout != other.layout),
            ("cpus", *cpus != other.cpus),
            ("irqchip", *irqchip != other.irqchip),
            ("pit", *pit != other.pit),
            ("cpu", *cpu != other.cpu),
            ("hide", *hide != other.hide),
            ("pmu", *pmu != other.pmu),
            ("acpi", *acpi != other.acpi),
            ("disks", *disks != other.disks),
            ("nets", *nets != other.nets),
            ("vsock", *vsock != other.vsock),
            ("rng", *rng != other.rng),
            ("balloon", *balloon != other.balloon),
            ("virtio_console", *virtio_console != other.virtio_console),
        ];
        differ.into_iter().find_map(|(field, differs)| differs.then_some(field))
    }

    /// A configuration with `memory` bytes and `cpus` vCPUs, otherwise the defaults for a Linux
    /// guest.
    ///
    /// # Errors
    /// When no VM can have that much memory or that many vCPUs.
    pub fn new(memory: u64, cpus: u64) -> Result<Self, ConfigError> {
        let layout = RamLayout::new(memory)?;
        let cpus = Self::checked_cpus(cpus)?;
        let (irqchip, hide) = (Irqchip::Full, CpuHide::default());
        Ok(Self {
            layout,
            cpus,
            irqchip,
            pit: false,
            cpu: CpuTemplate::Host,
            hide,
            pmu: false,
            acpi: true,
            reserved: ReservedFlag,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            rng: None,
            balloon: false,
            virtio_console: false,
        })
    }

    /// As [`VmConfig::new`], with the defaults for the bare guest: no ACPI, and only local APICs as
    /// interrupt controllers.
    ///
    /// # Errors
    /// As [`VmConfig::new`].
    pub fn bare(memory: u64, cpus: u64) -> Result<Self, ConfigError> {
        Ok(Self { irqchip: Irqchip::Split, acpi: false, ..Self::new(memory, cpus)? })
    }

    fn checked_cpus(cpus: u64) -> Result<u8, ConfigError> {
        u8::try_from(cpus).ok().filter(|n| (1..=MAX_CPUS).contains(n)).ok_or(ConfigError::Cpus { cpus })
    }

    /// The guest's RAM ranges.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Whether the guest has ACPI tables: a generation id, a power button, and the interrupt of
    /// their events.
    #[must_use]
    pub fn has_acpi(&self) -> bool {
        self.acpi && self.irqchip == Irqchip::Full
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// The PC chips that KVM emulates.
    pub(crate) fn chips(&self) -> Chips {
        match (self.irqchip, self.pit) {
            (Irqchip::Split, _) => Chips::None,
            (Irqchip::Full, false) => Chips::Irqchip,
            (Irqchip::Full, true) => Chips::IrqchipAndPit,
        }
    }

    /// The virtio devices in the order of their slots: disks first, so that adding another device
    /// does not move a disk.
    pub(crate) fn device_slots(&self) -> impl Iterator<Item = DeviceSlot<'_>> {
        let disks = self.disks.iter().map(DeviceSlot::Disk);
        disks
            .chain(self.nets.iter().map(DeviceSlot::Net))
            .chain(self.vsock.iter().map(|_| DeviceSlot::Vsock))
            .chain(self.rng.iter().map(DeviceSlot::Rng))
            .chain(self.balloon.then_some(DeviceSlot::Balloon))
            .chain(self.virtio_console.then_some(DeviceSlot::Console))
    }

    /// Refuses a device without queues, or with more than it can have, and a network device with
    /// two backends.
    ///
    /// # Errors
    /// [`ConfigError::Queues`], [`ConfigError::Backends`].
    pub fn check_queues(&self) -> Result<(), ConfigError> {
        let disks = self.disks.iter().map(|disk| ("block", disk.device.queues, MAX_QUEUES));
        let most = |net: &NetSpec| if net.user.is_some() { 1 } else { MAX_PAIRS };
        let nets = self.nets.iter().map(|net| ("network", net.queues, most(net)));
        let wrong = disks.chain(nets).find(|(_, queues, most)| !(1..=*most).contains(queues));
        wrong.map_or(Ok(()), |(device, queues, most)| Err(ConfigError::Queues { device, queues, most }))?;
        let two = self.nets.iter().find(|net| net.user.is_some() && !net.tap.is_empty());
        two.map_or(Ok(()), |net| Err(ConfigError::Backends { tap: net.tap.clone() }))
    }

    /// The number of queues of each virtio device, in the order of their slots.
    pub fn virtio_queues(&self) -> impl Iterator<Item = usize> {
        self.device_slots().map(DeviceSlot::queues)
    }

    /// Refuses more devices than there are slots for.
    ///
    /// # Errors
    /// [`ConfigError::Devices`].
    pub fn check_devices(&self) -> Result<(), ConfigError> {
        let devices = self.virtio_queues().count();
        if devices > VIRTIO_GSIS.len() { Err(ConfigError::Devices { devices }) } else { Ok(()) }
    }

    /// The arguments by which a Linux kernel without ACPI finds the virtio devices, each after a
    /// space.
    #[must_use]
    pub(crate) fn device_args(&self) -> String {
        let mut args = String::new();
        for (base, gsi) in (0..self.virtio_queues().count()).filter_map(virtio_slot) {
            // Writing to a String does not fail.
            let _ = write!(args, " virtio_mmio.device=4K@{:#x}:{gsi}", base.0);
        }
        args
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
        let mut many = VmConfig::new(1 << 20, 1).unwrap();
        let disk = DiskSpec { disk: DiskConfig::new("/disk".as_ref()), device: BlockOptions::default() };
        many.disks = vec![disk; 17];
        assert!(many.check_devices().unwrap_err().to_string().contains("17"));
        many.disks.truncate(2);
        assert!(many.check_devices().is_ok());
        assert!(many.check_queues().is_ok());
        for queues in [0, MAX_QUEUES + 1] {
            many.disks[0].device.queues = queues;
            assert!(matches!(many.check_queues(), Err(ConfigError::Queues { device: "block", .. })));
        }
        many.disks[0].device.queues = 1;
        assert_eq!(many.device_args(), " virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0001000:17");
        let queues = |config: &VmConfig| config.virtio_queues().collect::<Vec<_>>();
        many.nets = vec![NetSpec { queues: 4, ..NetSpec::new("tap%d") }];
        many.vsock = Some(VsockOptions { cid: 3, socket: "/socket".into() });
        (many.rng, many.balloon, many.virtio_console) = (Some(Limits::default()), true, true);
        assert_eq!(queues(&many), [1, 1, 9, 3, 1, 4, 2], "the disks stay where they were");
        assert!(VmConfig::new(4097, 1).unwrap_err().to_string().contains("4097"));
        assert!(VmConfig::new(0, 1).is_err());
        let big = VmConfig::new(1 << 44, 1).unwrap();
        assert!(big.check_host_memory().unwrap_err().to_string().contains("16777216 MiB"));
    }

    #[test]
    fn a_field_that_differs_is_named_as_in_a_snapshot() {
        let base = VmConfig::new(1 << 20, 1).unwrap();
        assert_eq!(base.difference(&base.clone()), None);
        let changes: [fn(&mut VmConfig); 8] = [
            |config| config.layout = RamLayout::new(2 << 20).unwrap(),
            |config| config.cpus = 2,
            |config| config.pit = !config.pit,
            |config| config.pmu = !config.pmu,
            |config| config.acpi = !config.acpi,
            |config| config.nets = vec![NetSpec::new("tap%d")],
            |config| config.rng = Some(Limits::default()),
            |config| config.virtio_console = true,
        ];
        let saved = |config: &VmConfig| ciborium::Value::serialized(config).unwrap().into_map().unwrap();
        for change in changes {
            let mut other = base.clone();
            change(&mut other);
            let changed = saved(&base).into_iter().zip(saved(&other)).find(|(one, two)| one != two).unwrap().0.0;
            assert_eq!(base.difference(&other), changed.as_text());
        }
    }

    #[test]
    fn the_flag_of_a_test_device_is_saved_as_false_and_ignored() {
        let config = VmConfig::bare(1 << 20, 1).unwrap();
        let mut saved = ciborium::Value::serialized(&config).unwrap();
        let fields = saved.as_map_mut().unwrap();
        let (_, flag) = fields.iter_mut().find(|(name, _)| name.as_text() == Some("report_port")).unwrap();
        assert_eq!(*flag, false.into());
        *flag = true.into();
        assert_eq!(saved.deserialized::<VmConfig>().unwrap(), config);
    }
}
