//! The hardware of a machine: for `clade run`, and for a template.

#![allow(rustdoc::broken_intra_doc_links, reason = "doc comments are help texts, in which brackets mean options")]

use clade_devices::virtio::net::EgressRule;
use clade_vmm::kvm::{CpuHide, CpuTemplate};
use clade_vmm::vm::NetSpec;

use crate::commands::devices::parse_net;
use crate::commands::units::parse_size;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct MachineArgs {
    /// Guest memory: bytes, or with K, M, G, T.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub(crate) mem: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u64,
    /// The CPU model: host, or the baseline x86-64-v1, x86-64-v2 or x86-64-v3, with which a
    /// snapshot moves between hosts of one vendor.
    #[arg(long, value_name = "TEMPLATE", default_value_t = CpuTemplate::Host)]
    pub(crate) cpu_template: CpuTemplate,
    /// CPU features to hide from the guest, besides those that this host's KVM lacks.
    #[arg(long, value_name = "FEATURE,...", value_parser = parse_hide)]
    pub(crate) cpu_hide: Option<CpuHide>,
    /// Performance counters, those of the host's CPU: a snapshot needs a host with the same.
    #[arg(long)]
    pub(crate) pmu: bool,
    /// A network device: tap=NAME or user, then options with commas between: mac=ADDRESS, queues=N,
    /// rx-bytes=RATE, rx-bytes-burst=N, and the same for rx-packets, tx-bytes and tx-packets. The
    /// TAP interface is opened or created; %d in its name is a free number. With user passt is the
    /// network, which needs no privileges; forward=HOST:GUEST leads a TCP port of this host's
    /// loopback address to the guest. Repeatable.
    #[arg(long, value_name = "tap=NAME|user,...", value_parser = parse_net)]
    pub(crate) net: Vec<NetSpec>,
    /// An egress rule: allow:CIDR[:PORT[-PORT]][/tcp|udp|icmp], or deny: and the same. IPv6 with a
    /// port is in brackets. The first rule that matches decides; without one, packets are dropped
    /// if any rule allows something. Repeatable.
    #[arg(long, value_name = "RULE", requires = "net")]
    pub(crate) egress: Vec<EgressRule>,
    /// An entropy device for the bare guest. Every other guest has one by default.
    #[arg(long, conflicts_with = "no_rng")]
    pub(crate) rng: bool,
    /// Leave out the entropy device.
    #[arg(long)]
    pub(crate) no_rng: bool,
    /// A balloon: the guest gives back free memory, by itself or on request (clade balloon).
    #[arg(long)]
    pub(crate) balloon: bool,
    /// A virtio console (hvc0) beside the serial one (clade console --virtio).
    #[arg(long)]
    pub(crate) virtio_console: bool,
    /// Leave out ACPI tables: the guest finds its devices by the command line only, and has no
    /// generation id to learn that it was cloned.
    #[arg(long)]
    pub(crate) no_acpi: bool,
    /// Give the guest a PIT (8254), for kernels that cannot calibrate without one.
    #[arg(long)]
    pub(crate) pit: bool,
    /// Allow more guest memory than the host has.
    #[arg(long)]
    pub(crate) overcommit: bool,
}

fn parse_hide(text: &str) -> Result<CpuHide, String> {
    text.parse().map_err(|error: clade_vmm::kvm::UnknownFeature| clade_vmm::error_chain(&error))
}
