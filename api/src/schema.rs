//! Schemas of the library's types, for the OpenAPI document. The library itself has no schemas:
//! tests here compare each with the library's own serialization.

#![expect(dead_code, reason = "they are read by the derived schemas alone")]

mod egress;

use utoipa::ToSchema;

pub(crate) use egress::EgressRule;

/// The reason why a VM stopped.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
#[schema(as = StopReason)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum StopReason {
    /// Its owner stopped it.
    Requested,
    /// The time that its owner gave it is over.
    TimeOver,
    /// The command of its session has ended.
    SessionEnded,
    /// Its process ended without a report.
    Process { signal: Option<i32>, code: Option<i32> },
    /// Its process exceeded its memory limit, and was killed.
    OverLimit { mib: u64 },
    /// The guest reset itself.
    Reset,
    /// The guest powered itself off.
    PowerOff,
    /// The guest ended itself after its main program had ended, and reported that.
    Exited { status: u8, text: String },
    /// The guest shut down, or took a triple fault.
    Shutdown { vcpu: usize },
    /// KVM could not emulate an instruction.
    Emulation { vcpu: usize, rip: u64, bytes: String },
    /// KVM reported an internal error of another kind.
    Internal { vcpu: usize, error: String },
    /// The hardware refused to enter the guest.
    FailEntry { vcpu: usize, reason: u64 },
    /// KVM_RUN returned an unhandled exit.
    Unexpected { vcpu: usize, exit: String },
    /// KVM_RUN itself failed.
    Run { vcpu: usize, error: String },
    /// The vCPU could not load its state.
    Start { vcpu: usize, error: String },
    /// Memory it shares with its parent was lost while it was still being copied.
    MemoryLost { error: String },
    /// The thread of a vCPU panicked.
    Panic { vcpu: usize, message: String },
}

/// The way to load memory from a snapshot.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[schema(as = RestoreLoad)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RestoreLoad {
    /// At each page's first access, shared through the page cache.
    Lazy,
    /// All of it at once, into huge pages. Every checksum is verified.
    Preload,
    /// At each page's first access, after the recorded working set has been read ahead.
    WorkingSet,
}

/// Whether packets pass between a guest and the host's network.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[schema(as = Link)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Link {
    /// Packets pass.
    Open,
    /// No packet passes, in either direction: the host drops and counts them. The guest sees its
    /// link down.
    Closed,
}

/// Chosen values for a child's network device.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[serde(deny_unknown_fields)]
#[schema(as = NetChoice)]
pub(crate) struct NetChoice {
    /// The TAP interface's name; `%d` stands for a free number.
    #[serde(default)]
    tap: Option<String>,
    /// The MAC address: unicast.
    #[serde(default)]
    #[schema(pattern = "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$")]
    mac: Option<String>,
}

/// Chosen values for a child's socket device.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[serde(deny_unknown_fields)]
#[schema(as = VsockChoice)]
pub(crate) struct VsockChoice {
    /// The CID.
    #[serde(default)]
    cid: Option<u64>,
    /// The socket's path; `{name}` stands for the child's name.
    #[serde(default)]
    socket: Option<String>,
}

/// The interrupt controllers that KVM emulates.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[serde(rename_all = "snake_case")]
pub(crate) enum Irqchip {
    /// Local APICs, IOAPIC and PICs.
    Full,
    /// Local APICs only.
    Split,
}

/// The CPU model that a guest sees.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize))]
pub(crate) enum CpuTemplate {
    #[serde(rename = "host")]
    Host,
    #[serde(rename = "x86-64-v1")]
    V1,
    #[serde(rename = "x86-64-v2")]
    V2,
    #[serde(rename = "x86-64-v3")]
    V3,
}

/// A token bucket.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct Rate {
    /// Tokens added per second.
    per_second: u64,
    /// The bucket's size in tokens. Default: what one second adds.
    burst: Option<u64>,
    /// Tokens on top of that at the beginning.
    once: u64,
}

/// The limits of a device. An absent limit means unlimited.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct Limits {
    /// Limit in bytes.
    bytes: Option<Rate>,
    /// Limit in operations.
    operations: Option<Rate>,
}

/// Whether transfers go through the host's page cache.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[serde(rename_all = "snake_case")]
pub(crate) enum CachePolicy {
    /// Through the page cache.
    Host,
    /// Around it (O_DIRECT).
    Direct,
}

/// A time.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct Time {
    secs: u64,
    nanos: u32,
}

/// A disk's file and how it is used.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct DiskConfig {
    /// A raw image or a block device.
    path: String,
    /// Whether the guest may only read it.
    read_only: bool,
    /// Whether its writes are dropped with the VM.
    #[serde(default)]
    ephemeral: bool,
    /// The id that the guest reads. Default: the last component of `path`.
    id: Option<String>,
    /// Whether transfers go through the host's page cache.
    cache: CachePolicy,
    /// The directory of overlays. Default: the image's.
    overlays: Option<String>,
    /// A delay added to every transfer, for tests.
    latency: Option<Time>,
}

