//! Everything of a [`ForkImage`] but its memory and its disks' contents: named sections, each a
//! CBOR value.
//!
//! | section | content |
//! |---|---|
//! | `host` | its requirements on a host, checked before anything else: [`HostRequirements`] |
//! | `config` | [`VmConfig`] |
//! | `vcpus` | a [`VcpuState`] for each vCPU |
//! | `vm` | interrupt controllers, PIT, clock |
//! | `devices` | [`DevicesState`] |
//! | `identity` | names and addresses of the VM it was taken from, and its generation |
//!
//! # Allowed changes
//!
//! - Fields have names. A new field has `#[serde(default)]`, whose default means the behaviour
//!   before the field.
//! - Unknown fields and sections are skipped, so they must not change the meaning of others.
//! - A field keeps its meaning and its unit. A new meaning gets a new name.
//! - KVM's own structures are bytes. They only grow: shorter ones are padded with zeros.
//!
//! # Checks
//!
//! Each section must fit the configuration. On a restore, KVM checks whether the state fits the
//! host, and each device checks its queues.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use clade_devices::virtio::block::MAX_QUEUES;
use clade_devices::virtio::net::MAX_PAIRS;
use clade_devices::virtio::{Backend, DeviceState as VirtioState, TransportState};
use clade_memory::RamImage;
use serde::de::{DeserializeOwned, Error as _, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

use crate::kvm::{HostRequirements, PlatformState, VcpuState};
use crate::platform::MAX_CPUS;
use crate::vm::config::{DeviceSlot, VmConfig};
use crate::vm::devices::DevicesState;
use crate::vm::fork::ForkImage;
use crate::vm::identity::Identity;

/// The names of the sections, in the order in which they are written.
pub const SECTIONS: [&str; 6] = [HOST, CONFIG, VCPUS, VM, DEVICES, IDENTITY];
const HOST: &str = "host";
const CONFIG: &str = "config";
const VCPUS: &str = "vcpus";
const VM: &str = "vm";
const DEVICES: &str = "devices";
const IDENTITY: &str = "identity";

/// Size in bytes of the buffer for the longest byte string that is read in one piece: an XSAVE
/// area's first part.
const SCRATCH: usize = 16 << 10;
/// Most bytes of the configuration, and of the identity.
const MAX_SMALL: usize = 1 << 20;

/// Why sections are refused, or an image cannot be written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SavedError {
    /// A section is missing.
    #[error("there is no section {section:?}")]
    Missing {
        /// The section's name.
        section: &'static str,
    },
    /// A section is present more than once.
    #[error("section {section:?} is there more than once")]
    Twice {
        /// The section's name.
        section: &'static str,
    },
    /// A section is not a CBOR value of its type.
    #[error("section {section:?}, of {bytes} bytes, cannot be read")]
    Read {
        /// The section's name.
        section: &'static str,
        /// The section's length in bytes.
        bytes: usize,
        /// The decoder's error.
        #[source]
        source: ciborium::de::Error<std::io::Error>,
    },
    /// A section is larger than its value may be.
    #[error("section {section:?} has {bytes} bytes, of at most {most}")]
    Large {
        /// The section's name.
        section: &'static str,
        /// The section's length in bytes.
        bytes: usize,
        /// The largest length.
        most: usize,
    },
    /// A section has bytes after its value.
    #[error("section {section:?} has {left} bytes behind its end")]
    Behind {
        /// The section's name.
        section: &'static str,
        /// The number of bytes after the value.
        left: usize,
    },
    /// A section cannot be encoded.
    #[error("section {section:?} cannot be written")]
    Write {
        /// The section's name.
        section: &'static str,
        /// The encoder's error.
        #[source]
        source: ciborium::ser::Error<std::io::Error>,
    },
    /// A number does not fit the configuration.
    #[error("section {section:?}: {what}: {found}, must be {wanted}")]
    Mismatch {
        /// The section's name.
        section: &'static str,
        /// The quantity.
        what: String,
        /// The number in the section.
        found: u64,
        /// The number in the configuration.
        wanted: u64,
    },
    /// A device is of another kind than in the configuration.
    #[error("section {section:?}: device {place} is of kind {found:?}, must be {wanted:?}")]
    Kind {
        /// The section's name.
        section: &'static str,
        /// The device's place.
        place: usize,
        /// The kind in the section.
        found: &'static str,
        /// The kind in the configuration.
        wanted: &'static str,
    },
    /// The state is of other interrupt controllers than the configuration's.
    #[error("section {section:?} is the state of {found}, and the configuration has {wanted}")]
    Chips {
        /// The section's name.
        section: &'static str,
        /// The chips in the section.
        found: String,
        /// The chips in the configuration.
        wanted: String,
    },
    /// The configuration describes an impossible VM.
    #[error("section {section:?} is not a valid VM configuration")]
    Config {
        /// The section's name.
        section: &'static str,
        /// The configuration's error.
        #[source]
        source: crate::vm::ConfigError,
    },
    /// A request in flight is not a descriptor of its queue, or the queue has too many requests.
    #[error(
        "section {section:?}: device {place} has a request in flight at {head} of queue {queue}, which has no such, or more than it can have"
    )]
    InFlight {
        /// The section's name.
        section: &'static str,
        /// The device's place.
        place: usize,
        /// The queue's index.
        queue: u16,
        /// The index of the request's first descriptor.
        head: u16,
    },
}

