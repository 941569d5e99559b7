//! The schemas of the library's types are as the library serializes them.

use std::path::Path;
use std::time::Duration;

use clade_block::DiskConfig;
use clade_devices::virtio::block::{BlockOptions, MAX_QUEUES};
use clade_devices::virtio::limiter::{Limits, Rate};
use clade_devices::virtio::net::{Link, MAX_PAIRS};
use clade_devices::virtio::vsock::VsockOptions;
use clade_host_io::CachePolicy;
use clade_vmm::kvm::CpuTemplate;
use clade_vmm::vm::{DiskSpec, Irqchip, NetChoice, NetSpec, PortForward, StopReason, UserNet, VmConfig, VsockChoice};
use serde_json::{Value, json};
use utoipa::PartialSchema;

fn config() -> VmConfig {
    let mut config = VmConfig::new(64 << 20, 2).unwrap();
    let mut disk = DiskConfig::new(Path::new("/disk"));
    disk.id = Some("id".to_owned());
    disk.overlays = Some("/overlays".into());
    disk.latency = Some(Duration::from_millis(1));
    let limits = Limits { bytes: Some(Rate::per_second(1)), operations: Some(Rate::per_second(2)) };
    let device = BlockOptions { limits, ..Default::default() };
    config.disks = vec![DiskSpec { disk, device }];
    config.nets = vec![NetSpec::new("tap%d")];
    config.nets[0].egress = vec![vec!["allow:10.0.0.0/8:443/tcp".parse().unwrap()]].try_into().unwrap();
    config.nets[0].user = Some(UserNet { forward: vec![PortForward { host: 8080, guest: 80 }] });
    config.nets[0].mac = Some("02:00:00:00:00:01".parse().unwrap());
    config.vsock = Some(VsockOptions { cid: 3, socket: "/socket".into() });
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
            serde_json::from_value::<VmConfig>(one).unwrap();
        }
    }
    let list = serde_json::to_value(CachePolicy::schema()).unwrap();
    for name in list["enum"].as_array().unwrap() {
        let mut one = written.clone();
        one["disks"][0]["disk"]["cache"] = name.clone();
        serde_json::from_value::<VmConfig>(one).unwrap();
    }
}

#[test]
fn bounds_are_those_of_the_library() {
    let schema = serde_json::to_value(VmConfig::schema()).unwrap();
    let most = schema["properties"]["cpus"]["maximum"].as_u64().unwrap();
    assert!(VmConfig::new(64 << 20, most).is_ok() && VmConfig::new(64 << 20, most + 1).is_err());
    assert!(VmConfig::new(4096 + 1, 1).is_err());
    let most = |schema: utoipa::openapi::RefOr<utoipa::openapi::Schema>| {
        serde_json::to_value(schema).unwrap()["properties"]["queues"]["maximum"].as_u64()
    };
    assert_eq!(most(BlockOptions::schema()), Some(u64::from(MAX_QUEUES)));
    assert_eq!(most(NetSpec::schema()), Some(u64::from(MAX_PAIRS)));
}

#[test]
fn choices_and_reasons_are_as_their_schemas_say() {
    let net = NetChoice { tap: Some("tap%d".to_owned()), mac: config().nets[0].mac };
    let vsock = VsockChoice { cid: Some(3), socket: Some("/socket".into()) };
    let list = serde_json::to_value(Link::schema()).unwrap();
    for name in list["enum"].as_array().unwrap() {
        serde_json::from_value::<Link>(name.clone()).map(drop).unwrap();
    }
    let (net, vsock) = (serde_json::to_value(net).unwrap(), serde_json::to_value(vsock).unwrap());
    assert_eq!((fields::<NetChoice>(), fields::<VsockChoice>()), (keys(&net), keys(&vsock)));
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
        let reason: StopReason = serde_json::from_value(example.clone()).unwrap();
        assert_eq!(serde_json::to_value(reason).unwrap(), example);
    }
}