/// A block device.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct BlockOptions {
    /// Number of queues.
    #[schema(minimum = 1, maximum = 16)]
    queues: u16,
    /// Limits of its throughput.
    limits: Limits,
}

/// A disk and its virtio block device.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct DiskSpec {
    disk: DiskConfig,
    device: BlockOptions,
}

/// A network by passt, which needs no privileges: the guest is 10.0.2.15/24, its gateway 10.0.2.2,
/// its name server 10.0.2.3.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
#[schema(as = UserNet)]
pub(crate) struct UserNet {
    /// TCP ports of the host's loopback address that lead to the guest. Children do not inherit
    /// them.
    #[cfg_attr(test, serde(default))]
    #[schema(max_items = 64)]
    forward: Vec<PortForward>,
}

/// A TCP port of the host's loopback address that leads to one of the guest's.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
#[schema(as = PortForward)]
pub(crate) struct PortForward {
    /// The host's port.
    #[schema(minimum = 1)]
    host: u16,
    /// The guest's port.
    #[schema(minimum = 1)]
    guest: u16,
}

/// A network device.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct NetSpec {
    /// The TAP interface to open or create; `%d` stands for a free number. Empty for `user`.
    tap: String,
    /// A network by passt instead of an interface.
    #[cfg_attr(test, serde(default))]
    user: Option<UserNet>,
    /// The MAC address; a random one if not given.
    #[schema(pattern = "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$")]
    mac: Option<String>,
    /// Pairs of queues.
    #[schema(minimum = 1, maximum = 8)]
    queues: u16,
    /// Limits on received traffic.
    receive: Limits,
    /// Limits on sent traffic.
    send: Limits,
    /// Egress rules: layers of rules, each of which a packet has to pass.
    #[cfg_attr(test, serde(default))]
    egress: Vec<Vec<EgressRule>>,
}

/// A socket device.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct VsockOptions {
    /// The guest's CID.
    cid: u64,
    /// The Unix socket to which programs on the host connect.
    socket: String,
}

/// The configuration of a VM.
#[derive(ToSchema)]
#[cfg_attr(test, derive(serde::Deserialize), serde(deny_unknown_fields))]
#[schema(as = VmConfig)]
pub(crate) struct VmConfig {
    /// Guest memory in bytes: whole 4 KiB pages.
    #[schema(minimum = 4096, multiple_of = 4096)]
    memory: u64,
    /// vCPUs.
    #[schema(minimum = 1, maximum = 32)]
    cpus: u8,
    /// Interrupt controllers.
    irqchip: Irqchip,
    /// Whether there is a PIT.
    pit: bool,
    /// The CPU model that the guest sees.
    cpu: CpuTemplate,
    /// CPU features to hide from the guest: Linux names, with commas between.
    hide: String,
    /// Whether the guest has performance counters.
    #[serde(default)]
    #[schema(default = true)]
    pmu: bool,
    /// Whether the guest gets ACPI tables.
    acpi: bool,
    /// Ignored.
    #[serde(default)]
    #[schema(deprecated)]
    report_port: bool,
    /// Disks, in the order in which the guest finds them.
    disks: Vec<DiskSpec>,
    /// Network devices, in the order in which the guest finds them.
    nets: Vec<NetSpec>,
    /// The socket device, if there is one.
    vsock: Option<VsockOptions>,
    /// The limits of the entropy device, if there is one.
    rng: Option<Limits>,
    /// Whether there is a balloon.
    balloon: bool,
    /// Whether there is a virtio console beside the serial one.
    virtio_console: bool,
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clade_block::DiskConfig as Disk;
    use clade_devices::virtio::limiter::{Limits as VmLimits, Rate as VmRate};
    use clade_devices::virtio::vsock::VsockOptions as Vsock;
    use clade_vmm::vm::{self, VmConfig as Config};
    use serde_json::{Value, json};
    use utoipa::PartialSchema;

    use super::*;

    fn config() -> Config {
        let mut config = Config::new(64 << 20, 2).unwrap();
        let mut disk = Disk::new(Path::new("/disk"));
        disk.id = Some("id".to_owned());
        disk.overlays = Some("/overlays".into());
        disk.latency = Some(std::time::Duration::from_millis(1));
        let limits = VmLimits { bytes: Some(VmRate::per_second(1)), operations: Some(VmRate::per_second(2)) };
        let device = clade_devices::virtio::block::BlockOptions { limits, ..Default::default() };
        config.disks = vec![vm::DiskSpec { disk, device }];
        config.nets = vec![vm::NetSpec::new("tap%d")];
        config.nets[0].egress = vec![vec!["allow:10.0.0.0/8:443/tcp".parse().unwrap()]].try_into().unwrap();
        config.nets[0].user = Some(vm::UserNet { forward: vec![vm::PortForward { host: 8080, guest: 80 }] });
        config.nets[0].mac = Some("02:00:00:00:00:01".parse().unwrap());
        config.vsock = Some(Vsock { cid: 3, socket: "/socket".into() });
        config.rng = Some(limits);
        config
    }