#[derive(Serialize, Deserialize)]
struct SavedIdentity {
    identity: Identity,
    generation: u32,
}

impl ForkImage {
    /// The guest's requirements on a host.
    #[must_use]
    pub fn host_requirements(&self) -> HostRequirements {
        // Every image has a first vCPU; all have the same features.
        let first = self.vcpus.first();
        HostRequirements::of(
            first.map_or(&[], |vcpu| vcpu.cpuid.as_slice()),
            first.and_then(|vcpu| vcpu.tsc_khz),
            first.and_then(VcpuState::arch_capabilities),
        )
    }

    /// Everything but memory and disks, by the names in [`SECTIONS`] and in that order.
    ///
    /// # Errors
    /// When a value has no encoding: a path that is not UTF-8.
    pub fn sections(&self) -> Result<Vec<(&'static str, Vec<u8>)>, SavedError> {
        let identity = SavedIdentity { identity: (*self.identity).clone(), generation: self.generation };
        Ok(vec![
            write(HOST, &self.host_requirements())?,
            write(CONFIG, &*self.config)?,
            write(VCPUS, &self.vcpus)?,
            write(VM, &self.vm)?,
            write(DEVICES, &self.devices)?,
            write(IDENTITY, &identity)?,
        ])
    }

    /// Builds an image from the result of [`ForkImage::sections`], with the memory and the disks of
    /// the same instant. `backends` are by slot, [`Backend::None`] for other devices. Check first
    /// with [`host_requirements`] whether this host is suitable.
    ///
    /// # Errors
    /// When a section is missing, cannot be read, or does not fit the others, the memory or the
    /// disks.
    pub fn from_sections<'a>(
        sections: impl IntoIterator<Item = (&'a str, &'a [u8])>,
        ram: RamImage,
        backends: Vec<Backend>,
    ) -> Result<Self, SavedError> {
        let sections: Vec<(&str, &[u8])> = sections.into_iter().collect();
        let config = read_small(&sections, CONFIG)?;
        Self::with_config(config, &sections, ram, backends)
    }

    /// The same for a configuration that was read from these sections before ([`config`]).
    pub(crate) fn with_config(
        config: VmConfig,
        sections: &[(&str, &[u8])],
        ram: RamImage,
        backends: Vec<Backend>,
    ) -> Result<Self, SavedError> {
        check_config(&config, &ram)?;
        let Vcpus(vcpus) = read(sections, VCPUS)?;
        check_vcpus(&config, &vcpus)?;
        let vm: PlatformState = read(sections, VM)?;
        let (found, wanted) = (vm.chips(), config.chips());
        if found != Some(wanted) {
            let found = found.map_or_else(|| "a PIT alone".to_owned(), |chips| format!("{chips:?}"));
            return Err(SavedError::Chips { section: VM, found, wanted: format!("{wanted:?}") });
        }
        let devices: DevicesState = read(sections, DEVICES)?;
        check_devices(&config, &devices, &backends)?;
        let SavedIdentity { identity, generation } = read_small(sections, IDENTITY)?;
        let count = |what: &str, found: usize, wanted: usize| expect(IDENTITY, what, found as u64, wanted as u64);
        count("network devices", identity.nets.len(), config.nets.len())?;
        count("socket devices", usize::from(identity.vsock.is_some()), usize::from(config.vsock.is_some()))?;
        let (config, identity) = (Arc::new(config), Arc::new(identity));
        Ok(Self { config, ram, vcpus, vm, devices, backends, identity, generation, place: None })
    }
}

/// The requirements on a host, to be checked by [`HostRequirements::check`].
///
/// # Errors
/// When there is no such section, or it cannot be read.
pub fn host_requirements<'a>(
    sections: impl IntoIterator<Item = (&'a str, &'a [u8])>,
) -> Result<HostRequirements, SavedError> {
    read(&sections.into_iter().collect::<Vec<_>>(), HOST)
}

/// The configuration in the sections. Memory and disks are made for it before
/// [`ForkImage::from_sections`].
///
/// # Errors
/// When there is no such section, or it cannot be read.
pub fn config<'a>(sections: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Result<VmConfig, SavedError> {
    read_small(&sections.into_iter().collect::<Vec<_>>(), CONFIG)
}

/// The identity of the VM that was saved, and its generation.
///
/// # Errors
/// When there is no such section, or it cannot be read.
pub(super) fn identity<'a>(
    sections: impl IntoIterator<Item = (&'a str, &'a [u8])>,
) -> Result<(Identity, u32), SavedError> {
    let SavedIdentity { identity, generation } = read_small(&sections.into_iter().collect::<Vec<_>>(), IDENTITY)?;
    Ok((identity, generation))
}

fn write<T: Serialize>(section: &'static str, value: &T) -> Result<(&'static str, Vec<u8>), SavedError> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).map_err(|source| SavedError::Write { section, source })?;
    Ok((section, bytes))
}

fn read<T: DeserializeOwned>(sections: &[(&str, &[u8])], section: &'static str) -> Result<T, SavedError> {
    let mut named = sections.iter().filter(|(name, _)| *name == section);
    let Some((_, bytes)) = named.next() else { return Err(SavedError::Missing { section }) };
    if named.next().is_some() {
        return Err(SavedError::Twice { section });
    }
    let (mut rest, mut scratch) = (*bytes, vec![0; SCRATCH.min(bytes.len())]);
    let value = ciborium::de::from_reader_with_buffer(&mut rest, &mut scratch);
    let value = value.map_err(|source| SavedError::Read { section, bytes: bytes.len(), source })?;
    if rest.is_empty() { Ok(value) } else { Err(SavedError::Behind { section, left: rest.len() }) }
}

/// Reads a section that a process without confinement reads too: of short lists, a byte takes up to 24 in memory.
fn read_small<T: DeserializeOwned>(sections: &[(&str, &[u8])], section: &'static str) -> Result<T, SavedError> {
    let long = sections.iter().find(|(name, bytes)| *name == section && bytes.len() > MAX_SMALL);
    match long {
        Some((_, bytes)) => Err(SavedError::Large { section, bytes: bytes.len(), most: MAX_SMALL }),
        None => read(sections, section),
    }
}

/// The states of vCPUs, no more than a VM may have: each takes seventy times its shortest encoding in memory.
struct Vcpus(Vec<VcpuState>);

impl<'de> Deserialize<'de> for Vcpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(VcpusVisitor)
    }
}

struct VcpusVisitor;

impl<'de> Visitor<'de> for VcpusVisitor {
    type Value = Vcpus;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MAX_CPUS} vCPUs")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut states: A) -> Result<Vcpus, A::Error> {
        let mut vcpus = Vec::new();
        while vcpus.len() < usize::from(MAX_CPUS)
            && let Some(vcpu) = states.next_element()?
        {
            vcpus.push(vcpu);
        }
        let is_more = vcpus.len() == usize::from(MAX_CPUS) && states.next_element::<IgnoredAny>()?.is_some();
        if is_more { Err(A::Error::custom(format_args!("more than {MAX_CPUS} vCPUs"))) } else { Ok(Vcpus(vcpus)) }
    }
}

fn expect(section: &'static str, what: &str, found: u64, wanted: u64) -> Result<(), SavedError> {
    if found == wanted {
        return Ok(());
    }
    Err(SavedError::Mismatch { section, what: what.to_owned(), found, wanted })
}