    fn fields<T: PartialSchema>() -> Vec<String> {
        let schema = serde_json::to_value(T::schema()).unwrap();
        let mut fields: Vec<_> = schema["properties"].as_object().unwrap().keys().cloned().collect();
        fields.sort();
        fields
    }

    fn keys(value: &Value) -> Vec<String> {
        let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    }

    #[test]
    fn a_configuration_is_as_its_schema_says() {
        let written = serde_json::to_value(config()).unwrap();
        serde_json::from_value::<VmConfig>(written.clone()).map(drop).unwrap();
        // And no field that the library does not write.
        assert_eq!(fields::<VmConfig>(), keys(&written));
        let (disk, net) = (&written["disks"][0], &written["nets"][0]);
        assert_eq!(fields::<DiskSpec>(), keys(disk));
        assert_eq!(fields::<DiskConfig>(), keys(&disk["disk"]));
        assert_eq!(fields::<BlockOptions>(), keys(&disk["device"]));
        assert_eq!(fields::<Limits>(), keys(&written["rng"]));
        assert_eq!(fields::<Rate>(), keys(&written["rng"]["bytes"]));
        assert_eq!(fields::<NetSpec>(), keys(net));
        assert_eq!(fields::<UserNet>(), keys(&net["user"]));
        assert_eq!(fields::<PortForward>(), keys(&net["user"]["forward"][0]));
        assert_eq!(fields::<VsockOptions>(), keys(&written["vsock"]));
        // The library accepts each name of the schema's lists.
        for (field, list) in [("irqchip", Irqchip::schema()), ("cpu", CpuTemplate::schema())] {
            let list = serde_json::to_value(list).unwrap();
            for name in list["enum"].as_array().unwrap() {
                let mut one = written.clone();
                one[field] = name.clone();
                serde_json::from_value::<Config>(one).unwrap();
            }
        }
        let list = serde_json::to_value(CachePolicy::schema()).unwrap();
        for name in list["enum"].as_array().unwrap() {
            let mut one = written.clone();
            one["disks"][0]["disk"]["cache"] = name.clone();
            serde_json::from_value::<Config>(one).unwrap();
        }
    }

    #[test]
    fn bounds_are_those_of_the_library() {
        let schema = serde_json::to_value(VmConfig::schema()).unwrap();
        let most = schema["properties"]["cpus"]["maximum"].as_u64().unwrap();
        assert!(Config::new(64 << 20, most).is_ok() && Config::new(64 << 20, most + 1).is_err());
        assert!(Config::new(4096 + 1, 1).is_err());
        let most = |schema: utoipa::openapi::RefOr<utoipa::openapi::Schema>| {
            serde_json::to_value(schema).unwrap()["properties"]["queues"]["maximum"].as_u64()
        };
        assert_eq!(most(BlockOptions::schema()), Some(u64::from(clade_devices::virtio::block::MAX_QUEUES)));
        assert_eq!(most(NetSpec::schema()), Some(u64::from(clade_devices::virtio::net::MAX_PAIRS)));
    }

    #[test]
    fn choices_and_reasons_are_as_their_schemas_say() {
        let net = vm::NetChoice { tap: Some("tap%d".to_owned()), mac: config().nets[0].mac };
        let vsock = vm::VsockChoice { cid: Some(3), socket: Some("/socket".into()) };
        let list = serde_json::to_value(Link::schema()).unwrap();
        for name in list["enum"].as_array().unwrap() {
            serde_json::from_value::<clade_devices::virtio::net::Link>(name.clone()).map(drop).unwrap();
        }
        let (net, vsock) = (serde_json::to_value(net).unwrap(), serde_json::to_value(vsock).unwrap());
        assert_eq!((fields::<NetChoice>(), fields::<VsockChoice>()), (keys(&net), keys(&vsock)));
        serde_json::from_value::<NetChoice>(net).map(drop).unwrap();
        serde_json::from_value::<VsockChoice>(vsock).map(drop).unwrap();
        // Each reason of the schema is one of the library's, with the same fields.
        let schema = serde_json::to_value(StopReason::schema()).unwrap();
        for one in schema["oneOf"].as_array().unwrap() {
            let mut example = json!({});
            for (field, of) in one["properties"].as_object().unwrap() {
                let kind = if of["type"].is_array() { &of["type"][0] } else { &of["type"] };
                example[field] = match (of["enum"][0].as_str(), kind.as_str().unwrap()) {
                    (Some(name), _) => json!(name),
                    (None, "integer") => json!(1),
                    _ => json!("text"),
                };
            }
            let reason: vm::StopReason = serde_json::from_value(example.clone()).unwrap();
            assert_eq!(serde_json::to_value(reason).unwrap(), example);
        }
    }
}