fn check_config(config: &VmConfig, ram: &RamImage) -> Result<(), SavedError> {
    expect(CONFIG, "bytes of memory", config.layout().bytes(), ram.layout().bytes())?;
    config.check_devices().map_err(|source| SavedError::Config { section: CONFIG, source })?;
    let disks = config.disks.iter().map(|disk| ("queues of disk", disk.device.queues, MAX_QUEUES));
    let nets = config.nets.iter().map(|net| ("queue pairs of network device", net.queues, MAX_PAIRS));
    for (at, (what, queues, most)) in disks.enumerate().chain(nets.enumerate()) {
        let (found, most) = (u64::from(queues), u64::from(most));
        expect(CONFIG, &format!("{what} {at}"), found, found.clamp(1, most))?;
    }
    Ok(())
}

fn check_vcpus(config: &VmConfig, vcpus: &[VcpuState]) -> Result<(), SavedError> {
    expect(VCPUS, "vCPUs", vcpus.len() as u64, u64::from(config.cpus()))?;
    let Some(first) = vcpus.first() else { return Ok(()) };
    for (at, vcpu) in vcpus.iter().enumerate() {
        let same = |what: &str, of: fn(&VcpuState) -> usize| {
            expect(VCPUS, &format!("{what} of vCPU {at}"), of(vcpu) as u64, of(first) as u64)
        };
        same("MSRs", |vcpu| vcpu.msrs.as_slice().len())?;
        same("words of the XSAVE area", |vcpu| vcpu.xsave.as_slice().len())?;
        same("CPUID entries", |vcpu| vcpu.cpuid.as_slice().len())?;
        for (number, (own, other)) in vcpu.msrs.as_slice().iter().zip(first.msrs.as_slice()).enumerate() {
            let what = format!("index of MSR {number} of vCPU {at}");
            expect(VCPUS, &what, u64::from(own.index), u64::from(other.index))?;
        }
    }
    Ok(())
}

fn check_devices(config: &VmConfig, devices: &DevicesState, backends: &[Backend]) -> Result<(), SavedError> {
    let wanted = config.device_slots().count() as u64;
    expect(DEVICES, "virtio devices", devices.virtio.len() as u64, wanted)?;
    expect(DEVICES, "backends given", backends.len() as u64, wanted)?;
    for (place, ((wanted, state), backend)) in config.device_slots().zip(&devices.virtio).zip(backends).enumerate() {
        let kind = |found, wanted| Err(SavedError::Kind { section: DEVICES, place, found, wanted });
        if state.device.kind() != wanted.kind() {
            return kind(state.device.kind(), wanted.kind());
        }
        match (wanted, backend) {
            (DeviceSlot::Disk(spec), Backend::Disk(disk)) if disk.config().read_only != spec.disk.read_only => {
                let named = |read_only| if read_only { "read-only disk" } else { "writable disk" };
                return kind(named(disk.config().read_only), named(spec.disk.read_only));
            }
            (DeviceSlot::Disk(_), Backend::Disk(_)) => {}
            (DeviceSlot::Disk(_), Backend::None) => return kind("without a disk", wanted.kind()),
            (_, Backend::Disk(_)) => return kind("with a disk", wanted.kind()),
            (_, Backend::None) => {}
        }
        let queues = state.queues().len() as u64;
        expect(DEVICES, &format!("queues of device {place}"), queues, wanted.queues() as u64)?;
        check_in_flight(place, state)?;
    }
    Ok(())
}

/// Checks that each request in flight is in a queue, and that no queue has more requests than
/// descriptors, because its device counts them.
fn check_in_flight(place: usize, state: &TransportState) -> Result<(), SavedError> {
    let VirtioState::Block(block) = &state.device else { return Ok(()) };
    let mut counts: HashMap<u16, u16> = HashMap::new();
    for chain in &block.in_flight {
        let size = state.queues().get(usize::from(chain.queue)).map_or(0, |queue| queue.size);
        let count = counts.entry(chain.queue).or_default();
        *count = count.saturating_add(1);
        if chain.head >= size || *count > size {
            let (queue, head) = (chain.queue, chain.head);
            return Err(SavedError::InFlight { section: DEVICES, place, queue, head });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
